"""ESM-2's 33 tokens, and the way from residue letters to their ids.

The order is that of fair-esm's "ESM-1b" alphabet; checkpoints depend on it.
"""

from __future__ import annotations

import numpy as np

TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")
VOCAB_SIZE = len(TOKENS)
CLS, PAD, EOS, UNK, MASK = (TOKENS.index(t) for t in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>"))
AMINO_ACIDS = np.arange(4, 24, dtype=np.uint8)  # the 20 standard ones, in the order of TOKENS
LETTERS = "".join(t for t in TOKENS if len(t) == 1)

_TO_IDS = bytes(TOKENS.index(chr(byte)) if chr(byte) in LETTERS else UNK for byte in range(256))


def encode(residues: bytes | memoryview) -> np.ndarray:
    """Token ids of `<cls> residues <eos>`, uint8 (len(residues) + 2,), read-only.

    A byte that is no token, a lower-case letter included, becomes `<unk>`; conversion lets none into the shards.
    """
    ids = b"".join((bytes([CLS]), bytes(residues).translate(_TO_IDS), bytes([EOS])))
    return np.frombuffer(ids, np.uint8)
