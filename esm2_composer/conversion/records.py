"""One cluster and its sequences -> one MDS sample: the rules for what is kept, changed and rejected.

A sample is one cluster: its id, the lengths of its members, and their residues end to end, members in the order of
their ids. Everything left out or changed is counted by reason, with examples; nothing is dropped silently.

The rules for a sequence: white space is removed, letters are made upper-case, a final `*` (stop) is dropped, J
(leucine or isoleucine, no token of ESM-2) becomes X (any). What then holds anything but the 20 amino acids and
X, B, U, Z, O, or nothing at all, is rejected. docs/data.md has the rules for ids and clusters.

Needs only numpy, so that any engine can build records in its own workers.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np

from esm2_composer.errors import UserError

EXAMPLES_KEPT = 20
TOO_MANY_REJECTED = "correct the input, or allow more with --max-reject-fraction"  # what to do about it
COUNTS = ("clusters_read", "clusters_written", "members_read", "members_written", "members_rejected")
COUNTS += ("members_left_out", "residues_written")
LENGTH_EDGES = (1, 51, 101, 201, 301, 401, 501, 751, 1023, 1501, 2001, 5001)
LONGEST_COUNTED = 1022  # data.min_length is at most this, unless data.max_length is raised
LENGTH_LABELS = [f"{low}-{high - 1}" for low, high in pairwise(LENGTH_EDGES)] + [f"{LENGTH_EDGES[-1]}-"]

RESIDUES = b"ACDEFGHIKLMNPQRSTVWYXBUZO"
NUCLEOTIDES = b"ACGTUNacgtun"  # of a protein's letters, about a quarter are among these
LOOKED_AT = 100  # sequences of a file, to tell nucleotides by
_TO_UPPER = bytes.maketrans(b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_WHITE_SPACE = b" \t\r\n\v\f"

# A member's id, and every sequence that the input gives under it (None: an empty entry).
Member = tuple[str, Sequence[bytes | None]]


def clean(raw: bytes) -> tuple[bytes, list[str]]:
    """(residues, what was changed), by the rules above.

    Raises ValueError with the reason if the sequence must be rejected.
    """
    changes = []
    packed = raw.translate(None, _WHITE_SPACE)
    if packed != raw:
        changes.append("white space removed")
    residues = packed.translate(_TO_UPPER)
    if residues != packed:
        changes.append("lower case made upper")
    if residues.endswith(b"*"):
        residues = residues[:-1]
        changes.append("final * dropped")
    if b"J" in residues:
        residues = residues.replace(b"J", b"X")
        changes.append("J made X")
    if not residues:
        raise ValueError("empty sequence")
    if not is_clean(residues):
        raise ValueError("bad residue")
    return residues, changes


def refusing_nucleotides(path: object, proteins: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Pass on (id, sequence) of a file; sequences that are not text pass unchecked.

    Raises UserError, after the first LOOKED_AT, if those are nucleotides.
    """
    letters = nucleotides = 0
    for name, sequence in islice(proteins, LOOKED_AT):
        raw = sequence.encode() if isinstance(sequence, str) else sequence
        if isinstance(raw, bytes):
            letters += len(raw)
            nucleotides += len(raw) - len(raw.translate(None, NUCLEOTIDES))
        yield name, sequence
    if letters >= 300 and nucleotides > 0.9 * letters:
        raise UserError(
            f"{path}: looks like nucleotides ({100 * nucleotides // letters} % A, C, G, T, U or N); give proteins"
        )
    yield from proteins


def refuse_nucleotides(path: object, proteins: Iterator[tuple[Any, Any]]) -> None:
    """Raises UserError if the first LOOKED_AT are nucleotides."""
    for _ in islice(refusing_nucleotides(path, proteins), LOOKED_AT + 1):
        pass


def is_clean(raw: bytes | None) -> bool:
    """Whether it is a sequence as it will be stored."""
    return isinstance(raw, bytes) and len(raw) > 0 and not raw.translate(None, RESIDUES)


