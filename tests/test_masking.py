"""Keyed random numbers depend on their key alone; the mask has the published rates and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from esm2_composer import alphabet
from esm2_composer.data.masking import MaskingRule, choose, keyed_words, token_uniforms

MILLION = 1_000_000
X = alphabet.TOKENS.index("X")  # maskable, and not among the replacements
SPECIAL = [alphabet.TOKENS.index(token) for token in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")]


def chi_square(counts: np.ndarray) -> float:
    """In units of the standard deviation that a uniform distribution gives it."""
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / np.sqrt(2 * freedom)


def kolmogorov_smirnov(numbers: np.ndarray) -> float:
    """Distance from uniform on [0, 1), times sqrt(n): above 1.95 in one of a thousand cases."""
    ordered, n = np.sort(numbers), len(numbers)
    above, below = np.arange(1, n + 1) / n - ordered, ordered - np.arange(n) / n
    return float(max(above.max(), below.max()) * np.sqrt(n))


def assert_share(count: int, total: int, expected: float) -> None:
    assert abs(count - total * expected) <= 4 * np.sqrt(total * expected * (1 - expected))


def letters(ids: np.ndarray) -> str:
    return "".join(alphabet.TOKENS[i] for i in ids)


# Keyed random numbers


def stream(key: int, count: int) -> np.ndarray:
    return token_uniforms(np.array([key], np.uint64), np.array([count]))


def test_the_words_of_a_key_never_change() -> None:
    words = keyed_words(17, 0, "UniRef50_A0A009")
    assert [f"{word:016x}" for word in words] == ["bab119ae961b0327", "43fb08d5e33b307f", "c0440028923c4cea"]


def test_every_part_of_the_key_counts() -> None:
    keys = [(1, 23, "a"), (2, 23, "a"), (1, 24, "a"), (1, 23, "b"), (12, 3, "a"), (23, 1, "a"), (1, 23, "A")]
    words = [keyed_words(*key) for key in keys]
    assert len(np.unique(words)) == 3 * len(keys)


@pytest.mark.parametrize("part", ["seed", "epoch", "cluster_id"])
def test_words_of_neighbouring_keys_are_uniform_and_independent(part: str) -> None:
    key = {"seed": 5, "epoch": 6, "cluster_id": "7"}
    words = [keyed_words(**{**key, part: str(i) if part == "cluster_id" else i}) for i in range(4000)]
    draws = np.array(words, float) / 2**64
    limit = 4 / np.sqrt(len(draws))
    for column in draws.T:
        assert kolmogorov_smirnov(column) < 1.95
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) < limit
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < limit


def test_choose_reaches_the_first_and_the_last_and_no_more() -> None:
    assert [choose(word, 3) for word in (0, 2**64 // 3, 2**64 // 3 + 1, 2**64 - 1)] == [0, 0, 1, 2]
    assert choose(2**64 - 1, 1) == 0


def test_numbers_are_those_of_splitmix64() -> None:
    """The generator's published test vector: seed 1234567 (Vigna's reference implementation)."""
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert stream(1234567, 4).tolist() == [(word >> 11) * 2.0**-53 for word in words]


def test_a_sequence_has_its_numbers_whatever_lies_beside_it() -> None:
    keys, lengths = np.array([3, 2**64 - 1, 7, 7], np.uint64), np.array([5, 3, 0, 4])
    together = token_uniforms(keys, lengths)
    apart = [stream(int(key), count) for key, count in zip(keys, lengths, strict=True)]
    assert np.array_equal(together, np.concatenate(apart))
    assert np.array_equal(stream(3, 9)[:5], stream(3, 5))
    assert token_uniforms(keys[:0], lengths[:0]).shape == (0,)


def test_a_stream_is_uniform() -> None:
    numbers = stream(keyed_words(0, 0, "c")[2], 200_000)
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert kolmogorov_smirnov(numbers) < 1.95
    assert chi_square(np.bincount((numbers * 1000 % 1 * 64).astype(int), minlength=64)) < 4


def test_streams_of_different_sequences_are_independent() -> None:
    keys = np.array([keyed_words(1, 0, str(i))[2] for i in range(2000)], np.uint64)
    columns = token_uniforms(keys, np.full(2000, 8)).reshape(2000, 8)
    assert chi_square(np.bincount((columns * 64).astype(int).ravel(), minlength=64)) < 4
    assert np.abs(np.corrcoef(columns.T) - np.eye(8)).max() < 4 / np.sqrt(2000)


# The mask


@pytest.fixture(scope="module")
def uniforms() -> np.ndarray:
    return stream(17, MILLION)


@pytest.fixture(scope="module")
def mixed() -> np.ndarray:
    """Every token but `<pad>`, which no sequence contains, equally often."""
    tokens = np.setdiff1d(np.arange(alphabet.VOCAB_SIZE, dtype=np.uint8), [alphabet.PAD])
    return np.resize(tokens, MILLION)


def test_fifteen_percent_of_the_maskable_tokens_are_selected(mixed: np.ndarray, uniforms: np.ndarray) -> None:
    _, labels = MaskingRule().apply(mixed, uniforms)
    maskable = int((~np.isin(mixed, SPECIAL)).sum())
    assert_share(int((labels != alphabet.PAD).sum()), maskable, 0.15)
    for token in (alphabet.TOKENS.index(letter) for letter in alphabet.LETTERS):
        assert_share(int((labels == token).sum()), int((mixed == token).sum()), 0.15)


def test_labels_are_true_ids_where_selected_and_inputs_are_true_elsewhere(
    mixed: np.ndarray, uniforms: np.ndarray
) -> None:
    truth = mixed.copy()
    inputs, labels = MaskingRule().apply(mixed, uniforms)
    selected = labels != alphabet.PAD
    assert inputs.dtype == labels.dtype == np.uint8
    assert np.array_equal(labels[selected], truth[selected])
    assert np.array_equal(inputs[~selected], truth[~selected])
    assert np.array_equal(mixed, truth), "the argument is left as it was"


def test_of_the_selected_80_percent_are_masked_10_replaced_10_kept(uniforms: np.ndarray) -> None:
    inputs, labels = MaskingRule().apply(np.full(MILLION, X, np.uint8), uniforms)
    shown = inputs[labels == X]
    replaced = np.isin(shown, alphabet.AMINO_ACIDS)
    assert_share(int((shown == alphabet.MASK).sum()), len(shown), 0.8)
    assert_share(int(replaced.sum()), len(shown), 0.1)
    assert_share(int((shown == X).sum()), len(shown), 0.1)
    assert int((shown == alphabet.MASK).sum() + replaced.sum() + (shown == X).sum()) == len(shown)


def test_replacements_are_uniform_over_the_amino_acids(uniforms: np.ndarray) -> None:
    inputs, _ = MaskingRule().apply(np.full(MILLION, X, np.uint8), uniforms)
    replaced = inputs[(inputs != X) & (inputs != alphabet.MASK)]
    counts = np.bincount(replaced, minlength=alphabet.VOCAB_SIZE)
    assert letters(np.flatnonzero(counts)) == "LAGVSERTIDPKQNFYMHWC"
    assert chi_square(counts[4:24]) < 4


def test_replacements_may_be_uniform_over_all_tokens(uniforms: np.ndarray) -> None:
    rule = MaskingRule(split=(0.0, 1.0, 0.0), replacement="all_tokens")
    inputs, labels = rule.apply(np.full(MILLION, X, np.uint8), uniforms)
    counts = np.bincount(inputs[labels == X], minlength=alphabet.VOCAB_SIZE)
    assert len(counts) == alphabet.VOCAB_SIZE
    assert chi_square(counts) < 4


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2.0**-53])
def test_every_letter_can_be_selected_and_no_special_token(number: float) -> None:
    tokens = np.arange(alphabet.VOCAB_SIZE, dtype=np.uint8)
    inputs, labels = MaskingRule(fraction=1.0).apply(tokens, np.full(len(tokens), number))
    assert set("LAGVSERTIDPKQNFYMHWCXBUZO.-") <= {alphabet.TOKENS[i] for i in labels[labels != alphabet.PAD]}
    assert not np.isin(labels, [i for i in SPECIAL if i != alphabet.PAD]).any()
    assert labels[alphabet.PAD] == alphabet.PAD
    assert np.array_equal(inputs[SPECIAL], SPECIAL)


def test_a_number_decides_its_own_token() -> None:
    numbers = np.array([0.0, 0.1199, 0.1201, 0.1349, 0.1351, 0.1499, 0.1501, 0.9999])
    inputs, labels = MaskingRule().apply(np.full(8, X, np.uint8), numbers)
    assert inputs.tolist() == [alphabet.MASK, alphabet.MASK, 4, 23, X, X, X, X]
    assert labels.tolist() == [X] * 6 + [alphabet.PAD] * 2


@pytest.mark.parametrize(
    ("fraction", "split"), [(0.3, (0.5, 0.3, 0.2)), (0.05, (1.0, 0.0, 0.0)), (1.0, (0, 0, 1))]
)
def test_fraction_and_split_can_be_chosen(
    uniforms: np.ndarray, fraction: float, split: tuple[float, float, float]
) -> None:
    inputs, labels = MaskingRule(fraction, split).apply(np.full(MILLION, X, np.uint8), uniforms)
    shown = inputs[labels == X]
    assert_share(len(shown), MILLION, fraction)
    counts = [(shown == alphabet.MASK).sum(), np.isin(shown, alphabet.AMINO_ACIDS).sum(), (shown == X).sum()]
    for count, share in zip(counts, split, strict=True):
        assert_share(int(count), len(shown), share)


def test_a_protein_of_one_residue_is_masked_as_often_as_any() -> None:
    tokens = alphabet.encode(b"M")
    selected = 0
    for epoch in range(4000):
        inputs, labels = MaskingRule().apply(tokens, stream(keyed_words(0, epoch, "short")[2], 3))
        assert inputs[0] == alphabet.CLS
        assert inputs[2] == alphabet.EOS
        assert labels[0] == labels[2] == alphabet.PAD
        selected += int(labels[1] == tokens[1])
        assert labels[1] in (tokens[1], alphabet.PAD)
    assert_share(selected, 4000, 0.15)
