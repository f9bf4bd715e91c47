"""Embeddings: the proteins of a FASTA file -> a parquet file, one row per protein, in the order of the input.

The file is read twice: once to its end before anything is computed, then a chunk at a time. A chunk's proteins are
sorted by length and laid end to end, without padding, in batches of `batch_tokens`; its rows, in input order
again, go to a journal. A rerun continues after the last whole chunk. Memory depends on the chunk alone.

A protein longer than the model was trained on is shown in windows of `<cls> residues <eos>`, as in training:
`<cls>` and `<eos>` at true ends only. Neighbouring windows overlap by at least a quarter, and each residue is
taken from the window where it is further from a cut.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from esm2_composer import alphabet
from esm2_composer.conversion.fasta import read_fasta
from esm2_composer.conversion.records import TOO_MANY_REJECTED, clean
from esm2_composer.errors import UserError
from esm2_composer.journal import Journal
from esm2_composer.model import ESM2

Protein = tuple[str, bytes]  # id, residues

CHUNK_BATCHES = 4  # more fill the batches better, fewer lose less in a kill


@dataclass
class Survey:
    """What a FASTA file holds, and what becomes of it by the rules of a conversion."""

    proteins: int = 0
    residues: int = 0
    longest: int = 0
    over_limit: int = 0
    digest: str = ""
    repeated: int = 0  # ids of several proteins: a join by id would give wrong rows
    repeated_id: str = ""
    changed: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # of every reason to reject, the first id, or its place


def survey(path: Path, max_length: int, max_reject_fraction: float) -> Survey:
    """Read a FASTA file to its end.

    Raises:
        UserError: it cannot be read to its end, nothing in it can be embedded, or too much of it cannot.
    """
    found, digest, ids = Survey(), hashlib.blake2b(digest_size=16), array("q")
    for number, (name, raw) in enumerate(read_fasta(path), start=1):
        try:
            residues, changes = _accept(name, raw)
        except ValueError as reason:
            found.rejected[str(reason)] += 1
            found.examples.setdefault(str(reason), name or f"record {number:,}")
            continue
        found.changed.update(changes)
        found.proteins += 1
        found.residues += len(residues)
        found.longest = max(found.longest, len(residues))
        found.over_limit += len(residues) + 2 > max_length
        ids.append(hash(name))
        digest.update(f"{name}\n".encode() + residues + b"\n")
    found.digest = digest.hexdigest()
    hashes, counts = np.unique(ids, return_counts=True)
    found.repeated = int((counts > 1).sum())
    if found.repeated:
        one = hashes[counts.argmax()]
        found.repeated_id = next((name for name, _ in read_proteins(path) if hash(name) == one), "")
    rejected = found.rejected.total()
    reasons = ", ".join(
        f"{reason} {n:,} (first: {found.examples[reason]!r})" for reason, n in found.rejected.items()
    )
    if not found.proteins:
        raise UserError(f"{path}: no protein to embed: {reasons}")
    if rejected > max_reject_fraction * (found.proteins + rejected):
        raise UserError(
            f"{path}: {rejected:,} of {found.proteins + rejected:,} sequences rejected, "
            f"more than {max_reject_fraction:.1%}: {reasons}; {TOO_MANY_REJECTED}"
        )
    return found


def read_proteins(path: Path) -> Iterator[Protein]:
    """The proteins of a FASTA file that `survey` did not reject."""
    for name, raw in read_fasta(path):
        try:
            residues, _ = _accept(name, raw)
        except ValueError:
            continue
        yield name, residues


def _accept(name: str, raw: bytes) -> tuple[bytes, list[str]]:
    """What `clean` makes of a sequence, of one that has a name; ValueError tells why it is left out."""
    if not name:
        raise ValueError("header without id")
    return clean(raw)


class Window(NamedTuple):
    """Tokens start to stop of a protein, shown to the model, of which first to last are taken."""

    start: int
    stop: int
    first: int
    last: int


def windows(tokens: int, max_length: int) -> list[Window]:
    """Windows of at most `max_length` over `<cls> residues <eos>`, together as long as `tokens`; every residue
    is taken once."""
    if tokens <= max_length:
        return [Window(0, tokens, 1, tokens - 1)]
    overlap = max_length // 4
    steps = -(-(tokens - max_length) // (max_length - overlap))
    starts = [i * (tokens - max_length) // steps for i in range(steps + 1)]
    middles = [(right + left + max_length) // 2 for left, right in pairwise(starts)]
    cuts = zip([1, *middles], [*middles, tokens - 1], strict=True)
    return [Window(start, start + max_length, *taken) for start, taken in zip(starts, cuts, strict=True)]


@dataclass(frozen=True)
class Embedder:
    """A model, on its device already, and what is wanted of it.

    Attributes:
        layer: as in `ESM2.represent`.
        max_length: tokens of a window.
        batch_tokens: tokens computed at a time, at least `max_length`; affects results only by rounding.
        per_residue: return the residues' embeddings too.
    """

    model: ESM2
    layer: int
    max_length: int
    batch_tokens: int
    per_residue: bool

    @property
    def columns(self) -> pa.Schema:
        vector = pa.list_(pa.float32(), self.model.config.hidden_size)
        columns = {"id": pa.string(), "length": pa.int32(), "windows": pa.int32(), "embedding": vector}
        return pa.schema({**columns, "residue_embeddings": pa.list_(vector)} if self.per_residue else columns)

    def chunks(self, proteins: Iterable[Protein]) -> Iterator[list[Protein]]:
        """Cut a stream of proteins where a chunk holds enough tokens."""
        limit = self.batch_tokens * (1 if self.per_residue else CHUNK_BATCHES)  # residues' embeddings are large
        chunk, tokens = [], 0
        for protein in proteins:
            chunk.append(protein)
            tokens += len(protein[1]) + 2
            if tokens >= limit:
                yield chunk
                chunk, tokens = [], 0
        if chunk:
            yield chunk

    @torch.inference_mode()
    def rows(self, chunk: Sequence[Protein]) -> pa.RecordBatch:
        """The output's rows of a chunk, in its order.

        Raises:
            UserError: a protein's embedding is not finite.
        """
        names, proteins = zip(*chunk, strict=True)
        lengths = np.array([len(residues) for residues in proteins])
        starts = np.concatenate(([0], lengths.cumsum()))
        cut = [windows(length + 2, self.max_length) for length in lengths]
        shown = [(window, i) for i, of_one in enumerate(cut) for window in of_one]
        shown.sort(key=lambda pair: pair[0].start - pair[0].stop)
        tokens = [alphabet.encode(residues) for residues in proteins]

        size, device = self.model.config.hidden_size, self.model.embed.weight.device
        sums = torch.zeros((len(proteins), size), dtype=torch.float64, device=device)
        residues = np.empty((starts[-1], size), np.float32) if self.per_residue else None
        for batch in self._batches(shown):
            x = self._represent([tokens[i][window.start : window.stop] for window, i in batch], device)
            spans = [np.arange(window.first, window.last) for window, _ in batch]
            first = np.cumsum([0, *(window.stop - window.start for window, _ in batch[:-1])])
            taken = np.concatenate(
                [span - window.start + at for span, (window, _), at in zip(spans, batch, first, strict=True)]
            )
            owners = np.repeat([i for _, i in batch], [len(span) for span in spans])
            x = x[torch.from_numpy(taken).to(device)]
            sums.index_add_(0, torch.from_numpy(owners).to(device), x.double())
            if residues is not None:
                places = [starts[i] + span - 1 for span, (_, i) in zip(spans, batch, strict=True)]
                residues[np.concatenate(places)] = x.cpu().numpy()

        means = (sums.cpu().numpy() / lengths[:, None]).astype(np.float32)
        finite = np.isfinite(means).all(1)  # and then so are the residues'
        if not finite.all():
            first = names[finite.argmin()]
            raise UserError(f"the embedding of {first!r} is no finite number: the model overflows")
        columns = [pa.array(names), pa.array(lengths, pa.int32()), pa.array(map(len, cut), pa.int32())]
        columns.append(_vectors(means))
        if residues is not None:
            columns.append(pa.ListArray.from_arrays(starts.astype(np.int32), _vectors(residues)))
        return pa.RecordBatch.from_arrays(columns, schema=self.columns)

    def _batches(self, shown: list[tuple[Window, int]]) -> Iterator[list[tuple[Window, int]]]:
        batch, tokens = [], 0
        for window, i in shown:
            if tokens + window.stop - window.start > self.batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append((window, i))
            tokens += window.stop - window.start
        yield batch

    def _represent(self, sequences: list[np.ndarray], device: torch.device) -> torch.Tensor:
        """Tokens of each sequence -> what they are to the model, end to end, fp32 (T, D)."""
        lengths = [len(tokens) for tokens in sequences]
        tokens = torch.from_numpy(np.concatenate(sequences)).to(device)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # as in training
            return self.model.represent(tokens, cu_seqlens, max(lengths), self.layer).float()


def _vectors(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def embed_file(
    source: Path, count: int, journal: Journal, embedder: Embedder, progress: Callable[[int], Any]
) -> None:
    """Append the embeddings of the proteins in `source` to a journal, after those it has, and finish it.

    `progress` is called with the number of residues that are done, at first those of an earlier run.

    Raises:
        UserError: there are no longer the `count` proteins that `survey` found, or an embedding is not finite;
            then the journal is removed, since the same command would fail again.
    """
    proteins = read_proteins(source)
    done = sum(len(residues) for _, residues in islice(proteins, journal.rows))
    progress(done)
    for chunk in embedder.chunks(proteins):
        try:
            rows = embedder.rows(chunk)
        except UserError:
            journal.discard()
            raise
        journal.append(rows)
        done += sum(len(residues) for _, residues in chunk)
        progress(done)
    if journal.rows != count:
        raise UserError(
            f"{source}: changed while it was read: {count:,} proteins at first, {journal.rows:,} at last; "
            f"remove {journal.path} and start again"
        )
    journal.finish()


def digest_weights(model: ESM2) -> str:
    """A BLAKE2b digest of all names and values, in hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
