"""Reads files of tensors without running code from them: safetensors, or `torch.load(weights_only=True)`."""

from __future__ import annotations

import argparse
import datetime
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from esm2_composer.checkpoints.checksums import is_damaged
from esm2_composer.checkpoints.sharded import MODEL_PREFIX
from esm2_composer.errors import UserError, system_error

State = Mapping[str, torch.Tensor]


# Plain data that checkpoints hold beside tensors: fair-esm's arguments; Composer's clock, versions and NumPy
# random state.
_PLAIN_TYPES = [
    argparse.Namespace,
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    # NumPy's array constructor, under the names that NumPy 1 and 2 write.
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def torch_load(path: Path) -> dict:
    """What a file holds; its tensors are read when they are looked at, unless it is of torch's older format."""
    with torch.serialization.safe_globals(_PLAIN_TYPES):
        try:
            mmap = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except OSError as error:
            raise system_error(f"{path}: cannot be read as weights ({error})", error) from error
        except Exception as error:  # torch raises half a dozen types for damaged files
            raise UserError(f"{path}: cannot be read as weights ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def read_tensors(path: Path) -> State:
    """The tensors of a file, of safetensors or of torch. Raises UserError if it is damaged."""
    if path.suffix != ".safetensors":
        check_sums(path)
        return torch_load(path)
    try:
        return load_file(path)
    except OSError as error:
        raise system_error(f"{path}: cannot be read as weights ({error})", error) from error
    except Exception as error:  # safetensors has its own type for damage
        raise UserError(f"{path}: cannot be read as weights ({error})") from error


def _reason(error: Exception) -> str:
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if unsafe:
        return f"it would run code: {unsafe[1]}"
    if isinstance(error, RuntimeError | OSError):
        return str(error).splitlines()[0]
    return "not a file that torch wrote"


def check_sums(path: Path) -> None:
    """Raise a UserError, if a file or sharded checkpoint that has checksums is not what was written."""
    has_them = (path / ".metadata").exists() or zipfile.is_zipfile(path)
    if has_them and is_damaged(path, prefix=MODEL_PREFIX):
        raise UserError(f"{path}: damaged, something is missing or not what was written")


def check_types(state: State, path: Path) -> None:
    """Raise a UserError, if one holds no floating-point numbers: quantized weights have scales elsewhere."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: '{name}' is of {tensor.dtype}, no type of ESM-2's weights")
