"""A store that does not answer is asked again; an answer that would be the same is taken."""

from __future__ import annotations

import errno
from http import HTTPStatus
from types import SimpleNamespace

import botocore.session
import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    FlexibleChecksumError,
    NoCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
)

from esm2_composer.errors import StoreUnavailable
from esm2_composer.retry import retry


def test_the_service_that_gives_a_machine_its_role_is_asked_more_than_once() -> None:
    session = botocore.session.get_session()
    assert session.get_config_variable("metadata_service_num_attempts") == 3
    assert session.get_config_variable("metadata_service_timeout") == 2


def answer(status: int) -> ClientError:
    return ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def upload_failed(status: int) -> S3UploadFailedError:
    error = S3UploadFailedError("Failed to upload file to bucket/file")
    error.__context__ = answer(status)  # as boto3 raises it
    return error


def while_handling(error: Exception, other: Exception) -> Exception:
    error.__context__ = other
    return error


class ErrorOfAnotherLibrary(Exception):
    """As google.api_core's (`code`), azure.core's (`status_code`), oci's (`code` is text) and requests' are."""

    def __init__(self, response: object = None, **attributes: object) -> None:
        super().__init__()
        self.response = response
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        *((answer(status), True) for status in (403, 404)),
        *((answer(status), False) for status in (408, 429, 503)),
        (upload_failed(403), True),
        (upload_failed(503), False),
        (while_handling(OSError("it differs"), answer(404)), False),
        (ErrorOfAnotherLibrary(code=HTTPStatus.NOT_FOUND), True),
        (ErrorOfAnotherLibrary(response=object(), status_code=403), True),
        (ErrorOfAnotherLibrary(code="BucketNotFound", status=404), True),
        (ErrorOfAnotherLibrary(response=SimpleNamespace(status_code=401)), True),
        (ErrorOfAnotherLibrary(code=HTTPStatus.TOO_MANY_REQUESTS), False),
        (ErrorOfAnotherLibrary(response=object(), status_code=None), False),
        (ErrorOfAnotherLibrary(), False),
        (NoCredentialsError(), True),
        (FlexibleChecksumError(error_msg="crc32"), False),
        (ProfileNotFound(profile="none"), True),
        (EndpointConnectionError(endpoint_url="http://nowhere"), False),
        (ReadTimeoutError(endpoint_url="http://nowhere"), False),
        (OSError(errno.ENAMETOOLONG, "File name too long", "cache/index.json"), True),
        (OSError(errno.EIO, "Input/output error", "cache/index.json"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_answer_that_would_be_the_same_again_is_not_asked_for_again(
    error: Exception, refusal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def ask() -> None:
        asked.append(1)
        raise error

    monkeypatch.setattr("esm2_composer.retry.WAITS", (0, 0))
    with pytest.raises(type(error) if refusal else StoreUnavailable):
        retry(ask, "s3://bucket/train/index.json")
    assert len(asked) == (1 if refusal else 3)


def test_what_comes_at_last_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[object] = [answer(503), TimeoutError(), "here"]

    def ask() -> object:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr("esm2_composer.retry.WAITS", (0, 0))
    assert retry(ask, "s3://bucket/run") == "here"
    assert capsys.readouterr().err.count("s3://bucket/run cannot be reached") == 2
