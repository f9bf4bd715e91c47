"""What a cluster shows in an epoch, and which clusters the global batches of real MDS shards hold."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing.connection
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import cluster
from streaming import StreamingDataset
from streaming.base.storage.download import LocalDownloader
from streaming.base.world import World
from test_epochs import lay_out_nodes
from torch.utils.data import DataLoader

from esm2_composer import alphabet
from esm2_composer.data import (
    LONGEST_TMPDIR,
    ClusterDraw,
    Share,
    check_cache,
    check_store,
    check_tmpdir,
    count_short_clusters,
    evaluation_loader,
    train_loader,
)
from esm2_composer.errors import StoreUnavailable, UserError
from esm2_composer.masking import MaskingRule
from esm2_composer.schema import DataSection
from esm2_composer.splits import count_clusters

NOTHING_MASKED = MaskingRule(fraction=1e-15)
BATCH = 8
DRAW = ClusterDraw(seed=5, max_length=24, min_length=8, masking=MaskingRule())


def shown(draw: ClusterDraw, of: dict[str, Any], epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, labels) of a cluster in an epoch."""
    batch = draw.collate([draw.window(of, epoch)])
    return batch["tokens"].numpy(), batch["labels"].numpy()


def windows(of: dict[str, Any], max_length: int, epochs: int) -> list[str]:
    """What is shown in each epoch, as text with < and > for the ends, unmasked."""
    draw = ClusterDraw(seed=1, max_length=max_length, min_length=1, masking=NOTHING_MASKED)
    return [text(shown(draw, of, epoch)[0]) for epoch in range(epochs)]


def text(tokens: np.ndarray) -> str:
    return "".join({alphabet.CLS: "<", alphabet.EOS: ">"}.get(i) or alphabet.TOKENS[i] for i in tokens.tolist())


def assert_uniform(seen: list[str], over: list[str]) -> None:
    counts = np.array([seen.count(each) for each in over])
    assert counts.sum() == len(seen), f"also shown: {set(seen) - set(over)}"
    expected, freedom = len(seen) / len(over), len(over) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


# Members


def test_members_are_uniform_over_epochs() -> None:
    seen = windows(cluster(b"A" * 30, b"C", b"D" * 7, b"E" * 30), max_length=50, epochs=4000)
    assert_uniform(seen, [f"<{'A' * 30}>", "<C>", f"<{'D' * 7}>", f"<{'E' * 30}>"])


def test_members_of_a_huge_cluster_are_uniform() -> None:
    """5,000 members, each of which shows the tenth of them that it is in."""
    tenths = "ACDEFGHIKL"
    members = [letter.encode() for letter in tenths for _ in range(500)]
    assert_uniform(windows(cluster(*members), max_length=50, epochs=1000), [f"<{letter}>" for letter in tenths])


def test_members_below_min_length_are_not_shown() -> None:
    draw = ClusterDraw(seed=1, max_length=50, min_length=5, masking=NOTHING_MASKED)
    some = cluster(b"AAAA", b"CCCCC", b"D", b"EEEEEE", b"FFFF")
    assert_uniform([text(shown(draw, some, epoch)[0]) for epoch in range(2000)], ["<CCCCC>", "<EEEEEE>"])


def test_all_members_are_shown_if_none_has_min_length() -> None:
    draw = ClusterDraw(seed=1, max_length=50, min_length=5, masking=NOTHING_MASKED)
    some = cluster(b"AAAA", b"CC", b"D")
    assert_uniform([text(shown(draw, some, epoch)[0]) for epoch in range(2000)], ["<AAAA>", "<CC>", "<D>"])


# Windows


def test_windows_are_uniform_and_the_ends_show_at_true_ends_only() -> None:
    seen = windows(cluster(b"LAGVSERTIDPK"), max_length=8, epochs=7000)
    whole = "<LAGVSERTIDPK>"
    assert_uniform(seen, [whole[start : start + 8] for start in range(7)])
    for end in "<>":
        assert abs(sum(end in window for window in seen) - 1000) < 4 * np.sqrt(7000 / 7 * 6 / 7)


def test_max_length_tokens_are_shown_whole_and_one_more_is_cropped() -> None:
    assert set(windows(cluster(b"LAGVSE"), max_length=8, epochs=200)) == {"<LAGVSE>"}
    assert set(windows(cluster(b"LAGVSER"), max_length=8, epochs=200)) == {"<LAGVSER", "LAGVSER>"}


