"""Validation perplexity by update: python tools/plot_convergence.py RUN... [--reference 8m|650m|3b] [--out FILE]

RUN is a TensorBoard folder, or a folder that holds one; the run may still be going on. Shown beside its curve:

--reference  the published curve of a size, and in which conditions a run differs from it
--data       the floors of that data: what a model reaches that knows only residue frequencies (unigram), and one
             that also copies the residues it sees (copier). Only below the second has a model learnt about
             proteins.
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from esm2_composer.addresses import is_remote
from esm2_composer.command import ArgumentParser, run_command
from esm2_composer.data.splits import SPLITS, check_data, count_clusters
from esm2_composer.errors import UserError
from esm2_composer.files import appearing_whole, refuse_existing, refuse_irregular
from esm2_composer.recipe.schema import DataSection

PERPLEXITY = "metrics/valid/perplexity"

# Perplexity by update of the ESM-2 models that NVIDIA trained, from the ESM-2 pre-training page of the BioNeMo
# Framework's documentation: the coordinates of its figure, +-0.002; at the last update, the number in its table.
PUBLISHED = {
    "8m": {
        **{10_000: 11.687, 20_000: 11.339, 30_000: 11.147, 50_000: 10.929, 100_000: 10.685, 150_000: 10.563},
        **{200_000: 10.487, 250_000: 10.426, 300_000: 10.379, 350_000: 10.341, 400_000: 10.305},
        **{450_000: 10.273, 500_000: 10.26},
    },
    "650m": {
        **{10_000: 10.245, 20_000: 9.511, 30_000: 9.132, 50_000: 8.719, 100_000: 8.213, 150_000: 7.948},
        **{200_000: 7.762, 250_000: 7.616, 300_000: 7.492, 350_000: 7.376, 400_000: 7.271},
        **{450_000: 7.174, 500_000: 7.14},
    },
    "3b": {
        **{2_500: 12.05, 5_000: 11.33, 10_000: 10.586, 17_500: 9.80, 32_500: 8.883, 47_500: 8.435},
        **{100_000: 7.723, 157_500: 7.357, 202_500: 7.161, 252_500: 6.985, 302_500: 6.836, 352_500: 6.700},
        **{380_000: 6.628, 455_000: 6.457, 500_000: 6.42},
    },
}
PUBLISHED_VALIDATION = 328_360  # clusters
PUBLISHED_CONDITIONS = {
    "data.replacement": "all_tokens",
    "data.mask_fraction": 0.15,
    "data.mask_split": [0.8, 0.1, 0.1],
    "data.max_length": 1024,
}
SOURCE = (
    "Published: ESM-2 {size} by NVIDIA (BioNeMo Framework documentation, ESM-2 pre-training), read off its "
    f"figure. Validated on {PUBLISHED_VALIDATION:,} UniRef50 clusters of UniProt 2024_03 with 15 % of tokens "
    "selected, of these 80/10/10, replaced by any of 33 ids (its script's default), at most 1,024 tokens; "
    "updates of 2,048 sequences."
)
FLOORS_NOTE = (
    "Without context: unigram knows the residue frequencies of {data} only; copier also copies, since one "
    "selected position in five shows a residue, right about half the time."
)

Point = tuple[float, int, float]  # when it was logged, update, value


@dataclass(frozen=True)
class Run:
    """Validation perplexity by update, and the recipe's values by full key, as far as the logs hold them."""

    name: str
    curve: dict[int, float]
    settings: dict[str, Any]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--reference", choices=PUBLISHED, help="the published curve of this size")
    parser.add_argument("--data", help="the shards that the runs were validated on")
    parser.add_argument("--local", help="cache folder, if --data is in an object store")
    parser.add_argument("--out", type=Path, help="write the figure here: .png, .pdf or .svg")
    args = parser.parse_args()
    if args.out and args.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {args.out} must end in .png, .pdf or .svg")
    if args.out:
        refuse_existing(args.out)
    if args.data:
        check_data(args.data, args.local, SPLITS)

    runs = name_apart([read_run(folder) for folder in args.runs], args.runs)
    levels, validation = read_data(args.data, args.local, runs) if args.data else ({}, None)
    notes: list[str] = []
    for run in runs:
        place = run.settings.get("data.remote")
        own = args.data is None or place is None or same_place(str(place), args.data)
        notes += compare(run, runs[0], args.reference, validation if own else None)
        if not own:
            notes.append(f"{run.name} was validated on {place}; the floors are those of {args.data}.")
    if args.data:
        notes.insert(0, FLOORS_NOTE.format(data=args.data))
    if args.reference:
        notes.insert(0, SOURCE.format(size=args.reference.upper()))
    published = {f"published {args.reference.upper()}": PUBLISHED[args.reference]} if args.reference else {}
    print_table({run.name: run.curve for run in runs} | published, levels, notes)
    if args.out:
        save(draw(runs, published, levels, notes), args.out)
        print(f"figure: {args.out}")


