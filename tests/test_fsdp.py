"""The mean of sharded gradients over CPU ranks, whether torch's gloo gives it or the sum."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from composer.core import Engine, Event, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from torch.distributed.fsdp import fully_shard

from esm2_composer.callbacks import GradientClipping
from esm2_composer.distributed import fsdp
from esm2_composer.distributed.collectives import end_process_group
from esm2_composer.distributed.fsdp import DivideByRanks, means_are_sums


def be_rank(rank: int, ranks: int, folder: Path) -> None:
    """Write the gradient of sharded weights of one, where rank r has the input r + 1; and what gloo gives."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    model = torch.nn.Linear(3, 2, bias=False)
    fully_shard(model)
    model(torch.full((1, 3), rank + 1.0)).sum().backward()
    sums, uncorrected = means_are_sums(), model.weight.grad.full_tensor().clone()
    correction = DivideByRanks()
    if sums:
        correction.apply(Event.AFTER_TRAIN_BATCH, SimpleNamespace(model=model), logger=None)
    corrected = model.weight.grad.full_tensor()
    torch.save({"sums": sums, "uncorrected": uncorrected, "corrected": corrected}, folder / f"{rank}.pt")
    end_process_group()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sharded_gradient_is_the_mean_over_ranks(ranks: int, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(be_rank, (ranks, tmp_path), ranks, start_method="fork")
    mean = (1 + ranks) / 2
    for rank in range(ranks):
        seen = torch.load(tmp_path / f"{rank}.pt")
        assert seen["corrected"].tolist() == [[mean] * 3] * 2
        assert seen["uncorrected"].tolist() == [[mean * ranks if seen["sums"] else mean] * 3] * 2
        assert ranks > 1 or not seen["sums"], "the mean of one is itself"


def test_gradients_are_divided_before_they_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp.dist, "get_world_size", lambda: 4)
    model = torch.nn.Linear(2, 1, bias=False)
    state = State(model, 0, "", DeviceCPU(), algorithms=[DivideByRanks()], callbacks=[GradientClipping(1.0)])
    state.set_dataloader([None], "train")
    state.max_duration = "1ba"
    engine = Engine(state, Logger(state))
    for gradient, clipped in (([12.0, 16.0], [0.6, 0.8]), ([1.2, 1.6], [0.3, 0.4])):
        model.weight.grad = torch.tensor([gradient])
        engine.run_event(Event.AFTER_BACKWARD)  # of a microbatch
        assert model.weight.grad.tolist() == torch.tensor([gradient]).tolist(), "not complete yet"
        engine.run_event(Event.AFTER_TRAIN_BATCH)
        torch.testing.assert_close(model.weight.grad, torch.tensor([clipped]))
