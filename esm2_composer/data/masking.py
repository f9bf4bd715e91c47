"""Random choices that depend on nothing but (seed, epoch, cluster id), and the 15 % 80/10/10 mask.

What is shown of a cluster in an epoch must not depend on ranks, workers, batches or restarts, so there is no
random state to carry: (seed, epoch, cluster id) is hashed into the words that decide everything else.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

from esm2_composer import alphabet

_MASKABLE = np.ones(alphabet.VOCAB_SIZE, dtype=bool)
_MASKABLE[[alphabet.CLS, alphabet.PAD, alphabet.EOS, alphabet.UNK, alphabet.MASK]] = False


def keyed_words(seed: int, epoch: int, cluster_id: str) -> tuple[int, int, int]:
    """Three independent uniform 64-bit words (BLAKE2b): for the member, the window, and the mask's stream."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{cluster_id}".encode(), digest_size=24).digest()
    return struct.unpack("<3Q", digest)


def choose(word: int, count: int) -> int:
    """One of 0 to count - 1, uniform as `word` is uniform over 64 bits."""
    return word * count >> 64


def token_uniforms(keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each token of sequences that lie end to end, float64 (T,).

    Token i of a sequence gets number i of the SplitMix64 stream (Steele, Lea and Flood, OOPSLA 2014) that its key
    starts: all streams at once, whatever sequences lie next to each other.

    Args:
        keys: one uniform word per sequence, uint64 (B,).
        lengths: tokens of each sequence, (B,).
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)
    starts = (np.cumsum(lengths) - lengths).astype(np.uint64)
    z = np.arange(1, lengths.sum() + 1, dtype=np.uint64) * gamma
    z += np.repeat(keys - starts * gamma, lengths)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class MaskingRule:
    """BERT's masked-language-model corruption, as ESM-2 uses it (Lin et al. 2023; Devlin et al. 2019).

    A token is selected with probability `fraction`, independently of all others: a short sequence may have none.
    Of the selected, the fractions `split` become `<mask>`, become a random one of the 20 amino acids (of the 33
    ids if `replacement` is "all_tokens" instead of "amino_acids"), or stay as they are. `<cls>`, `<eos>`, `<pad>`,
    `<unk>` and `<mask>` are never selected.
    """

    fraction: float = 0.15
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    replacement: str = "amino_acids"

    @property
    def choices(self) -> np.ndarray:
        """The ids, one of which a token is replaced by, (20,) or (33,)."""
        assert self.replacement in ("amino_acids", "all_tokens")
        return np.arange(alphabet.VOCAB_SIZE) if self.replacement == "all_tokens" else alphabet.AMINO_ACIDS

    def apply(self, tokens: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corrupt `tokens`, uint8 (T,), using one number in [0, 1) per token.

        Returns (inputs, labels), both uint8 (T,): labels hold the true id where a token was selected and
        `<pad>`, which no sequence contains, elsewhere.
        """
        mask_below = self.fraction * self.split[0]
        replace_below = mask_below + self.fraction * self.split[1]
        selected = (uniforms < self.fraction) & _MASKABLE[tokens]
        labels = np.where(selected, tokens, np.uint8(alphabet.PAD))
        inputs = tokens.copy()
        inputs[selected & (uniforms < mask_below)] = alphabet.MASK
        (replaced,) = np.nonzero(selected & (uniforms >= mask_below) & (uniforms < replace_below))
        if replaced.size:
            # Within its interval the number is again uniform, so it also picks the replacement.
            choices = self.choices
            position = (uniforms[replaced] - mask_below) / (replace_below - mask_below)
            pick = np.minimum((position * len(choices)).astype(np.intp), len(choices) - 1)
            inputs[replaced] = choices[pick]
        return inputs, labels
