"""AdamW as ESM-2 was trained with it, and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def build_adamw(
    model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over the trainable parameters.

    Biases and layer norms, that is all 1-D parameters, are not decayed; the embedding is.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def rate_factor(update: int, warmup: int, updates: int, decay_fraction: float, floor: float) -> float:
    """The factor on the peak learning rate for update number `update`, counted from 1.

    Linear warmup over `warmup` updates, linear decay to `floor` over `decay_fraction` of the rest of the
    run's `updates`, then constant.
    """
    if update < warmup:
        return update / warmup
    progress = (update - warmup) / (decay_fraction * (updates - warmup))
    return max(floor, 1 - (1 - floor) * progress)


def build_schedule(
    optimizer: torch.optim.Optimizer, warmup: int, updates: int, decay_fraction: float, floor: float
) -> LambdaLR:
    """ESM-2's schedule (see `rate_factor`), to be stepped after every update.

    torch counts the steps made. Composer's own scheduler protocol would read the clock instead, which lags:
    its first two updates share a rate.
    """
    return LambdaLR(optimizer, lambda done: rate_factor(done + 1, warmup, updates, decay_fraction, floor))


def settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Rates, decays and the like of each parameter group."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def restore_settings(
    optimizer: torch.optim.Optimizer, schedule: LambdaLR, groups: Sequence[dict[str, Any]]
) -> None:
    """Replace the settings loaded from a checkpoint by `groups`, those from before it was loaded.

    The moments and the schedule's position stay.
    """
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    for group, given, factor in zip(optimizer.param_groups, groups, schedule.lr_lambdas, strict=True):
        group.update(given, lr=given["initial_lr"] * factor(schedule.last_epoch))
