"""Which clusters the global batches of an epoch hold: a function of (seed, epoch) and the shards' sizes alone.

An epoch is a whole number of global batches. The clusters that would not fill the last one are left out, others
in each epoch. The rest is shuffled by Streaming's py1e, shard by shard within canonical nodes, and the canonical
nodes take turns: so a global batch is the same on any number of ranks, and a machine needs only the shards of the
canonical nodes that fall to it.

Streaming lays epochs out in the same order, but to leave a few samples out it draws those that stay one by one,
and it holds five arrays of an epoch at a time: 3.3 GB for the 65 million clusters of UniRef50.
"""

from __future__ import annotations

import math

import numpy as np
from streaming import StreamingDataset
from streaming.base.batching import batching_methods
from streaming.base.shuffle import get_shuffle
from streaming.base.world import World


def lay_out_epoch(dataset: StreamingDataset, world: World, epoch: int, samples_done: int) -> np.ndarray:
    """The epoch's samples, by who reads them and when, as Streaming asks for them.

    Args:
        dataset: with an `epoch_size` that is a multiple of the global batch size.
        samples_done: of this epoch, a multiple of the global batch size; they are not laid out again.

    Returns:
        Sample ids, int32 (nodes, ranks of a node, workers of a rank, batches of a worker, batch size); the last
        batch of a worker is all -1 if others have one more.
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
    ).astype(np.int32)
    # That counts the samples that stay; their own numbers are higher by those left out before them.
    order = order.reshape(dataset.num_canonical_nodes, -1)
    stay_before = left_out - np.arange(len(left_out))
    for of_node in order:
        of_node += np.searchsorted(stay_before, of_node, side="right").astype(np.int32)
    in_turns = order.T.reshape(-1)[samples_done:]
    batches = in_turns.reshape(-1, dataset.batch_size, world.ranks_per_node, world.num_nodes)
    if missing := -len(batches) % world.workers_per_rank:
        batches = np.concatenate([batches, np.full((missing, *batches.shape[1:]), -1, np.int32)])
    return batches.reshape(-1, world.workers_per_rank, *batches.shape[1:]).transpose(4, 3, 1, 0, 2)


def samples_left_out(samples: int, kept: int, seed: int, epoch: int) -> np.ndarray:
    """All but `kept` of the samples 0 to `samples` - 1, rising, int64: a uniform choice for each epoch."""
    assert samples < 2**31
    left_out = np.random.default_rng((seed, epoch)).choice(samples, samples - kept, replace=False)
    return np.sort(left_out)


def shards_in_use(dataset: StreamingDataset, nodes: int) -> int:
    """How many shards a node reads from at a time, when an epoch is laid out for so many nodes.

    A canonical node reads shards one after the other, but py1e spreads each over `shuffle_block_size` samples of
    that node, so several at a time; and a shard may be cut between two canonical nodes.
    """
    canonical, shards = dataset.num_canonical_nodes, len(dataset.samples_per_shard)
    pieces = (shards + canonical) / min(nodes, canonical)  # that the node reads in an epoch
    share = dataset.shuffle_block_size * canonical / dataset.num_samples  # of the epoch, until one is done
    return min(shards, math.ceil(pieces * min(1, 1.1 * share)))  # the number in use varies by a tenth


WHOLE_BATCHES = "whole_batches"
batching_methods[WHOLE_BATCHES] = lay_out_epoch  # Streaming looks the method of a dataset up here
