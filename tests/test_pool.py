"""A global batch into microbatches: every sequence once, near-equal bins, true counts."""

from __future__ import annotations

import heapq
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from esm2_composer import alphabet
from esm2_composer.data.draw import Share
from esm2_composer.data.pool import Microbatch, Pool, PooledLoader, balance, data_spec, pack, work_of
from esm2_composer.distributed.collectives import end_process_group
from esm2_composer.errors import UserError


def uniref_lengths(count: int, seed: int) -> np.ndarray:
    """Tokens of sequences as long as UniRef50's, cropped at 1024."""
    lengths = np.random.default_rng(seed).lognormal(5.6, 0.7, count) + 2
    return np.clip(lengths, 3, 1024).astype(np.int32)


def fills(lengths: np.ndarray, bins: list[list[int]]) -> list[int]:
    return [int(lengths[each].sum()) for each in bins]


def by_tokens(lengths: np.ndarray, ranks: int, largest: int) -> list[list[int]]:
    """As if a model computed equally long on every token."""
    return balance(lengths, lengths.astype(np.int64), ranks, largest)


# balance


@pytest.mark.parametrize("number", [1, 3, 16])
@pytest.mark.parametrize("largest", [1024, 1500, 4096, 10**6])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_every_sequence_is_once_in_a_bin_and_no_bin_is_too_large(number: int, largest: int, count: int) -> None:
    lengths = uniref_lengths(count, seed=count)
    bins = by_tokens(lengths, number, largest)
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(count))
    assert max(fills(lengths, bins)) <= largest
    assert len(bins) % number == 0
    assert len(bins) > 0


@pytest.mark.parametrize(
    ("lengths", "number", "largest", "bins"),
    [
        ([4] * 12, 2, 8, 6),  # exactly full
        ([4] * 12, 2, 9, 6),
        ([4] * 12, 2, 24, 2),
        ([4] * 12, 2, 23, 4),
        ([4] * 12, 5, 100, 5),
        ([8, 1, 1], 1, 8, 2),
        ([3] * 5, 2, 5, 6),  # 15 tokens fit into four bins of 5, five sequences of 3 do not
    ],
)
def test_as_few_bins_as_hold_the_sequences(lengths: list[int], number: int, largest: int, bins: int) -> None:
    made = by_tokens(np.array(lengths, np.int32), number, largest)
    assert len(made) == bins
    assert max(fills(np.array(lengths), made)) <= largest