def read_run(folder: Path) -> Run:
    """Raises UserError if there is no curve in the folder, or more than one."""
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    starts: dict[Path, list[Point]] = {}
    settings: dict[str, Any] = {}
    for file, event, value in read_events(folder, PERPLEXITY, SESSION_START_INFO_TAG):
        if value.tag == PERPLEXITY:
            starts.setdefault(file, []).append((event.wall_time, event.step, value.simple_value))
        else:
            info = parse_session_start_info_plugin_data(value.metadata.plugin_data.content)
            settings |= {key: as_logged(entry.string_value) for key, entry in info.hparams.items()}
    if not starts:
        raise UserError(f"{folder}: holds no TensorBoard events with {PERPLEXITY}")
    names = {file.parent for file in starts}
    if len(names) > 1:
        raise UserError(f"{folder}: holds several runs; name one: {', '.join(map(str, sorted(names)))}")
    return Run(names.pop().name, join_starts(starts.values()), settings)


def join_starts(starts: Iterable[list[Point]]) -> dict[int, float]:
    """One curve of the points of each event file, of which a run that was started several times has several.

    What a start had done beyond the update where a later one began was abandoned, and is no part of the curve.
    """
    curve: dict[int, float] = {}
    for points in sorted(starts):  # by the time of their first
        _, began, _ = points[0]
        curve = {step: value for step, value in curve.items() if step < began}
        curve |= {step: value for _, step, value in points}
    return curve