def test_a_window_lies_within_its_member() -> None:
    some = cluster(b"A" * 20, b"C" * 3, b"D" * 20)
    for window in windows(some, max_length=8, epochs=500):
        assert len(window) <= 8
        assert len(set(window.strip("<>"))) == 1


# The whole draw


def test_a_draw_depends_on_seed_epoch_and_cluster_id_alone() -> None:
    def drawn(seed: int, epoch: int, name: str) -> bytes:
        draw = ClusterDraw(seed, max_length=16, min_length=1, masking=MaskingRule())
        shown(draw, cluster(b"MKV", name="another"), epoch)
        some = cluster(b"LAGVSERTIDPK" * 9, b"YWFM" * 20, name=name)
        return np.concatenate(shown(draw, some, epoch)).tobytes()

    assert drawn(1, 2, "a") == drawn(1, 2, "a")
    assert len({drawn(*key) for key in [(1, 2, "a"), (2, 2, "a"), (1, 3, "a"), (1, 2, "b"), (2, 1, "a")]}) == 5


def test_what_a_key_shows_never_changes() -> None:
    draw = ClusterDraw(seed=17, max_length=8, min_length=1, masking=MaskingRule(fraction=0.5))
    some = cluster(b"LAGVSERTIDPK", b"QNFYMHWCXBUZ", name="UniRef50_A0A009")
    epochs = [shown(draw, some, epoch) for epoch in range(3)]
    inputs = [text(inputs).replace("<mask>", "_") for inputs, _ in epochs]
    assert inputs == ["___YM_WC", "NFYM_WC_", "FY_H__X_"]
    labels = [text(labels).replace("<pad>", ".") for _, labels in epochs]
    assert labels == ["QNF..H..", "....H..X", "..M.WC.B"]


def test_member_window_and_mask_are_independent() -> None:
    draw = ClusterDraw(seed=1, max_length=8, min_length=1, masking=MaskingRule(fraction=0.5))
    some, epochs = cluster(b"LAGVSERTIDPK", b"QNFYMHWCXBUZ"), 4000
    wholes = "<LAGVSERTIDPK>", "<QNFYMHWCXBUZ>"
    columns = []
    for epoch in range(epochs):
        inputs, labels = shown(draw, some, epoch)
        selected = labels != alphabet.PAD
        window = text(np.where(selected, labels, inputs))
        member = int(window in wholes[1])
        columns.append([member, wholes[member].index(window), *selected[1:7]])
    related = np.abs(np.corrcoef(np.array(columns, float).T)) - np.eye(8)
    assert related.max() < 4 / np.sqrt(epochs)


def test_labels_are_what_the_window_shows() -> None:
    some = cluster(b"LAGVSERTIDPK")
    masked = ClusterDraw(seed=1, max_length=8, min_length=1, masking=MaskingRule())
    for epoch, window in enumerate(windows(some, max_length=8, epochs=300)):
        inputs, labels = shown(masked, some, epoch)
        assert text(np.where(labels == alphabet.PAD, inputs, labels)) == window


# Batches


def test_a_batch_lays_its_sequences_end_to_end_each_as_it_is_alone() -> None:
    some = [
        DRAW.window(cluster(members, name=members.decode()), 0) for members in (b"MKV" * 30, b"LA", b"GVSERT" * 3)
    ]
    alone, batch = [DRAW.collate([each]) for each in some], DRAW.collate(some)
    for key in ("tokens", "labels", "lengths"):
        assert torch.equal(batch[key], torch.cat([each[key] for each in alone]))
    assert batch["lengths"].tolist() == [24, 4, 20]
    assert [batch[key].dtype for key in ("tokens", "labels", "lengths")] == [torch.uint8, torch.uint8, torch.int32]


def test_a_batch_of_nothing_has_the_same_types() -> None:
    batch = DRAW.collate([])
    assert [tuple(batch[key].shape) for key in ("tokens", "labels", "lengths")] == [(0,)] * 3
    assert [batch[key].dtype for key in ("tokens", "labels", "lengths")] == [torch.uint8, torch.uint8, torch.int32]


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


