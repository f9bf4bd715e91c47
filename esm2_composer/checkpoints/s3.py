"""Checkpoints in a store that speaks S3; `S3_ENDPOINT_URL` selects one other than Amazon's."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
from botocore.config import Config

from esm2_composer.checkpoints.names import (
    DIVERGED,
    PROBE,
    STAGING,
    is_checkpoint,
    is_diverged,
    listed_parts,
    updates,
)
from esm2_composer.errors import UserError

DELETIONS = 10  # at a time


class S3Folder:
    """What `LocalFolder` offers too: see `folders` for what always holds."""

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")
        self._bucket, _, prefix = self._uri.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._committed: str | None = None  # the last, by this process: it need not be looked at
        self._client = boto3.client(
            "s3",
            endpoint_url=os.environ.get("S3_ENDPOINT_URL"),
            config=Config(retries={"mode": "standard", "max_attempts": 5}),
        )

    def __str__(self) -> str:
        return self._uri

    def make(self) -> None:
        """Folders of a store need not be made."""

    def lock(self) -> None:
        """A store has no locks."""

    def clear(self) -> None:
        """Clear what a killed run left unfinished."""
        for key in self._keys(PROBE):
            self._delete(key)
        keys = self._keys("ep")
        whole = {key.removesuffix("/.metadata") for key in keys}
        for name in sorted({key.split("/")[0] for key in keys} - whole):
            if is_checkpoint(name):
                self.remove(name)

    def names(self) -> list[str]:
        """The whole checkpoints, oldest first."""
        keys = self._keys("ep")
        found = sorted(filter(is_checkpoint, (key.removesuffix("/.metadata") for key in keys)), key=updates)
        while found and found[-1] != self._committed and self._lacks_parts(found[-1], keys):
            found.pop()  # as in a local folder
        return found

    def _lacks_parts(self, name: str, keys: Sequence[str]) -> bool:
        if f"{name}/.metadata" not in keys:
            return False
        metadata = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}{name}/.metadata")
        return not {f"{name}/{part}" for part in listed_parts(metadata["Body"].read())} <= set(keys)

    def diverged(self) -> list[str]:
        """The states of runs that diverged."""
        return sorted(filter(is_diverged, {key.split("/")[0] for key in self._keys(DIVERGED)}))

    def location(self, name: str) -> str:
        return f"{self._uri}/{name}"

    def staging(self) -> Path:
        """Where this node's ranks write a checkpoint before it is uploaded: the same at every start, so that what
        a killed run left there is cleared.

        Raises:
            UserError: others can write there, and could change what the next start unpickles.
        """
        mine = hashlib.sha256(self._uri.encode()).hexdigest()[:16]
        private = Path(tempfile.gettempdir(), f"checkpoints-{os.getuid()}-{mine}")
        with contextlib.suppress(FileExistsError):
            private.mkdir(0o700)
        found = private.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise UserError(
                f"{private} is no folder that only you can write to; remove it, or set TMPDIR to another"
            )
        return private / STAGING

    def begin(self, staged: Path, name: str, rank: int) -> None:
        """Before any rank writes its part of a sharded checkpoint."""
        staged.mkdir(parents=True, exist_ok=True)
        if not rank:
            self.remove(name)  # what a copy cut short has left would make these parts look whole too early

    def send(self, staged: Path, name: str, rank: int) -> None:
        """Upload the rank's part of a sharded checkpoint."""
        for path in sorted(staged.glob(f"__{rank}_*")):
            self._upload(path, f"{name}/{path.name}")

    def commit(self, staged: Path, name: str) -> None:
        """Make a checkpoint whole, once every rank has sent its part."""
        if staged.is_dir():
            self._upload(staged / ".metadata", f"{name}/.metadata")
        else:
            self._upload(staged, name)
        self._committed = name

    def remove(self, name: str) -> None:
        keys = [key for key in self._keys(name) if key == name or key.startswith(f"{name}/")]
        keys.sort(key=lambda key: not key.endswith("/.metadata"))  # first what completes it
        with ThreadPoolExecutor(DELETIONS) as threads:
            for at_a_time in (keys[:1], keys[1:]):
                list(threads.map(self._delete, at_a_time))

    def read(self, name: str) -> str | None:
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)
        except self._client.exceptions.NoSuchKey:
            return None
        return answer["Body"].read().decode()

    def write(self, name: str, text: str) -> None:
        self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=text.encode())

    def is_damaged(self, name: str, rank: int, ranks: int) -> bool:
        """A store returns what was sent."""
        return False

    def _delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def _upload(self, path: Path, key: str) -> None:
        self._client.upload_file(str(path), self._bucket, self._prefix + key)

    def _keys(self, start: str) -> list[str]:
        """The objects whose names begin so, without the folder's own prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + start
        )
        return [entry["Key"].removeprefix(self._prefix) for page in pages for entry in page.get("Contents", ())]
