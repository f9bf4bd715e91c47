"""One process of several, started by a launcher such as composer or torchrun, which sets its environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from esm2_composer import preemption
from esm2_composer.distributed.sockets import be_reachable, open_many_files
from esm2_composer.errors import ReportedError, UserError

Result = TypeVar("Result")

LEAST = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "NODE_RANK": 0}


def run_on_ranks(main: Callable[[], Result], joins: bool = True) -> Result:
    """Run `main` on each rank, so that for an error raised on all of them the launcher returns rank 0's exit code.

    Args:
        joins: whether the processes connect; False for one that only asks how many there would be.

    Raises:
        UserError: see `check_environment` and `sockets.be_reachable`.
    """
    check_environment(joins)
    try:
        if joins:
            be_reachable()
            open_many_files()
        return main()
    except ReportedError:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            preemption.let_rank_zero_leave_first()
        raise


def check_environment(joins: bool = True) -> None:
    """Raise a UserError if what a launcher would set is not a valid rank, or, for a process that joins others, is
    incomplete."""
    place = {}
    for name, minimum in LEAST.items():
        value = os.environ.get(name, str(minimum))
        if not (value.isascii() and value.isdecimal()) or int(value) < minimum:
            raise UserError(f"the environment variable {name} is {value!r}; it must be a number from {minimum} up")
        place[name] = int(value)
    remedy = "unset it, or start with a launcher, such as composer"
    for rank, ranks in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("NODE_RANK", "WORLD_SIZE")):
        if place[rank] >= place[ranks]:
            raise UserError(
                f"the environment variable {rank} is {place[rank]}, of {ranks} {place[ranks]}; {remedy}"
            )
    needed = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if joins and place["WORLD_SIZE"] > 1 and (absent := [name for name in needed if name not in os.environ]):
        raise UserError(f"the environment variable WORLD_SIZE is set, but not {', '.join(absent)}; {remedy}")
