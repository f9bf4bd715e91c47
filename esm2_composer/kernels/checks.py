"""What is checked before a run uses our kernels: what building them needs, and how far off they are.

Compilers and GPUs change, and a wrong gradient would show only in the loss, weeks later. So kernels are compared
with a reference on the GPU at hand, outputs and gradients (`attention.rotated_error`,
`elementwise.elementwise_error`, `fp8.product_error`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch


def missing_for_triton() -> str | None:
    """The first thing missing of what Triton needs to build its kernels; None if all is here."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's, as Triton does
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return None if header.exists() else str(header)


@contextlib.contextmanager
def as_in_training(device: str) -> Iterator[None]:
    """With gradients and without autocast, wherever a model is first called."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        yield


def relative_error(got: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> float:
    """The largest of norm(got - exact) / norm(exact); NaN if any is."""
    errors = []
    for ours, theirs in zip(got, exact, strict=True):
        theirs = theirs if theirs.dtype == torch.float64 else theirs.float()
        errors.append(((ours.to(theirs.device, theirs.dtype) - theirs).norm() / theirs.norm()).item())
    return max(errors, key=lambda error: (error != error, error))


def failure_line(failure: Exception) -> str:
    """The error on one line of at most 200 characters; a compiler's may fill pages."""
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
