"""Files to and from object storage, by whatever stores Streaming knows (s3, gs, azure, oci, ...).

An upload counts only when the object has been read back and has the same hash.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from esm2_composer.errors import StoreUnavailable, UserError
from esm2_composer.files import xxh64
from esm2_composer.retry import Result, is_permanent, retry

DOWNLOAD_SECONDS = 300


class StoreError(UserError):
    """A store refuses what it is asked."""


def failure(message: str, error: Exception) -> StoreError | StoreUnavailable:
    """StoreUnavailable where the same may work later."""
    return (StoreError if is_permanent(error) else StoreUnavailable)(f"{message} ({error})")


class Store:
    """The objects below a URI, and a local folder whose files go there."""

    def __init__(self, uri: str, folder: Path) -> None:
        """Raises StoreError if there is no such store, or no access, StoreUnavailable if it does not answer."""
        from streaming.base.storage.download import CloudDownloader
        from streaming.base.storage.upload import CloudUploader

        self._uri, self._folder = uri.rstrip("/"), folder
        # It warns if the folder has files in it, as a resumed run's has.
        logging.getLogger(CloudUploader.__module__).setLevel(logging.ERROR)
        try:
            self._uploader = CloudUploader.get((str(folder), self._uri), keep_local=True, retry=1, exist_ok=True)
            self._downloader = CloudDownloader.get(self._uri)
        except Exception as error:  # each store raises its own types
            raise failure(f"{uri}: cannot be opened", error) from error

    def upload(self, name: str) -> None:
        """Store `name` of the folder. Raises StoreError, or StoreUnavailable if that fails for half a minute."""
        expected = xxh64(self._folder / name)

        def upload() -> None:
            self._uploader.upload_file(name)
            with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
                if xxh64(self._fetch(name, Path(scratch))) != expected:
                    raise OSError("it differs from what was sent")

        self._retry(upload, name, "stored")

    def names(self, start: str = "") -> set[str]:
        """What is there under names that begin so. Raises StoreError or StoreUnavailable if it does not say."""
        try:
            found = self._uploader.list_objects(start) or []
        except Exception as error:
            raise failure(f"{self._uri}: cannot be listed", error) from error
        return {key.rpartition("/")[2] for key in found}

    def download(self, name: str, folder: Path) -> Path:
        """Fetch an object into `folder`; its path there. Raises as `upload`."""
        return self._retry(partial(self._fetch, name, folder), name, "read")

    def _retry(self, ask: Callable[[], Result], name: str, done: str) -> Result:
        try:
            return retry(ask, f"{self._uri}/{name}")
        except StoreUnavailable:
            raise
        except Exception as error:  # it will not work later either
            raise StoreError(f"{self._uri}/{name}: cannot be {done} ({error})") from error

    def _fetch(self, name: str, folder: Path) -> Path:
        self._downloader.download(f"{self._uri}/{name}", str(folder / name), DOWNLOAD_SECONDS)
        return folder / name