@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize(("shortest", "longest"), [(550, 650), (300, 500), (3, 1024)])
def test_the_fewest_bins_are_found_in_few_trials(
    shortest: int, longest: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.random.default_rng(number).integers(shortest, longest, 300)
    bins = number
    while fullest_of(lengths, bins) > 1024:
        bins += number
    placed = []
    heapreplace = heapq.heapreplace
    monkeypatch.setattr(heapq, "heapreplace", lambda *args: placed.append(args) or heapreplace(*args))
    assert len(by_tokens(lengths, number, largest=1024)) == bins
    assert len(placed) <= 16 * len(lengths)


def fullest_of(lengths: np.ndarray, bins: int) -> int:
    """Tokens of the fullest bin by LPT alone."""
    fill = np.zeros(bins, int)
    for length in -np.sort(-lengths):
        fill[fill.argmin()] += length
    return int(fill.max())


def test_the_longest_go_first_each_to_the_emptiest_bin() -> None:
    assert by_tokens(np.array([2, 9, 4, 6, 3], np.int32), ranks=2, largest=100) == [[1, 4], [3, 2, 0]]


def test_sequences_change_places_until_bins_are_level() -> None:
    lengths = np.array([5, 5, 4, 4, 3, 3, 3], np.int32)  # LPT alone: 11, 8, 8
    assert sorted(fills(lengths, by_tokens(lengths, ranks=3, largest=100))) == [9, 9, 9]


def test_equal_lengths_keep_their_order() -> None:
    bins = by_tokens(np.full(300, 5, np.int32), ranks=3, largest=1000)
    assert bins == [list(range(first, 300, 3)) for first in range(3)]


@pytest.mark.parametrize(
    ("number", "largest"), [(2, 16384), (8, 32768), (64, 16384), (128, 65536), (128, 2048), (512, 16384)]
)
@pytest.mark.parametrize("hidden_size", [1280, 5120])
@pytest.mark.parametrize("seed", range(3))
def test_the_busiest_rank_is_close_to_the_mean(number: int, largest: int, hidden_size: int, seed: int) -> None:
    lengths = uniref_lengths(2048, seed)
    work = work_of(lengths, hidden_size)
    made = balance(lengths, work, number, largest)
    bins = fills(work, made)
    ranks = [sum(bins[rank::number]) for rank in range(number)]
    assert sum(ranks) == work.sum()
    most = 1.015 if number == 512 else 1.01  # of four sequences per rank
    assert max(ranks) < most * work.sum() / number
    assert max(bins) < most * work.sum() / len(bins), "in every microbatch"
    assert max(fills(lengths, made)) <= largest


def test_work_is_a_tokens_products_and_what_it_attends_to() -> None:
    """The measured shares of attention: 82 of 550 ms for 650M, 68 of 748 for 3B, without rotation and the rest."""
    lengths = uniref_lengths(50_000, seed=0)
    for hidden_size, share in ((1280, 82 / 550), (2560, 68 / 748)):
        attention = work_of(lengths, hidden_size) - 2 * hidden_size * lengths.astype(np.int64)
        assert attention.sum() / work_of(lengths, hidden_size).sum() == pytest.approx(share, rel=0.15)


def test_no_swap_that_would_level_bins_makes_one_too_large() -> None:
    lengths = np.array([2, 18, 16, 12, 15, 14, 6, 12, 14, 18, 3, 4, 14, 2, 3, 2, 12])
    bins = balance(lengths, work_of(lengths, hidden_size=1), ranks=3, largest=59)
    assert sorted(fills(lengths, bins)) == [52, 56, 59]  # to give a 2 for a 3 would make the last one 60


def test_balancing_depends_on_the_lengths_alone() -> None:
    lengths = uniref_lengths(500, seed=0)
    first = by_tokens(lengths, 8, 4096)
    np.random.seed(1)
    assert by_tokens(lengths.copy(), 8, 4096) == first
    assert by_tokens(lengths.astype(np.int64), 8, 4096) == first


def test_ranks_without_sequences_get_empty_bins() -> None:
    assert by_tokens(np.array([5, 3], np.int32), ranks=4, largest=8) == [[0], [1], [], []]
    assert by_tokens(np.array([], np.int32), ranks=3, largest=8) == [[], [], []]


# pack


def test_pack_says_where_sequences_and_selected_tokens_are() -> None:
    tokens = np.array([0, 32, 5, 2, 0, 6, 32, 32, 2, 0, 7, 2], np.uint8)
    labels = np.array([1, 9, 1, 1, 1, 6, 8, 30, 1, 1, 1, 1], np.uint8)
    packed = pack(tokens, labels, np.array([4, 5, 3], np.int32))
    assert packed["tokens"].tolist() == tokens.tolist()
    assert packed["cu_seqlens"].tolist() == [0, 4, 9, 12]
    assert packed["max_seqlen"] == 5
    assert packed["positions"].tolist() == [1, 5, 6, 7]
    assert packed["targets"].tolist() == [9, 6, 8, 30]
    assert (packed["num_sequences"], packed["num_tokens"], packed["num_masked"]) == (3, 12, 4)


def test_pack_of_nothing_is_a_stand_in_that_counts_as_nothing() -> None:
    packed = pack(np.array([], np.uint8), np.array([], np.uint8), np.array([], np.int32))
    assert packed["tokens"].tolist() == [alphabet.CLS, alphabet.EOS]
    assert packed["cu_seqlens"].tolist() == [0, 2]
    assert packed["max_seqlen"] == 2
    assert packed["positions"].tolist() == packed["targets"].tolist() == []
    assert (packed["num_sequences"], packed["num_tokens"], packed["num_masked"]) == (0, 0, 0)


@pytest.mark.parametrize("count", [0, 2])
def test_pack_has_the_types_the_model_takes(count: int) -> None:
    packed = pack(np.full(3 * count, 4, np.uint8), np.full(3 * count, 4, np.uint8), np.full(count, 3, np.int32))
    tensors = {key: value.dtype for key, value in packed.items() if isinstance(value, torch.Tensor)}
    assert tensors == {
        "tokens": torch.uint8,
        "cu_seqlens": torch.int32,
        "positions": torch.int64,
        "targets": torch.int64,
    }
    assert {type(value) for key, value in packed.items() if key not in tensors} == {int}


# Pool, on one rank


def share_of(sequences: list[tuple[np.ndarray, np.ndarray]]) -> Share:
    """(tokens, labels) pairs, end to end."""
    tokens, labels = zip(*sequences, strict=True) if sequences else ((), ())
    empty = np.empty(0, np.uint8)
    return {
        "tokens": torch.from_numpy(np.concatenate([*tokens, empty])),
        "labels": torch.from_numpy(np.concatenate([*labels, empty])),
        "lengths": torch.tensor([len(each) for each in tokens], dtype=torch.int32),
    }


def random_share(count: int) -> Share:
    """Distinct sequences, about a seventh of their tokens selected; the last has none."""
    rng = np.random.default_rng(count)
    samples = []
    for i in range(count):
        tokens = rng.integers(4, 31, rng.integers(3, 40)).astype(np.uint8)
        selected = (rng.random(len(tokens)) < 0.15) & (i < count - 1)
        samples.append(
            (tokens, np.where(selected, rng.integers(4, 31, len(tokens)), alphabet.PAD).astype(np.uint8))
        )
    return share_of(samples)


def sequences_of_share(share: Share) -> list[tuple[list[int], list[int]]]:
    lengths = share["lengths"].tolist()
    pairs = zip(share["tokens"].split(lengths), share["labels"].split(lengths), strict=True)
    return [(tokens.tolist(), labels.tolist()) for tokens, labels in pairs]


def sequences_of_microbatch(packed: Microbatch) -> list[tuple[list[int], list[int]]]:
    labels = torch.full((len(packed["tokens"]),), alphabet.PAD)
    labels[packed["positions"]] = packed["targets"]
    lengths = packed["cu_seqlens"].diff().tolist()
    pairs = zip(packed["tokens"].split(lengths), labels.split(lengths), strict=True)
    return [(tokens.tolist(), labels.tolist()) for tokens, labels in pairs]


@pytest.mark.parametrize("budget", [40, 64, 200, 10**6])
def test_every_sequence_is_kept_once_with_its_labels_whatever_the_budget(budget: int) -> None:
    share = random_share(50)
    batch = Pool(budget, 320)(share)
    kept = [each for packed in batch["microbatches"] for each in sequences_of_microbatch(packed)]
    assert sorted(kept) == sorted(sequences_of_share(share))
    assert all(len(packed["tokens"]) <= budget for packed in batch["microbatches"])
    assert all(packed["max_seqlen"] == max(packed["cu_seqlens"].diff()) for packed in batch["microbatches"])
    assert len(batch["microbatches"]) >= len(share["tokens"]) / budget


def test_a_budget_that_holds_all_makes_one_microbatch() -> None:
    share = random_share(20)
    tokens = len(share["tokens"])
    assert len(Pool(tokens, 320)(share)["microbatches"]) == 1
    assert len(Pool(tokens - 1, 320)(share)["microbatches"]) == 2


@pytest.mark.parametrize("budget", [40, 10**6])
def test_counts_are_those_of_the_batch_whatever_the_budget(budget: int) -> None:
    share = random_share(50)
    batch = Pool(budget, 320)(share)
    assert batch["num_sequences"] == 50
    assert batch["num_tokens"] == len(share["tokens"])
    assert batch["num_masked"] == int((share["labels"] != alphabet.PAD).sum())


def test_an_empty_share_still_makes_a_microbatch() -> None:
    batch = Pool(100, 320)(share_of([]))
    (packed,) = batch["microbatches"]
    assert packed["tokens"].tolist() == [alphabet.CLS, alphabet.EOS]
    assert (batch["num_sequences"], batch["num_tokens"]) == (0, 0)


def test_a_batch_without_selected_tokens_can_still_be_divided_by_their_count() -> None:
    share = share_of([(np.array([0, 5, 2], np.uint8), np.full(3, alphabet.PAD, np.uint8))] * 3)
    batch = Pool(6, 320)(share)
    assert batch["num_masked"] == 1
    assert [packed["num_masked"] for packed in batch["microbatches"]] == [1, 0]
    assert all(len(packed["positions"]) == 0 for packed in batch["microbatches"])


# The loader


def test_the_loader_keeps_order_and_length_and_can_be_left_and_taken_up_again() -> None:
    shares = [random_share(count) for count in (5, 9, 3)]
    loader = PooledLoader(DataLoader(shares, batch_size=None), microbatch_tokens=200, hidden_size=320)
    assert len(loader) == 3
    for batch in loader:
        assert batch["num_sequences"] == 5
        break
    assert [batch["num_sequences"] for batch in loader] == [5, 9, 3]


class Watched:
    """Shares, and an event for each that is set when it is asked for."""

    def __init__(self, count: int) -> None:
        self.asked = [threading.Event() for _ in range(count)]

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, number: int) -> Share:
        self.asked[number].set()
        return random_share(1 + number)


