"""Validation perplexity by update: python tools/plot_convergence.py RUN... [--data URI] [--out FILE.png]

RUN is a TensorBoard folder, also of a run that goes on. With --data the floors of that data are drawn and
listed: what a model reaches that knows residue frequencies only (unigram), and one that copies what it sees
as well (copier). Below the second, a model has learnt something about proteins.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from esm2_composer.errors import UserError, run_command

PERPLEXITY = "metrics/valid/perplexity"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito: safe for colour-blind eyes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", help="the shards the runs were validated on (a local folder)")
    parser.add_argument("--out", type=Path, help="write the figure here")
    args = parser.parse_args()
    if args.out and args.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {args.out} must end in .png, .pdf or .svg")

    curves = {str(run): read_scalars(run, PERPLEXITY) for run in args.runs}
    for run, curve in curves.items():
        if not curve:
            raise UserError(f"{run}: holds no TensorBoard events with {PERPLEXITY}")
    levels = data_floors(args.data) if args.data else {}
    print_table(curves, levels)
    if args.out:
        draw(curves, levels, args.out)
        print(f"figure: {args.out}")


def read_scalars(run: Path, tag: str) -> dict[int, float]:
    """The values of `tag` by step, of all event files below `run`; where a step was done twice, the later."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = []
    for file in run.rglob("events.out.tfevents.*"):
        accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0})
        accumulator.Reload()
        if tag in accumulator.Tags()["scalars"]:
            events += accumulator.Scalars(tag)
    return {event.step: event.value for event in sorted(events, key=lambda e: (e.step, e.wall_time))}


def data_floors(data: str) -> dict[str, float]:
    """The floors of the shards in folder `data`, under the recipes' masking rule."""
    from streaming import StreamingDataset

    from esm2_composer.evaluation import floors, residue_frequencies
    from esm2_composer.masking import MaskingRule

    frequencies = []
    for split in ("train", "valid"):
        if not (Path(data) / split / "index.json").is_file():
            raise UserError(f"{data} holds no {split} shards ({split}/index.json)")
        clusters = StreamingDataset(local=f"{data}/{split}", batch_size=1)
        frequencies.append(residue_frequencies(clusters[i] for i in range(clusters.num_samples)))
    return floors(*frequencies, MaskingRule())


def print_table(curves: dict[str, dict[int, float]], levels: dict[str, float]) -> None:
    rows = []
    for run, curve in curves.items():
        first, last = min(curve), max(curve)
        rows += [(f"{run}, update {first}", curve[first]), (f"{run}, update {last}", curve[last])]
    names = {"unigram": "residue frequencies only (unigram)", "copier": "frequencies, and copies what it sees"}
    rows += [(names[name], value) for name, value in levels.items()]
    width = max(len(name) for name, _ in rows)
    print(f"{'validation perplexity':{width}}")
    for name, value in rows:
        print(f"  {name:{width}}  {value:6.2f}")


def draw(curves: dict[str, dict[int, float]], levels: dict[str, float], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (run, curve), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        axes.plot(list(curve), list(curve.values()), color=colour, marker="o", markersize=4, label=run)
    for (name, value), style in zip(levels.items(), ("--", ":"), strict=False):
        axes.axhline(value, color="0.35", linestyle=style, label=f"{name} {value:.2f}")
    axes.set(xlabel="update", ylabel="validation perplexity")
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    run_command(main)
