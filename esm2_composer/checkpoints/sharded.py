"""A folder of `torch.distributed.checkpoint`, whose tensors are read without running code from it.

Its `.metadata` is a pickle, which torch would load unchecked. Here only the types that such a file needs are
built.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from esm2_composer.errors import UserError

MODEL_PREFIX = "state.model."  # of the names of a model's tensors


def read_sharded(folder: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The model's tensors by name, on the device "meta" without their values; optimizer state is not read.

    Raises:
        UserError: damaged, incomplete, or of something else.
    """
    try:
        reader = SafeReader(folder)
        tensors = {
            key.removeprefix(MODEL_PREFIX): torch.empty(stored.size, dtype=stored.properties.dtype, device=device)
            for key, stored in reader.read_metadata().state_dict_metadata.items()
            if key.startswith(MODEL_PREFIX) and type(stored) is TensorStorageMetadata  # others would be unpickled
        }
        if device != "meta":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of a single process, which is intended
                dcp.load({"state": {"model": tensors}}, storage_reader=reader, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # the second is no Exception
        reason = (str(error).splitlines() or [type(error).__name__])[-1]
        raise UserError(f"{folder}: cannot be read as a sharded checkpoint ({reason})") from error
    return tensors


class SafeReader(dcp.FileSystemReader):
    """torch's reader, with metadata of known types only."""

    def read_metadata(self) -> Metadata:
        with open(self.path / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_METADATA_TYPES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
}


class Refused(pickle.UnpicklingError):
    """The metadata names a type outside `_METADATA_TYPES`, which may run code when it is loaded."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA_TYPES:
            raise Refused(f"it would run code: {module}.{name}")
        return super().find_class(module, name)