def test_the_next_batch_is_fetched_and_pooled_while_one_is_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = Watched(5)
    pooled = [threading.Event() for _ in range(5)]

    def watched(of: Pool, share: Share) -> dict[str, Any]:
        batch = call(of, share)
        pooled[batch["num_sequences"] - 1].set()
        return batch

    call = Pool.__call__
    monkeypatch.setattr(Pool, "__call__", watched)
    batches = iter(PooledLoader(DataLoader(shares, batch_size=None), microbatch_tokens=200, hidden_size=320))
    for number in range(4):
        assert next(batches)["num_sequences"] == 1 + number
        assert shares.asked[number + 1].wait(60), "nobody asks for the next one until this one is done"
        assert pooled[number + 1].wait(60), "the next one is fetched, but not pooled"


@pytest.mark.parametrize("in_hand", range(3))
def test_no_more_than_one_batch_is_fetched_ahead(in_hand: int) -> None:
    shares = Watched(5)
    batches = iter(PooledLoader(DataLoader(shares, batch_size=None), microbatch_tokens=200, hidden_size=320))
    for _ in range(1 + in_hand):
        next(batches)
    batches.close()  # waits for the thread to end what it was told to do
    assert [each.is_set() for each in shares.asked] == [number <= in_hand + 1 for number in range(5)]


