"""Scores follow their definitions, and the floors are those published beside the real data."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from esm2_composer import alphabet
from esm2_composer.evaluation import evaluate, floors, residue_frequencies
from esm2_composer.layouts import Sequences
from esm2_composer.masking import MaskingRule
from esm2_composer.model import ESM2, ESM2Config
from esm2_composer.pool import pack
from esm2_composer.records import Report, build_record


def microbatch(lengths: list[int], seed: int) -> dict:
    generator = np.random.default_rng(seed)
    tokens = generator.choice(alphabet.AMINO_ACIDS, sum(lengths))
    inputs, labels = MaskingRule().apply(tokens, generator.random(len(tokens)))
    return pack(inputs, labels, np.array(lengths, np.int32))


def test_scores_are_means_over_all_masked_tokens_whatever_the_microbatches():
    torch.manual_seed(0)
    net = ESM2(ESM2Config(1, 32, 2, 64))
    batches = [microbatch([300, 20], 1), microbatch([7], 2)]
    scores = evaluate(net, batches, torch.device("cpu"))
    losses, hits = [], []
    with torch.no_grad():
        for batch in batches:
            logits = net(batch["tokens"], batch["cu_seqlens"])[batch["positions"]]
            for row, target in zip(logits.double(), batch["targets"], strict=True):
                losses.append(-row.log_softmax(-1)[target].item())
                hits.append(row.argmax() == target)
    assert scores["masked_tokens"] == len(losses)
    assert scores["sequences"] == 3
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert scores["accuracy"] == pytest.approx(np.mean(hits))


def test_frequencies_weigh_every_cluster_once():
    clusters = [
        {"residues": b"LLLL", "lengths": np.array([2, 2])},  # on average, a draw shows two L
        {"residues": b"AAAAAA", "lengths": np.array([6])},
    ]
    frequencies = residue_frequencies(clusters)
    ids = {letter: alphabet.TOKENS.index(letter) for letter in "LAG"}
    assert frequencies[ids["L"]] / frequencies[ids["G"]] == pytest.approx(3)  # one is added to each letter
    assert frequencies[ids["A"]] / frequencies[ids["G"]] == pytest.approx(7)
    assert frequencies.sum() == pytest.approx(1)
    assert not frequencies[alphabet.MASK]


@pytest.mark.parametrize("all_tokens", [False, True])
def test_the_copier_is_the_best_guess_without_context(all_tokens):
    """Against a count over simulated masks: the entropy of the truth given what the input shows."""
    rule = MaskingRule(all_tokens=all_tokens)
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


def test_the_floors_of_real_data_are_those_in_its_readme(real_data):
    def frequencies(clusters: str, sequences: str) -> np.ndarray:
        database = Sequences(real_data / "full" / sequences)
        records = []
        for row in pq.read_table(real_data / "full" / clusters).to_pylist():
            ids = row.get("ur90_id") or [row["ur50_id"]]
            found = database.look_up(ids)
            records.append(build_record(row["ur50_id"], [(name, found[name.encode()]) for name in ids], Report()))
        return residue_frequencies(records)

    train = frequencies("train_clusters.parquet", "train.db")
    valid = frequencies("valid_clusters.parquet", "validation.db")
    found = floors(train, valid, MaskingRule())
    assert found["unigram"] == pytest.approx(18.22, abs=0.01)
    assert found["copier"] == pytest.approx(15.27, abs=0.01)
    assert floors(train, valid, MaskingRule(all_tokens=True))["copier"] == pytest.approx(14.90, abs=0.01)
