"""distributed/collectives.py: what rank zero does, or fails at, is the same on every rank; ranks part at once."""

import pickle
import time
from pathlib import Path

import pytest
import torch

from esm2_composer.conversion.convert import Interrupted
from esm2_composer.distributed.collectives import end_process_group, on_every_rank, on_rank_zero
from esm2_composer.errors import StoreUnavailable, UserError


@pytest.mark.parametrize("error", [UserError("mine"), StoreUnavailable("theirs"), Interrupted("full; kept")])
def test_what_rank_zero_fails_of_every_rank_fails_of(error, monkeypatch):
    def fail() -> None:
        raise error

    def send(outcome: list) -> None:
        sent.extend(pickle.loads(pickle.dumps(outcome)))

    def receive(outcome: list) -> None:
        outcome[:] = sent

    sent: list = []
    monkeypatch.setattr("composer.utils.dist.broadcast_object_list", send)
    with pytest.raises(type(error), match=str(error)):
        on_rank_zero(fail)
    monkeypatch.setattr("composer.utils.dist.get_global_rank", lambda: 1)
    monkeypatch.setattr("composer.utils.dist.broadcast_object_list", receive)
    with pytest.raises(type(error), match=str(error)):
        on_rank_zero(lambda: pytest.fail("this is rank 1"))


def fail_on_the_second(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)

    def fail() -> int:
        if rank:
            raise UserError("mine")
        return rank

    assert on_every_rank(lambda: rank) == [0, 1]
    with pytest.raises(UserError, match="mine"):
        on_every_rank(fail)
    (folder / f"{rank} has failed").touch()
    end_process_group()


def test_what_one_rank_fails_of_every_rank_fails_of(tmp_path):
    torch.multiprocessing.start_processes(fail_on_the_second, (tmp_path,), 2, start_method="fork")
    assert len(list(tmp_path.glob("* has failed"))) == 2


def meet_and_part(rank: int, folder: Path) -> None:
    for i in range(100):
        torch.distributed.init_process_group("gloo", f"file://{folder}/{i}", rank=rank, world_size=2)
        torch.distributed.broadcast_object_list([i])
        torch.distributed.all_reduce(torch.ones(3))
        end_process_group()


def test_ranks_part_as_soon_as_they_are_done(tmp_path):
    ranks = torch.multiprocessing.start_processes(meet_and_part, (tmp_path,), 2, join=False, start_method="fork")
    try:
        deadline = time.monotonic() + 60
        while not ranks.join(timeout=1):
            assert time.monotonic() < deadline, "a rank waits for ever"
    finally:
        for process in ranks.processes:
            process.kill()
