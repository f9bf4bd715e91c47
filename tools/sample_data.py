"""Write a synthetic protein-family data set in the BioNeMo ESM-2 layout.

The data are SYNTHETIC: no sequence stems from an organism. They are made to try the training out, because a
small model learns them within minutes. The process, fixed by the seed:

1. A library of shared domains is drawn from the residue frequencies of Swiss-Prot. In every domain most
   positions are conserved and some are variable.
2. A family's ancestor is an M and then domains in random order, each after a short random linker, cut to a
   length from a log-normal distribution. Some domains are common, others rare. Every copy of a domain has
   diverged from the library's.
3. A cluster's members are the ancestor with further substitutions, mostly at its variable positions, and with
   a few small insertions and deletions. A few members have an unknown residue, X.

Validation families are new ones: their domains occur in train, their sequences do not.

OUT gets train_clusters.parquet (ur50_id, ur90_id), train.db, valid_clusters.parquet (ur50_id) and
validation.db; both databases have the table protein (id, sequence).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sqlite3
import sys
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from esm2_composer.addresses import is_remote
from esm2_composer.command import ArgumentParser, in_range, run_command
from esm2_composer.errors import TransientError, UserError, system_error
from esm2_composer.files import appearing_whole

RESIDUES = np.frombuffer(b"ARNDCQEGHILKMFPSTWYV", np.uint8)
# Percent in UniProtKB/Swiss-Prot, in the order of RESIDUES.
SWISS_PROT = [8.25, 5.52, 4.06, 5.46, 1.38, 3.93, 6.71, 7.07, 2.27, 5.91]
SWISS_PROT += [9.64, 5.79, 2.41, 3.86, 4.74, 6.65, 5.36, 1.10, 2.92, 6.85]
CUMULATIVE = np.cumsum(SWISS_PROT) / np.cumsum(SWISS_PROT)[-1]

DOMAINS = 24
# Few common domains, many rare ones: the common ones are learnt early, so the loss falls from the start.
USAGE = 1 / np.arange(1, DOMAINS + 1)
USAGE /= USAGE.sum()
DOMAIN_LENGTHS = (40, 121)  # half-open, like every range below
LINKER_LENGTHS = (2, 9)
INDEL_LENGTHS = (1, 4)
VARIABLE_SHARE = 0.15
CONSERVED_RATE, VARIABLE_RATE = 0.04, 0.6  # chance that a family redraws a domain's position: 12 % on average
MEMBER_SCALE = 0.5  # a member redraws at this multiple of those chances: 6 % on average
INDELS_PER_MEMBER = 0.4
X_SHARE = 0.005
LENGTH = NormalDist(np.log(268), 0.69)  # of a family's log length
MIN_LENGTH = 20
LONG = 1022  # residues that fit into 1,024 tokens with the start and the end token
CLUSTER_TAIL, MAX_CLUSTER = 1.3, 50  # P(size >= k) = k ** -1.3: mean 2.9, 59 % singletons


class Chain(NamedTuple):
    """A stretch of protein: each position's residue (ASCII) and its chance of being redrawn in a copy."""

    residues: np.ndarray
    rates: np.ndarray


MOST_CLUSTERS = 1_000_000  # all data are in memory at a time, some 3 KB a cluster

Families = dict[str, dict[str, str]]  # UniRef50-like id: {UniRef90-like id: sequence}
START = Chain(np.array([ord("M")], np.uint8), np.zeros(1))


