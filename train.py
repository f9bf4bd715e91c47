"""Train ESM-2 from a recipe: composer train.py yamls/NAME.yaml [key.subkey=value ...]

Exit codes: 0 done, also when it was done before; 2 a mistake in the recipe or its data; 75 preempted and
saved, to be launched again with the same command.
"""

import argparse

from esm2_composer.config import load_recipe
from esm2_composer.errors import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, see yamls/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides)

    # Composer takes seconds to import; a wrong recipe is told at once.
    from esm2_composer.callbacks import EXIT_PREEMPTED, Preemption
    from esm2_composer.runner import build_trainer

    trainer = build_trainer(recipe)
    if trainer.state.timestamp >= trainer.state.max_duration:
        print(f"{recipe.run_name} is done: {recipe.updates} updates, nothing left to train")
        return 0
    if trainer.state.timestamp.batch == 0:
        trainer.eval()  # where the curve starts, and a broken validation split shows before days are spent
    trainer.fit()
    preempted = any(isinstance(c, Preemption) and c.preempted for c in trainer.state.callbacks)
    trainer.close()
    return EXIT_PREEMPTED if preempted else 0


if __name__ == "__main__":
    run_command(main)
