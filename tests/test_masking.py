"""Keyed random numbers depend on their key alone; the mask has the published rates and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from esm2_composer import alphabet
from esm2_composer.masking import KeyedUniforms, MaskingRule

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


def test_the_numbers_of_a_key_never_change() -> None:
    golden = ["0x1.e57718b135d1cp-1", "0x1.a00974cfa08b6p-1", "0x1.16d678f01f04cp-2", "0x1.bdb7040c1ce4cp-1"]
    assert [number.hex() for number in KeyedUniforms(17, 0, "UniRef50_A0A009").draw(4)] == golden


def test_the_same_key_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    first = KeyedUniforms(3, 2, "a").draw(8)
    KeyedUniforms(3, 2, "b").draw(5)
    np.random.seed(4)
    assert np.array_equal(KeyedUniforms(3, 2, "a").draw(8), first)


def test_every_part_of_the_key_counts() -> None:
    keys = [(1, 23, "a"), (2, 23, "a"), (1, 24, "a"), (1, 23, "b"), (12, 3, "a"), (23, 1, "a"), (1, 23, "A")]
    streams = [KeyedUniforms(*key).draw(4) for key in keys]
    assert len(np.unique(streams)) == 4 * len(keys)


def test_how_a_stream_is_cut_does_not_matter() -> None:
    whole = KeyedUniforms(1, 2, "c").draw(9)
    stream = KeyedUniforms(1, 2, "c")
    assert np.array_equal(np.concatenate([stream.draw(2), stream.draw(7)]), whole)


def test_a_stream_is_uniform() -> None:
    numbers = KeyedUniforms(0, 0, "c").draw(200_000)
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert kolmogorov_smirnov(numbers) < 1.95
    assert chi_square(np.bincount((numbers * 1000 % 1 * 64).astype(int), minlength=64)) < 4


@pytest.mark.parametrize("part", ["seed", "epoch", "cluster_id"])
def test_neighbouring_keys_are_uniform_and_independent(part: str) -> None:
    key = {"seed": 5, "epoch": 6, "cluster_id": "7"}
    draws = np.array(
        [KeyedUniforms(**{**key, part: str(i) if part == "cluster_id" else i}).draw(2) for i in range(4000)]
    )
    assert kolmogorov_smirnov(draws[:, 0]) < 1.95
    assert kolmogorov_smirnov(draws[:, 1]) < 1.95
    limit = 4 / np.sqrt(len(draws))
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < limit
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < limit


# The mask


@pytest.fixture(scope="module")
def uniforms() -> np.ndarray:
    return KeyedUniforms(17, 0, "million").draw(MILLION)


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
    rule = MaskingRule(split=(0.0, 1.0, 0.0), all_tokens=True)
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
        inputs, labels = MaskingRule().apply(tokens, KeyedUniforms(0, epoch, "short").draw(3))
        assert inputs[0] == alphabet.CLS
        assert inputs[2] == alphabet.EOS
        assert labels[0] == labels[2] == alphabet.PAD
        selected += int(labels[1] == tokens[1])
        assert labels[1] in (tokens[1], alphabet.PAD)
    assert_share(selected, 4000, 0.15)
