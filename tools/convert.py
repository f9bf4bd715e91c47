"""Convert a protein data set into MDS shards keyed by cluster, on disk or object storage.

    python tools/convert.py --clusters train_clusters.parquet --sequences train.db --out shards --split train
    python tools/convert.py --clusters valid_clusters.parquet --sequences validation.db --out shards --split valid
    python tools/convert.py --flat uniref/ --out s3://bucket/uniref50
    python tools/convert.py --fasta proteins.fasta.gz --cluster-tsv clusters.tsv --out shards
    python tools/convert.py --flat uniref/ --out /shared/uniref50 --spark spark://host:7077
    python tools/convert.py --verify s3://bucket/uniref50

writes OUT/train and OUT/valid, each with its `index.json` and a `conversion.json` that says what was read,
written, changed and rejected. If killed, the same command resumes. docs/data.md has the layouts and every rule.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from pathlib import Path

from esm2_composer.addresses import is_remote, lies_in, names_bucket
from esm2_composer.command import ArgumentParser, in_range, run_command
from esm2_composer.data.splits import SPLITS
from esm2_composer.errors import UserError
from esm2_composer.progress import Progress


def main() -> None:
    args = parse_args()
    show = Progress("verified" if args.verify else args.split)
    if args.verify:
        from esm2_composer.conversion.verification import verify

        for split, statistics in verify(args.verify, args.workers, show).items():
            show.close()
            print_statistics(split, statistics)
        return
    # Imported only now: help and wrong options need none of it.
    from esm2_composer.conversion.convert import Options, convert
    from esm2_composer.conversion.layouts import BioNeMo, Fasta, Flat

    if args.clusters:
        layout = BioNeMo(args.clusters, args.sequences)
    elif args.flat:
        layout = Flat(args.flat)
    else:
        layout = Fasta(args.fasta, args.cluster_tsv)
    options = Options(args.split, args.max_members_per_cluster, args.seed or 0)
    with open_spark(args.spark) as spark, contextlib.closing(show):
        conversion = convert(
            layout,
            args.out,
            options,
            max_reject_fraction=args.max_reject_fraction,
            workers=args.workers,
            scratch=args.scratch,
            progress=show,
            engine=spark,
        )
    print_summary(args.split, conversion)


def open_spark(master: str | None) -> contextlib.AbstractContextManager:
    if not master:
        return contextlib.nullcontext()
    from esm2_composer.conversion.spark import Spark

    return Spark(master)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=Path, help="parquet with ur90_id lists, or ur50_id")
    parser.add_argument("--sequences", type=Path, help="SQLite file with table protein (id, sequence)")
    parser.add_argument("--flat", type=Path, help="parquet, or folder of them, with ur50_id, ur90_id, sequence")
    parser.add_argument("--fasta", type=Path, nargs="+", help="FASTA, plain, gzip or zstd")
    parser.add_argument("--cluster-tsv", type=Path, help="MMseqs2's representative TAB member, for --fasta")
    parser.add_argument("--out", help="folder or URI that holds, or will hold, train/ and valid/")
    parser.add_argument("--split", choices=SPLITS, default="train", help="(%(default)s)")
    parser.add_argument(
        "--workers", type=in_range(int, 1), default=len(os.sched_getaffinity(0)), help="processes (%(default)s)"
    )
    parser.add_argument(
        "--max-reject-fraction",
        type=in_range(float, 0, 1),
        default=0.01,
        help="write nothing if more members are unusable, or more clusters have none (%(default)s)",
    )
    parser.add_argument(
        "--max-members-per-cluster", type=in_range(int, 1), help="keep so many of a cluster (default: all)"
    )
    parser.add_argument("--seed", type=int, help="of the choice that --max-members-per-cluster makes (default: 0)")
    parser.add_argument("--scratch", type=Path, help="work in progress for object storage (default: this folder)")
    parser.add_argument(
        "--spark",
        metavar="MASTER",
        help="build the shards on Apache Spark: local[2], spark://host:7077, yarn, ...",
    )
    parser.add_argument("--verify", metavar="URI", help="re-read shards, check them, print their statistics")
    args = parser.parse_args()
    check(args, parser)
    return args


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse impossible options, and ones without effect: whoever gives one expects something of it."""
    for argument in sys.argv:
        if argument.encode(errors="ignore").decode() != argument:
            raise UserError(f"{argument}: not UTF-8, which DuckDB and Arrow want of a path")
    layouts = [name for name in ("clusters", "flat", "fasta", "verify") if getattr(args, name)]
    if len(layouts) != 1:
        raise UserError("give one of: --clusters with --sequences, --flat, --fasta, --verify")
    if args.verify:
        for name, value in vars(args).items():
            if name not in ("verify", "workers") and value != parser.get_default(name):
                raise UserError(f"--verify goes without --{name.replace('_', '-')}")
    if bool(args.clusters) != bool(args.sequences):
        raise UserError("--clusters and --sequences go together")
    if args.cluster_tsv and not args.fasta:
        raise UserError("--cluster-tsv goes with --fasta")
    if not args.verify and not args.out:
        raise UserError("--out is missing")
    for place in filter(None, (args.out, args.verify)):
        if re.match(r"\w+:(?!/)", place):  # libraries take that for a URI
            raise UserError(f"{place}: write a folder (as ./{place}), or a store as s3://bucket/prefix")
        if is_remote(place) and not names_bucket(place):
            raise UserError(f"{place}: write a store as s3://bucket/prefix")
    if args.seed is not None and not args.max_members_per_cluster:
        raise UserError("--seed goes with --max-members-per-cluster")
    if len(str(args.seed)) > 64:  # what keys a hash
        raise UserError("--seed must not be longer than 64 characters")
    if args.scratch and not is_remote(args.out):
        raise UserError(f"--scratch goes with object storage; work for a folder lies in it ({args.out})")
    if args.flat and lies_in(args.out, str(args.flat)):
        raise UserError(f"--out {args.out} lies in --flat {args.flat}, where its own files would be read")


