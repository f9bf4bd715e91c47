"""What a run's checkpoints and their parts are called, and what is beside them for a while."""

from __future__ import annotations

import re

LATEST = "latest-rank0.pt"  # a link to a run's newest checkpoint, in local folders, for people and tools
DIVERGED = "diverged-"  # prefix of states kept for inspection, never resumed from
STAGING, PROBE = ".saving", ".seen-"  # where a checkpoint is written; a file to see who shares the folder
_NAME = re.compile(r"ep\d+-ba(\d+)(-rank0\.pt)?")  # a file or, if sharded, a folder


def is_checkpoint(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def is_diverged(name: str) -> bool:
    return name.startswith(DIVERGED) and is_checkpoint(name.removeprefix(DIVERGED))


def is_sharded(name: str) -> bool:
    return not name.endswith(".pt")


def updates(name: str) -> int:
    """The number of updates after which the checkpoint of this name was saved."""
    match = _NAME.fullmatch(name)
    assert match, name
    return int(match[1])


def listed_parts(metadata: bytes) -> set[str]:
    """The files that a sharded checkpoint's `.metadata` lists: a pickle, not to be loaded."""
    return {name.decode() for name in re.findall(rb"__\d+_\d+\.distcp", metadata)}
