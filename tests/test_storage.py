"""storage.py and conversion to object storage, against a real S3 endpoint behind a proxy that can fail."""

from __future__ import annotations

import hashlib
import http.client
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from raw_data import bionemo, hashes, in_order, random_data

from esm2_composer import retry
from esm2_composer.conversion import plan as conversion_plan
from esm2_composer.conversion.convert import Interrupted, Options, convert
from esm2_composer.conversion.layouts import BioNeMo
from esm2_composer.conversion.verification import verify
from esm2_composer.errors import StoreUnavailable, UserError
from esm2_composer.storage import Store, StoreError

# What becomes of a request: (method, path, body) -> the body to pass on, or a status to answer with.
Fault = Callable[[str, str, bytes], "bytes | int"]


class Bucket:
    """A bucket on a server of its own; `fault` is asked about every request."""

    def __init__(self) -> None:
        self.fault: Fault = lambda method, path, body: body
        self.stored: list[str] = []  # objects in the order of their uploads
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self._upstream = self._moto.get_host_and_port()
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._proxy.server_port}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                passed = bucket.fault(self.command, self.path, body)
                if isinstance(passed, int):
                    self.send_response(passed)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if self.command == "PUT":
                    bucket.stored.append(self.path.removeprefix("/bucket/"))
                upstream = http.client.HTTPConnection(*bucket._upstream)
                upstream.request(self.command, self.path, passed, dict(self.headers))
                answer = upstream.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

            def log_message(self, *args: object) -> None:
                pass

        return Handler

    def reset(self) -> None:
        """Forget the objects: all servers of a process share them."""
        connection = http.client.HTTPConnection(*self._upstream)
        connection.request("POST", "/moto-api/reset")
        assert connection.getresponse().status == 200

    def close(self) -> None:
        self._proxy.shutdown()
        self._moto.stop()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server = Bucket()
    server.reset()
    monkeypatch.setenv("S3_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # boto3's own retries out of the way of ours
    monkeypatch.setattr(retry, "WAITS", (0,) * 5)
    boto3.client("s3", endpoint_url=server.url).create_bucket(Bucket="bucket")
    server.stored.clear()
    yield server
    server.close()


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BioNeMo:
    monkeypatch.setattr(conversion_plan, "PART_CLUSTERS", 40)
    named, proteins = random_data(100)
    return bionemo(tmp_path, {"ur50_id": list(named), "ur90_id": list(named.values())}, proteins)


def fail(times: int, answer: int | Callable[[bytes], bytes], part: str, verb: str = "PUT") -> Fault:
    """The first so many uploads, or other requests, of objects with `part` in their name get `answer`."""
    left = [times]

    def fault(method: str, path: str, body: bytes) -> bytes | int:
        if method == verb and part in path and left[0]:
            left[0] -= 1
            return answer if isinstance(answer, int) else answer(body)
        return body

    return fault


def test_a_split_on_object_storage_is_the_one_on_disk(bucket: Bucket, layout: BioNeMo, tmp_path: Path) -> None:
    told = convert(layout, "s3://bucket/some/where", Options(), workers=1, scratch=tmp_path / "scratch")
    convert(layout, str(tmp_path / "local"), Options())
    assert bucket.stored[-1] == "some/where/train/index.json"
    expected = {*hashes(tmp_path / "local/train"), "conversion.json"}
    assert set(bucket.stored) == {f"some/where/train/{name}" for name in expected}
    assert not list((tmp_path / "scratch").iterdir())
    client = boto3.client("s3", endpoint_url=bucket.url)
    for name, digest in hashes(tmp_path / "local/train").items():
        client.download_file("bucket", f"some/where/train/{name}", str(tmp_path / "fetched"))
        assert hashlib.sha256((tmp_path / "fetched").read_bytes()).hexdigest() == digest
    assert verify("s3://bucket/some/where")["train"] == verify(str(tmp_path / "local"))["train"]
    uploads = len(bucket.stored)
    assert convert(layout, "s3://bucket/some/where/", Options(), scratch=tmp_path / "scratch") == {
        **told,
        "already_done": True,
    }
    assert len(bucket.stored) == uploads
    with pytest.raises(UserError, match=r"options\.seed was 0, is 1"):
        convert(layout, "s3://bucket/some/where", Options(seed=1), scratch=tmp_path / "scratch")


def test_clusters_of_the_other_split_are_found_on_object_storage(bucket: Bucket, tmp_path: Path) -> None:
    one = bionemo(tmp_path / "one", {"ur50_id": ["a", "b"]}, {"a": "MK", "b": "MV"})
    two = bionemo(tmp_path / "two", {"ur50_id": ["b", "c"]}, {"b": "MV", "c": "ML"})
    convert(one, "s3://bucket/x", Options("train"), scratch=tmp_path)
    with pytest.raises(UserError, match="cluster of the other split 1"):
        convert(two, "s3://bucket/x", Options("valid"), scratch=tmp_path)


@pytest.mark.parametrize("answer", [500, lambda body: body[:-1] + b"!"], ids=["refused", "corrupted"])
def test_an_upload_that_fails_or_arrives_damaged_is_tried_again(
    bucket: Bucket, layout: BioNeMo, tmp_path: Path, answer: int | Callable
) -> None:
    bucket.fault = fail(3, answer, "shard.00001")
    convert(layout, "s3://bucket/x", Options(), scratch=tmp_path)
    assert verify("s3://bucket/x")["train"]["clusters"] == 100


def test_a_lost_store_keeps_the_work_and_the_same_command_goes_on(
    bucket: Bucket, layout: BioNeMo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.fault = fail(10**9, 500, "shard.00002")
    scratch = tmp_path / "scratch"
    with pytest.raises(Interrupted, match=r"shard\.00002.*the work is kept"):
        convert(layout, "s3://bucket/x", Options(), scratch=scratch)
    before = set(bucket.stored)
    assert not any("index.json" in name for name in before)
    bucket.stored.clear()
    bucket.fault = lambda method, path, body: body
    convert(layout, "s3://bucket/x", Options(), scratch=scratch)
    assert before.isdisjoint(bucket.stored)
    assert verify("s3://bucket/x")["train"]["clusters"] == 100


def test_a_download_that_fails_is_tried_again_and_told_in_one_line(
    bucket: Bucket, layout: BioNeMo, tmp_path: Path
) -> None:
    told = convert(layout, "s3://bucket/x", Options(), scratch=tmp_path)
    other = bionemo(tmp_path / "other", {"ur50_id": ["z"]}, {"z": "MK"})
    for name, one, split in (("conversion.json", layout, "train"), ("cluster_ids.parquet", other, "valid")):
        bucket.fault = fail(10**9, 500, f"bucket/x/train/{name}", "GET")
        with pytest.raises(StoreUnavailable, match=rf"^s3://bucket/x/train/{name} cannot be reached \("):
            convert(one, "s3://bucket/x", Options(split), scratch=tmp_path)
        assert not list(tmp_path.glob(".*"))
    bucket.fault = fail(10**9, 500, "bucket/x/train/index.json", "GET")
    with pytest.raises(StoreUnavailable, match=r"train/index\.json cannot be reached"):
        verify("s3://bucket/x")
    bucket.fault = fail(3, 500, "bucket/x/train/conversion.json", "GET")
    assert convert(layout, "s3://bucket/x", Options(), scratch=tmp_path) == {**told, "already_done": True}


def test_a_store_that_is_lost_at_the_end_keeps_the_work(bucket: Bucket, layout: BioNeMo, tmp_path: Path) -> None:
    """When the other split is looked for once more."""

    def fault(method: str, path: str, body: bytes) -> bytes | int:
        return 500 if method == "GET" and "valid" in path and bucket.stored else body

    bucket.fault = fault
    with pytest.raises(Interrupted, match=r"s3://bucket/x/valid: cannot be listed.*the work is kept"):
        convert(layout, "s3://bucket/x", Options(), scratch=tmp_path)
    bucket.fault = lambda method, path, body: body
    bucket.stored.clear()
    convert(layout, "s3://bucket/x", Options(), scratch=tmp_path)
    last = "cluster_ids.parquet", "conversion.json", "index.json"
    assert bucket.stored == [f"x/train/{name}" for name in last]


def test_a_shard_that_has_gone_since_its_upload_is_made_again(
    bucket: Bucket, layout: BioNeMo, tmp_path: Path
) -> None:
    client = boto3.client("s3", endpoint_url=bucket.url)

    def fault(method: str, path: str, body: bytes) -> bytes | int:
        if "valid" in path and bucket.stored:  # the other split is looked for once more, after all uploads
            client.delete_object(Bucket="bucket", Key="x/train/shard.00000.00.mds.zstd")
        return body

    bucket.fault = fault
    with pytest.raises(Interrupted, match=r"x/train/shard\.00000\.00\.mds\.zstd was uploaded and is not there"):
        convert(layout, "s3://bucket/x", Options(), scratch=tmp_path)
    assert "x/train/index.json" not in bucket.stored
    bucket.fault = lambda method, path, body: body
    bucket.stored.clear()
    assert convert(layout, "s3://bucket/x", Options(), scratch=tmp_path)["clusters_written"] == 100
    assert [name for name in bucket.stored if "shard" in name] == ["x/train/shard.00000.00.mds.zstd"]
    assert verify("s3://bucket/x")["train"]["clusters"] == 100


def test_unfinished_work_for_another_place_is_refused(bucket: Bucket, layout: BioNeMo, tmp_path: Path) -> None:
    """The names of their folders are the same."""
    bucket.fault = fail(len(retry.WAITS) + 1, 500, "index.json")
    with pytest.raises(Interrupted):
        convert(layout, "s3://bucket/a-b", Options(), scratch=tmp_path)
    with pytest.raises(UserError, match=r"destination\.0 was 's3://bucket/a-b', is 's3://bucket/a_b'"):
        convert(layout, "s3://bucket/a_b", Options(), scratch=tmp_path)
    convert(layout, "s3://bucket/a-b/", Options(), scratch=tmp_path)


def test_what_is_refused_at_last_says_what_stays(bucket: Bucket, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(conversion_plan, "PART_CLUSTERS", 10)
    names = [name for name, _ in in_order({f"c{number}": [] for number in range(40)})]
    layout = bionemo(tmp_path, {"ur50_id": names}, {name: "MK" if name in names[:30] else "M1" for name in names})
    with pytest.raises(
        UserError, match=r"bad residue.*; shards stay at s3://bucket/x/train, without index\.json$"
    ):
        convert(layout, "s3://bucket/x", Options(), max_reject_fraction=0.1, scratch=tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())


def test_a_split_without_its_clusters_ids_cannot_be_compared(bucket: Bucket, tmp_path: Path) -> None:
    layout = bionemo(tmp_path, {"ur50_id": ["a"]}, {"a": "MK"})
    client = boto3.client("s3", endpoint_url=bucket.url)
    for out in (str(tmp_path / "out"), "s3://bucket/x"):
        convert(layout, out, Options("train"), scratch=tmp_path)
        (tmp_path / "out/train/cluster_ids.parquet").unlink(missing_ok=True)
        client.delete_object(Bucket="bucket", Key="x/train/cluster_ids.parquet")
        with pytest.raises(UserError, match=r"train has no cluster_ids\.parquet, so nobody can tell"):
            convert(layout, out, Options("valid"), scratch=tmp_path)


def test_no_bucket_is_one_clear_line(
    bucket: Bucket, layout: BioNeMo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^s3://none/x/train: cannot be opened"):
        convert(layout, "s3://none/x", Options(), scratch=tmp_path / "scratch")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable, match=r"^s3://bucket/x/train: cannot be opened"):
        convert(layout, "s3://bucket/x", Options(), scratch=tmp_path / "scratch")
    with pytest.raises(UserError, match=r"^what://b/x/train: cannot be opened \(Invalid Cloud provider prefix"):
        convert(layout, "what://b/x", Options(), scratch=tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())


def test_verification_of_object_storage_finds_damage(bucket: Bucket, layout: BioNeMo, tmp_path: Path) -> None:
    convert(layout, "s3://bucket/x", Options(), scratch=tmp_path)
    client = boto3.client("s3", endpoint_url=bucket.url)
    client.put_object(Bucket="bucket", Key="x/train/shard.00002.00.mds.zstd", Body=b"other")
    with pytest.raises(UserError, match=r"shard\.00002.*the shard is damaged"):
        verify("s3://bucket/x/train")
    client.delete_object(Bucket="bucket", Key="x/train/shard.00002.00.mds.zstd")
    with pytest.raises(UserError, match=r"shard\.00002.*cannot be read"):
        verify("s3://bucket/x/train")


def test_an_object_counts_only_when_it_comes_back_alike(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    store = Store("s3://bucket/x", tmp_path)
    bucket.fault = fail(len(retry.WAITS) + 1, lambda body: body.replace(b"content", b"CONTENT"), "file")
    with pytest.raises(StoreUnavailable, match=r"s3://bucket/x/file cannot be reached .* did not match"):
        store.upload("file")
    store.upload("file")
    assert store.names() == store.names("file") == store.names("fil") == {"file"}
    assert store.names("filed") == set()
    (tmp_path / "there").mkdir()
    assert store.download("file", tmp_path / "there").read_bytes() == b"content"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_what_the_store_refuses_is_asked_for_once(bucket: Bucket, tmp_path: Path, capfd) -> None:
    (tmp_path / "file").write_bytes(b"content")
    store, asked = Store("s3://bucket/x", tmp_path), []

    def refuse(method: str, path: str, body: bytes) -> bytes | int:
        asked.append(method)
        return 403

    bucket.fault = refuse
    with pytest.raises(StoreError, match=r"^s3://bucket/x/file: cannot be stored \(.*403"):
        store.upload("file")
    assert len(asked) == 1
    (tmp_path / "there").mkdir()
    with pytest.raises(StoreError, match=r"^s3://bucket/x/file: cannot be read \(.*permission"):
        store.download("file", tmp_path / "there")
    assert "trying again" not in capfd.readouterr().err
