"""From all ranks' shares of a global batch to microbatches of equally many tokens.

With a fixed number of UniRef sequences a rank, the slowest of 128 ranks would have half as much again to
compute as the mean. So the ranks show each other their sequences, under a megabyte or two in all, and deal
them out anew. The loss is a mean over all masked tokens of the global batch, so it does not matter where a
sequence is computed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.distributed
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader

from esm2_composer import alphabet
from esm2_composer.data import Sequences

Microbatch = dict[str, Any]  # see `pack`


def pack(tokens: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> Microbatch:
    """What the model takes, from sequences that lie end to end.

    Returns tokens uint8 (T,), cu_seqlens int32 (B+1,), max_seqlen, positions int64 (M,) of the selected
    tokens and their true ids targets int64 (M,); and the counts num_sequences, num_tokens, num_masked, as plain
    integers, since reading them off a GPU would stop it.
    """
    num_sequences = len(lengths)
    if not num_sequences:  # a rank without work takes the step with the others, and adds nothing to it
        tokens = np.array([alphabet.CLS, alphabet.EOS], np.uint8)
        labels = np.full(2, alphabet.PAD, np.uint8)
        lengths = np.array([2], np.int32)
    (positions,) = np.nonzero(labels != alphabet.PAD)
    return {
        "tokens": torch.from_numpy(tokens),
        "cu_seqlens": torch.from_numpy(np.concatenate(([0], lengths)).cumsum(dtype=np.int32)),
        "max_seqlen": int(lengths.max()),
        "positions": torch.from_numpy(positions),
        "targets": torch.from_numpy(labels[positions].astype(np.int64)),
        "num_sequences": num_sequences,
        "num_tokens": len(tokens) if num_sequences else 0,
        "num_masked": len(positions),
    }


def deal(lengths: np.ndarray, hands: int, largest: int) -> list[list[int]]:
    """Deal sequences out into a multiple of `hands` piles of at most `largest` tokens, near-equal in tokens.

    Longest first, each to the pile with the fewest tokens (Graham's LPT rule): the fullest pile is at most a
    third above the best possible, and in practice within a per cent of it.

    Args:
        lengths: tokens of each sequence, none above `largest`.

    Returns:
        The piles, each a list of indices into `lengths`: as few as hold them if dealt so, and the same for the
        same lengths.
    """
    assert not len(lengths) or lengths.max() <= largest, "a sequence is longer than a microbatch"
    order = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    rounds = max(1, math.ceil(sum(sizes) / (hands * largest)))
    while True:
        piles: list[list[int]] = [[] for _ in range(rounds * hands)]
        fill = [(0, pile) for pile in range(len(piles))]
        for i in order:
            tokens, pile = fill[0]
            heapq.heapreplace(fill, (tokens + sizes[i], pile))
            piles[pile].append(i)
        if max(tokens for tokens, _ in fill) <= largest:
            return piles
        rounds += 1


class Pool:
    """Deals the sequences of a global batch out anew, so that all ranks compute on equally many tokens.

    Composer calls it once a batch on every rank (`DataSpec.batch_transforms`). Every rank learns all
    sequences, deals them in the same way, and keeps its own piles: equally many microbatches on every rank,
    each of at most `microbatch_tokens` tokens.
    """

    def __init__(self, microbatch_tokens: int) -> None:
        self._microbatch_tokens = microbatch_tokens
        # The default group may be NCCL's, which has no CPU tensors.
        self._group = torch.distributed.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def __call__(self, share: Sequences) -> dict[str, Any]:
        """The rank's new share, cut into microbatches (see `pack`), with its own counts."""
        tokens, labels, lengths = (share[key].numpy() for key in ("tokens", "labels", "lengths"))
        if self._group is not None:
            tokens, labels, lengths = self._gather(tokens, labels, lengths)
        starts = lengths.cumsum() - lengths
        piles = deal(lengths, dist.get_world_size(), self._microbatch_tokens)
        microbatches = []
        for pile in piles[dist.get_global_rank() :: dist.get_world_size()]:
            where = [slice(starts[i], starts[i] + lengths[i]) for i in pile]
            empty = np.empty(0, np.uint8)  # np.concatenate takes no empty list
            microbatches.append(
                pack(
                    np.concatenate([*(tokens[w] for w in where), empty]),
                    np.concatenate([*(labels[w] for w in where), empty]),
                    lengths[pile],
                )
            )
        counts = ("num_sequences", "num_tokens", "num_masked")
        return {"microbatches": microbatches, **{key: sum(m[key] for m in microbatches) for key in counts}}

    def _gather(
        self, tokens: np.ndarray, labels: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All ranks' sequences, in the order of ranks."""
        counts = _all_gather(np.array([len(lengths)], np.int64), self._group)
        all_lengths = _all_gather(lengths, self._group, [int(count[0]) for count in counts])
        sizes = [int(each.sum()) for each in all_lengths]
        both = _all_gather(np.concatenate((tokens, labels)), self._group, [2 * size for size in sizes])
        return (
            np.concatenate([each[:size] for each, size in zip(both, sizes, strict=True)]),
            np.concatenate([each[size:] for each, size in zip(both, sizes, strict=True)]),
            np.concatenate(all_lengths),
        )


def _all_gather(
    mine: np.ndarray, group: torch.distributed.ProcessGroup, sizes: Sequence[int] | None = None
) -> list[np.ndarray]:
    """Every rank's 1-D array; `sizes` are their lengths, if those differ."""
    sizes = sizes or [len(mine)] * group.size()
    padded = torch.zeros(max(sizes), dtype=torch.from_numpy(mine[:0]).dtype)
    padded[: len(mine)] = torch.from_numpy(mine)
    out = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(out, padded, group=group)
    return [each[:size].numpy() for each, size in zip(out, sizes, strict=True)]


def data_spec(loader: DataLoader, microbatch_tokens: int) -> DataSpec:
    """The loader as Composer takes it: pooled, and counted in sequences, real tokens and masked tokens."""
    return DataSpec(
        dataloader=loader,
        batch_transforms=Pool(microbatch_tokens),
        split_batch=lambda batch, _: batch["microbatches"],
        get_num_samples_in_batch=itemgetter("num_sequences"),
        get_num_tokens_in_batch=lambda batch: {
            "total": batch["num_tokens"],
            "loss_generating": batch["num_masked"],
        },
    )
