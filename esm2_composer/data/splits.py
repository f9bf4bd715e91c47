"""Where the shards of the two splits are, and where they cannot be."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from esm2_composer.addresses import is_remote, lies_in, names_bucket
from esm2_composer.errors import UserError

SPLITS = ("train", "valid")


def cache_problem(remote: str, local: str) -> str | None:
    """Why the shards at `remote` cannot have their cache at `local`, and what would work; None if they can."""
    if is_remote(local) or not can_be_folder(Path(local)):
        return f"{local}; it must be a folder"
    if any(lies_in(f"{local}/{split}", f"{remote}/{split}") for split in SPLITS):
        return f"{local}, where the shards themselves lie and would be lost; without it they are read in place"
    return None


def can_be_folder(path: Path) -> bool:
    """Whether it is a folder, or does not exist yet but can be made."""
    return next(part for part in (path, *path.absolute().parents) if os.path.lexists(part)).is_dir()


def lacking(data: str, split: str) -> str | None:
    """Why the folder `data` has no shards of `split`; None if it has."""
    folder = Path(data)
    if (folder / split / "index.json").is_file():
        return swapped(f"{data}/{split}", split, _conversion_of(folder / split))
    if not folder.exists():
        return f"{data}: no such folder" + ("" if folder.is_absolute() else f" in {Path.cwd()}")
    if (folder / "index.json").is_file():
        return f"{data} is a split itself; give the folder in which it lies"
    return f"{data} holds no {split} shards ({split}/index.json)"


def _conversion_of(folder: Path) -> object:
    try:
        return json.loads((folder / "conversion.json").read_text())
    except (OSError, ValueError, RecursionError):  # shards of others, or a damaged file
        return None


def swapped(place: str, split: str, conversion: object) -> str | None:
    """What is wrong if train shards are in the place of valid ones, or the other way round; None if they are not,
    or their conversion.json does not say."""
    try:
        converted = conversion["state"]["options"]["split"]
    except (LookupError, TypeError):
        return None
    if (split, converted) not in (SPLITS, SPLITS[::-1]):
        return None
    return f"{place}: {converted} shards, by conversion.json; convert anew with --split {split}"


def check_data(data: str, local: str | None, splits: Iterable[str]) -> None:
    """Raise a UserError if the splits at a command's --data cannot be read, with their cache at its --local."""
    if local and (problem := cache_problem(data, local)):
        raise UserError(f"--local is {problem}")
    if is_remote(data):
        if not names_bucket(data):
            raise UserError(f"--data {data}: write a folder or s3://bucket/prefix")
        if not local:
            raise UserError(f"--data {data} needs --local, a folder for its cache")
        return
    for split in splits:
        if lack := lacking(data, split):
            raise UserError(lack)
        if not local and cannot_be_unpacked(Path(data, split)):
            raise UserError(f"--data {data}: shards cannot be unpacked there; add --local, a folder for a cache")


def cannot_be_unpacked(folder: Path) -> bool:
    """Whether a folder of shards holds some that are still packed, and cannot be written."""
    packed = folder.glob("*.mds.*")
    return not os.access(folder, os.W_OK) and any(not path.with_suffix("").exists() for path in packed)


def count_clusters(index: bytes) -> int:
    """How many clusters the content of an index.json lists; 0 if it is not an index."""
    try:
        return sum(shard["samples"] for shard in json.loads(index)["shards"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
