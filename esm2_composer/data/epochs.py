"""Which clusters the global batches of an epoch hold: a function of (seed, epoch) and the shards' sizes alone.

An epoch is a whole number of global batches. The clusters that would not fill the last one are left out, different
ones each epoch. The rest is shuffled by Streaming's py1e, shard by shard within canonical nodes, and the canonical
nodes take turns: so a global batch is the same on any number of ranks, and a machine needs only the shards of its
own canonical nodes.

Streaming's layout has the same order, but to drop a few samples it draws the kept ones one by one, and it holds
five epoch-sized arrays: 3.3 GB for UniRef50's 65 million clusters. Here it is one, plus half of one shared by the
node's processes.
"""

from __future__ import annotations

import math

import numpy as np
from streaming import StreamingDataset
from streaming.base.shuffle import get_shuffle
from streaming.base.world import World

PIECE = 2**20  # samples interleaved at a time, or a few more


def layout_shape(dataset: StreamingDataset, world: World, samples_done: int) -> tuple[int, int, int, int]:
    """What a node reads of an epoch: ranks per node, workers per rank, batches per worker, batch size."""
    left = dataset.epoch_size - samples_done
    batches = left // (dataset.batch_size * world.ranks_per_node * world.num_nodes)
    assert left >= 0
    return world.ranks_per_node, world.workers_per_rank, -(-batches // world.workers_per_rank), dataset.batch_size


def lay_out_epoch(
    dataset: StreamingDataset, world: World, epoch: int, samples_done: int, layout: np.ndarray
) -> None:
    """Fill in which samples of the epoch this node reads, by rank, worker and batch.

    Args:
        dataset: with an `epoch_size` that is a multiple of the global batch size.
        samples_done: of this epoch, a multiple of the global batch size; they are not laid out again.
        layout: int32 of `layout_shape`; becomes sample ids, and -1 for the last batch of a worker if others have
            one more.
    """
    left_out = samples_left_out(dataset.num_samples, dataset.epoch_size, dataset.shuffle_seed, epoch)
    ends = np.cumsum(dataset.samples_per_shard)
    order = get_shuffle(
        dataset.shuffle_algo,
        np.diff(ends - np.searchsorted(left_out, ends), prepend=0),
        dataset.num_canonical_nodes,
        dataset.shuffle_seed,
        epoch,
        dataset.shuffle_block_size,
    ).reshape(dataset.num_canonical_nodes, -1)
    # That numbers only the samples that stay; their real numbers are higher by those left out before them.
    stay_before = left_out - np.arange(len(left_out))
    order = order[:, samples_done // dataset.num_canonical_nodes :]
    ranks, workers, _, batch_size = layout.shape
    global_batch = batch_size * ranks * world.num_nodes
    assert samples_done % global_batch == 0
    assert global_batch % len(order) == 0
    rounds = math.ceil(PIECE / (workers * global_batch))  # of all workers, in a piece
    width = rounds * workers * global_batch // len(order)  # of a canonical node, in a piece
    for piece in range(math.ceil(order.shape[1] / width)):
        in_turns = order[:, piece * width : (piece + 1) * width].T.reshape(-1)
        in_turns = in_turns + np.searchsorted(stay_before, in_turns, side="right")
        batches = in_turns.reshape(-1, batch_size, ranks, world.num_nodes)[..., world.node]
        if missing := -len(batches) % workers:
            batches = np.concatenate([batches, np.full((missing, *batches.shape[1:]), -1)])
        of_workers = batches.reshape(-1, workers, batch_size, ranks).transpose(3, 1, 0, 2)
        layout[:, :, piece * rounds : (piece + 1) * rounds] = of_workers


def samples_left_out(samples: int, kept: int, seed: int, epoch: int) -> np.ndarray:
    """All but `kept` of the samples 0 to `samples` - 1, rising, int64: a uniform choice for each epoch."""
    assert samples < 2**31
    left_out = np.random.default_rng((seed, epoch)).choice(samples, samples - kept, replace=False)
    return np.sort(left_out)


def shards_in_use(dataset: StreamingDataset, nodes: int) -> int:
    """How many shards a node reads from at a time, when an epoch is laid out for `nodes` nodes.

    A canonical node reads shards one after the other, but py1e spreads each over `shuffle_block_size` samples of
    that node, so several at a time; and a shard may be cut between two canonical nodes.
    """
    canonical, shards = dataset.num_canonical_nodes, len(dataset.samples_per_shard)
    pieces = (shards + canonical) / min(nodes, canonical)  # that the node reads in an epoch
    share = dataset.shuffle_block_size * canonical / dataset.num_samples  # of the epoch, until one is done
    return min(shards, math.ceil(pieces * min(1, 1.1 * share)))  # the number in use varies by a tenth
