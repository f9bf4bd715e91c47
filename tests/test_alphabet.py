"""The 33 tokens and their encoding, against fair-esm's alphabet and Hugging Face's tokenizer."""

from __future__ import annotations

import esm
import numpy as np
import pytest
from transformers import EsmTokenizer

from esm2_composer import alphabet

SEQUENCES = ["M", "LAGVSERTIDPKQNFYMHWC", "MXBXUZOK.-.A-", "MKJAWJ", "JVJ", "XBUZO.-" * 3]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> EsmTokenizer:
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    vocabulary.write_text("\n".join(alphabet.TOKENS))
    return EsmTokenizer(str(vocabulary))


def test_tokens_are_fair_esms_in_their_order() -> None:
    theirs = esm.data.Alphabet.from_architecture("ESM-1b")
    assert list(alphabet.TOKENS) == theirs.all_toks
    assert alphabet.VOCAB_SIZE == 33
    ours = (alphabet.CLS, alphabet.PAD, alphabet.EOS, alphabet.UNK, alphabet.MASK)
    assert ours == (theirs.cls_idx, theirs.padding_idx, theirs.eos_idx, theirs.unk_idx, theirs.mask_idx)


def test_amino_acids_are_the_twenty_standard_ones() -> None:
    assert sorted(alphabet.TOKENS[i] for i in alphabet.AMINO_ACIDS) == sorted("ACDEFGHIKLMNPQRSTVWY")


@pytest.mark.parametrize("residues", SEQUENCES)
def test_encoding_is_hugging_faces(tokenizer: EsmTokenizer, residues: str) -> None:
    assert alphabet.encode(residues.encode()).tolist() == tokenizer(residues)["input_ids"]


@pytest.mark.parametrize("residues", SEQUENCES)
def test_encoding_is_fair_esms(residues: str) -> None:
    theirs = esm.data.Alphabet.from_architecture("ESM-1b")
    body = [theirs.get_idx(letter) for letter in residues]
    assert alphabet.encode(residues.encode()).tolist() == [theirs.cls_idx, *body, theirs.eos_idx]


def test_every_other_byte_is_one_unknown_token() -> None:
    others = bytes(byte for byte in range(256) if chr(byte) not in "LAGVSERTIDPKQNFYMHWCXBUZO.-")
    tokens = alphabet.encode(others)
    assert len(tokens) == len(others) + 2
    assert set(tokens[1:-1].tolist()) == {3}


def test_lower_case_is_unknown() -> None:
    assert alphabet.encode(b"Mkl").tolist() == [0, 20, 3, 3, 2]


def test_tokens_are_bytes() -> None:
    assert alphabet.encode(b"MK").dtype == np.uint8
    assert alphabet.encode(b"MK").tolist() == [0, 20, 15, 2]


def test_no_residues_are_the_two_ends() -> None:
    assert alphabet.encode(b"").tolist() == [0, 2]
