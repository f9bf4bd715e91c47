"""How FSDP shards a model over ranks; and on CPU ranks the mean of its gradients, where torch returns their
sum."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from esm2_composer.distributed.collectives import say
from esm2_composer.recipe.schema import FSDPSection


def parallelism_of(fsdp: FSDPSection | None, on_gpu: bool) -> dict[str, Any] | None:
    """The section as the Trainer's `parallelism_config`; None for DDP.

    Raises:
        UserError: the data_parallel degrees do not fit the number of ranks.
    """
    if fsdp is None:
        return None
    if fsdp.version == 1 and not on_gpu:
        say("no GPU here: training unsharded, since FSDP version 1 needs GPUs (fsdp.version=2 does not)")
        return None
    fsdp.check_degrees(dist.get_world_size())
    os.environ["FSDP_VERSION"] = str(fsdp.version)  # Composer's only switch
    return {"fsdp": fsdp_options(fsdp)}


def fsdp_options(fsdp: FSDPSection) -> dict[str, Any]:
    """The section in the terms of Composer's configuration of that version."""
    options = dataclasses.asdict(fsdp)
    for key in ("version", "activation_checkpointing"):  # the model recomputes by itself
        del options[key]
    if fsdp.version == 1:
        return options
    options["reshard_after_forward"] = options.pop("sharding_strategy") == "FULL_SHARD"
    for key in ("data_parallel_shard_degree", "data_parallel_replicate_degree", "sync_module_states"):
        del options[key]  # version 2 finds these out, or cannot do them
    return options


def means_are_sums() -> bool:
    """Whether the default process group returns a sum when asked for a mean over ranks.

    gloo does so in torch 2.7, without an error, when FSDP2 reduces gradients. All ranks must call this.
    """
    ranks = dist.get_world_size()
    mean = torch.empty(1)
    torch.distributed.reduce_scatter_tensor(mean, torch.ones(ranks), op=torch.distributed.ReduceOp.AVG)
    return mean.item() != 1.0


class DivideByRanks(Algorithm):
    """Divides the gradients by the number of ranks, once they are complete.

    As an algorithm, since those run before callbacks, of which clipping is one.
    """

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(dist.get_world_size())
