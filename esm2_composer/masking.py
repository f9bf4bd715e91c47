"""Random choices that depend on nothing but (seed, epoch, cluster id), and the 15 % 80/10/10 mask.

What a cluster looks like in an epoch must not depend on ranks, workers, batches or restarts, so there is no
random state to carry: each (seed, epoch, cluster id) is hashed into the key of a counter-based generator.
Only its raw 64-bit words are used, whose stream NumPy promises never to change.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from esm2_composer import alphabet

_MASKABLE = np.ones(alphabet.VOCAB_SIZE, dtype=bool)
_MASKABLE[[alphabet.CLS, alphabet.PAD, alphabet.EOS, alphabet.UNK, alphabet.MASK]] = False


class KeyedUniforms:
    """A stream of uniform numbers in [0, 1), float64, that is a pure function of its key."""

    def __init__(self, seed: int, epoch: int, cluster_id: str) -> None:
        digest = hashlib.blake2b(f"{seed}/{epoch}/{cluster_id}".encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))

    def draw(self, count: int) -> np.ndarray:
        """The next `count` numbers, float64 (count,)."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class MaskingRule:
    """BERT's masked-language-model corruption, as ESM-2 uses it (Lin et al. 2023; Devlin et al. 2019).

    A token is selected with probability `fraction`, independently of all others: a short sequence may have
    none. Of the selected, the shares `split` become `<mask>`, become a token of `replacements`, stay as
    they are. `<cls>`, `<eos>`, `<pad>`, `<unk>` and `<mask>` are never selected.
    """

    fraction: float = 0.15
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    all_tokens: bool = False  # replace by any of the 33 ids instead of the 20 amino acids

    def apply(self, tokens: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corrupt `tokens`, uint8 (T,), using one number in [0, 1) a token.

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
            choices = np.arange(alphabet.VOCAB_SIZE) if self.all_tokens else alphabet.AMINO_ACIDS
            position = (uniforms[replaced] - mask_below) / (replace_below - mask_below)
            pick = np.minimum((position * len(choices)).astype(np.intp), len(choices) - 1)
            inputs[replaced] = choices[pick]
        return inputs, labels
