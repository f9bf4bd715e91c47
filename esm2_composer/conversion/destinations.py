"""Where a split of shards goes: a folder, or object storage.

Either way `shards/` in the work folder of a conversion is what it is made from, and a split is finished when its
index.json is there: on disk all files appear with it, by a rename; on object storage it is uploaded last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from esm2_composer.addresses import is_remote
from esm2_composer.data.splits import SPLITS
from esm2_composer.errors import UserError
from esm2_composer.files import xxh64
from esm2_composer.storage import Store, StoreError

TOLD = ("cluster_ids.parquet", "conversion.json", "index.json")  # of a split, beside its shards; in this order
COUNTED = ("clusters_written", "members_written", "residues_written")


class OtherSplit(NamedTuple):
    """The other split, which names the clusters that a split must not have."""

    cluster_ids: Path  # its cluster_ids.parquet
    xxh64: str


def open_destination(out: str, split: str, work: Path) -> LocalSplit | RemoteSplit:
    """The split `out/split`, made in the folder `work`. Raises UserError if a store cannot be opened."""
    return RemoteSplit(out, split, work) if is_remote(out) else LocalSplit(out, split, work)


class LocalSplit:
    """A split on disk: it appears whole, by a rename."""

    address = None  # work in progress is there too

    def __init__(self, out: str, split: str, work: Path) -> None:
        self._out, self._split, self._work = Path(out), split, work

    def conversion(self) -> dict[str, Any] | None:
        """conversion.json of the finished split, if there is one.

        Raises UserError if something else is there.
        """
        split = self._out / self._split
        if not os.path.lexists(split):
            return None
        if not (split / "index.json").is_file() or not (split / "conversion.json").is_file():
            raise UserError(
                f"{split} exists already and is no finished conversion; remove it, or choose another --out"
            )
        return _read_conversion(split / "conversion.json", str(split))

    def other_split(self) -> OtherSplit | None:
        """The other split, if it exists. Raises UserError if it does not reliably tell its clusters."""
        other = self._out / other_split_name(self._split)
        there = {name for name in TOLD if (other / name).exists()}
        return _other_split(str(other), there, other.joinpath)

    def has(self, shard: dict[str, Any]) -> bool:
        """Whether the shard of this entry of index.json is in place, and whole."""
        packed = shard["zip_data"]
        path = self._work / "shards" / packed["basename"]
        return path.exists() and xxh64(path) == packed["hashes"]["xxh64"]

    def publish(self, name: str) -> None:
        """The shard is already in place."""

    def finish(self) -> None:
        """Make the split appear."""
        (self._work / "shards").rename(self._out / self._split)


class RemoteSplit:
    """A split on object storage: its files are uploaded as they come, index.json last."""

    def __init__(self, out: str, split: str, work: Path) -> None:
        self._out, self._split, self._work = out.rstrip("/"), split, work
        self._store = Store(f"{self._out}/{split}", work / "shards")
        self.address = [self._out, os.environ.get("S3_ENDPOINT_URL")]

    def conversion(self) -> dict[str, Any] | None:
        """As LocalSplit's."""
        if "index.json" not in self._store.names("index.json"):
            return None
        if "conversion.json" not in self._store.names("conversion.json"):
            raise UserError(
                f"{self._out}/{self._split} exists already and is no finished conversion; remove it, or choose "
                "another --out"
            )
        path = self._fetch(self._store, "conversion.json")
        return _read_conversion(path, f"{self._out}/{self._split}")

    def other_split(self) -> OtherSplit | None:
        """As LocalSplit's, fetched."""
        other = f"{self._out}/{other_split_name(self._split)}"
        store = Store(other, self._work / "other")
        return _other_split(other, store.names(), lambda name: self._fetch(store, name))

    def has(self, shard: dict[str, Any]) -> bool:
        """Whether it is there: it was whole when it was uploaded. Raises StoreError or StoreUnavailable."""
        return shard["zip_data"]["basename"] in self._uploaded_before

    @cached_property
    def _uploaded_before(self) -> set[str]:
        return self._store.names("shard.")

    def _fetch(self, store: Store, name: str) -> Path:
        folder = self._work / "fetched"
        folder.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)  # of another split, or of a run that was killed
        return store.download(name, folder)

    def publish(self, name: str) -> None:
        """Upload a shard, and remove it here. Raises StoreError or StoreUnavailable."""
        self._store.upload(name)
        (self._work / "shards" / name).unlink()

    def finish(self) -> None:
        """Upload what completes the split.

        Raises StoreError, also if a shard has disappeared since its upload, or StoreUnavailable.
        """
        index = json.loads((self._work / "shards" / "index.json").read_text())
        lost = {shard["zip_data"]["basename"] for shard in index["shards"]}
        lost -= self._store.names("shard.")
        if lost:
            raise StoreError(f"{self._out}/{self._split}/{min(lost)} was uploaded and is not there any more")
        for name in TOLD:
            self._store.upload(name)


def other_split_name(split: str) -> str:
    (other,) = set(SPLITS) - {split}
    return other


def _other_split(place: str, there: Collection[str], fetch: Callable[[str], Path]) -> OtherSplit | None:
    """The other split, at `place`, if it exists. Raises UserError if it lacks a file, or files disagree."""
    for name in TOLD:
        if name not in there and "index.json" in there:
            raise _cannot_compare(f"{place} has no {name}")
    if "cluster_ids.parquet" not in there:
        return None
    path = fetch("cluster_ids.parquet")
    found = xxh64(path)
    if "conversion.json" not in there:  # its upload is not finished
        return OtherSplit(path, found)
    if _read_conversion(fetch("conversion.json"), place)["cluster_ids_xxh64"] != found:
        raise _cannot_compare(f"{place}/cluster_ids.parquet is damaged: its xxh64 is not that of conversion.json")
    return OtherSplit(path, found)


def _cannot_compare(why: str) -> UserError:
    return UserError(
        f"{why}, so nobody can tell whether a cluster is in both splits; "
        "make that split anew, or choose another --out"
    )


def _read_conversion(path: Path, place: str) -> dict[str, Any]:
    """conversion.json of the split at `place`, fetched to `path` if need be."""
    try:
        conversion = json.loads(path.read_text())
        conversion["state"]["inputs"], conversion["cluster_ids_xxh64"]
        if not all(isinstance(conversion[name], int) for name in COUNTED):
            raise TypeError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(
            f"{place}/conversion.json is damaged, or of another version of this program; remove it, or choose "
            "another --out"
        ) from None
    return conversion