def test_what_fails_in_loading_fails_in_the_loop() -> None:
    class Shares(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield random_share(5)
            raise RuntimeError("shard is gone")

    batches = iter(PooledLoader(DataLoader(Shares(), batch_size=None), 200, 320))
    assert next(batches)["num_sequences"] == 5
    with pytest.raises(RuntimeError, match="shard is gone"):
        next(batches)


def be_rank(rank: int, folder: Path) -> None:
    class Shares(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield random_share(5)
            if rank == 1:
                raise UserError("shard is gone")
            yield random_share(5)

    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    batches = iter(PooledLoader(DataLoader(Shares(), batch_size=None), 200, 320))
    next(batches)
    with pytest.raises(UserError, match="shard is gone"):
        next(batches)
    end_process_group()


def test_a_mistake_that_one_rank_meets_is_told_by_all(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(be_rank, (tmp_path,), 2, start_method="fork")


def test_composer_sees_pooled_batches_and_their_true_counts() -> None:
    share = random_share(50)
    spec = data_spec(DataLoader([share], batch_size=None), microbatch_tokens=200, hidden_size=320)
    (batch,) = spec.dataloader
    assert spec.get_num_samples_in_batch(batch) == 50
    assert spec.get_num_tokens_in_batch(batch) == len(share["tokens"])
    masked = int((share["labels"] != alphabet.PAD).sum())
    assert spec.get_num_tokens_in_batch(batch, token_type="loss_generating") == masked
    packed = spec.split_batch(batch, 1)
    assert sum(each["num_sequences"] for each in packed) == 50
    assert max(each["num_tokens"] for each in packed) <= 200
    assert sum(spec.get_num_tokens_in_batch(each) for each in packed) == len(share["tokens"]), "microbatches too"
    assert sum(spec.get_num_tokens_in_batch(each, token_type="loss_generating") for each in packed) == masked
