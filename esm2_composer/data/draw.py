"""What is shown of a cluster in an epoch: a member, a window of it, and a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from esm2_composer import alphabet
from esm2_composer.data.masking import MaskingRule, choose, keyed_words, token_uniforms

# A part of a global batch: tokens uint8 (T,), labels uint8 (T,), lengths int32 (B,).
Share = dict[str, torch.Tensor]


Window = tuple[np.ndarray, int]  # tokens uint8 (T,) of a window, and the word that keys its mask


@dataclass(frozen=True)
class ClusterDraw:
    """What is shown of a cluster in an epoch: one member, one window of it, one mask.

    The member is uniform among those of at least `min_length` residues (among all, if none is so long). The
    window of at most `max_length` tokens is uniform over every window of `<cls> residues <eos>`, the last
    included, so `<cls>` and `<eos>` show at true ends only.
    """

    seed: int
    max_length: int
    min_length: int
    masking: MaskingRule

    def window(self, cluster: dict[str, Any], epoch: int) -> Window:
        """The window, not yet masked, of a cluster: its cluster_id, lengths (integers) and residues (bytes or
        memoryview)."""
        member_word, window_word, mask_word = keyed_words(self.seed, epoch, cluster["cluster_id"])
        lengths = cluster["lengths"].tolist()  # most are of a few members, for which numpy takes longer
        members = [i for i, length in enumerate(lengths) if length >= self.min_length] or range(len(lengths))
        member = members[choose(member_word, len(members))]
        start = sum(lengths[:member])
        tokens = alphabet.encode(cluster["residues"][start : start + lengths[member]])
        first = choose(window_word, max(len(tokens) - self.max_length, 0) + 1)
        return tokens[first : first + self.max_length], mask_word

    def collate(self, samples: Sequence[Window]) -> Share:
        """Lay windows end to end, and mask them all at once."""
        tokens = np.concatenate([*(tokens for tokens, _ in samples), np.empty(0, np.uint8)])
        lengths = np.array([len(tokens) for tokens, _ in samples], np.int32)
        uniforms = token_uniforms(np.array([word for _, word in samples], np.uint64), lengths)
        inputs, labels = self.masking.apply(tokens, uniforms)
        return {
            "tokens": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "lengths": torch.from_numpy(lengths),
        }
