"""Train by a recipe, and write the gradient's norm at each update, unclipped, the losses and the final weights:
composer -n N tests/gradient_norms.py OUT.pt RECIPE [key=value ...]"""

import sys

import torch
from composer.core import Callback
from composer.utils import dist
from torch.distributed.tensor import DTensor

from esm2_composer.config import load_recipe
from esm2_composer.runner import build_trainer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Record(Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []
        self.losses: list[float] = []

    def after_train_batch(self, state, logger) -> None:  # after clipping, at a norm never reached
        gradients = [whole(p.grad) for p in state.model.parameters() if p.grad is not None]
        self.norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    def batch_end(self, state, logger) -> None:
        self.losses.append(state.total_loss_dict["loss/train/total"])


if __name__ == "__main__":
    out, recipe, *overrides = sys.argv[1:]
    trainer, _ = build_trainer(load_recipe(recipe, overrides))
    record = Record()
    trainer.state.callbacks.append(record)
    trainer.fit()
    weights = {name: whole(p.detach()) for name, p in trainer.state.model.named_parameters()}
    weights = {name.removeprefix("module."): weight for name, weight in weights.items()}
    if not dist.get_global_rank():
        torch.save({"norms": record.norms, "losses": record.losses, "weights": weights}, out)
