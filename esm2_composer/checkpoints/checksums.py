"""Whether a checkpoint is what was written: torch stores a checksum of each tensor, and checks none."""

from __future__ import annotations

import errno
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from esm2_composer.checkpoints.sharded import Refused, SafeReader


def is_damaged(checkpoint: Path, rank: int = 0, ranks: int = 1, prefix: str = "") -> bool:
    """Whether something is missing, or is not as it was written. Reads all of it. False where that cannot be
    determined, as on a failing disk.

    Args:
        checkpoint: a file that torch wrote, a zip file, or the folder of a sharded checkpoint.
        rank, ranks: of a sharded one this rank reads its part; of a file the first reads all.
        prefix: of the names of the tensors that matter; of a file all do.
    """
    try:
        return any(map(_is_archive_damaged, _archives(checkpoint, rank, ranks, prefix)))
    except (MemoryError, Refused):
        return False
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.EINVAL)  # the second for an offset before the beginning
    except Exception:  # of unpickling and of unzipping, any
        return True


def _archives(checkpoint: Path, rank: int, ranks: int, prefix: str) -> Iterator[str | io.BytesIO]:
    if checkpoint.is_dir():
        stored = SafeReader(checkpoint).read_metadata().storage_data
        places = [(e.relative_path, e.offset, e.length) for key, e in stored.items() if key.fqn.startswith(prefix)]
        for name, offset, length in sorted(places)[rank::ranks]:
            with open(checkpoint / name, "rb") as file:
                file.seek(offset)
                yield io.BytesIO(file.read(length))  # what torch.save made of a tensor
    elif rank == 0:
        yield str(checkpoint)


def _is_archive_damaged(file: str | io.BytesIO) -> bool:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if archive.testzip() is not None or len(names) > len(set(names)):  # one bit makes data/4 a second data/5
            return True
    # torch's reader checks the zip directory more strictly. It comes last: about a failing disk it says less.
    if isinstance(file, io.BytesIO):
        file.seek(0)
    torch._C.PyTorchFileReader(file)
    return False
