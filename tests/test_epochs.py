"""Which clusters the global batches of an epoch hold, and who reads them."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections import Counter, OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle
from streaming.base.world import World

from esm2_composer.data import epochs
from esm2_composer.data.epochs import lay_out_epoch, layout_shape, samples_left_out, shards_in_use

SHARDS = [9, 1, 30, 4, 2, 18]  # samples
SAMPLES = sum(SHARDS)
SEED = 5


def dataset(batch: int, nodes: int = 2) -> SimpleNamespace:
    """What the layout needs of a dataset whose global batch is `batch`, on one rank."""
    return SimpleNamespace(
        num_samples=SAMPLES,
        samples_per_shard=np.array(SHARDS),
        epoch_size=SAMPLES // batch * batch,
        num_canonical_nodes=nodes,
        shuffle_algo="py1e",
        shuffle_seed=SEED,
        shuffle_block_size=20,
        batch_size=batch,
    )


def lay_out_nodes(dataset: Any, world: World, epoch: int, done: int) -> np.ndarray:
    """What each node lays out: ids (nodes, ranks of a node, workers, batches, batch size of a rank)."""
    layouts = np.full((world.num_nodes, *layout_shape(dataset, world, done)), -2, np.int32)
    for node, layout in enumerate(layouts):
        first = node * world.workers_per_node
        of_node = World(world.num_nodes, world.ranks_per_node, world.workers_per_rank, first)
        lay_out_epoch(dataset, of_node, epoch, done, layout)
    assert (layouts != -2).all()
    return layouts


def shared(of: SimpleNamespace, world: World) -> SimpleNamespace:
    """The same dataset, on so many ranks."""
    return SimpleNamespace(**{**vars(of), "batch_size": of.batch_size // world.num_ranks})


def lay_out(of: SimpleNamespace, world: World, epoch: int = 0, done: int = 0) -> np.ndarray:
    """Ids by batch, (batches, nodes, ranks, batch size of a rank); the batches of workers in turns."""
    work = lay_out_nodes(shared(of, world), world, epoch, done)
    steps = work.transpose(3, 2, 0, 1, 4).reshape(-1, *work.shape[:2], work.shape[4])
    return steps[(steps >= 0).all((1, 2, 3))]


ONE = World(1, 1, 1, 0)


@pytest.mark.filterwarnings("ignore:Shuffle block size")
@pytest.mark.parametrize("world", [ONE, World(1, 2, 3, 0), World(2, 1, 1, 0), World(4, 2, 2, 0)])
@pytest.mark.parametrize("done", [0, 8, 24, 64])
@pytest.mark.parametrize("piece", [1, 40, 10_000])
def test_where_nothing_is_left_out_the_layout_is_streamings(
    world: World, done: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = dataset(8)
    assert of.epoch_size == SAMPLES
    shuffled = get_shuffle("py1e", np.array(SHARDS), 2, SEED, 3, 20)
    ranks = world.num_nodes * world.ranks_per_node
    places = get_partitions(
        "orig", SAMPLES, 2, world.num_nodes, world.ranks_per_node, world.workers_per_rank, 8 // ranks, done
    )
    theirs = np.where(places < 0, -1, shuffled[places])
    monkeypatch.setattr(epochs, "PIECE", piece)
    assert np.array_equal(lay_out_nodes(shared(of, world), world, 3, done), theirs)


@pytest.mark.filterwarnings("ignore:Shuffle block size")
def test_the_order_of_an_epoch_never_changes() -> None:
    """Or a run that another version of Streaming or numpy resumes would repeat clusters, and leave others out."""
    assert [lay_out(dataset(12), ONE, epoch).reshape(5, 12).tolist() for epoch in (0, 1)] == [
        [
            [45, 52, 31, 60, 19, 56, 12, 46, 17, 62, 33, 59],
            [34, 48, 21, 58, 16, 47, 44, 53, 22, 61, 27, 63],
            [13, 37, 10, 55, 18, 57, 29, 39, 35, 54, 30, 50],
            [11, 38, 26, 6, 36, 5, 24, 4, 28, 3, 9, 43],
            [14, 41, 15, 8, 25, 2, 20, 0, 23, 7, 32, 42],
        ],
        [
            [44, 46, 16, 52, 21, 55, 25, 60, 9, 56, 11, 58],
            [45, 59, 12, 42, 31, 57, 27, 62, 35, 63, 33, 61],
            [36, 54, 10, 41, 26, 47, 28, 38, 22, 50, 24, 53],
            [14, 51, 15, 7, 18, 0, 37, 3, 17, 6, 32, 1],
            [34, 2, 20, 4, 19, 5, 29, 43, 13, 40, 23, 39],
        ],
    ]


def many_shards() -> SimpleNamespace:
    return SimpleNamespace(
        num_samples=46_160,
        samples_per_shard=np.arange(40) * 97 % 1500 + 500,
        epoch_size=46_160 // 256 * 256,
        num_canonical_nodes=64,
        shuffle_algo="py1e",
        shuffle_seed=17,
        shuffle_block_size=4000,
        batch_size=256,
    )


@pytest.mark.parametrize(("epoch", "digest"), [(0, "1f14fb780dac8a15"), (3, "637999add3e1fdac")])
def test_the_order_of_many_shards_never_changes(epoch: int, digest: str) -> None:
    ids = lay_out(many_shards(), ONE, epoch).astype("<i8")
    assert hashlib.sha256(ids.tobytes()).hexdigest().startswith(digest)


def test_an_epoch_is_laid_out_within_ten_bytes_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the layout: eight are Streaming's order."""
    monkeypatch.setattr(epochs, "PIECE", 1024)
    of = many_shards()
    layout = np.empty(layout_shape(of, ONE, 0), np.int32)
    tracemalloc.start()
    lay_out_epoch(of, ONE, 0, 0, layout)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * of.num_samples


