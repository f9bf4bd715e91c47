"""Perplexities that a model reaches without learning context: the floors to beat.

Under an 80/10/10 mask one selected position in five shows a residue, the true one about half the time, so a model
that has learnt only to copy scores well below the residues' own entropy. The floors say how well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from esm2_composer import alphabet
from esm2_composer.data.checks import check_cache
from esm2_composer.data.loaders import open_clusters
from esm2_composer.data.masking import MaskingRule
from esm2_composer.recipe.schema import DataSection

MAX_CLUSTERS = 2**20  # of a split with more, so many are read for the floors: their error is then below 0.01


def data_floors(data: DataSection, rules: Iterable[MaskingRule]) -> list[dict[str, float]]:
    """The floors (see `floors`) of the shards at `data` under each of `rules`.

    Raises:
        UserError: there are no such shards, they are not of clusters, or the cache holds other ones.
    """
    check_cache(data)
    train, valid = (_clusters(*data.split(name)) for name in ("train", "valid"))
    train = residue_frequencies(train, data.max_length, added=1)  # so that no residue is impossible
    valid = residue_frequencies(valid, data.max_length)
    return [floors(train, valid, rule) for rule in rules]


def _clusters(remote: str | None, local: str) -> Iterator[dict[str, Any]]:
    """A split's clusters; of one with very many, `MAX_CLUSTERS` in blocks spread evenly over its shards."""
    clusters = open_clusters(remote, local, draw=None, batch_size=1)
    total = clusters.num_samples
    blocks = 64 if total > MAX_CLUSTERS else 1
    size = min(total, MAX_CLUSTERS) // blocks
    for block in range(blocks):
        start = block * total // blocks
        yield from map(clusters.get_item, range(start, start + size))


def residue_frequencies(clusters: Iterable[dict[str, Any]], max_length: int, added: int = 0) -> np.ndarray:
    """Share of each of the 33 ids among residues as drawn, and `added` more of each letter.

    As in training without `data.min_length`, a cluster shows one uniform member of it, and of that one uniform
    window of at most `max_length` tokens (`data.draw.ClusterDraw`): a residue counts by how often it shows.

    Args:
        clusters: samples of shards.
    """
    counts = np.zeros(256)
    for cluster in clusters:
        residues = np.frombuffer(cluster["residues"], dtype=np.uint8)
        shown = _shown(cluster["lengths"], max_length)
        counts += np.bincount(residues, shown, minlength=256) / len(cluster["lengths"])
    frequencies = np.zeros(alphabet.VOCAB_SIZE)
    for letter in alphabet.LETTERS:
        frequencies[alphabet.TOKENS.index(letter)] = counts[ord(letter)] + added
    return frequencies / frequencies.sum()


def _shown(lengths: np.ndarray, max_length: int) -> np.ndarray | None:
    """The share of a member's windows that show a residue, of all residues end to end; None: all show them all."""
    longer = np.flatnonzero(lengths + 2 > max_length)  # <cls> and <eos>, too, take places of a window
    if not len(longer):
        return None
    shown = np.ones(lengths.sum())
    ends = lengths.cumsum()
    for member in longer:
        windows = lengths[member] + 3 - max_length
        place = np.arange(1, lengths[member] + 1)
        first, last = np.maximum(place - max_length + 1, 0), np.minimum(place, windows - 1)  # to show it
        shown[ends[member] - lengths[member] : ends[member]] = (last - first + 1) / windows
    return shown


def floors(train: np.ndarray, valid: np.ndarray, rule: MaskingRule) -> dict[str, float]:
    """Perplexities on residues distributed as `valid` of models that know the frequencies `train` only.

    unigram: predicts them at every position. copier: combines them with the visible input token, the best
    that can be done without context under `rule`.

    Args:
        train, valid: frequencies of the 33 ids, float (33,).
    """
    masked, replaced, kept = rule.split

    def joint(frequencies: np.ndarray) -> np.ndarray:
        """[s, t]: how often the true token is t, and the input shows s, not <mask>."""
        shares = np.diag(kept * frequencies)
        shares[rule.choices] += replaced / len(rule.choices) * frequencies
        return shares

    present = valid > 0
    unigram = -float(valid[present] @ np.log(train[present]))
    seen, model = joint(valid), joint(train)
    happens = seen > 0
    given_shown = model[happens] / np.broadcast_to(model.sum(1, keepdims=True), model.shape)[happens]
    copier = masked * unigram - float(seen[happens] @ np.log(given_shown))
    return {"unigram": math.exp(unigram), "copier": math.exp(copier)}
