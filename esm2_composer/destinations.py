"""Where a split of shards goes: a folder, or object storage.

Either way `shards/` in the work folder of a conversion is what it is made from, and a split is finished when its
index.json is there: on disk all files appear with it, by a rename; on object storage it is uploaded last.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from esm2_composer.errors import UserError
from esm2_composer.files import is_remote
from esm2_composer.storage import Store, StoreError

SPLITS = ("train", "valid")


def open_destination(out: str, split: str, work: Path) -> LocalSplit | RemoteSplit:
    """The split `out/split`, made in the folder `work`. Raises UserError if a store cannot be opened."""
    return RemoteSplit(out, split, work) if is_remote(out) else LocalSplit(out, split, work)


class LocalSplit:
    """A split on disk: it appears whole, by a rename."""

    address = None  # work in progress lies there too

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
        return _read_conversion(split / "conversion.json")

    def other_cluster_ids(self) -> Path | None:
        """cluster_ids.parquet of the other split, if that is there. Raises UserError if the other
        split is there, but no such file."""
        other = self._out / _other(self._split)
        if (other / "cluster_ids.parquet").exists():
            return other / "cluster_ids.parquet"
        if (other / "index.json").exists():
            raise _cannot_compare(str(other))
        return None

    def published(self) -> set[str]:
        """The names of the shards that are in their place already."""
        return {path.name for path in (self._work / "shards").iterdir()}

    def publish(self, name: str) -> None:
        """The shard lies where it will be."""

    def finish(self) -> None:
        """Let the split appear."""
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
        return _read_conversion(self._fetch(self._store, "conversion.json"))

    def other_cluster_ids(self) -> Path | None:
        """As LocalSplit's, fetched."""
        other = f"{self._out}/{_other(self._split)}"
        store = Store(other, self._work / "other")
        there = store.names()
        if "cluster_ids.parquet" in there:
            return self._fetch(store, "cluster_ids.parquet")
        if "index.json" in there:
            raise _cannot_compare(other)
        return None

    def published(self) -> set[str]:
        """As LocalSplit's. Raises StoreError or StoreAway."""
        return self._store.names("shard.")

    def _fetch(self, store: Store, name: str) -> Path:
        folder = self._work / "fetched"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return store.download(name, folder)

    def publish(self, name: str) -> None:
        """Upload a shard, and remove it here. Raises StoreError or StoreAway."""
        self._store.upload(name)
        (self._work / "shards" / name).unlink()

    def finish(self) -> None:
        """Upload what makes it a split.

        Raises StoreError, also if a shard has gone since it was uploaded, or StoreAway.
        """
        index = json.loads((self._work / "shards" / "index.json").read_text())
        lost = {shard["zip_data"]["basename"] for shard in index["shards"]} - self.published()
        if lost:
            raise StoreError(f"{self._out}/{self._split}/{min(lost)} was uploaded and is not there any more")
        for name in ("cluster_ids.parquet", "conversion.json", "index.json"):
            self._store.upload(name)


def _other(split: str) -> str:
    (other,) = set(SPLITS) - {split}
    return other


def _cannot_compare(other: str) -> UserError:
    return UserError(
        f"{other} has no cluster_ids.parquet, so nobody can tell whether a cluster is in both splits; "
        "make it anew, or choose another --out"
    )


def _read_conversion(path: Path) -> dict[str, Any]:
    try:
        conversion = json.loads(path.read_text())
        conversion["state"]["inputs"]
    except (ValueError, LookupError, TypeError):
        raise UserError(
            f"{path} is of another version of this program; remove it, or choose another --out"
        ) from None
    return conversion
