"""From MDS shards of clusters to this rank's part of a global batch, as flat tokens.

What counts is the global batch. Which clusters it holds follows from Streaming's order, which depends only on seed
and epoch as long as the global batch size stays the same; what is shown of each cluster follows from its draw.
Ranks and workers only decide where a sequence is computed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from esm2_composer.data.checks import too_few
from esm2_composer.data.draw import ClusterDraw, Share, Window
from esm2_composer.data.epochs import shards_in_use
from esm2_composer.data.shards import MappedDataset, opening_alone
from esm2_composer.data.streams import CheckedStream
from esm2_composer.errors import ReportedError, UserError, tell

# The order is laid out for gcd(this, global batch) nodes, so a run resumes on any number that divides it or is a
# multiple. Fewer would make a large epoch slow to shuffle.
CANONICAL_NODES = 2**6 * 3 * 5


class ClusterDataset(MappedDataset):
    """MDS shards of clusters, each drawn afresh every epoch, or always as in `pinned_epoch`."""

    def __init__(
        self, stream: CheckedStream, draw: ClusterDraw | None, pinned_epoch: int | None = None, **arguments: Any
    ) -> None:
        super().__init__(stream, **arguments)
        self.draw = draw
        self._pinned_epoch = pinned_epoch

    def end_epochs_after(self, samples: int) -> None:
        """Make an epoch `samples` long. Streaming takes that only as an argument, which is too early: before it
        has read how many samples there are."""
        self.epoch_size = samples
        self.length = samples // _world_size()

    def __iter__(self) -> Iterator[Window]:
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

    def __getitem__(self, sample_id: int) -> Window:
        # Streaming increments the epoch before it yields the epoch's first sample.
        epoch = self.next_epoch - 1 if self._pinned_epoch is None else self._pinned_epoch
        return self.draw.window(self.get_item(sample_id), epoch)


class EvaluationBatches(IterableDataset):
    """Every cluster once, in shard order, `batch_size` per global batch: this rank's part of each.

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


def canonical_nodes(global_batch_size: int, ranks: int) -> int:
    """How many nodes Streaming's order is laid out for, whatever their real number.

    Raises:
        UserError: this number of ranks cannot share a global batch equally.
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
    """Shuffled clusters for training, `global_batch_size` per step over all ranks; a batch is a `draw.Share`.

    With a `cache_limit`, such as "200gb", the least recently read shards are removed from `local` to make room. If
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
        shuffle_block_size=max(4_000_000 // nodes, 2**18),  # Streaming's choice, kept if its default changes
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
        raise UserError(too_few(remote or local, clusters.num_samples, global_batch_size))
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
    """Every cluster once, drawn the same way every time, for evaluation; a batch is a `draw.Share`."""
    clusters = open_clusters(remote, local, draw=draw, batch_size=1, pinned_epoch=0)
    return DataLoader(
        EvaluationBatches(clusters, global_batch_size),
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


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
        # same moment: no user's mistake, and worth another start.
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
