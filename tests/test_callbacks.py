"""Ranks leave together, once one of them was told to; gradients are gone while a model is evaluated."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from esm2_composer import preemption
from esm2_composer.callbacks import GradientRelease, Preempted, Preemption
from esm2_composer.distributed.collectives import end_process_group


def leave_when_told(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}  # a Trainer of another test may have left its own
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    callback = Preemption()
    callback.after_train_batch(None, None)
    if rank:
        preemption.received.set()  # too late for this update: the other rank could not know
    callback.batch_end(None, None)
    callback.after_train_batch(None, None)
    with pytest.raises(Preempted):
        callback.batch_end(None, None)
    (folder / f"{rank} has left").touch()
    end_process_group()


def test_a_rank_that_is_told_in_mid_update_leaves_with_the_others_after_the_next(tmp_path):
    torch.multiprocessing.start_processes(leave_when_told, (tmp_path,), 2, start_method="fork")
    assert len(list(tmp_path.glob("* has left"))) == 2


def test_a_rank_alone_leaves_after_the_update_in_which_it_is_told(monkeypatch):
    callback = Preemption()
    callback.after_train_batch(None, None)
    callback.batch_end(None, None)
    callback.after_train_batch(None, None)
    monkeypatch.setattr(preemption.received, "is_set", lambda: True)
    with pytest.raises(Preempted):
        callback.batch_end(None, None)


def test_gradients_are_freed_before_an_evaluation():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    GradientRelease().eval_start(SimpleNamespace(optimizers=(optimizer,)), None)
    assert [parameter.grad for parameter in model.parameters()] == [None, None]
