"""Perplexity of a checkpoint on a validation split: python tools/evaluate.py CHECKPOINT --data URI

CHECKPOINT is a Composer checkpoint (a file, or the folder of a sharded one), a Hugging Face folder or hub name, or
a fair-esm file. The whole split is scored, with the same masked tokens every time: by default the recipes'.
On many GPUs, with the same result: composer -n N tools/evaluate.py CHECKPOINT --data URI
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from esm2_composer.command import ArgumentParser, in_range, run_command
from esm2_composer.data.splits import SPLITS, check_data
from esm2_composer.distributed.launcher import run_on_ranks
from esm2_composer.errors import UserError
from esm2_composer.gpu_memory import naming_lack
from esm2_composer.imports import slow_imports
from esm2_composer.progress import Progress
from esm2_composer.recipe.schema import MAX_INT, DataSection

SEQUENCES_A_RANK = 64  # taken up at a time
SHOWN = {"at_mask": "  that show <mask>", "at_residue": "  that show a residue"}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="what the recipe calls data.remote")
    parser.add_argument("--local", help="cache folder, if --data is in an object store")
    parser.add_argument("--split", default="valid", help="a folder of --data (%(default)s)")
    parser.add_argument(
        "--seed",
        type=in_range(int, 0, MAX_INT),
        default=17,
        help="the recipe's seed, which fixes the masks (%(default)s)",
    )
    parser.add_argument(
        "--max-length", type=in_range(int, 8, MAX_INT), default=1024, help="tokens of a sequence (%(default)s)"
    )
    parser.add_argument(
        "--replacement",
        choices=("amino_acids", "all_tokens"),
        default="amino_acids",
        help="what replaces a tenth of the selected: one of the 20 (default), or all 33, as in the published runs",
    )
    parser.add_argument("--floors", action="store_true", help="also what is reached without context")
    parser.add_argument(
        "--microbatch-tokens",
        type=in_range(int, 8, MAX_INT),
        default=16384,
        help="tokens computed at a time (%(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="a JSON object on standard output, the table on standard error"
    )
    args = parser.parse_args()
    data = DataSection(remote=args.data, local=args.local, max_length=args.max_length)
    check(args, data)

    with slow_imports():
        import torch
        from composer.utils import dist

        from esm2_composer.data.checks import check_cache
        from esm2_composer.data.draw import ClusterDraw
        from esm2_composer.data.loaders import evaluation_loader
        from esm2_composer.data.masking import MaskingRule
        from esm2_composer.data.pool import Pool
        from esm2_composer.distributed.collectives import end_process_group
        from esm2_composer.evaluation import evaluate
        from esm2_composer.floors import data_floors
        from esm2_composer.model import ESM2

    net = ESM2.from_pretrained(args.checkpoint)  # each rank for itself, before they connect
    on_gpu = torch.cuda.is_available()
    ranks, rank = dist.get_world_size(), dist.get_global_rank()
    if ranks > 1:
        dist.initialize_dist("gpu" if on_gpu else "cpu", timeout=1800)
    device = torch.device("cuda", dist.get_local_rank()) if on_gpu else torch.device("cpu")
    check_cache(data, {args.split, *SPLITS} if args.floors else {args.split})
    rule = MaskingRule(replacement=args.replacement)
    draw = ClusterDraw(args.seed, args.max_length, data.min_length, rule)
    loader = evaluation_loader(draw, *data.split(args.split), SEQUENCES_A_RANK * ranks, num_workers=0)
    shares = checked(loader, args.data)
    if rank == 0:
        shares = progress(shares, len(loader))
    pool = Pool(args.microbatch_tokens, net.config.hidden_size)
    batches = iter(lambda: pool.take(shares), None)
    with naming_lack(f"set --microbatch-tokens below {args.microbatch_tokens}"):
        result = evaluate(net.to(device), (m for batch in batches for m in batch["microbatches"]), device)
    result |= {key: getattr(args, key) for key in ("data", "split", "seed", "max_length", "replacement")}
    if args.floors:
        (result["floors"],) = data_floors(data, [rule])
    if rank == 0:
        table = sys.stderr if args.json else sys.stdout
        print(f"{args.checkpoint} on {args.data}/{args.split}", report(result), sep="\n", file=table)
        if args.json:
            print(json.dumps(result))
    if ranks > 1:
        end_process_group()


def check(args: argparse.Namespace, data: DataSection) -> None:
    """Raises UserError for mistakes that show before anything is loaded."""
    if args.microbatch_tokens < args.max_length:
        raise UserError(f"--microbatch-tokens {args.microbatch_tokens} must hold a sequence of {args.max_length}")
    if args.split in (".", "..") or "/" in args.split:
        raise UserError(f"--split {args.split} must be the name of a folder in --data")
    check_data(data.remote, data.local, (args.split, *SPLITS) if args.floors else (args.split,))


def checked(shares: Iterable[dict[str, Any]], data: str) -> Iterator[dict[str, Any]]:
    """Raises UserError if a share holds an id that is not a token of ESM-2: its scores would mean nothing."""
    from esm2_composer.alphabet import PAD, UNK

    for share in shares:
        # <unk> may also replace a selected token, but is never selected itself
        if ((share["tokens"] == UNK) & (share["labels"] == PAD)).any():
            raise UserError(
                f"{data} holds letters that are not of ESM-2's alphabet; shards come from tools/convert.py"
            )
        yield share


def progress(shares: Iterable[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """The shares of `total` batches; shows how many have been scored."""
    with contextlib.closing(Progress("evaluate")) as show:
        show("batches", 0, total)
        for done, share in enumerate(shares, start=1):
            yield share  # scored when the next is asked for
            show("batches", done, total)


def report(result: dict[str, Any]) -> str:
    """`result` as a table."""
    rows = [
        ("all selected positions", result),
        *((name, result[key]) for key, name in SHOWN.items() if key in result),
        ("by tokens of the sequence, as shown", None),
        *((f"  {name}", scores) for name, scores in result["by_length"].items()),
        ("by true residue", None),
        *((f"  {name}", scores) for name, scores in result["by_residue"].items()),
    ]
    lines = [f"{result['sequences']:,} sequences{'':20} perplexity     loss  accuracy     selected"]
    for name, scores in rows:
        if not scores:
            lines.append(name)
            continue
        lines.append(
            f"{name:36}{scores['perplexity']:11.4f} {scores['loss']:8.5f} {scores['accuracy']:9.4f}"
            f" {scores['selected_tokens']:12,}"
        )
    if "floors" in result:
        lines.append("without context, from the frequencies of train")
        lines.append(f"{'  unigram, where <mask> shows':36}{result['floors']['unigram']:11.4f}")
        lines.append(f"{'  copier, at all selected positions':36}{result['floors']['copier']:11.4f}")
    lines.append(
        f"selected: 15 %, of these 80/10/10, replaced by {result['replacement']}, seed {result['seed']}, windows "
        f"of at most {result['max_length']} tokens; compare only with numbers made so, on the same split"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(lambda: run_on_ranks(main))
