"""Measure this project beside its peers, in one run.

    python tools/benchmark.py step      training steps, beside transformers
    python tools/benchmark.py loader    from shards to balanced microbatches, beside transformers' collator

Compare ratios: absolute figures change from machine to machine. `--json` prints one JSON object as the last line
of standard output; all else goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks import loader, step

from esm2_composer.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, benchmark in {"step": step, "loader": loader}.items():
        command = commands.add_parser(name, description=benchmark.__doc__)
        benchmark.add_arguments(command)
        command.add_argument("--json", action="store_true")
        command.set_defaults(benchmark=benchmark)
    args = parser.parse_args()
    result = args.benchmark.measure(args)
    print(args.benchmark.table(result), file=sys.stderr)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
