"""Perplexity on a validation split: exp of the mean negative log-likelihood of the true residue over all selected
positions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from esm2_composer import alphabet
from esm2_composer.errors import UserError
from esm2_composer.model import ESM2

LENGTH_EDGES = (2, 65, 129, 257, 513, 1025)  # tokens at which a bin begins; the last has no end
LENGTH_BINS = (*(f"{low}-{high - 1}" for low, high in pairwise(LENGTH_EDGES)), f"{LENGTH_EDGES[-1]}-")
MAX_LOSS = 709  # nats: e to a higher one is not a finite float


@torch.no_grad()
def evaluate(net: ESM2, microbatches: Iterable[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Score `net`, on `device` already, on the packed microbatches (see `pool.pack`) of all ranks together.

    Returns loss (nats), perplexity, accuracy and number of selected positions, and the same
        at_mask      of those that show `<mask>`, where a model cannot copy
        at_residue   of those that show a residue, the true one or another
        by_length    by the tokens of the sequence, as shown: {"2-64": ..., ...}
        by_residue   by the true residue: {"L": ..., ...}
    as far as there are such positions.

    Raises:
        UserError: no position is selected, or a loss is NaN or too high to have a perplexity.
    """
    net.eval()
    # Sums of loss, of correct predictions, and of ones, by (shows <mask>, length bin, true id). In fp64 a sum over
    # more than 1e9 positions is exact to 1e-7 in any order, so it does not matter which rank computes what.
    sums = torch.zeros(3, 2, len(LENGTH_BINS), alphabet.VOCAB_SIZE, dtype=torch.float64, device=device)
    sequences = torch.zeros((), dtype=torch.int64, device=device)
    for batch in microbatches:
        lengths = batch["cu_seqlens"].diff()
        bins = torch.bucketize(lengths, torch.tensor(LENGTH_EDGES), right=True) - 1
        bins = bins.repeat_interleave(lengths)[batch["positions"]].to(device)
        tokens, cu_seqlens, positions, targets = (
            batch[key].to(device) for key in ("tokens", "cu_seqlens", "positions", "targets")
        )
        # As in training, except under FSDP's mixed_precision DEFAULT, which also rounds weights and residual
        # stream.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = net(tokens, cu_seqlens, batch["max_seqlen"], positions).float()
        loss = F.cross_entropy(logits, targets, reduction="none").double()
        values = torch.stack((loss, (logits.argmax(-1) == targets).double(), torch.ones_like(loss)))
        shows_mask = (tokens[positions] == alphabet.MASK).long()
        cell = (shows_mask * len(LENGTH_BINS) + bins) * alphabet.VOCAB_SIZE + targets
        sums.view(3, -1).index_add_(1, cell, values)
        sequences += batch["num_sequences"]
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(sequences)
    sums = sums.cpu()
    if not sums[2].any():
        raise UserError(f"none of {int(sequences):,} sequences has a selected position")
    at_mask, at_residue = sums[:, 1].sum((1, 2)), sums[:, 0].sum((1, 2))
    by_length = zip(LENGTH_BINS, sums.sum((1, 3)).T, strict=True)
    by_residue = zip(alphabet.TOKENS, sums.sum((1, 2)).T, strict=True)
    return {
        **_scores(sums.sum((1, 2, 3))),
        "sequences": int(sequences),
        **_groups([("at_mask", at_mask), ("at_residue", at_residue)]),
        "by_length": _groups(by_length),
        "by_residue": _groups(by_residue),
    }


def _groups(sums: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    return {name: _scores(each) for name, each in sums if each[2]}


def _scores(sums: torch.Tensor) -> dict[str, float]:
    loss, correct, count = sums.tolist()
    mean = loss / count
    if not mean < MAX_LOSS:
        raise UserError(f"the loss is {mean:g}, which has no perplexity: the weights have diverged or are damaged")
    return {
        "loss": mean,
        "perplexity": math.exp(mean),
        "accuracy": correct / count,
        "selected_tokens": int(count),
    }
