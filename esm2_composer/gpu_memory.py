"""Memory on GPUs: how PyTorch allocates it, and what a user can do where there is too little."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from esm2_composer.errors import UserError


def let_it_grow() -> None:
    """Have PyTorch extend what it has allocated on a GPU, unless the user has set how it allocates.

    Each microbatch has another number of tokens. Freed pieces of one do not fit the next, so that PyTorch would
    allocate more, and at the limit wait for the GPU, free all that is unused and allocate anew, or find no room.
    It reads the variable when it first allocates.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # as PyTorch 2.9 and newer call it
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@contextlib.contextmanager
def naming_lack(remedy: str) -> Iterator[None]:
    """Turns torch's error for a GPU without room into a UserError that tells the remedy."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing it takes seconds
            raise
        found = str(error).partition(" If reserved")[0]  # advice follows, to set what `let_it_grow` has set
        raise UserError(f"a GPU has no room; {remedy} ({found})") from error
