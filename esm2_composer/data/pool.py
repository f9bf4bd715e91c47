"""From all ranks' parts of a global batch to microbatches of equally much work.

With a fixed number of UniRef sequences per rank, the slowest of 128 ranks would compute 1.5 times the mean. So the
ranks exchange their sequences, a megabyte or two in all, and redistribute them. The loss is a mean over all masked
tokens of the global batch, so it does not matter where a sequence is computed.
"""

from __future__ import annotations

import functools
import heapq
import math
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.distributed
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader

from esm2_composer import alphabet
from esm2_composer.data.draw import Share
from esm2_composer.distributed.collectives import all_gather, cpu_group
from esm2_composer.errors import ReportedError

Microbatch = dict[str, Any]  # see `pack`

SWEEPS = 120  # over the bins, at most, to level them


def pack(tokens: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> Microbatch:
    """What the model takes, from sequences that lie end to end.

    Returns tokens uint8 (T,), cu_seqlens int32 (B+1,), max_seqlen, positions int64 (M,) of the selected tokens and
    their true ids targets int64 (M,); and the counts num_sequences, num_tokens, num_masked, as plain integers,
    since reading them from a GPU would stall it.
    """
    num_sequences = len(lengths)
    if not num_sequences:  # a rank without work joins the step, and adds nothing to it
        tokens = np.array([alphabet.CLS, alphabet.EOS], np.uint8)
        labels = np.full(2, alphabet.PAD, np.uint8)
        lengths = np.array([2], np.int32)
    (positions,) = np.nonzero(labels != alphabet.PAD)
    return {
        "tokens": _tensor(tokens),
        "cu_seqlens": _tensor(np.concatenate(([0], lengths)).cumsum(dtype=np.int32)),
        "max_seqlen": int(lengths.max()),
        "positions": _tensor(positions),
        "targets": _tensor(labels[positions].astype(np.int64)),
        "num_sequences": num_sequences,
        "num_tokens": len(tokens) if num_sequences else 0,
        "num_masked": len(positions),
    }


def _tensor(array: np.ndarray) -> torch.Tensor:
    """In pinned memory if there is a GPU, which can then copy it while it computes."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def work_of(lengths: np.ndarray, hidden_size: int) -> np.ndarray:
    """How long a model computes on sequences of so many tokens, int64 (N,), in units of its own.

    Attending to n tokens takes n / 2D of the time that all else takes for a token, D being the hidden size: on an
    H200, n / 1.8D, 2.1D and 1.8D for 8M, 650M and 3B (docs/performance.md).
    """
    lengths = lengths.astype(np.int64)
    return lengths * (2 * hidden_size + lengths)


def balance(lengths: np.ndarray, work: np.ndarray, ranks: int, largest: int) -> list[list[int]]:
    """Sort sequences into a multiple of `ranks` bins of at most `largest` tokens, near-equal in work.

    The longest first, each to the bin with the least work (Graham's LPT rule), then single sequences are swapped
    until the bins are level: within about a per cent of the mean, if no sequence alone is more.

    Args:
        lengths: (N,) tokens of each sequence, none above `largest`.
        work: int64 (N,), that of each sequence.

    Returns:
        The bins, each a list of indices into `lengths`: as few as suffice when filled so, and the same for the
        same lengths and work.
    """
    assert not len(lengths) or lengths.max() <= largest, "a sequence is longer than a microbatch"
    order = np.argsort(-work, kind="stable").tolist()
    tokens, costs = lengths.tolist(), work.tolist()

    @functools.cache
    def filled(per_rank: int) -> list[list[int]] | None:
        """The bins with `per_rank` per rank, or None if one is too full."""
        bins: list[list[int]] = [[] for _ in range(per_rank * ranks)]
        fill = [(0, bin_) for bin_ in range(len(bins))]
        for i in order:
            cost, bin_ = fill[0]
            heapq.heapreplace(fill, (cost + costs[i], bin_))
            bins[bin_].append(i)
        return bins if max(sum(tokens[i] for i in bin_) for bin_ in bins) <= largest else None

    # Try the lower bound, then 1, 3, 7 ... more; then bisect between the last failure and the first success: more
    # bins hardly ever make the fullest fuller.
    fewest = max(1, math.ceil(sum(tokens) / (ranks * largest)))
    reach = 1
    while filled(fewest + reach - 1) is None:
        reach *= 2
    between = range(fewest + reach // 2, fewest + reach - 1)
    per_rank = between.start + bisect_left(between, True, key=lambda per_rank: filled(per_rank) is not None)
    return _level(filled(per_rank), lengths, work, largest)


def _level(bins: list[list[int]], lengths: np.ndarray, work: np.ndarray, largest: int) -> list[list[int]]:
    """Swap sequences between bins with much work and with little, until the most is within 0.4 % of the mean.

    With many sequences per bin there is nothing to do; with four, as on 512 ranks, LPT alone leaves 4 %.
    """
    rows = max(map(len, bins)) + 1  # a free place in every bin, so that a sequence can also just move
    members = np.full((rows, len(bins)), -1)
    for column, bin_ in enumerate(bins):
        members[: len(bin_), column] = bin_
    lengths, work = (np.append(each, 0).astype(np.int64) for each in (lengths, work))  # the last is a free place's
    goal = max(1.004 * work.sum() / len(bins), work.max())
    for sweep in range(SWEEPS):
        sizes = work[members]
        fill = sizes.sum(0)
        if fill.max() <= goal:
            break
        by_fill = np.argsort(fill, kind="stable")
        full = by_fill[::-1][: max(1, len(bins) // 8)]
        # Each gets another partner in every sweep: with few sequences per bin, few partners have a match.
        empty = np.roll(by_fill[: len(bins) - len(full)], -7 * sweep)[: len(full)]
        gap = fill[full] - fill[empty]
        # To move half the gap would level the two; [i, j, pair] is how far swapping i for j is off.
        off = np.abs(2 * (sizes[:, None, full] - sizes[None, :, empty]) - gap).reshape(rows * rows, -1)
        best = off.argmin(0)
        i, j = np.divmod(best, rows)
        moved = lengths[members[i, full]] - lengths[members[j, empty]]
        room = largest - lengths[members].sum(0)
        helps = off[best, np.arange(len(full))] < gap
        (pairs,) = np.nonzero(helps & (moved <= room[empty]) & (-moved <= room[full]))
        give, take = (i[pairs], full[pairs]), (j[pairs], empty[pairs])
        members[give], members[take] = members[take], members[give]
    return [column[column >= 0].tolist() for column in members.T]


class Pool:
    """Redistributes the sequences of a global batch, so that all ranks compute equally long.

    Every rank receives all sequences, sorts them in the same way, and keeps its own bins: equally many
    microbatches on every rank, each of at most `microbatch_tokens` tokens.
    """

    def __init__(self, microbatch_tokens: int, hidden_size: int) -> None:
        self._microbatch_tokens, self._hidden_size = microbatch_tokens, hidden_size
        # The default group may be NCCL's, which has no CPU tensors.
        self._group = cpu_group()

    def __call__(self, share: Share) -> dict[str, Any]:
        """The rank's new part: {"microbatches": list of `pack`, their summed num_sequences, num_tokens, num_masked
        and "work", by `work_of`}."""
        tokens, labels, lengths = (share[key].numpy() for key in ("tokens", "labels", "lengths"))
        if self._group is not None:
            tokens, labels, lengths = self._gather(tokens, labels, lengths)
        starts = lengths.cumsum() - lengths
        work = work_of(lengths, self._hidden_size)
        bins = balance(lengths, work, dist.get_world_size(), self._microbatch_tokens)
        mine = bins[dist.get_global_rank() :: dist.get_world_size()]
        microbatches = []
        for bin_ in mine:
            where = [slice(starts[i], starts[i] + lengths[i]) for i in bin_]
            empty = np.empty(0, np.uint8)  # np.concatenate takes no empty list
            microbatches.append(
                pack(
                    np.concatenate([*(tokens[w] for w in where), empty]),
                    np.concatenate([*(labels[w] for w in where), empty]),
                    lengths[bin_],
                )
            )
        counts = ("num_sequences", "num_tokens", "num_masked")
        batch = {"microbatches": microbatches, **{key: sum(m[key] for m in microbatches) for key in counts}}
        batch["work"] = sum(int(work[bin_].sum()) for bin_ in mine)
        if not (labels != alphabet.PAD).any():  # the loss is zero then, but Composer would divide by the count
            batch["num_masked"] = microbatches[0]["num_masked"] = 1
        return batch

    def _gather(
        self, tokens: np.ndarray, labels: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All ranks' sequences, in the order of ranks."""
        counts = self._gather_counts(len(lengths), len(tokens))
        mine = np.concatenate((lengths.astype(np.int32).view(np.uint8), tokens, labels))
        all_bytes = all_gather(mine, self._group, [4 * int(b) + 2 * int(t) for b, t in counts])
        parts = []
        for each, (b, t) in zip(all_bytes, counts, strict=True):
            parts.append((each[4 * b : 4 * b + t], each[4 * b + t :], each[: 4 * b].view(np.int32)))
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def take(self, shares: Iterator[Share]) -> dict[str, Any] | None:
        """The next share, pooled; None if there is none. A ReportedError on one rank is raised on every rank;
        otherwise the run would exit with the code of a rank killed while waiting."""
        try:
            share = next(shares, None)
        except ReportedError as error:
            if self._group is not None:
                self._gather_counts(-1, 0, error)
            raise
        return None if share is None else self(share)

    def _gather_counts(self, sequences: int, tokens: int, error: ReportedError | None = None) -> list[np.ndarray]:
        counts = all_gather(np.array([sequences, tokens], np.int64), self._group)
        if min(sequences for sequences, _ in counts) < 0:
            errors: list[ReportedError | None] = [None] * len(counts)
            torch.distributed.all_gather_object(errors, error, self._group)
            raise next(each for each in errors if each is not None)
        return counts


class PooledLoader(DataLoader):
    """A loader's batches, pooled one ahead in a thread while the model computes on the previous one.

    At 128 ranks the exchange takes longer than Composer's other work between two steps, so it must not happen
    there. All ranks begin it when they hand out a batch, and none leaves before it has ended: so no rank waits for
    one that has stopped.
    """

    def __init__(self, loader: DataLoader, microbatch_tokens: int, hidden_size: int) -> None:
        super().__init__(
            loader.dataset,
            batch_size=loader.batch_size,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            persistent_workers=loader.persistent_workers,
            worker_init_fn=loader.worker_init_fn,
        )
        self._pool = Pool(microbatch_tokens, hidden_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        shares = super().__iter__()

        with ThreadPoolExecutor(1, "pool") as thread:
            ahead = thread.submit(self._pool.take, shares)
            while (batch := ahead.result()) is not None:
                ahead = thread.submit(self._pool.take, shares)
                yield batch


def data_spec(loader: DataLoader, microbatch_tokens: int, hidden_size: int) -> DataSpec:
    """The loader as Composer takes it: pooled, and counted in sequences, real tokens and masked tokens."""
    return DataSpec(
        dataloader=PooledLoader(loader, microbatch_tokens, hidden_size),
        split_batch=lambda batch, _: batch["microbatches"],
        get_num_samples_in_batch=itemgetter("num_sequences"),
        get_num_tokens_in_batch=lambda batch: {
            "total": batch["num_tokens"],
            "loss_generating": batch["num_masked"],
        },
    )
