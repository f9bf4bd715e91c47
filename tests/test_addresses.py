"""Paths and addresses of stores are told apart, and what lies within what."""

from pathlib import Path

import pytest

from esm2_composer.addresses import is_remote, lies_in, names_bucket


@pytest.mark.parametrize(
    "uri", ["s3://bucket/x", "s3:/bucket", "dbfs:/Volumes/a", "hf://datasets/a/b", "azure-dl://x"]
)
def test_an_address_of_a_store_is_no_path(uri: str) -> None:
    assert is_remote(uri)


@pytest.mark.parametrize("path", ["x", "/x", "./s3/x", "a:b", "a b://c", ""])
def test_a_path_is_no_address(path: str) -> None:
    assert not is_remote(path)


@pytest.mark.parametrize(
    ("uri", "names"),
    [
        *(("s3://bucket", True), ("gs://bucket/x", True), ("dbfs:/Volumes/a", True)),
        *(("s3://", False), ("s3:///x", False), ("s3:/x", False), ("hf:/datasets", False)),
    ],
)
def test_an_address_names_a_bucket_where_stores_have_them(uri: str, names: bool) -> None:
    assert names_bucket(uri) == names


@pytest.mark.parametrize(
    ("place", "folder", "within"),
    [
        ("a", "a", True),
        ("a/b/../c", "./a/", True),
        ("ab", "a", False),
        ("link/x", "a", True),
        ("loop", "a", False),
        ("s3://a/b", "s3://a", True),
        ("s3://a", "a", False),
        ("a", "s3://a", False),
    ],
)
def test_what_lies_in_a_folder(tmp_path, monkeypatch, place, folder, within):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("a")
    Path("loop").symlink_to("loop")
    assert lies_in(place, folder) == within