@dataclass
class Report:
    """What a conversion read, wrote, changed and rejected; of a part or, merged, of the whole.

    `changed` and `rejected` map a reason to {"count": int, "examples": [up to 20 ids]}.
    """

    counts: Counter = field(default_factory=Counter)
    changed: dict[str, dict[str, Any]] = field(default_factory=dict)
    rejected: dict[str, dict[str, Any]] = field(default_factory=dict)
    member_lengths: list[int] = field(default_factory=lambda: [0] * len(LENGTH_EDGES))
    longest_members: Counter = field(default_factory=Counter)  # clusters by their longest, up to LONGEST_COUNTED

    def change(self, what: str, name: str) -> None:
        _tally(self.changed, what, 1, [name])

    def reject(self, reason: str, name: str, members: int) -> None:
        """Count one rejected member or cluster, with which `members` members are lost."""
        _tally(self.rejected, reason, 1, [name])
        self.counts["members_rejected"] += members

    def reasons(self) -> str:
        """Why things were rejected, the most frequent first, each with its count and an example."""
        reasons = sorted(self.rejected.items(), key=lambda item: -item[1]["count"])
        return ", ".join(
            f"{reason} {entry['count']:,} (such as {entry['examples'][0]!r})" for reason, entry in reasons
        )

    def merge(self, other: Report) -> None:
        """Add what `other` says; examples of earlier ones come first."""
        self.counts.update(other.counts)
        for mine, theirs in ((self.changed, other.changed), (self.rejected, other.rejected)):
            for reason, entry in theirs.items():
                _tally(mine, reason, entry["count"], entry["examples"])
        pairs = zip(self.member_lengths, other.member_lengths, strict=True)
        self.member_lengths = [mine + theirs for mine, theirs in pairs]
        self.longest_members.update(other.longest_members)

    def as_dict(self) -> dict[str, Any]:
        return {
            **dict.fromkeys(COUNTS, 0),
            **self.counts,
            "changed": self.changed,
            "rejected": self.rejected,
            "member_lengths": dict(zip(LENGTH_LABELS, self.member_lengths, strict=True)),
            "longest_members": {str(length): count for length, count in sorted(self.longest_members.items())},
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Report:
        counts = {name: count for name, count in record.items() if isinstance(count, int)}
        longest = Counter({int(length): count for length, count in record["longest_members"].items()})
        lengths = list(record["member_lengths"].values())
        return cls(Counter(counts), record["changed"], record["rejected"], lengths, longest)


def _tally(table: dict[str, dict[str, Any]], reason: str, count: int, examples: Sequence[str]) -> None:
    entry = table.setdefault(reason, {"count": 0, "examples": []})
    entry["count"] += count
    entry["examples"].extend(examples[: EXAMPLES_KEPT - len(entry["examples"])])


def choose_members(
    cluster_id: str,
    named: Sequence[str | None],
    report: Report,
    owned_elsewhere: Collection[str] = (),
    limit: int | None = None,
    seed: int = 0,
) -> list[str]:
    """The ids whose sequences make up the cluster, each once, in ascending order.

    Args:
        named: the ids as the input names them, in any order, maybe repeated or missing.
        owned_elsewhere: those of them that the input puts into another cluster too, which keeps them.
        limit: keep at most this many: those whose hash with `seed` is smallest, whatever the order of the input.
    """
    report.counts["members_read"] += len(named)
    if len(named) == 1 and named[0] and not owned_elsewhere:  # most clusters
        return [named[0]]
    members: list[str] = []
    elsewhere, before = set(owned_elsewhere), None
    for member in sorted(member or "" for member in named):
        if not member:
            report.reject("member without id", cluster_id, 1)
        elif member == before:
            report.change("member named again in its cluster", member)
        elif member in elsewhere:
            report.reject("member of another cluster", member, 1)
        else:
            members.append(member)
        before = member
    if limit and len(members) > limit:
        report.change("cluster cut to the member limit", cluster_id)
        report.counts["members_left_out"] += len(members) - limit
        members = sorted(heapq.nsmallest(limit, members, key=lambda member: _keyed_hash(seed, member)))
    return members


def _keyed_hash(seed: int, text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()


def build_record(cluster_id: str, members: Iterable[Member], report: Report) -> dict[str, Any] | None:
    """The MDS sample of a cluster, or None if no member is left; everything is counted in `report`.

    Args:
        members: as `choose_members` gives them, with all sequences found under each id.
    """
    report.counts["clusters_read"] += 1
    kept = []
    for member_id, given in members:
        if len(given) == 1 and is_clean(given[0]):  # nearly every member
            kept.append(given[0])
            continue
        try:
            residues, changes = _only_sequence(given)
        except ValueError as reason:
            report.reject(str(reason), member_id, 1)
            continue
        for change in changes:
            report.change(change, member_id)
        kept.append(residues)
    if not kept:
        report.reject("cluster with no usable member", cluster_id, 0)  # its members are counted already
        return None
    lengths = [len(sequence) for sequence in kept]
    residues = b"".join(kept)
    report.counts["clusters_written"] += 1
    report.counts["members_written"] += len(lengths)
    report.counts["residues_written"] += len(residues)
    report.longest_members[min(max(lengths), LONGEST_COUNTED)] += 1
    for length in lengths:
        report.member_lengths[bisect_right(LENGTH_EDGES, length) - 1] += 1
    return {"cluster_id": cluster_id, "lengths": np.array(lengths, dtype=np.int32), "residues": residues}


def _only_sequence(given: Sequence[bytes | None]) -> tuple[bytes, list[str]]:
    """The one sequence of a member, cleaned; entries that clean to the same are one."""
    given = [raw for raw in given if raw is not None]
    if not given:
        raise ValueError("member without sequence")
    if not all(isinstance(raw, bytes) for raw in given):
        raise ValueError("sequence is not text")
    if len(given) == 1:
        return clean(given[0])
    outcomes = [_outcome(raw) for raw in set(given)]
    if len({residues for residues, _ in outcomes}) > 1:
        raise ValueError("different sequences under one id")
    residues, changes = min(outcomes, key=lambda outcome: (len(outcome[1]), outcome[1]))  # whatever their order
    if isinstance(residues, str):
        raise ValueError(residues)
    return residues, [*changes, "sequence given again"]


def _outcome(raw: bytes) -> tuple[bytes | str, list[str]]:
    """What `clean` makes of it; the reason in place of residues if it is rejected."""
    try:
        return clean(raw)
    except ValueError as reason:
        return str(reason), []
