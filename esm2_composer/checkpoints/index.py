"""`checkpoints.json`: what a run has measured, and which checkpoints are kept for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from esm2_composer.checkpoints.folders import Folder, ask, damaged
from esm2_composer.checkpoints.names import updates
from esm2_composer.checkpoints.resume import Origin
from esm2_composer.data.splits import SPLITS
from esm2_composer.distributed.collectives import say

INDEX = "checkpoints.json"


@dataclass
class Index:
    """`checkpoints.json`: digests of the splits a run is on, and every validation loss by update."""

    shards: dict[str, str] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Folder) -> Index:
        """Raises UserError if it is damaged, StoreUnavailable if the store does not answer."""
        try:
            content = json.loads(ask(folder, lambda: folder.read(INDEX)) or "{}")
            losses = {int(update): float(loss) for update, loss in content.get("validation_loss", {}).items()}
            if not all(map(math.isfinite, losses.values())):
                raise ValueError("a loss that is no number")
        except (ValueError, TypeError, AttributeError) as error:
            raise damaged(folder, INDEX, "remove it, to go on without the validation losses so far") from error
        shards = {split: digest for split in SPLITS if (digest := content.get(f"{split}_shards"))}
        return cls(shards, losses)

    @classmethod
    def of(cls, origin: Origin) -> Index:
        """What is known of the run so far; if it branches off another run, only its shards."""
        index = cls.read(origin.folder)
        if index == cls():
            say(
                f"{origin.folder} has lost its checkpoints.json: earlier validation losses, and which shards the "
                "run was trained on, are not known"
            )
        return replace(index, losses={}) if origin.is_branch_point else index

    def write(self, folder: Folder, best: Sequence[str]) -> None:
        losses = {str(update): self.losses[update] for update in sorted(self.losses)}
        shards = {f"{split}_shards": digest for split, digest in self.shards.items()}
        content = {**shards, "validation_loss": losses, "best": list(best)}
        folder.write(INDEX, json.dumps(content, indent=1) + "\n")


def best(names: Sequence[str], losses: Mapping[int, float], keep: int) -> list[str]:
    """The up to `keep` checkpoints with the lowest validation losses, the lowest first."""
    scored = [name for name in names if updates(name) in losses]
    return sorted(scored, key=lambda name: (losses[updates(name)], updates(name)))[:keep]


def superseded(names: Sequence[str], losses: Mapping[int, float], keep_newest: int, keep_best: int) -> list[str]:
    """The checkpoints, of `names` oldest first, that are neither among the newest nor among the best."""
    kept = {*names[-keep_newest:], *best(names, losses, keep_best)}
    return [name for name in names if name not in kept]
