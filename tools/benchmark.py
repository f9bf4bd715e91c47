"""Measure this project versus its peers, in one run.

    python tools/benchmark.py step       training steps, versus transformers
    python tools/benchmark.py profile    where a training step's time goes, and what each part could take at best
    python tools/benchmark.py host       the time between two updates, by loggers and number of ranks
    python tools/benchmark.py sharding   the host's time that FSDP adds per layer, by layers sharded together
    python tools/benchmark.py attention  rotation and attention of a layer, by every kernel
    python tools/benchmark.py loader     from shards to balanced microbatches, versus transformers' collator
    python tools/benchmark.py startup    from launch to the first batch of 65 million clusters
    python tools/benchmark.py convert    from raw UniRef to shards, by size of the input and number of workers
    python tools/benchmark.py embed      embeddings, versus transformers
    python tools/benchmark.py parity     logits and gradients, versus transformers and fair-esm

Compare ratios: absolute figures change from machine to machine. `--json` prints one JSON object as the last line
of standard output; all else goes to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from esm2_composer.command import ArgumentParser, run_command

BENCHMARKS = (
    "step",
    "profile",
    "host",
    "sharding",
    "attention",
    "loader",
    "startup",
    "convert",
    "embed",
    "parity",
)


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    for name in BENCHMARKS:
        command = commands.add_parser(name)
        if name in sys.argv[1:2]:  # the others' imports take long
            benchmark = importlib.import_module(f"benchmarks.{name}")
            command.description = benchmark.__doc__
            benchmark.add_arguments(command)
            command.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = benchmark.measure(args)
    print(benchmark.table(result), file=sys.stderr)
    if args.json:
        print(json.dumps(result))
    return 0 if getattr(benchmark, "went_well", bool)(result) else 1


if __name__ == "__main__":
    run_command(main)
