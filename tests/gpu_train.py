"""train.py with what recipes keep for GPUs, on CPU ranks: FSDP version 1, and bf16.

torch has both on CPUs too, but for a few lines: Composer and our runner do not ask for them there. What else a GPU
has, its kernels, streams, memory and NCCL, is not here.

    composer -n N tests/gpu_train.py RECIPE [key=value ...]
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path

import torch
from composer.core import Precision
from composer.distributed import dist_strategy
from composer.trainer import trainer
from torch.distributed.fsdp import _init_utils
from torch.distributed.fsdp._flat_param import FlatParamHandle

from esm2_composer import runner

TRAIN = Path(__file__).parent.parent / "train.py"


def autocast(precision: Precision, *_: object, **__: object) -> contextlib.AbstractContextManager:
    """In the place of Composer's `get_precision_context`, which casts on GPUs only."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == Precision.AMP_BF16)


def allow() -> None:
    parallelism_of, to_empty = runner.parallelism_of, torch.nn.Module.to_empty
    runner.parallelism_of = lambda fsdp, on_gpu: parallelism_of(fsdp, on_gpu=True)
    runner._precision = lambda precision, on_gpu: precision
    dist_strategy._validate_precision = trainer._validate_precision = lambda precision, device: None
    trainer.get_precision_context = autocast
    torch.cuda.current_device = lambda: torch.device("cpu")  # Composer tells FSDP to shard there
    torch.nn.Module.to_empty = lambda module, device, recurse=True: to_empty(module, device="cpu", recurse=recurse)
    _init_utils._check_module_states_for_sync_module_states = lambda states: None  # gloo can send them
    # torch frees what it has copied to a CPU, or writes over it; from a CPU `cpu()` is no copy.
    FlatParamHandle.to_cpu = lambda handle: contextlib.nullcontext()
    torch.Tensor.cpu = torch.Tensor.clone


if __name__ == "__main__":
    allow()
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")
