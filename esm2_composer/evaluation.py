"""Perplexity on a validation split, and the floors that a model reaches without learning context.

Perplexity is exp of the mean negative log-likelihood of the true residue over all selected positions. Under an
80/10/10 mask one selected position in five shows a residue, the true one about half the time, so a model that
has learnt no context, only to copy, scores well below the residues' own entropy. The floors say how well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from esm2_composer import alphabet
from esm2_composer.config import DataSection
from esm2_composer.errors import UserError
from esm2_composer.masking import MaskingRule
from esm2_composer.model import ESM2

LENGTH_EDGES = (2, 65, 129, 257, 513, 1025)  # tokens at which a bin begins; the last has no end
LENGTH_BINS = (*(f"{low}-{high - 1}" for low, high in pairwise(LENGTH_EDGES)), f"{LENGTH_EDGES[-1]}-")
MAX_LOSS = 709  # nats: e to a higher one is no float
FLOOR_CLUSTERS = 2**20  # of a split with more, so many are read for the floors: their error is then below 0.01


@torch.no_grad()
def evaluate(net: ESM2, microbatches: Iterable[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Score `net`, on `device` already, on the packed microbatches (see `pool.pack`) of all ranks together.

    Returns loss (nats), perplexity, accuracy and number of the selected positions, and the same
        at_mask      of those that show `<mask>`, where a model cannot copy
        at_residue   of those that show a residue, the true one or another
        by_length    by the tokens of the sequence, as shown: {"2-64": ..., ...}
        by_residue   by the true residue: {"L": ..., ...}
    as far as there are such positions.

    Raises:
        UserError: no position is selected, or a loss is no number that has a perplexity.
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
        # As in training, but under FSDP's mixed_precision DEFAULT, which rounds weights and residual stream, too.
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


def data_floors(data: DataSection, rules: Iterable[MaskingRule]) -> list[dict[str, float]]:
    """The floors (see `floors`) of the shards at `data` under each of `rules`.

    Raises:
        UserError: there are no such shards, they are not of clusters, or the cache holds other ones.
    """
    from esm2_composer.data import check_cache

    check_cache(data)
    train = residue_frequencies(_clusters(*data.split("train")), added=1)  # so that no residue is impossible
    valid = residue_frequencies(_clusters(*data.split("valid")))
    return [floors(train, valid, rule) for rule in rules]


def _clusters(remote: str | None, local: str) -> Iterator[dict[str, Any]]:
    """A split's clusters; of one with very many, `FLOOR_CLUSTERS` in blocks spread evenly over its shards."""
    from esm2_composer.data import open_clusters

    clusters = open_clusters(remote, local, draw=None, batch_size=1)
    total = clusters.num_samples
    blocks = 64 if total > FLOOR_CLUSTERS else 1
    size = min(total, FLOOR_CLUSTERS) // blocks
    for block in range(blocks):
        start = block * total // blocks
        yield from map(clusters.get_item, range(start, start + size))


def residue_frequencies(clusters: Iterable[dict[str, Any]], added: int = 0) -> np.ndarray:
    """Share of each of the 33 ids among residues as drawn, one uniform member a cluster, and `added` more of each
    letter."""
    counts = np.zeros(256)
    for cluster in clusters:
        residues = np.frombuffer(cluster["residues"], dtype=np.uint8)
        counts += np.bincount(residues, minlength=256) / len(cluster["lengths"])
    frequencies = np.zeros(alphabet.VOCAB_SIZE)
    for letter in alphabet.LETTERS:
        frequencies[alphabet.TOKENS.index(letter)] = counts[ord(letter)] + added
    return frequencies / frequencies.sum()


def floors(train: np.ndarray, valid: np.ndarray, rule: MaskingRule) -> dict[str, float]:
    """Perplexities on residues distributed as `valid` of models that know the frequencies `train` only.

    unigram: predicts them at every position. copier: combines them with the visible input token, the best
    that can be done without context under `rule`.

    Args:
        train, valid: frequencies of the 33 ids, float (33,).
    """
    masked, replaced, kept = rule.split
    choices = np.arange(alphabet.VOCAB_SIZE) if rule.all_tokens else alphabet.AMINO_ACIDS
    # joint[s, t]: the true token is t and the input shows s, given that it is not masked
    joint = np.diag(kept * train)
    joint[choices] += replaced / len(choices) * train
    shown = joint.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        given_shown = -np.log(joint / shown)
        entropy = -np.log(train)
    present = valid > 0
    unigram = float(valid[present] @ entropy[present])
    after_replacement = float(valid[present] @ given_shown[choices][:, present].mean(0))
    after_keeping = float(valid[present] @ given_shown.diagonal()[present])
    copier = masked * unigram + replaced * after_replacement + kept * after_keeping
    return {"unigram": math.exp(unigram), "copier": math.exp(copier)}
