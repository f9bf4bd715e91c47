"""AdamW as ESM-2 was trained with it, and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from composer.core import State
from torch import nn


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


@dataclass(frozen=True)
class WarmupLinearHold:
    """ESM-2's schedule: linear warmup, linear decay over `decay_fraction` of the rest, then constant.

    A Composer scheduler: called with the state, it returns the factor on the peak learning rate.
    """

    warmup: int  # updates
    updates: int  # of the whole run
    decay_fraction: float  # of the updates after warmup
    floor: float  # factor at the end of the decay

    def factor(self, update: int) -> float:
        """The factor update number `update`, counted from 1, trains with."""
        if update < self.warmup:
            return update / self.warmup
        progress = (update - self.warmup) / (self.decay_fraction * (self.updates - self.warmup))
        return max(self.floor, 1 - (1 - self.floor) * progress)

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        # Composer asks before it counts the update that is about to be made.
        return self.factor(state.timestamp.batch.value + 1)
