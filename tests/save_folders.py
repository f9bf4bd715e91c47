"""Checkpoints without a run, in both kinds of folder."""

import os
from pathlib import Path

import torch

from esm2_composer.checkpoints.folders import Folder
from esm2_composer.checkpoints.local import LocalFolder


def stage(tmp_path: Path, name: str) -> Path:
    """A checkpoint as it is before it is moved to its place."""
    staged = tmp_path / "staged" / name
    if name.endswith(".pt"):
        staged.parent.mkdir(exist_ok=True)
        torch.save({"state": torch.ones(100)}, staged)
    else:
        staged.mkdir(parents=True)
        for part in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
            (staged / part).write_bytes(part.encode())
    return staged


def save(folder: Folder, tmp_path: Path, name: str, whole: bool = True) -> None:
    staged = stage(tmp_path, name)
    for rank in (0, 1):
        folder.send(staged, name, rank)
    if whole:
        folder.commit(staged, name)


def listing(folder: Folder) -> list[str]:
    return os.listdir(folder.path) if isinstance(folder, LocalFolder) else folder._keys("")
