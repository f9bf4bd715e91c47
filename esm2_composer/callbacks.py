"""What happens around the steps of a run: stopping early, clipping, freeing gradients, and measuring."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.fsdp import FullyShardedDataParallel

from esm2_composer import preemption
from esm2_composer.distributed.collectives import all_gather, cpu_group
from esm2_composer.loggers import LOSS
from esm2_composer.task import MaskedLanguageModel

EVERY = 10  # updates between two readings of values that cost a synchronisation


class Preempted(Exception):
    """Raised on all ranks at once, between two updates."""


class Preemption(Callback):
    """Raises `Preempted` on every rank, once one rank was told to stop (see `preemption`).

    Ranks ask each other once an update has been launched, and read the answer after it, so that GPUs compute
    meanwhile: gloo sends a number around the ring of ranks twice, which on a hundred ranks takes longer than all
    else that a host does between two updates.
    """

    def __init__(self) -> None:
        # Not the default group: on GPUs that is NCCL's, and asking it would make the GPU wait.
        self._group = cpu_group()
        self._told: torch.Tensor | None = None
        self._asking: torch.distributed.Work | None = None
        self._fitting = False

    def fit_start(self, state: State, logger: Logger) -> None:
        dist.barrier()
        preemption.in_training.set()
        self._fitting = True

    def before_dataloader(self, state: State, logger: Logger) -> None:
        preemption.waiting_for_data.set()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        preemption.waiting_for_data.clear()

    def epoch_end(self, state: State, logger: Logger) -> None:
        preemption.waiting_for_data.clear()  # the loader had no further batch

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self._ask()

    def batch_end(self, state: State, logger: Logger) -> None:
        self._leave_if_told()

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        if self._fitting:
            self._ask()
            self._leave_if_told()

    def _ask(self) -> None:
        if self._group is not None:
            self._told = torch.tensor(int(preemption.received.is_set()))
            maximum = torch.distributed.ReduceOp.MAX
            self._asking = torch.distributed.all_reduce(self._told, maximum, self._group, async_op=True)

    def _leave_if_told(self) -> None:
        if self._group is None:
            leaving = preemption.received.is_set()
        else:
            self._asking.wait()
            leaving = bool(self._told)
        if leaving:
            raise Preempted


class GradientClipping(Callback):
    """Clips the norm of the whole gradient, and logs what it was. (Composer's algorithm keeps it to itself.)"""

    def __init__(self, max_norm: float) -> None:
        self._max_norm = max_norm
        self._norm: torch.Tensor | None = None

    def after_train_batch(self, state: State, logger: Logger) -> None:
        roots = [m for m in state.model.modules() if isinstance(m, FullyShardedDataParallel) and m.check_is_root()]
        if roots:
            (root,) = roots
            self._norm = root.clip_grad_norm_(self._max_norm)
        else:
            self._norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), self._max_norm)

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % EVERY == 0:
            norm = self._norm.full_tensor() if hasattr(self._norm, "full_tensor") else self._norm
            logger.log_metrics({"gradient_norm": norm.item()})


class GradientRelease(Callback):
    """Frees the gradients before an evaluation, which has no use for them.

    In evaluation FSDP 1 gives parameters their full shape in bf16, while gradients stay fp32 shards.
    torch.compile, which compiles in a resumed run's first evaluation, rejects a gradient that does not fit its
    parameter.
    """

    def eval_start(self, state: State, logger: Logger) -> None:
        for optimizer in state.optimizers:
            optimizer.zero_grad()


class TokenMonitor(Callback):
    """Logs how good the batches are, and how well the model does on them.

    `load/fill`: real tokens as a fraction of what microbatches may hold; `load/balance`: the mean rank's work
    (`pool.work_of`) as a fraction of the busiest rank's, for which all others wait; perplexity and masked accuracy
    in training.
    """

    def __init__(self, model: MaskedLanguageModel, microbatch_tokens: int) -> None:
        self._model, self._microbatch_tokens = model, microbatch_tokens
        self._group = cpu_group()
        self._counts = (0, 0, 0)

    def batch_start(self, state: State, logger: Logger) -> None:
        batch = state.batch
        self._counts = (batch["num_tokens"], len(batch["microbatches"]), batch["work"])

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % EVERY:
            return
        mine = np.array([*self._counts, *self._model.take_accuracy()], np.float64)
        ranks = np.stack(all_gather(mine, self._group))
        tokens, microbatches, work, correct, predicted = ranks.sum(0).tolist()
        logger.log_metrics(
            {
                "load/fill": tokens / (microbatches * self._microbatch_tokens),
                "load/balance": work / (len(ranks) * ranks[:, 2].max().item()),
                "metrics/train/perplexity": math.exp(min(state.total_loss_dict[LOSS], 50)),
                "metrics/train/masked_accuracy": correct / max(predicted, 1),
            }
        )
