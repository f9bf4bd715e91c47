"""Whether a checkpoint is what was written: torch stores a checksum of each tensor, and looks at none."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from esm2_composer.sharded_checkpoint import Refused, SafeReader


def is_damaged(checkpoint: Path, rank: int = 0, ranks: int = 1, prefix: str = "") -> bool:
    """Whether something is missing, or is not as it was written. It takes reading all of it; False where that is
    not to be found out, as on a disk that fails.

    Args:
        checkpoint: a file that torch wrote, a zip file, or the folder of a sharded checkpoint.
        rank, ranks: of a sharded one this rank reads its share; of a file the first reads all.
        prefix: how the names of the tensors begin that matter; of a file all do.
    """
    try:
        return any(map(_is_damaged, _archives(checkpoint, rank, ranks, prefix)))
    except (OSError, MemoryError, Refused) as error:
        return isinstance(error, FileNotFoundError)
    except Exception:  # of unpickling and of unzipping, any
        return True


def _archives(checkpoint: Path, rank: int, ranks: int, prefix: str) -> Iterator[BinaryIO]:
    if checkpoint.is_dir():
        stored = SafeReader(checkpoint).read_metadata().storage_data
        places = [(e.relative_path, e.offset, e.length) for key, e in stored.items() if key.fqn.startswith(prefix)]
        for name, offset, length in sorted(places)[rank::ranks]:
            with open(checkpoint / name, "rb") as file:
                file.seek(offset)
                yield io.BytesIO(file.read(length))  # what torch.save made of a tensor
    elif rank == 0:
        with open(checkpoint, "rb") as file:
            yield file


def _is_damaged(file: BinaryIO) -> bool:
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    if archive.testzip() is not None or len(names) > len(set(names)):  # one bit makes data/4 a second data/5
        return True
    # Of the directory torch's reader overlooks less. It comes last, when a disk that fails has told Python's.
    file.seek(0)
    try:
        torch._C.PyTorchFileReader(file)
    except Exception:  # where an offset is absurd, an OSError
        return True
    return False
