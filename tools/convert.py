"""Convert a UniRef layout into MDS shards keyed by cluster.

    python tools/convert.py --clusters train_clusters.parquet --sequences train.db --out shards --split train
    python tools/convert.py --clusters valid_clusters.parquet --sequences validation.db --out shards --split valid

writes shards/train and shards/valid, each with its `index.json` and a `conversion.json` that says what was
read, written, changed and rejected.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tqdm import tqdm

from esm2_composer.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=Path, required=True, help="parquet with ur90_id lists, or ur50_id")
    parser.add_argument("--sequences", type=Path, required=True, help="SQLite file with table protein")
    parser.add_argument("--out", required=True, help="folder that holds, or will hold, train/ and valid/")
    parser.add_argument("--split", choices=("train", "valid"), default="train")
    parser.add_argument(
        "--max-reject-fraction", type=float, default=0.01, help="write nothing if more members are unusable"
    )
    args = parser.parse_args()
    if not 0 <= args.max_reject_fraction <= 1:
        raise UserError(f"--max-reject-fraction {args.max_reject_fraction} must lie between 0 and 1")
    if re.match(r"[\w+-]+:/", args.out):
        raise UserError(f"--out {args.out}: write to a local folder, then copy it, index.json last")

    from esm2_composer.records import BioNeMo, write_split  # Streaming takes seconds to import

    clusters = BioNeMo(args.clusters, args.sequences)
    conversion = write_split(
        tqdm(clusters, unit=" clusters", desc=args.split, disable=None),
        Path(args.out) / args.split,
        {"clusters": str(args.clusters), "sequences": str(args.sequences)},
        args.max_reject_fraction,
    )
    print(
        f"{args.split}: {conversion['clusters_written']:,} clusters, {conversion['members_written']:,} members, "
        f"{conversion['residues_written']:,} residues in {conversion['elapsed_seconds']} s",
        file=sys.stderr,
    )
    for reason, rejected in conversion["rejected"].items():
        print(f"rejected, {reason}: {rejected['count']:,}", file=sys.stderr)
    for change, count in conversion["changed"].items():
        print(f"changed, {change}: {count:,}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
