"""From MDS shards of clusters to this rank's share of a global batch, as flat tokens.

The unit of meaning is the global batch. Which clusters it holds follows from Streaming's order, which depends
on seed and epoch only, as long as the global batch size stays; what each cluster shows follows from its draw.
Ranks and workers only decide where a sequence is computed.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from streaming.base.storage.download import CloudDownloader
from torch.utils.data import DataLoader, IterableDataset

from esm2_composer import alphabet
from esm2_composer.conversion.records import LONGEST_COUNTED
from esm2_composer.epochs import shards_in_use
from esm2_composer.errors import ReportedError, StoreUnavailable, UserError, system_error, tell
from esm2_composer.masking import MaskingRule, choose, keyed_words, token_uniforms
from esm2_composer.retry import retry
from esm2_composer.schema import DataSection
from esm2_composer.shards import CheckedStream, MappedDataset, opening_alone
from esm2_composer.splits import SPLITS, count_clusters, swapped

# Streaming lays an epoch out for this many nodes, or for those of its factors that the batch has too: so a run
# goes on upon any number of nodes with no other prime factors. Fewer would make a large epoch slow to shuffle.
CANONICAL_NODES = 2**6 * 3 * 5
# Bytes: Linux lets a socket's path have 107, and Python adds these.
LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")

# A part of a global batch: tokens uint8 (T,), labels uint8 (T,), lengths int32 (B,).
Share = dict[str, torch.Tensor]


Sample = tuple[np.ndarray, int]  # tokens uint8 (T,) of a window, and the word that keys its mask


@dataclass(frozen=True)
class ClusterDraw:
    """What a cluster shows in an epoch: one member, one window of it, one mask.

    The member is uniform among those of at least `min_length` residues (among all, if none is so long). The
    window of at most `max_length` tokens is uniform over every window of `<cls> residues <eos>`, the last
    included, so `<cls>` and `<eos>` show at true ends only.
    """

    seed: int
    max_length: int
    min_length: int
    masking: MaskingRule

    def window(self, cluster: dict[str, Any], epoch: int) -> Sample:
        """The window of a cluster, before its mask."""
        member_word, window_word, mask_word = keyed_words(self.seed, epoch, cluster["cluster_id"])
        lengths = cluster["lengths"].tolist()  # most are of a few members, for which numpy takes longer
        members = [i for i, length in enumerate(lengths) if length >= self.min_length] or range(len(lengths))
        member = members[choose(member_word, len(members))]
        start = sum(lengths[:member])
        tokens = alphabet.encode(cluster["residues"][start : start + lengths[member]])
        first = choose(window_word, max(len(tokens) - self.max_length, 0) + 1)
        return tokens[first : first + self.max_length], mask_word

    def collate(self, samples: Sequence[Sample]) -> Share:
        """Lay windows end to end, and mask them all at once."""
        tokens = np.concatenate([*(tokens for tokens, _ in samples), np.empty(0, np.uint8)])
        lengths = np.array([len(tokens) for tokens, _ in samples], np.int32)
        uniforms = token_uniforms(np.array([word for _, word in samples], np.uint64), lengths)
        inputs, labels = self.masking.apply(tokens, uniforms)
        return {
            "tokens": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "lengths": torch.from_numpy(lengths),
        }


class ClusterDataset(MappedDataset):
    """MDS shards of clusters, each drawn anew every epoch, or always as in `pinned_epoch`."""

    def __init__(
        self, stream: CheckedStream, draw: ClusterDraw | None, pinned_epoch: int | None = None, **arguments: Any
    ) -> None:
        super().__init__(stream, **arguments)
        self.draw = draw
        self._pinned_epoch = pinned_epoch

    def end_epochs_after(self, samples: int) -> None:
        """Make an epoch `samples` long. Streaming takes that as an argument only, which comes too early:
        before it has read how many samples there are."""
        self.epoch_size = samples
        self.length = samples // _world_size()

    def __iter__(self) -> Iterator[Sample]:
        try:
            yield from super().__iter__()
        except RuntimeError:  # "Background thread failed"
            self._raise_failure()
            raise
        self._raise_failure()
        if hasattr(self, "_event") and self._event.is_set():  # or the epoch would just have ended
            raise RuntimeError("shards cannot be fetched; the traceback above says why")

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def __getitem__(self, sample_id: int) -> Sample:
        # Streaming counts an epoch on before it yields the epoch's first sample.
        epoch = self.next_epoch - 1 if self._pinned_epoch is None else self._pinned_epoch
        return self.draw.window(self.get_item(sample_id), epoch)


class EvaluationBatches(IterableDataset):
    """Every cluster once, in shard order, `batch_size` to a global batch: this rank's share of each.

    Streaming's own iteration repeats samples so that ranks have equally many; here ranks have equally many
    batches, and the last may be short or empty.
    """

    def __init__(self, clusters: ClusterDataset, batch_size: int) -> None:
        self.clusters = clusters
        self._batch_size = batch_size
        self._rank, self._ranks = _rank(), _world_size()

    def __len__(self) -> int:
        return math.ceil(self.clusters.num_samples / self._batch_size)

    def __iter__(self) -> Iterator[Share]:
        worker = torch.utils.data.get_worker_info()
        batches = range(worker.id if worker else 0, len(self), worker.num_workers if worker else 1)
        for batch in batches:
            start = batch * self._batch_size
            stop = min(start + self._batch_size, self.clusters.num_samples)
            yield self.clusters.draw.collate(
                [self.clusters[i] for i in range(start + self._rank, stop, self._ranks)]
            )


def count_short_clusters(place: str, min_length: int) -> int | None:
    """How many clusters of a split have no member of `min_length` residues; None if its conversion does not say.

    Args:
        place: folder or URI of the split.
    """
    if min_length > LONGEST_COUNTED:  # longer ones are counted as so long
        return None
    try:
        longest = _fetch_conversion(place)["longest_members"]
        return sum(count for length, count in longest.items() if int(length) < min_length)
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def canonical_nodes(global_batch_size: int, ranks: int) -> int:
    """How many nodes Streaming's order is made for, whatever their real number.

    Raises:
        UserError: so many ranks cannot share a global batch equally.
    """
    if global_batch_size % ranks:
        raise UserError(f"global_train_batch_size {global_batch_size} is not a multiple of the {ranks} ranks")
    canonical = math.gcd(CANONICAL_NODES, global_batch_size)
    nodes = _nodes(ranks)
    if canonical % nodes and nodes % canonical:
        raise UserError(
            f"{nodes} nodes cannot share global_train_batch_size {global_batch_size}; "
            f"take a number of nodes that divides {canonical}"
        )
    return canonical


def cache_needed(clusters: ClusterDataset) -> int:
    """Bytes of the shards that this node reads from at a time, and of one more that is being unpacked."""
    sizes = [shard.raw_data.bytes for shard in clusters.shards]
    in_use = shards_in_use(clusters, _nodes(_world_size()))
    return in_use * sum(sizes) // len(sizes) + max(shard.get_max_size() for shard in clusters.shards)


def train_loader(
    draw: ClusterDraw,
    remote: str | None,
    local: str,
    global_batch_size: int,
    num_workers: int,
    cache_limit: str | None = None,
) -> DataLoader:
    """Shuffled clusters, `global_batch_size` a step over all ranks, for training.

    With a `cache_limit`, such as "200gb", shards that were not read for longest leave `local` to make room. If
    they would soon be read again, a line says so.

    An epoch is a whole number of global batches: the clusters left over, fewer than one batch and different ones
    each epoch, are not shown in it.

    Raises:
        UserError: the ranks cannot share the batch equally, or there are fewer clusters than one batch.
    """
    ranks = _world_size()
    nodes = canonical_nodes(global_batch_size, ranks)
    clusters = open_clusters(
        remote,
        local,
        draw=draw,
        batch_size=global_batch_size // ranks,
        shuffle=True,
        shuffle_algo="py1e",
        shuffle_seed=draw.seed,
        shuffle_block_size=max(4_000_000 // nodes, 2**18),  # Streaming's choice, kept if it should choose anew
        num_canonical_nodes=nodes,
        cache_limit=cache_limit,
    )
    if cache_limit and clusters.cache_limit < (needed := cache_needed(clusters)) and not _rank():
        tell(
            f"data.cache_limit {cache_limit} has no room for the shards in use at a time, so each will be fetched "
            f"many times; give it {math.ceil(needed / 2**20)}mb"
        )
    batches = clusters.num_samples // global_batch_size
    if not batches:
        raise UserError(_too_few(remote or local, clusters.num_samples, global_batch_size))
    clusters.end_epochs_after(batches * global_batch_size)
    return DataLoader(
        clusters,
        batch_size=clusters.batch_size,
        collate_fn=draw.collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def evaluation_loader(
    draw: ClusterDraw, remote: str | None, local: str, global_batch_size: int, num_workers: int
) -> DataLoader:
    """Every cluster once, drawn the same way every time, for evaluation."""
    clusters = open_clusters(remote, local, draw=draw, batch_size=1, pinned_epoch=0)
    return DataLoader(
        EvaluationBatches(clusters, global_batch_size),
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def check_tmpdir(data: DataSection) -> None:
    """Raise a UserError if loader processes could not hand over batches: their rank would wait for ever."""
    folder = tempfile.gettempdir()
    if data.num_workers and len(os.fsencode(folder)) > LONGEST_TMPDIR:
        raise UserError(
            f"TMPDIR {folder} is too long for the sockets of loader processes; "
            f"set one of at most {LONGEST_TMPDIR} bytes, or data.num_workers=0"
        )


def make_cache(data: DataSection) -> None:
    """Raise a UserError, or TransientError, if `data.local` cannot be made: Streaming would blame the shards."""
    if data.local is not None:
        try:
            Path(data.local).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise system_error(f"data.local {data.local} cannot be made ({error.strerror})", error) from error


def check_cache(data: DataSection, splits: Collection[str] = SPLITS) -> None:
    """See that `data.local` holds no other shards than `data.remote`: Streaming takes an index that it finds.

    Raises:
        UserError: it does, or the remote has none.
        StoreUnavailable: the store does not answer.
    """
    for name in splits:
        remote, local = data.split(name)
        cached = Path(local, "index.json")
        if remote is None or not cached.exists():
            continue
        if _fetch_index(remote) != cached.read_bytes():
            raise UserError(
                f"data.local {data.local} holds other {name} shards than data.remote {data.remote}; "
                "take another data.local"
            )


def check_store(data: DataSection, global_batch_size: int) -> None:
    """Look at the splits in a store, as `config` does at those in a folder.

    Raises:
        UserError: a split is absent, lies in the other's place, or has too few clusters for a global batch.
        StoreUnavailable: the store does not answer.
    """
    for name in SPLITS:
        remote, _ = data.split(name)
        assert remote is not None, data
        clusters = count_clusters(_fetch_index(remote))
        if not clusters:
            raise UserError(f"{remote}/index.json is no index of MDS shards")
        if name == "train" and clusters < global_batch_size:
            raise UserError(_too_few(remote, clusters, global_batch_size))
        if mistake := swapped(remote, name, _fetch_conversion(remote)):
            raise UserError(mistake)


def _too_few(place: str, clusters: int, global_batch_size: int) -> str:
    return f"{place} holds {clusters} clusters, fewer than one global_train_batch_size of {global_batch_size}"


def _fetch_index(remote: str) -> bytes:
    """Raises UserError if there is none, StoreUnavailable if the store does not answer for half a minute."""
    try:
        return retry(partial(_fetch, remote, "index.json"), f"{remote}/index.json")
    except StoreUnavailable:
        raise
    except Exception as error:  # each store raises its own types
        raise UserError(f"{remote}: cannot be opened as MDS shards ({error})") from error


def _fetch_conversion(place: str) -> object:
    """The conversion.json of a split, at a folder or URI; None if it cannot be had."""
    try:
        return json.loads(_fetch(place, "conversion.json"))
    except Exception:  # no such file, or other content; each store raises its own types
        return None


def _fetch(place: str, name: str) -> bytes:
    """A small file of a split, from its folder or URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        CloudDownloader.get(place).download(f"{place}/{name}", str(path), 60)
        return path.read_bytes()


def open_clusters(remote: str | None, local: str, **arguments: Any) -> ClusterDataset:
    """The dataset of a split, fetched from `remote` if need be; `arguments` are ClusterDataset's.

    Raises:
        UserError: there are no such shards, or they are damaged.
        StoreUnavailable: the store does not answer.
    """
    try:
        with opening_alone():
            return ClusterDataset(CheckedStream(remote, local), **arguments)
    except ReportedError:
        raise
    except Exception as error:  # each store raises its own types
        # Another rank was lost, the store is away, or another user's run took the name in shared memory at the
        # same moment: no mistake, and worth another start.
        another_start_may_do = isinstance(error, dist.DistError | ConnectionError | FileExistsError)
        if another_start_may_do or "/gloo/" in str(error):
            raise
        if "`cache_limit`" in str(error):  # Streaming's, of one that is too small
            raise UserError(f"data.cache_limit {arguments['cache_limit']}: {error}") from error
        raise UserError(f"{remote or local}: cannot be opened as MDS shards ({error})") from error


def _nodes(ranks: int) -> int:
    return ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
