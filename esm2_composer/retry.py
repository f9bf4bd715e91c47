"""Retrying a store that does not answer, but not one whose answer would be the same."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from botocore import exceptions as boto

from esm2_composer.errors import REFUSED, ReportedError, StoreUnavailable, tell

Result = TypeVar("Result")

# A machine's role comes from a separate service, which a node's hundred processes ask at once. boto would ask it
# once, for a second, and take silence for no credentials.
os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "3")
os.environ.setdefault("AWS_METADATA_SERVICE_TIMEOUT", "2")

WAITS = (1, 2, 4, 8, 16)  # seconds before asking again
# What boto itself raises, not for a store's answer, where another attempt may work.
TRANSIENT = (
    *(boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError),
    *(boto.CredentialRetrievalError, boto.MetadataRetrievalError),
    boto.FlexibleChecksumError,  # garbled on its way
)


def retry(ask: Callable[[], Result], source: str) -> Result:
    """Retry for half a minute, as long as the store and not the request is at fault.

    Raises:
        StoreUnavailable: it did not come back; worth another start.
        Exception: what the store raises for a request that will never work.
    """
    waits = iter(WAITS)
    while True:
        try:
            return ask()
        except Exception as error:  # each store raises its own types
            if is_permanent(error):
                raise
            message = f"{source} cannot be reached ({type(error).__name__}: {error})"
            if (wait := next(waits, None)) is None:
                raise StoreUnavailable(message) from error
            tell(f"{message}; trying again in {wait} s")
            time.sleep(wait)


def is_permanent(error: Exception) -> bool:
    """Whether retrying cannot help: an error reported already, the file system's about the path, boto's own about
    the request, or a 4xx answer of the store other than 408 and 429 (too many requests)."""
    if isinstance(error, ReportedError | FileNotFoundError | PermissionError | ValueError | ImportError):
        return True
    if isinstance(error, OSError) and error.errno in REFUSED:
        return True
    if isinstance(error, boto.BotoCoreError):
        return not isinstance(error, TRANSIENT)
    status = _http_status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def _http_status(error: Exception) -> int | None:
    """The status of a store's answer; each store's library has its own place for it. None: there was no answer."""
    from boto3.exceptions import S3UploadFailedError  # takes half a second

    if isinstance(error, S3UploadFailedError):  # boto3's, which only quotes what the store answered
        error = error.__context__ or error
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # boto's
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    names = "code", "status_code", "status"  # Google's, Azure's and requests', Oracle's
    codes = (getattr(source, name, None) for source in (error, response) for name in names)
    return next((status for status in codes if isinstance(status, int)), None)
