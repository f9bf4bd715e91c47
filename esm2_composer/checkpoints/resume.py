"""Which checkpoint a run resumes from: the newest of its own, or one of another run, from which it branches off.

Next to the checkpoints is `recipe.yaml`, what they were trained with.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import yaml
from composer.core import State
from composer.utils import dist
from omegaconf.errors import OmegaConfBaseException

from esm2_composer.checkpoints.folders import Folder, ask, damaged, open_folder
from esm2_composer.checkpoints.names import DIVERGED, LATEST, PROBE, is_sharded, updates
from esm2_composer.distributed.collectives import on_every_rank, on_rank_zero
from esm2_composer.errors import UserError, naming
from esm2_composer.recipe.config import BRANCH_MAY_CHANGE, MAY_CHANGE, changes, to_yaml
from esm2_composer.recipe.schema import Recipe

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a start resumes from: its own run's newest, or another run's, to branch off."""

    folder: Folder
    name: str
    is_branch_point: bool = False

    def __str__(self) -> str:
        return self.folder.location(self.name)

    @property
    def update(self) -> int:
        return updates(self.name)

    @property
    def remedy(self) -> str:
        """What to do if it is damaged."""
        return "set load_path to another" if self.is_branch_point else "remove it, to go on from the one before"


def find_checkpoint(folder: Folder, resume: bool, recipe: Recipe, sharded: bool) -> str | None:
    """The name of the checkpoint to resume from, None if the run is new. Each rank may look for itself.

    `sharded` says whether this run reads and writes sharded checkpoints.

    Raises:
        UserError: the folder cannot be written, or it holds a run that must not be resumed or is a different one.
        TransientError: the disk is full or fails, or the store does not answer.
    """

    def look() -> tuple[list[str], list[str], str | None]:
        folder.make()
        return folder.names(), folder.diverged(), folder.read(RECIPE)

    try:
        names, diverged, before = ask(folder, look)
    except UnicodeDecodeError as error:
        raise damaged(folder, RECIPE, "put back the recipe of this run") from error
    newest = updates(names[-1]) if names else 0
    for name in diverged:
        if (update := updates(name.removeprefix(DIVERGED))) >= newest:
            raise UserError(
                f"save_folder {folder} holds a run that diverged at update {update}; go on as it advised then, in "
                f"another save_folder, or remove {name} to go on from "
                f"{recipe.load_path if recipe.load_path and not names else f'update {newest}'} all the same"
            )
    if not names:
        return None
    last = names[-1]
    if not resume:
        raise UserError(
            f"save_folder {folder} holds a run of {updates(last)} updates; "
            "set autoresume=true to go on with it, or take another save_folder"
        )
    _check_fits(folder, last, before, recipe, sharded, MAY_CHANGE, "take another save_folder")
    return last


def find_branch_point(recipe: Recipe, sharded: bool) -> Origin:
    """The checkpoint of another run, which `load_path` names. Each rank may look for itself.

    Raises:
        UserError: there is none, or a run of this recipe cannot branch off there.
        StoreUnavailable: the store does not answer.
    """
    assert recipe.load_path is not None
    place, name = os.path.split(recipe.load_path.rstrip("/"))
    with naming("load_path"):
        folder = open_folder(place or ".")
        try:
            names, before = ask(folder, lambda: (folder.names(), folder.read(RECIPE)))
        except UnicodeDecodeError as error:
            raise damaged(folder, RECIPE, "put back the recipe of that run") from error
        if name not in names:
            # A link moves: ranks, and starts after a kill, would branch off at different checkpoints.
            hint = "; name the one that it leads to now" if name == LATEST else ""
            raise UserError(
                f"{recipe.load_path} is no whole checkpoint of a run, such as ep0-ba1000-rank0.pt{hint}"
            )
        _check_fits(
            folder, name, before, recipe, sharded, BRANCH_MAY_CHANGE, "take its weights alone, by model.init_from"
        )
        if updates(name) >= recipe.updates:
            raise UserError(f"{recipe.load_path} has all updates that max_duration={recipe.max_duration} asks for")
    return Origin(folder, name, is_branch_point=True)


