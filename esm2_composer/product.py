"""A linear layer's product and its gradients, as one thing that `fp8` can replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Product(NamedTuple):
    """How x (T, K), weight (N, K) and bias (N,) become x weight^T + bias, (T, N) in the type of x."""

    linear: Callable[..., torch.Tensor]  # x, weight, bias -> out, for autograd
    forward: Callable[..., tuple]  # the same without it -> out, and a tuple of tensors to keep
    keep: Callable[..., tuple]  # x, weight -> that tuple alone
    backward: Callable[..., tuple]  # the gradient of out, and those tensors -> those of x and weight


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple:
    kept = _keep(x, weight)
    return torch.addmm(bias.to(x.dtype), x, kept[1].t()), kept


def _keep(x: torch.Tensor, weight: torch.Tensor) -> tuple:
    return x, weight.to(x.dtype)


def _backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple:
    return grad @ weight, grad.t() @ x


PLAIN = Product(F.linear, _forward, _keep, _backward)
