"""The mean of sharded gradients over CPU ranks, where torch gives their sum."""

from __future__ import annotations

import torch
import torch.distributed as dist
from composer.core import Algorithm, Event, State
from composer.loggers import Logger


def means_are_sums() -> bool:
    """Whether the default process group adds up where a mean over ranks is asked for.

    gloo does so in torch 2.7, without an error, when FSDP2 reduces gradients. All ranks must call this.
    """
    ranks = dist.get_world_size()
    mean = torch.empty(1)
    dist.reduce_scatter_tensor(mean, torch.ones(ranks), op=dist.ReduceOp.AVG)
    return mean.item() != 1.0


class DivideByRanks(Algorithm):
    """Divides the gradients by the number of ranks, once they are complete.

    As an algorithm, since those come before callbacks, of which clipping is one.
    """

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(dist.get_world_size())