def spread(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return `count` uniform numbers in ascending order, one in each of `count` equal bins of [0, 1)."""
    return (np.arange(count) + rng.random(count)) / count


def residues_at(uniform: np.ndarray) -> np.ndarray:
    """Map uniform numbers to residues with the Swiss-Prot frequencies."""
    return RESIDUES[np.searchsorted(CUMULATIVE, uniform)]


def make_library(rng: np.random.Generator) -> list[Chain]:
    """Draw the domains that all families share."""
    library = []
    for length in rng.integers(*DOMAIN_LENGTHS, size=DOMAINS):
        # Evenly spread draws: with few domains, independent ones would shift the overall composition.
        residues = rng.permutation(residues_at(spread(rng, length)))
        variable = rng.permutation(spread(rng, length)) < VARIABLE_SHARE
        library.append(Chain(residues, np.where(variable, VARIABLE_RATE, CONSERVED_RATE)))
    return library


def copy_chain(rng: np.random.Generator, chain: Chain, scale: float = 1.0) -> Chain:
    """Copy a chain, redrawing each position with its own chance times `scale`."""
    redrawn = rng.random(len(chain.rates)) < chain.rates * scale
    fresh = residues_at(rng.random(len(chain.rates)))
    return Chain(np.where(redrawn, fresh, chain.residues), chain.rates)


def make_ancestor(rng: np.random.Generator, library: list[Chain], length: int) -> Chain:
    """Join diverged copies of random domains by linkers to an ancestor of exactly `length` residues."""
    parts, total = [START], 1
    while total < length:
        size = rng.integers(*LINKER_LENGTHS)
        linker = Chain(residues_at(rng.random(size)), np.full(size, VARIABLE_RATE))
        domain = copy_chain(rng, library[rng.choice(DOMAINS, p=USAGE)])
        parts += [linker, domain]
        total += size + len(domain.residues)
    return Chain(*(np.concatenate(field)[:length] for field in zip(*parts, strict=True)))


def make_member(rng: np.random.Generator, ancestor: Chain) -> str:
    """Mutate an ancestor into one member's sequence; the first M stays."""
    residues = copy_chain(rng, ancestor, MEMBER_SCALE).residues
    for _ in range(rng.poisson(INDELS_PER_MEMBER)):
        at, size = rng.integers(1, len(residues)), rng.integers(*INDEL_LENGTHS)
        if rng.random() < 0.5:
            residues = np.insert(residues, at, residues_at(rng.random(size)))
        else:
            residues = np.delete(residues, slice(at, at + size))
    if rng.random() < X_SHARE:
        residues[rng.integers(1, len(residues))] = ord("X")
    return residues.tobytes().decode("ascii")


def make_families(rng: np.random.Generator, library: list[Chain], sizes: np.ndarray) -> list[list[str]]:
    """Make one family of sequences for each of the ascending `sizes`, in random order."""
    # Steps of the golden ratio spread the lengths evenly over every range of sizes; with independent draws a
    # few large families would decide the mean length.
    uniform = (rng.random() + np.arange(len(sizes)) * (5**0.5 - 1) / 2) % 1
    lengths = [max(MIN_LENGTH, round(np.exp(LENGTH.inv_cdf(u)))) for u in uniform.tolist()]
    families = []
    for index in rng.permutation(len(sizes)):
        ancestor = make_ancestor(rng, library, lengths[index])
        families.append([make_member(rng, ancestor) for _ in range(sizes[index])])
    return families


def make_data(seed: int, clusters: int, valid_clusters: int) -> tuple[Families, dict[str, str]]:
    """Return the train families and validation's {UniRef50-like id: sequence}."""
    rng = np.random.default_rng(seed)
    library = make_library(rng)
    tail = (1 - spread(rng, clusters)) ** (-1 / CLUSTER_TAIL)
    families = make_families(rng, library, np.minimum(tail, MAX_CLUSTER).astype(int))
    train = {
        f"UniRef50_SYN{number:06d}": {f"UniRef90_SYN{number:06d}_{i}": seq for i, seq in enumerate(family, 1)}
        for number, family in enumerate(families, 1)
    }
    known = {seq for family in families for seq in family}
    held_out = make_families(rng, library, np.ones(valid_clusters, int))
    numbered = enumerate((family[0] for family in held_out), clusters + 1)
    # A very short sequence could occur in train by chance.
    return train, {f"UniRef50_SYN{number:06d}": seq for number, seq in numbered if seq not in known}


def write_database(path: Path, proteins: dict[str, str]) -> None:
    """Write the table protein (id, sequence) to a new SQLite file."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
        database.executemany("INSERT INTO protein VALUES (?, ?)", proteins.items())


def write_files(folder: Path, train: Families, valid: dict[str, str]) -> None:
    """Write the four files into `folder`."""
    members = pa.array([list(family) for family in train.values()], pa.list_(pa.string()))
    ids, valid_ids = pa.array(list(train), pa.string()), pa.array(list(valid), pa.string())
    pq.write_table(pa.table({"ur50_id": ids, "ur90_id": members}), folder / "train_clusters.parquet")
    pq.write_table(pa.table({"ur50_id": valid_ids}), folder / "valid_clusters.parquet")
    proteins = {key: seq for family in train.values() for key, seq in family.items()}
    write_database(folder / "train.db", proteins)
    write_database(folder / "validation.db", valid)


def report(out: Path, train: Families, valid: dict[str, str]) -> None:
    """Print what was written to stderr."""
    lengths = np.array([len(seq) for family in train.values() for seq in family.values()])
    counts = f"{len(train)} train clusters with {len(lengths)} proteins, {len(valid)} validation proteins"
    shape = f"mean length {lengths.mean():.1f}, {(lengths > LONG).mean():.2%} longer than {LONG} residues"
    print(f"SYNTHETIC data: {counts}\ntrain: {shape}\nwritten to {out}", file=sys.stderr)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description="Write synthetic protein families in BioNeMo's ESM-2 layout.")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be new or empty")
    parser.add_argument(
        "--seed", type=in_range(int, 0, 2**63 - 1), default=17, help="same seed, same data (%(default)s)"
    )
    clusters = in_range(int, 1, MOST_CLUSTERS)
    parser.add_argument("--clusters", type=clusters, default=2000, help="train clusters (%(default)s)")
    parser.add_argument("--valid-clusters", type=clusters, default=120, help="validation clusters (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Make the data and write them."""
    args = parse_args()
    out = Path(os.path.realpath(args.out))  # never through a link that leads nowhere
    if is_remote(str(args.out)):
        raise UserError(f"{args.out}: write to a local disk, and copy")
    try:
        if os.path.lexists(args.out) and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{args.out} exists and is not an empty folder; give a new folder or empty it")
        train, valid = make_data(args.seed, args.clusters, args.valid_clusters)
        with appearing_whole(out) as partial:  # what a crash leaves must not look like a data set
            partial.mkdir()
            write_files(partial, train, valid)
    except OSError as error:
        raise system_error(f"{out}: cannot be written ({error.strerror})", error) from error
    except sqlite3.Error as error:  # in a file just made: the disk
        raise TransientError(f"{out}: cannot be written ({error})") from error
    report(out, train, valid)


if __name__ == "__main__":
    run_command(main)
