"""The layers' matrix products in fp8, by torchao: an option for GPUs of compute capability 8.9 on (H100, B200).

Weights, optimizer, norms, attention and the head stay as they are; the inputs and weights of the four products of
a layer are rounded to e4m3 and their gradients to e5m2, each tensor under a scale of its own, found anew at each
use. What it gives up: a scale belongs to a whole microbatch, so other sequences beside one change its last digits,
and so do other numbers of ranks.
"""

from __future__ import annotations

import torch
from torch import nn

from esm2_composer.errors import UserError
from esm2_composer.model import ESM2


def use_fp8(net: ESM2, emulate: bool = False) -> None:
    """Exchange the linear modules of the layers for ones that compute in fp8; parameters and names stay.

    Args:
        net: to be changed before it is compiled, sharded or given to an optimizer.
        emulate: round as fp8 does, but multiply in higher precision, on any device: for tests.

    Raises:
        UserError: torchao is not installed, this GPU has no fp8, or a dimension is no multiple of 16.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(f"fp8: torchao cannot be imported ({error}); pip install 'esm2-composer[fp8]'") from error
    if not emulate and torch.cuda.get_device_capability() < (8, 9):
        raise UserError(f"fp8: {torch.cuda.get_device_name()} has no fp8 products; an H100 or newer has")
    if net.config.hidden_size % 16 or net.config.ffn_hidden_size % 16:
        raise UserError("fp8: hidden_size and ffn_hidden_size must be multiples of 16")
    # The products that give the weights' gradients sum over tokens, whose number need not be a multiple of 16 ...
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    for layer in net.layers:  # ... and the head's inputs are few, and too fine for fp8
        convert_to_float8_training(layer, config=config)
    assert not any(type(module) is nn.Linear for layer in net.layers for module in layer.modules())