def test_clusters_that_are_all_short_are_counted(shards: Path, tmp_path: Path) -> None:
    dataset = train_loader(DRAW, str(shards / "train"), str(tmp_path), BATCH, num_workers=0).dataset
    longest = [max(StreamingDataset.get_item(dataset, i)["lengths"]) for i in range(dataset.num_samples)]
    for min_length in (1, min(longest), min(longest) + 1, int(np.median(longest)), 1022):
        short = sum(length < min_length for length in longest)
        assert count_short_clusters(str(shards / "train"), min_length) == short
    assert count_short_clusters(str(shards / "train"), 1023) is None
    assert count_short_clusters(str(shards), 5) is None


@pytest.mark.parametrize("longest", [[], None, "x", {"x": 1}, {"3": "x"}, {"3": None}])
def test_a_conversion_json_of_other_content_counts_no_clusters(tmp_path: Path, longest: Any) -> None:
    (tmp_path / "conversion.json").write_text(json.dumps({"longest_members": longest}))
    assert count_short_clusters(str(tmp_path), 5) is None


def test_a_cache_of_the_remotes_own_shards_is_taken_and_others_are_refused(written: Path, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        shutil.copytree(written, tmp_path / "remote" / split)
    data = DataSection(str(tmp_path / "remote"), str(tmp_path / "cache"))
    check_cache(data)
    shutil.copytree(tmp_path / "remote", tmp_path / "cache")
    check_cache(data)
    index = tmp_path / "cache/valid/index.json"
    index.write_text(index.read_text() + " ")
    check_cache(data, ["train"])
    with pytest.raises(UserError, match=f"data.local {data.local} holds other valid shards than data.remote"):
        check_cache(data)
    shutil.rmtree(tmp_path / "remote")
    with pytest.raises(UserError, match="remote/train: cannot be opened as MDS shards"):
        check_cache(data)


@pytest.mark.parametrize(("more", "works"), [(0, True), (1, False)])
def test_a_tmpdir_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch, more: int, works: bool) -> None:
    data, shorter = DataSection("shards", num_workers=1), len(f"{tempfile.gettempdir()}/12345678")
    with tempfile.TemporaryDirectory(prefix="n" * (LONGEST_TMPDIR + more - shorter)) as folder:
        Path(folder, "pymp-12345678").mkdir()
        with contextlib.nullcontext() if works else pytest.raises(OSError, match="too long"):
            multiprocessing.connection.Listener(f"{folder}/pymp-12345678/listener-12345678").close()
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with contextlib.nullcontext() if works else pytest.raises(UserError, match="too long for the sockets"):
            check_tmpdir(data)
        check_tmpdir(replace(data, num_workers=0))


def test_what_lies_in_a_store_is_looked_at_before_a_run(written: Path, tmp_path: Path) -> None:
    data = DataSection(str(tmp_path / "remote"), str(tmp_path / "cache"))
    shutil.copytree(written, tmp_path / "remote/train")
    clusters = count_clusters((written / "index.json").read_bytes())
    with pytest.raises(UserError, match="remote/valid: cannot be opened as MDS shards"):
        check_store(data, clusters)
    shutil.copytree(written, tmp_path / "remote/valid")
    check_store(data, clusters)
    with pytest.raises(UserError, match=f"train holds {clusters} clusters, fewer than one global_"):
        check_store(data, clusters + 1)
    conversion = {"state": {"options": {"split": "train"}}}
    (tmp_path / "remote/valid/conversion.json").write_text(json.dumps(conversion))
    with pytest.raises(UserError, match="remote/valid: train shards, by conversion"):
        check_store(data, clusters)
    (tmp_path / "remote/train/index.json").write_text("{}")
    with pytest.raises(UserError, match=r"remote/train/index\.json is no index of MDS shards"):
        check_store(data, clusters)
    assert not (tmp_path / "cache").exists()


def test_a_store_that_is_away_while_the_cache_is_compared_is_waited_for(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "valid"):
        shutil.copytree(written, tmp_path / "cache" / split)

    def away(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("esm2_composer.retry.WAITS", (0,))
    monkeypatch.setattr(LocalDownloader, "_download_file_impl", away)
    with pytest.raises(StoreUnavailable, match="no route to host"):
        check_cache(DataSection(str(tmp_path / "remote"), str(tmp_path / "cache")))
    assert capsys.readouterr().err.endswith("no route to host); trying again in 0 s\n")