def print_summary(split: str, conversion: dict) -> None:
    written = (
        f"{conversion['clusters_written']:,} clusters, {conversion['members_written']:,} members, "
        f"{conversion['residues_written']:,} residues"
    )
    if "already_done" in conversion:
        print(f"{split}: {written}, converted before; nothing to do", file=sys.stderr)
        return
    seconds = conversion["elapsed_seconds"]
    print(f"{split}: {written} in {seconds} s", file=sys.stderr)
    unscored = conversion["members_written"] - conversion["clusters_written"]
    if split == "valid" and unscored:
        print(
            f"valid: evaluation scores one member of each cluster, by its seed; members left out: {unscored:,}",
            file=sys.stderr,
        )
    if len(files := conversion["state"]["inputs"].get("flat", [])) > 1:
        print(f"read: {len(files):,} parquet files", file=sys.stderr)
    read = conversion.get("sequences_read", 0)  # where the layout reads them all
    unused = read - conversion["sequences_found"] if read else 0
    if unused:
        print(f"not used: {unused:,} of {read:,} sequences, which no member to be written names", file=sys.stderr)
    for reason, rejected in conversion["rejected"].items():
        print(f"rejected, {reason}: {rejected['count']:,}", file=sys.stderr)
    for change, changed in conversion["changed"].items():
        print(f"changed, {change}: {changed['count']:,}", file=sys.stderr)


def print_statistics(split: str, statistics: dict) -> None:
    lengths = ", ".join(f"{name} {value:,}" for name, value in statistics["length_percentiles"].items())
    lines = [
        f"{statistics['shards']:,} shards hold what index.json says",
        *(f"not compared with {name}, which is not there" for name in statistics["absent"]),
        ", ".join(f"{statistics[name]:,} {name}" for name in ("clusters", "members", "residues")),
        f"lengths {lengths}; {statistics['share_over_1022']:.2%} over 1,022",
        f"padded to 1,024, {statistics['padding_at_1024']:.1%} of all tokens drawn would be padding",
    ]
    print("\n".join(f"{split}: {line}" for line in lines))


if __name__ == "__main__":
    run_command(main)
