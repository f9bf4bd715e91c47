"""Floors are what a model without context reaches, and those published beside the real data."""

import math

import numpy as np
import pytest
from streaming import MDSWriter

from esm2_composer import alphabet
from esm2_composer import floors as module
from esm2_composer.conversion.convert import Options, convert
from esm2_composer.conversion.layouts import BioNeMo
from esm2_composer.data.draw import ClusterDraw
from esm2_composer.data.masking import MaskingRule
from esm2_composer.errors import UserError
from esm2_composer.floors import data_floors, floors, residue_frequencies
from esm2_composer.recipe.schema import DataSection


def test_frequencies_weigh_every_cluster_once():
    clusters = [
        {"residues": b"LLLL", "lengths": np.array([2, 2])},  # on average, a draw shows two L
        {"residues": b"AAAAAA", "lengths": np.array([6])},
    ]
    frequencies = residue_frequencies(clusters, 1024, added=1)
    ids = {letter: alphabet.TOKENS.index(letter) for letter in "LAG"}
    assert frequencies[ids["L"]] / frequencies[ids["G"]] == pytest.approx(3)  # one is added to each letter
    assert frequencies[ids["A"]] / frequencies[ids["G"]] == pytest.approx(7)
    assert frequencies.sum() == pytest.approx(1)
    assert not frequencies[alphabet.MASK]
    as_they_are = residue_frequencies(clusters, 1024)
    assert as_they_are[ids["L"]] == pytest.approx(2 / 8)
    assert as_they_are[ids["G"]] == 0


def test_of_a_long_member_residues_count_by_how_often_a_window_shows_them():
    """Windows of 5 tokens: of <cls>LLLGAA<eos>, 4; of the other, which fits one, the only one."""
    cluster = {"residues": b"LLLGAAVVV", "lengths": np.array([6, 3])}
    shown = {"L": 2 + 3 + 4, "G": 4, "A": 3 + 2, "V": 3 * 4}  # of 4
    frequencies = residue_frequencies([cluster], 5)
    for letter, count in shown.items():
        assert frequencies[alphabet.TOKENS.index(letter)] == pytest.approx(count / sum(shown.values())), letter


def test_frequencies_are_those_that_training_draws():
    generator = np.random.default_rng(0)
    lengths = np.array([3, 6, 7, 30])
    residues = generator.choice([*b"LAGV"], size=lengths.sum(), p=[0.4, 0.3, 0.2, 0.1]).astype(np.uint8).tobytes()
    cluster = {"cluster_id": "c", "residues": residues, "lengths": lengths}
    draw = ClusterDraw(seed=0, max_length=8, min_length=1, masking=MaskingRule())
    drawn = np.concatenate([draw.window(cluster, epoch)[0] for epoch in range(20_000)])
    drawn = drawn[(drawn != alphabet.CLS) & (drawn != alphabet.EOS)]
    expected = np.bincount(drawn, minlength=33) / len(drawn)
    assert residue_frequencies([cluster], 8) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("split", [(0.8, 0.1, 0.1), (0.9, 0.0, 0.1), (0.9, 0.1, 0.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("replacement", ["amino_acids", "all_tokens"])
def test_the_copier_is_the_best_guess_without_context(split, replacement):
    """Against a count over simulated masks: the entropy of the truth given what the input shows."""
    rule = MaskingRule(split=split, replacement=replacement)
    generator = np.random.default_rng(0)
    frequencies = np.zeros(33)
    frequencies[4:24] = generator.dirichlet(np.full(20, 5.0))
    tokens = generator.choice(33, size=4_000_000, p=frequencies).astype(np.uint8)
    inputs, labels = rule.apply(tokens, generator.random(len(tokens)))
    selected = labels != alphabet.PAD
    joint = np.zeros((33, 33))
    np.add.at(joint, (inputs[selected], labels[selected]), 1)
    given = joint / np.maximum(joint.sum(1, keepdims=True), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = -np.nansum(joint * np.log(given)) / joint.sum()
    assert floors(frequencies, frequencies, rule)["copier"] == pytest.approx(math.exp(loss), rel=3e-3)


@pytest.mark.parametrize(
    ("name", "unigram", "copier", "copier_of_33", "within"),
    [("full", 18.22, 15.27, 14.90, 0.01), ("tiny", 18.29, 15.32, None, 0.05)],
)
def test_the_floors_of_real_data_are_those_in_its_readme(
    real_data, tmp_path, name, unigram, copier, copier_of_33, within
):
    folder = real_data / name
    for split, clusters, sequences in (
        ("train", "train_clusters.parquet", "train.db"),
        ("valid", "valid_clusters.parquet", "validation.db"),
    ):
        convert(BioNeMo(folder / clusters, folder / sequences), str(tmp_path), Options(split), 0.0)
    rules = [MaskingRule(), MaskingRule(replacement="all_tokens")]
    whole = DataSection(str(tmp_path), max_length=2**20)  # proteins, as there
    amino_acids, all_tokens = data_floors(whole, rules)
    assert amino_acids["unigram"] == pytest.approx(unigram, abs=within)
    assert amino_acids["copier"] == pytest.approx(copier, abs=within)
    if copier_of_33:
        assert all_tokens["copier"] == pytest.approx(copier_of_33, abs=within)


def test_of_a_huge_split_clusters_spread_over_all_of_it_are_read(shards, monkeypatch):
    whole = [cluster["cluster_id"] for cluster in module._clusters(None, f"{shards}/train")]
    assert len(whole) == 96
    monkeypatch.setattr(module, "MAX_CLUSTERS", 64)
    some = [cluster["cluster_id"] for cluster in module._clusters(None, f"{shards}/train")]
    where = [whole.index(name) for name in some]
    assert len(where) == len(set(where)) == 64
    assert np.diff(where).max() <= 2


def test_floors_of_shards_of_something_else_are_refused(tmp_path):
    with MDSWriter(out=str(tmp_path / "train"), columns={"text": "str"}) as writer:
        writer.write({"text": "MKV"})
    with pytest.raises(UserError, match=r"train: not shards of clusters; their columns are text \(str\)"):
        data_floors(DataSection(str(tmp_path)), [MaskingRule()])


def test_a_name_taken_in_shared_memory_is_no_mistake(shards, monkeypatch):
    def taken(*_, **__):
        raise FileExistsError("/000000_locals")

    monkeypatch.setattr("esm2_composer.data.loaders.ClusterDataset", taken)
    with pytest.raises(FileExistsError):
        data_floors(DataSection(str(shards)), [MaskingRule()])
