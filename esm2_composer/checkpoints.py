"""The folder a run saves to and resumes from, where it is a local one."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

from esm2_composer.errors import UserError

LATEST = "latest-rank0.pt"  # Composer's link to the newest checkpoint, a file or, if sharded, a folder


def prepare_save_folder(folder: Path, resume: bool) -> None:
    """Make the folder, and see to it that a run in it can be resumed.

    Composer replaces its link to the newest checkpoint by removing it first. A run killed in between would
    start anew, over its own checkpoints: so a missing link is set again, to the newest checkpoint that is whole.

    Raises:
        UserError: the folder cannot be written, or it holds another run's checkpoints and is not to be resumed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"save_folder {folder} cannot be written ({error.strerror})") from error
    whole = sorted((path for path in folder.glob("ep*-ba*") if _is_whole(path)), key=_updates)
    if not whole:
        return
    if not resume:
        raise UserError(
            f"save_folder {folder} holds a run of {_updates(whole[-1])} updates; "
            "set autoresume=true to go on with it, or take another run_name"
        )
    if not (folder / LATEST).exists():
        link = folder / f".{LATEST}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(whole[-1].name)
        os.replace(link, folder / LATEST)


def _updates(checkpoint: Path) -> int:
    """The update a checkpoint was saved after, from its name: ep1-ba200-rank0.pt or, sharded, ep1-ba200."""
    match = re.match(r"ep\d+-ba(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def _is_whole(checkpoint: Path) -> bool:
    # Each format writes its table of contents last.
    if checkpoint.is_dir():
        return (checkpoint / ".metadata").exists()
    return zipfile.is_zipfile(checkpoint)
