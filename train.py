"""Train ESM-2 from a recipe: composer train.py yamls/NAME.yaml [key.subkey=value ...]

Exit codes: 0 done (also if it already was); 2 a mistake in the recipe or its data; 3 the loss diverged; 75 told to
stop: the same command resumes; 130 Ctrl-C, nothing saved; 1 another failure, also if told to stop and unable to
save.
"""

from esm2_composer import preemption

if __name__ == "__main__":
    preemption.watch_signals()  # before anything that takes time

import argparse
import os
import sys

from esm2_composer.command import ArgumentParser, run_command
from esm2_composer.distributed.launcher import run_on_ranks
from esm2_composer.errors import EXIT_DIVERGED, EXIT_FAILURE, EXIT_PREEMPTED, UserError, tell
from esm2_composer.gpu_memory import naming_lack
from esm2_composer.imports import slow_imports
from esm2_composer.recipe.schema import Recipe


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="a YAML file, see yamls/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, tell what it asks for, and end")
    args = parser.parse_intermixed_args()
    if args.recipe is None:
        raise UserError("give a recipe, such as yamls/8m.yaml")

    from esm2_composer.recipe.config import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        with slow_imports():
            from esm2_composer.recipe.report import describe

        if recipe.data.local is not None:
            with slow_imports():
                from esm2_composer.data.checks import check_shards

            check_shards(recipe.data, recipe.global_train_batch_size)
        print(describe(recipe, ranks=int(os.environ.get("WORLD_SIZE", 1))))
        return 0

    tokens = recipe.device_microbatch_tokens
    with naming_lack(f"set device_microbatch_tokens below {tokens}, or see what tools/plan.py tells"):
        return train(recipe)


def train(recipe: Recipe) -> int:
    """The exit code of a run."""
    with slow_imports():  # until now signals and mistakes were handled at once
        from esm2_composer.callbacks import Preempted
        from esm2_composer.checkpoints.names import DIVERGED
        from esm2_composer.checkpoints.saving import WAITS_LEAVING
        from esm2_composer.distributed.collectives import say
        from esm2_composer.divergence import Diverged, advice
        from esm2_composer.runner import Done, build_trainer

    preemption.watch_signals()  # again: Composer, imported since, has a handler that would exit at once
    try:
        trainer, saver = build_trainer(recipe)
    except Done as finished:
        print(finished)
        return 0
    code, done = 0, False
    try:
        if saver.lacks_evaluation(trainer.state, recipe):
            trainer.eval()
        if trainer.state.timestamp >= trainer.state.max_duration:
            print(Done(recipe, trainer.state.timestamp.batch.value))
        else:
            trainer.fit()
            done = True
    except Preempted:
        if saver.save_once(trainer.state, WAITS_LEAVING):
            code = EXIT_PREEMPTED
        else:
            tell("error: told to leave, and what was trained since the last checkpoint is lost")
            code = EXIT_FAILURE
    except Diverged as reason:
        kept = saver.save(trainer.state, prefix=DIVERGED)
        message = advice(recipe, saver.newest_before(reason.before), kept)
        tell(f"error: update {trainer.state.timestamp.batch.value}: {reason}. {message}")
        code = EXIT_DIVERGED
    trainer.close()
    preemption.ignore_signals()
    if done:
        say(f"{recipe.run_name} is done: {saver.result()}")
    return code


if __name__ == "__main__":
    run_command(lambda: run_on_ranks(main, joins="--dry-run" not in sys.argv))
