"""Cluster FASTA files with MMseqs2, as UniRef is built: python tools/build_clusters.py --fasta F... --out DIR

DIR, a new folder, will hold train_clusters.parquet and train.db, valid_clusters.parquet and validation.db, which
tools/convert.py reads, and report.json. Members are the representatives of clusters at 90 % identity; these in
turn, clustered at 50 %, give the clusters. A fraction of the clusters is set aside for validation, and training
members that match a validation sequence are removed. The same input, seed and MMseqs2 give the same clusters.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from esm2_composer.command import ArgumentParser, in_range, run_command
from esm2_composer.errors import UserError

ENOUGH_VALID = 100  # clusters


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", type=Path, nargs="+", required=True, help="FASTA: plain, gzip or zstd")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.005, help="clusters for validation (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=17, help="of the choice of clusters for validation")
    parser.add_argument(
        "--threads",
        type=in_range(int, 1, 1024),
        default=len(os.sched_getaffinity(0)),
        help="of MMseqs2 (%(default)s)",
    )
    parser.add_argument(
        "--max-reject-fraction",
        type=in_range(float, 0, 1),
        default=0.01,
        help="stop if more sequences are unusable",
    )
    args = parser.parse_args()
    if not 0 < args.valid_fraction < 1:
        raise UserError(f"--valid-fraction {args.valid_fraction} must lie between 0 and 1")

    from esm2_composer.conversion.clustering import build_clusters

    report = build_clusters(
        args.fasta,
        args.out,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
        threads=args.threads,
        max_reject_fraction=args.max_reject_fraction,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for name, count in report["counts"].items():
        print(f"{name.replace('_', ' ')}: {count:,}", file=sys.stderr)
    for reason, rejected in report["rejected"].items():
        print(f"rejected, {reason}: {rejected['count']:,}", file=sys.stderr)
    for change, count in report["changed"].items():
        print(f"changed, {change}: {count:,}", file=sys.stderr)
    valid = report["counts"]["clusters_valid"]
    if valid < ENOUGH_VALID:
        print(
            f"clusters for validation: {valid:,}, few to measure perplexity by; raise --valid-fraction",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_command(main)
