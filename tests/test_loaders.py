"""Which clusters the global batches of real MDS shards hold, in training and in evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from streaming.base.world import World
from test_draw import DRAW, shown
from test_epochs import lay_out_nodes
from torch.utils.data import DataLoader

from esm2_composer.data.draw import ClusterDraw, Share
from esm2_composer.data.loaders import evaluation_loader, train_loader
from esm2_composer.errors import UserError

BATCH = 8


def sequences(batch: Share) -> list[tuple[bytes, bytes]]:
    """(inputs, labels) of each sequence."""
    lengths = batch["lengths"].tolist()
    parts = zip(batch["tokens"].split(lengths), batch["labels"].split(lengths), strict=True)
    return [(inputs.numpy().tobytes(), labels.numpy().tobytes()) for inputs, labels in parts]


def contents(loader: DataLoader) -> list[list[tuple[bytes, bytes]]]:
    return [sequences(batch) for batch in loader]


def names(
    loader: DataLoader, clusters: list[dict[str, Any]], epoch: int, draw: ClusterDraw = DRAW
) -> list[list[str]]:
    """The cluster ids of each batch; KeyError if a sequence is not the draw of any cluster in that epoch."""
    known = {}
    for each in clusters:
        inputs, labels = shown(draw, each, epoch)
        known[inputs.tobytes(), labels.tobytes()] = each["cluster_id"]
    assert len(known) == len(clusters)
    return [[known[sequence] for sequence in batch] for batch in contents(loader)]


def flat(batches: list[list[Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(batches)


def test_an_epoch_is_full_batches_of_distinct_clusters_drawn_for_that_epoch(
    fresh: Callable[[], str], clusters: list[dict[str, Any]]
) -> None:
    loader = train_loader(DRAW, None, fresh(), BATCH, num_workers=0)
    assert len(loader) == 4
    epochs = [names(loader, clusters, epoch) for epoch in range(4)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [8] * 4
        assert len(set(flat(batches))) == 32
    orders = {tuple(flat(batches)) for batches in epochs}
    left_out = {frozenset(each["cluster_id"] for each in clusters) - set(order) for order in orders}
    assert len(orders) == len(left_out) == 4
    assert not frozenset.intersection(*left_out)


def test_the_order_is_shuffled_anew_by_seed_and_epoch(
    fresh: Callable[[], str], clusters: list[dict[str, Any]]
) -> None:
    orders = [[each["cluster_id"] for each in clusters]]
    for draw in (DRAW, replace(DRAW, seed=6)):
        loader = train_loader(draw, None, fresh(), len(clusters), num_workers=0)
        orders += [list(flat(names(loader, clusters, epoch, draw))) for epoch in range(2)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len(set(map(tuple, orders))) == 5


def test_the_order_of_training_never_changes(fresh: Callable[[], str], clusters: list[dict[str, Any]]) -> None:
    loader = train_loader(DRAW, None, fresh(), BATCH, num_workers=0)
    first, *_ = names(loader, clusters, epoch=0)
    assert " ".join(name.removeprefix("UniRef50_") for name in first) == "8 12 34 35 18 24 2 3"
    dataset = loader.dataset
    assert (dataset.shuffle_algo, dataset.shuffle_block_size) == ("py1e", 500_000)


def test_nodes_and_ranks_do_not_change_what_the_global_batches_hold(fresh: Callable[[], str]) -> None:
    loader = train_loader(DRAW, None, fresh(), BATCH, num_workers=0)
    dataset = loader.dataset
    assert dataset.num_canonical_nodes == 8, "left to Streaming, it would be the number of nodes"
    next(iter(loader))
    layouts = []
    for nodes, ranks, workers in [(1, 1, 1), (1, 4, 1), (2, 1, 1), (2, 2, 3), (4, 2, 1), (8, 1, 2)]:
        dataset.batch_size = BATCH // (nodes * ranks)
        work = lay_out_nodes(dataset, World(nodes, ranks, workers, 0), 0, 0)
        # Worker w computes every workers-th step, from step w on.
        layouts.append([sorted(work[:, :, step % workers, step // workers].flat) for step in range(4)])
    assert len(set(itertools.chain(*layouts[0]))) == 4 * BATCH
    assert all(layout == layouts[0] for layout in layouts)


def test_workers_do_not_change_the_global_batches_of_training(fresh: Callable[[], str]) -> None:
    alone, shared = (train_loader(DRAW, None, fresh(), BATCH, num_workers=workers) for workers in (0, 2))
    for _ in range(2):
        assert contents(alone) == contents(shared)


def test_a_remote_is_read_through_its_cache(fresh: Callable[[], str], tmp_path: Path) -> None:
    cached = train_loader(DRAW, fresh(), str(tmp_path / "cache"), BATCH, num_workers=0)
    assert contents(cached) == contents(train_loader(DRAW, None, fresh(), BATCH, num_workers=0))
    assert (tmp_path / "cache" / "index.json").is_file()


def test_a_resumed_run_goes_on_after_its_last_batch(fresh: Callable[[], str]) -> None:
    loader = train_loader(DRAW, None, fresh(), BATCH, num_workers=0)
    contents(loader)
    second_epoch = contents(loader)
    state = loader.dataset.state_dict(num_samples=3 * BATCH, from_beginning=True)
    resumed = train_loader(DRAW, None, fresh(), BATCH, num_workers=2)
    resumed.dataset.load_state_dict(state)
    assert contents(resumed) == second_epoch[3:]
    assert contents(resumed) == contents(loader)


def test_one_batch_of_all_clusters_is_enough(fresh: Callable[[], str], clusters: list[dict[str, Any]]) -> None:
    (only,) = names(train_loader(DRAW, None, fresh(), 37, num_workers=0), clusters, epoch=0)
    assert set(only) == {each["cluster_id"] for each in clusters}


def test_fewer_clusters_than_a_batch_are_refused(fresh: Callable[[], str]) -> None:
    folder = fresh()
    with pytest.raises(UserError, match=f"{folder} holds 37 clusters.* 38$"):
        train_loader(DRAW, None, folder, 38, num_workers=0)


@pytest.mark.parametrize("open_loader", [train_loader, evaluation_loader])
@pytest.mark.parametrize("remote", [None, "absent"])
def test_a_folder_without_shards_is_refused(
    open_loader: Callable[..., DataLoader], remote: str | None, tmp_path: Path
) -> None:
    remote = remote and str(tmp_path / remote)
    with pytest.raises(UserError, match=f"^{remote or tmp_path}: cannot be opened"):
        open_loader(DRAW, remote, str(tmp_path), BATCH, 0)


def test_evaluation_shows_every_cluster_once_in_the_order_of_the_shards_every_time(
    fresh: Callable[[], str], clusters: list[dict[str, Any]]
) -> None:
    loader = evaluation_loader(DRAW, None, fresh(), BATCH, num_workers=0)
    assert len(loader) == 5
    for _ in range(2):
        batches = names(loader, clusters, epoch=0)
        assert [len(batch) for batch in batches] == [8, 8, 8, 8, 5]
        assert list(flat(batches)) == [each["cluster_id"] for each in clusters]


def test_workers_do_not_change_evaluation(fresh: Callable[[], str]) -> None:
    alone, shared = (evaluation_loader(DRAW, None, fresh(), BATCH, num_workers=workers) for workers in (0, 2))
    expected = contents(alone)
    assert contents(shared) == expected
    assert contents(shared) == expected


@pytest.mark.parametrize(("batch", "sizes"), [(37, [37]), (36, [36, 1]), (100, [37])])
def test_the_last_evaluation_batch_is_short_but_never_empty(
    fresh: Callable[[], str], batch: int, sizes: list[int]
) -> None:
    loader = evaluation_loader(DRAW, None, fresh(), batch, num_workers=0)
    assert [len(sequences(each)) for each in loader] == sizes
    assert len(loader) == len(sizes)
