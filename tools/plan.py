"""Memory, time, GPU-hours and disk of a run, before paying: python tools/plan.py RECIPE --gpus N [--gpu h100]

By arithmetic on stated assumptions (see esm2_composer/recipe/estimate.py); measure MFU on one node and give it
as --mfu. Needs neither GPUs nor the recipe's data. Any key can be overridden as key.subkey=value.
"""

from __future__ import annotations

import argparse
import json

from esm2_composer.command import ArgumentParser, in_range, run_command
from esm2_composer.imports import slow_imports
from esm2_composer.recipe.gpus import GPUS


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, see yamls/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    parser.add_argument("--gpus", type=in_range(int, 1), required=True, help="of the whole run")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="default: h100")
    parser.add_argument(
        "--mfu",
        type=in_range(float, 0.001, 1),
        help="share of the GPUs' peak that computing reaches; default: a cautious one for the size of the heads",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_intermixed_args()

    from esm2_composer.recipe.config import load_recipe

    recipe = load_recipe(args.recipe, args.overrides, data_is_here=False)
    with slow_imports():
        from esm2_composer.recipe.report import report

    text, data = report(recipe, args.gpus, args.gpu, args.mfu)
    print(json.dumps(data) if args.json else text)


if __name__ == "__main__":
    run_command(main)
