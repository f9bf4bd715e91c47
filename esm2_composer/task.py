"""ESM-2's masked-language-model training as a ComposerModel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from composer.metrics import LanguageCrossEntropy, LanguagePerplexity, MaskedAccuracy
from composer.models import ComposerModel
from torchmetrics import Metric

from esm2_composer.data.pool import Microbatch
from esm2_composer.model import ESM2


class MaskedLanguageModel(ComposerModel):
    """Predicts the true ids at a microbatch's selected positions; no logits are computed elsewhere."""

    def __init__(self, net: ESM2) -> None:
        super().__init__()
        self.net = net
        self._metrics = {
            "loss": LanguageCrossEntropy(),
            "perplexity": LanguagePerplexity(),
            "masked_accuracy": MaskedAccuracy(),
        }
        self._correct: torch.Tensor | int = 0
        self._predicted = 0

    def forward(self, batch: Microbatch) -> torch.Tensor:
        """Logits (M, 33) of the M selected tokens, fp32 or, in mixed precision, bf16."""
        return self.net(batch["tokens"], batch["cu_seqlens"], batch["max_seqlen"], batch["positions"])

    def loss(self, outputs: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        """The mean over the microbatch's selected tokens, fp32 (). Composer (`accumulate_train_batch_on_tokens`)
        weights it by `pool.data_spec`'s "loss_generating" count, so that the gradient is the mean over all
        selected tokens of the global batch."""
        self._correct += (outputs.detach().argmax(dim=-1) == batch["targets"]).sum()
        self._predicted += batch["num_masked"]
        total = F.cross_entropy(outputs.float(), batch["targets"], reduction="sum")
        return total / max(batch["num_masked"], 1)

    def take_accuracy(self) -> tuple[int, int]:
        """How many selected tokens this rank predicted right, and of how many, in training since the last call.
        Waits for the GPU."""
        taken = int(self._correct), self._predicted
        self._correct, self._predicted = 0, 0
        return taken

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else self._metrics  # Composer would compute them over all ranks at every update

    def update_metric(self, batch: Microbatch, outputs: torch.Tensor, metric: Metric) -> None:
        if len(batch["targets"]):  # Composer's metrics reject an empty batch
            metric.update(outputs.float(), batch["targets"])

    def flops_per_batch(self, batch: dict[str, Any]) -> int:
        """Operations of a training step on this rank's whole batch, for Composer's SpeedMonitor."""
        return sum(self.net.flops(m["cu_seqlens"].diff().tolist(), m["num_masked"]) for m in batch["microbatches"])