def _check_fits(
    folder: Folder,
    name: str,
    before: str | None,
    recipe: Recipe,
    sharded: bool,
    may_change: Sequence[str],
    otherwise: str,
) -> None:
    """Raise a UserError unless `recipe` can continue from that checkpoint, whose run had the recipe `before`."""
    if before is None:
        raise UserError(
            f"save_folder {folder} holds checkpoints, but not the {RECIPE} they were trained with; put it "
            f"back, or {otherwise}"
        )
    try:
        changed = changes(before, recipe, may_change)
    except (yaml.YAMLError, OmegaConfBaseException, AttributeError):
        changed = None
    if not before.strip() or changed is None:
        raise damaged(folder, RECIPE, "put back the recipe of this run")
    if changed:
        null = any(change.startswith("schedule.updates ") for change in changed)
        hint = " (null makes schedule.updates max_duration: give it the number it was)" if null else ""
        raise UserError(
            f"save_folder {folder} holds a run of another recipe: {'; '.join(changed)}; "
            f"set that back{hint}, or {otherwise}"
        )
    if is_sharded(name) and not sharded and recipe.fsdp and recipe.fsdp.state_dict_type == "sharded":
        raise UserError(
            f"save_folder {folder} holds sharded checkpoints, to be resumed on GPUs: none is seen here, "
            "and FSDP version 1 needs them"
        )
    if is_sharded(name) != sharded:
        kind = "sharded" if is_sharded(name) else "full"
        remedy = f"fsdp.state_dict_type={kind}" if recipe.fsdp else "the fsdp section they were saved with"
        raise UserError(f"save_folder {folder} holds {kind} checkpoints; resume them with {remedy}")


def take_over(folder: Folder, resume: bool, recipe: Recipe, sharded: bool) -> str | None:
    """Make the folder this run's: clear what a killed one left unfinished, and leave the recipe. For one rank.

    Returns and raises what `find_checkpoint` does: a run that was still ending may have saved one since.
    """

    def take() -> None:
        folder.clear()
        folder.write(RECIPE, to_yaml(recipe))

    ask(folder, folder.lock)
    checkpoint = find_checkpoint(folder, resume, recipe, sharded)
    ask(folder, take)
    return checkpoint


def check_shared(folder: Folder) -> None:
    """Raise a UserError on every rank unless all see the folder of rank 0."""

    def write() -> str:
        # A name that nobody has looked up before: NFS caches for a while that a file does not exist.
        name = f"{PROBE}{uuid.uuid4().hex}"
        ask(folder, lambda: folder.write(name, ""))
        return name

    name = on_rank_zero(write)
    seen = on_every_rank(lambda: ask(folder, lambda: folder.read(name)) is not None)
    on_rank_zero(lambda: ask(folder, lambda: folder.remove(name)))
    if not all(seen):
        raise UserError(
            f"save_folder {folder} is not the same on all nodes; take a shared one, or s3://bucket/prefix"
        )


def check_undamaged(origin: Origin) -> None:
    """Raise a UserError on every rank, if a checkpoint is not what was written: torch would load other numbers.
    Each rank reads its part of a sharded one."""
    ranks = dist.get_world_size()
    if any(on_every_rank(lambda: origin.folder.is_damaged(origin.name, dist.get_global_rank(), ranks))):
        raise damaged(origin.folder, origin.name, origin.remedy)


def check_resumed(state: State, origin: Origin) -> None:
    """Raise a UserError if what has been loaded is not of the update in its name, or is not a whole run's:
    Composer ignores what it does not find."""
    loaded = state.timestamp.batch.value
    if loaded != origin.update:
        raise UserError(
            f"save_folder {origin.folder}: {origin.name} is of update {loaded}; remove it, or give it the name it "
            "had"
        )
    (optimizer,), (schedule,) = state.optimizers, state.schedulers
    if not optimizer.state or schedule.last_epoch != loaded:
        raise damaged(origin.folder, origin.name, origin.remedy)
