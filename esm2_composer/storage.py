"""Files to and from object storage, by whatever stores Streaming knows (s3, gs, azure, oci, ...).

An upload counts only when the object has been read back and has the same hash.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from esm2_composer.errors import StoreUnavailable, UserError
from esm2_composer.files import xxh64
from esm2_composer.retry import is_permanent

ATTEMPTS = 5  # with 1, 2, 4 and 8 seconds between them
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
        """Store `name` of the folder. Raises StoreError or StoreUnavailable if that fails, tried several times."""
        from streaming.base.util import retry

        expected = xxh64(self._folder / name)

        @retry(num_attempts=ATTEMPTS)
        def upload() -> None:
            self._uploader.upload_file(name)
            with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
                if xxh64(self._fetch(name, Path(scratch))) != expected:
                    raise OSError("it differs from what was sent")

        try:
            upload()
        except Exception as error:
            raise failure(f"{self._uri}/{name}: cannot be stored", error) from error

    def names(self, start: str = "") -> set[str]:
        """What is there under names that begin so. Raises StoreError or StoreUnavailable if it does not say."""
        try:
            found = self._uploader.list_objects(start) or []
        except Exception as error:
            raise failure(f"{self._uri}: cannot be listed", error) from error
        return {key.rpartition("/")[2] for key in found}

    def download(self, name: str, folder: Path) -> Path:
        """Fetch an object into `folder`; its path there. Raises StoreError or StoreUnavailable if that fails."""
        from streaming.base.util import retry

        try:
            return retry(num_attempts=ATTEMPTS)(self._fetch)(name, folder)
        except Exception as error:
            raise failure(f"{self._uri}/{name}: cannot be read", error) from error

    def _fetch(self, name: str, folder: Path) -> Path:
        self._downloader.download(f"{self._uri}/{name}", str(folder / name), DOWNLOAD_SECONDS)
        return folder / name
