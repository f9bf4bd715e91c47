"""Which of the ranks this process is: a launcher, such as composer or torchrun, says so in the environment."""

from __future__ import annotations

import os

from esm2_composer.errors import UserError

LEAST = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "NODE_RANK": 0}


def check_place(joins: bool = True) -> None:
    """Raise a UserError if what a launcher would set is no place among ranks, or, for a process that joins others,
    is not all there."""
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
