"""What one rank does for all, and how ranks disconnect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch.distributed
from composer.utils import dist

from esm2_composer.errors import ReportedError, tell

T = TypeVar("T")


def say(line: str) -> None:
    """Print a line, on the first rank only."""
    if not dist.get_global_rank():
        tell(line)


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0; return its value, or raise its one-line error, on every rank."""
    outcome: list = [None, None]
    if not dist.get_global_rank():
        try:
            outcome[0] = action()
        except ReportedError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_rank(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank; return the values of all, or raise the first one-line error, on every rank."""
    outcome: list = [None, None]
    try:
        outcome[0] = action()
    except ReportedError as error:
        outcome[1] = error
    outcomes = dist.all_gather_object(outcome)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [value for value, _ in outcomes]


def cpu_group() -> torch.distributed.ProcessGroup | None:
    """A new group of all ranks for CPU tensors, for which no GPU has to wait; None for a single rank."""
    return torch.distributed.new_group(backend="gloo") if dist.get_world_size() > 1 else None


def all_gather(
    mine: np.ndarray, group: torch.distributed.ProcessGroup | None, sizes: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Every rank's 1-D array, through a `cpu_group`; `sizes` are their lengths, if those differ."""
    if group is None:
        return [mine]
    sizes = sizes or [len(mine)] * group.size()
    padded = torch.zeros(max(sizes), dtype=torch.from_numpy(mine[:0]).dtype)
    padded[: len(mine)] = torch.from_numpy(mine)
    out = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(out, padded, group=group)
    return [each[:size].numpy() for each, size in zip(out, sizes, strict=True)]


def end_process_group() -> None:
    """torch's `destroy_process_group`, which may never return after a collective of gloo.

    A gloo thread frees what a collective was given, which takes Python's lock. Destroying a group holds that lock
    and waits for the thread (before torch 2.8, pytorch#154976). Destroying a backend releases it, so here the
    backends go last: those of the default group, if nothing else holds it. Other groups are idle by then.
    """
    group = torch.distributed.group.WORLD
    backends = [group._get_backend(device) for device in group._device_types]
    torch.distributed.destroy_process_group()
    del group, backends
