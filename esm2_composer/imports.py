"""Imports that take seconds, such as torch's and Composer's: commands make them last, once all is checked."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def slow_imports() -> Iterator[None]:
    """Turn the garbage collector off during imports, and leave out of it what they made: that is hardly ever
    garbage, and to look through it, again and again as it grows, then later, and at the end, takes seconds."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
