"""Train by a recipe, and write the gradient's norm at each update, unclipped, the losses and the final weights:
composer -n N tests/gradient_norms.py OUT.pt RECIPE [key=value ...]"""

import contextlib
import sys
from collections.abc import Iterator

import torch
from composer.core import Callback
from composer.utils import dist
from gpu_train import allow
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from esm2_composer.recipe.config import load_recipe
from esm2_composer.runner import build_trainer


@contextlib.contextmanager
def whole(model: torch.nn.Module) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor | None]]]:
    """Every parameter and its gradient by name, put together from the shards of all ranks."""

    def full(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    # Does nothing to a model that version 1 has not sharded.
    with FullyShardedDataParallel.summon_full_params(model, writeback=False, with_grads=True):
        named = ((name.replace("_fsdp_wrapped_module.", ""), p) for name, p in model.named_parameters())
        yield {name.removeprefix("module."): (full(p.detach()), full(p.grad)) for name, p in named}


class Record(Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []
        self.losses: list[float] = []

    def after_train_batch(self, state, logger) -> None:  # after clipping, at a norm never reached
        with whole(state.model) as parameters:
            gradients = [grad for _, grad in parameters.values() if grad is not None]
            self.norms.append(torch.cat([grad.flatten() for grad in gradients]).norm().item())

    def batch_end(self, state, logger) -> None:
        self.losses.append(state.total_loss_dict["loss/train/total"])


if __name__ == "__main__":
    out, recipe, *overrides = sys.argv[1:]
    recipe = load_recipe(recipe, overrides)
    if recipe.fsdp is not None and recipe.fsdp.version == 1:
        allow()
    trainer, _ = build_trainer(recipe)
    record = Record()
    trainer.state.callbacks.append(record)
    trainer.fit()
    with whole(trainer.state.model) as parameters:
        weights = {name: weight.clone() for name, (weight, _) in parameters.items()}
    if not dist.get_global_rank():
        torch.save({"norms": record.norms, "losses": record.losses, "weights": weights}, out)