def read_events(folder: Path, *tags: str) -> Iterator[tuple[Path, Any, Any]]:
    """(file, event, value of it) for each value of one of `tags` in the event files below `folder`.

    TensorBoard's own reader decodes everything: minutes for the log of a long run, where this takes seconds.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    wanted = [tag.encode() for tag in tags]
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        for record in records(file):
            if not any(tag in record for tag in wanted):
                continue
            try:
                event = Event.FromString(record)
            except DecodeError:
                raise UserError(f"{file}: damaged") from None
            yield from ((file, event, value) for value in event.summary.value if value.tag in tags)


def records(file: Path) -> Iterator[bytes]:
    """The records of a file, as far as it has been written: each is a length, its checksum, data, its checksum."""
    refuse_irregular(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    start = 0
    while start + 8 <= len(content):
        data = start + 12
        stop = data + int.from_bytes(content[start : start + 8], "little")
        if stop > len(content):
            return
        yield content[data:stop]
        start = stop + 4


def as_logged(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def name_apart(runs: list[Run], folders: list[Path]) -> list[Run]:
    """Runs of the same name get those of their folders."""
    count = Counter(run.name for run in runs)
    return [
        Run(str(folder), run.curve, run.settings) if count[run.name] > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def same_place(a: str, b: str) -> bool:
    return a.rstrip("/") == b.rstrip("/") if is_remote(a + b) else os.path.realpath(a) == os.path.realpath(b)


def read_data(data: str, local: str | None, runs: list[Run]) -> tuple[dict[str, float], int]:
    """The floors of the shards at `data` under the runs' masking rules, and the number of validation clusters.

    Windows are as long as the first run's; where another's are not, `compare` says so.
    """
    from esm2_composer.data.masking import MaskingRule
    from esm2_composer.floors import data_floors

    section = DataSection(data, local, max_length=runs[0].settings.get("data.max_length", 1024))
    rules = [  # how many are selected does not matter
        MaskingRule(
            split=tuple(run.settings.get("data.mask_split", (0.8, 0.1, 0.1))),
            replacement=run.settings.get("data.replacement", "amino_acids"),
        )
        for run in runs
    ]
    rules = list(dict.fromkeys(rules))
    replacements = [rule.replacement for rule in rules]
    splits = ["/".join(f"{100 * share:g}" for share in rule.split) for rule in rules]
    levels = {}
    for *names, floors in zip(replacements, splits, data_floors(section, rules), strict=True):
        differing = [name for name, all in zip(names, (replacements, splits), strict=True) if len(set(all)) > 1]
        levels |= {"unigram": floors["unigram"], ", ".join(["copier", *differing]): floors["copier"]}
    return levels, count_clusters(Path(local or data, "valid/index.json").read_bytes())


def compare(run: Run, first: Run, reference: str | None, validation: int | None) -> Iterator[str]:
    """What to know before this run's curve is compared with the published one, and with the first run's."""
    if "data.replacement" not in run.settings:
        yield f"{run.name}: its logs do not hold its recipe, so its mask, replacement and lengths are unknown."
        return
    keys = [*PUBLISHED_CONDITIONS, "data.remote"]
    differs = [
        f"{key} {run.settings.get(key)}, not {first.settings[key]}"
        for key in keys
        if key in first.settings and run.settings.get(key) != first.settings[key]
    ]
    if differs:
        yield f"{run.name} is not comparable with {first.name}: {'; '.join(differs)}."
    if reference is None:
        return
    differs = [
        f"{key} {run.settings.get(key)}, not {value}"
        for key, value in PUBLISHED_CONDITIONS.items()
        if run.settings.get(key) != value
    ]
    if validation not in (None, PUBLISHED_VALIDATION):
        differs.append(f"validated on {validation:,} other clusters")
    batch = run.settings.get("global_train_batch_size")
    count = "an unknown number of" if batch is None else f"{batch:,}"
    scale = "" if batch == 2048 else f" Its updates are of {count} sequences."
    if differs:
        yield f"{run.name} is not comparable with the published curve: {'; '.join(differs)}.{scale}"
    else:
        yield f"{run.name} is comparable with the published curve if validated on the same split.{scale}"


def print_table(curves: dict[str, dict[int, float]], levels: dict[str, float], notes: list[str]) -> None:
    shown: set[int] = set()
    for curve in curves.values():  # some 20 points of each, and its last
        shown |= {*sorted(curve)[:: -(-len(curve) // 20)], max(curve)}
    widths = [max(len(name), 7) for name in curves]
    print("validation perplexity")
    print(f"{'update':>9}", *(f"{name:>{width}}" for name, width in zip(curves, widths, strict=True)), sep="  ")
    for update in sorted(shown):
        cells = [f"{curve[update]:.3f}" if update in curve else "" for curve in curves.values()]
        print(f"{update:9,}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)), sep="  ")
    for name, value in levels.items():
        print(f"{value:9.2f}  {name}")
    for note in notes:
        print(textwrap.fill(note, 115, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def draw(runs: list[Run], published: dict[str, dict[int, float]], levels: dict[str, float], notes: list[str]):
    """The figure. Curves are told apart by marker and label as well as by colour, and floors by dashes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito's, for colour-blind eyes
    markers = "osD^v"
    ink, faint = "0.15", "0.42"
    caption = "\n".join(textwrap.fill(note, 124, break_long_words=False, break_on_hyphens=False) for note in notes)
    below = 0.62 + 0.135 * (caption.count("\n") + 1 if caption else 0)  # inches
    figure, axes = plt.subplots(figsize=(7.2, 4.0 + below))
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.07, right=0.83, top=1 - 0.42 / height, bottom=below / height)

    if published:
        axes.set_xscale("log")  # a young run beside a whole one
    axes.set_yscale("log")
    axes.margins(y=0.06)
    lines = []
    for i, run in enumerate(runs):  # the sixth has the first's colour again, but another marker
        style = {"color": colours[i % 5], "marker": markers[(i + i // 5) % 5], "mec": "white", "mew": 0.6}
        lines.append((run.name, run.curve, style))
    lines += [(name, curve, {"color": ink, "marker": "o", "mfc": "white"}) for name, curve in published.items()]
    ends = []
    for name, curve, style in lines:
        points = [(x, y) for x, y in sorted(curve.items()) if math.isfinite(y) and (x or not published)]
        if points:  # a logarithmic axis has no place for update 0
            x, y = zip(*points, strict=True)
            marked = [*range(0, len(x) - 1, -(-len(x) // 16)), len(x) - 1]
            axes.plot(x, y, lw=1.6, ms=4.5, markevery=marked, **style)
            ends.append((name, x[-1], y[-1], style["color"]))
    for (name, value), dashes in zip(levels.items(), cycle(((6, 3), (1, 2), (3, 2, 1, 2))), strict=False):
        axes.axhline(value, color=faint, lw=1.1, ls=(0, dashes), zorder=1)
        ends.append((name, axes.get_xlim()[1], value, faint))
    label_ends(axes, ends)

    axes.set_title("Validation perplexity by update", loc="left", fontsize=11, weight="bold", color=ink)
    axes.set_xlabel("update", color=ink)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ticks = ticks_between(*axes.get_ylim())
    axes.set_yticks(ticks, labels=[f"{tick:,g}" for tick in ticks])
    axes.yaxis.minorticks_off()
    axes.grid(axis="y", color="0.91", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=faint, labelcolor=ink, labelsize=9)
    figure.text(
        0.07,
        0.10 / height,
        caption,
        fontsize=7,
        color="0.3",
        va="bottom",
        linespacing=1.3,
        parse_math=False,  # a $ of a name is a $
    )
    return figure


def ticks_between(low: float, high: float) -> list[float]:
    """Three round numbers at least, on a logarithmic axis."""
    ticks = [t for t in (*range(1, 11), *range(12, 21, 2), 25, 30, 40, 60, 100, 1_000, 10_000) if low < t < high]
    for step in (factor * 10.0**power for power in range(4, -3, -1) for factor in (5, 2, 1)):
        if len(ticks) > 2:
            break
        ticks = [round(i * step, 2) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return ticks


def label_ends(axes: Any, ends: list[tuple[str, float, float, str]]) -> None:
    """Write (name, y) right of each (x, y), moved up where it would cover another."""
    points_a_pixel = 72 / axes.figure.dpi
    axes.figure.draw_without_rendering()  # fixes the scales
    placed: list[tuple[float, float]] = []
    for name, x, y, colour in sorted(ends, key=lambda end: end[2]):
        across, up = axes.transData.transform((x, y)) * points_a_pixel
        target = up
        while any(abs(across - other) < 110 and abs(target - height) < 11 for other, height in placed):
            target += 1
        placed.append((across, target))
        axes.annotate(
            f"{name}  {y:.2f}",
            (x, y),
            xytext=(7, target - up),
            textcoords="offset points",
            va="center",
            color=colour,
            weight="bold",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            annotation_clip=False,
            parse_math=False,
        )


def save(figure: Any, out: Path) -> None:
    with appearing_whole(out) as partial:
        figure.savefig(partial, format=out.suffix[1:], dpi=200, bbox_inches="tight")


if __name__ == "__main__":
    run_command(main)
