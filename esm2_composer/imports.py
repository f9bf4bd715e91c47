"""Imports that take seconds, such as torch's and Composer's: commands make them last, once all is checked."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def slow_imports() -> Iterator[None]:
    """For what is imported in it, hardly ever garbage. Python would look through it again and again while it
    grows, whenever it looks for garbage later, and once more at the end."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
