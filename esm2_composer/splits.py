"""Where the shards of the two splits lie, and where they cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path

from esm2_composer.files import is_remote, lies_in

SPLITS = ("train", "valid")


def cache_problem(remote: str, local: str) -> str | None:
    """Why the shards at `remote` cannot have their cache at `local`, and what would do; None if they can."""
    if is_remote(local) or not can_be_folder(Path(local)):
        return f"{local}; it must be a folder"
    if any(lies_in(f"{local}/{split}", f"{remote}/{split}") for split in SPLITS):
        return f"{local}, where the shards themselves lie and would be lost; without it they are read in place"
    return None


def can_be_folder(path: Path) -> bool:
    """It is one, or there is nothing yet but a folder to make it in."""
    return next(part for part in (path, *path.absolute().parents) if os.path.lexists(part)).is_dir()


def lacking(data: str, split: str) -> str | None:
    """Why the folder `data` has no shards of `split`; None if it has."""
    folder = Path(data)
    if (folder / split / "index.json").is_file():
        return None
    if not folder.exists():
        return f"{data}: no such folder" + ("" if folder.is_absolute() else f" in {Path.cwd()}")
    if (folder / "index.json").is_file():
        return f"{data} is a split itself; give the folder in which it lies"
    return f"{data} holds no {split} shards ({split}/index.json)"


def count_clusters(index: Path) -> int:
    """How many an index tells of; 0 if it is none."""
    try:
        return sum(shard["samples"] for shard in json.loads(index.read_text())["shards"])
    except (ValueError, KeyError, TypeError):
        return 0
