"""How good a model is on a validation split, and what it costs nothing to reach there.

Perplexity is exp of the mean negative log-likelihood of the true residue over all selected positions. Under an
80/10/10 mask one selected position in five shows a residue, the true one about half the time, so a model that
has learnt no context, only to copy, scores well below the residues' own entropy. The floors say how well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from esm2_composer import alphabet
from esm2_composer.masking import MaskingRule
from esm2_composer.model import ESM2


@torch.no_grad()
def evaluate(net: ESM2, microbatches: Iterable[dict[str, Any]], device: torch.device) -> dict[str, float]:
    """Score `net`, on `device` already, on packed microbatches (see `pool.pack`).

    Returns loss (nats), perplexity and accuracy over the selected positions, and how many there were.
    """
    net.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    masked = sequences = 0
    for batch in microbatches:
        tokens, cu_seqlens, positions, targets = (
            batch[key].to(device) for key in ("tokens", "cu_seqlens", "positions", "targets")
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # as in training
            logits = net(tokens, cu_seqlens, batch["max_seqlen"], positions).float()
        loss += F.cross_entropy(logits, targets, reduction="sum").double()
        correct += (logits.argmax(-1) == targets).sum()
        masked += batch["num_masked"]
        sequences += batch["num_sequences"]
    mean = loss.item() / max(masked, 1)
    return {
        "loss": mean,
        "perplexity": math.exp(mean),
        "accuracy": correct.item() / max(masked, 1),
        "masked_tokens": masked,
        "sequences": sequences,
    }


def residue_frequencies(clusters: Iterable[dict[str, Any]]) -> np.ndarray:
    """Share of each of the 33 ids among residues as drawn: one uniform member a cluster. Add-one smoothed
    over the letters, so that no residue is impossible."""
    counts = np.zeros(256)
    for cluster in clusters:
        residues = np.frombuffer(cluster["residues"], dtype=np.uint8)
        counts += np.bincount(residues, minlength=256) / len(cluster["lengths"])
    frequencies = np.zeros(alphabet.VOCAB_SIZE)
    for letter in alphabet.LETTERS:
        frequencies[alphabet.TOKENS.index(letter)] = counts[ord(letter)] + 1
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