@pytest.mark.filterwarnings("ignore:Shuffle block size")
@pytest.mark.parametrize("batch", [6, 8, 12, 60])
def test_global_batches_are_the_same_on_any_nodes_ranks_and_workers_and_after_any_stop(batch: int) -> None:
    for epoch in range(3):
        expected = [sorted(step.flat) for step in lay_out(dataset(batch), ONE, epoch)]
        assert len(expected) == SAMPLES // batch
        for world in (World(1, 2, 1, 0), World(2, 1, 3, 0), World(1, 1, 4, 0), World(batch // 2, 2, 1, 0)):
            for done in range(len(expected)):
                steps = lay_out(dataset(batch), world, epoch, done * batch)
                assert [sorted(step.flat) for step in steps] == expected[done:]


@pytest.mark.filterwarnings("ignore:Shuffle block size")
def test_a_sample_comes_once_an_epoch_and_those_left_out_are_others_each_time() -> None:
    left_out: Counter[int] = Counter()
    epochs = 3000
    for epoch in range(epochs):
        ids = lay_out(dataset(12), ONE, epoch).ravel()
        assert len(set(ids.tolist())) == len(ids) == 60
        left_out.update(set(range(SAMPLES)) - set(ids.tolist()))
    counts = np.array([left_out[i] for i in range(SAMPLES)])
    expected = epochs * 4 / SAMPLES
    # Samples without replacement vary a little less than chi-square says.
    assert ((counts - expected) ** 2 / expected).sum() < SAMPLES + 4 * np.sqrt(2 * SAMPLES)


def test_what_is_left_out_depends_on_seed_and_epoch() -> None:
    def left_out(seed: int, epoch: int) -> list[int]:
        return samples_left_out(100, 90, seed, epoch).tolist()

    assert left_out(1, 2) == left_out(1, 2) == sorted(set(left_out(1, 2)))
    assert len({tuple(left_out(*key)) for key in [(1, 2), (2, 1), (1, 3), (2, 2)]}) == 4
    assert samples_left_out(10, 10, 0, 0).tolist() == []


@pytest.mark.filterwarnings("ignore:Shuffle block size")
def test_every_epoch_and_seed_has_an_order_of_its_own() -> None:
    orders = [tuple(lay_out(dataset(8), ONE, epoch).ravel()) for epoch in range(3)]
    other = dataset(8)
    other.shuffle_seed = 6
    orders += [tuple(lay_out(other, ONE, epoch).ravel()) for epoch in range(3)]
    assert len(set(orders)) == 6


def fetches(shards: list[int], room: int) -> int:
    """How many shards are fetched by a cache that has room for so many, if they are read in this order."""
    cache: OrderedDict[int, None] = OrderedDict()
    count = 0
    for shard in shards:
        if shard not in cache:
            count += 1
            if len(cache) == room:
                cache.popitem(last=False)
        cache[shard] = None
        cache.move_to_end(shard)
    return count


@pytest.mark.parametrize("nodes", [1, 4, 16, 32])
@pytest.mark.parametrize("block", [200, 400, 10_000])
def test_a_cache_for_the_shards_in_use_fetches_each_about_once(nodes: int, block: int) -> None:
    size, count = 100, 240
    many = SimpleNamespace(
        num_samples=size * count,
        samples_per_shard=np.full(count, size),
        epoch_size=size * count,
        num_canonical_nodes=16,
        shuffle_algo="py1e",
        shuffle_seed=SEED,
        shuffle_block_size=block,
        batch_size=32,
    )
    of_node = (lay_out(many, World(nodes, 1, 1, 0))[:, 0].ravel() // size).tolist()
    room, distinct = shards_in_use(many, nodes), len(set(of_node))
    assert room < 1.3 * distinct
    assert fetches(of_node, room) < 1.1 * distinct
    assert fetches(of_node, room // 2) > 10 * distinct, "half of it is not enough"
