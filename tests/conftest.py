"""What several test files need: real data where it is, small shards, and the project's commands."""

import contextlib
import faulthandler
import functools
import gc
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import botocore.loaders
import numpy as np
import psutil
import pytest
import torch
from moto.server import ThreadedMotoServer
from streaming import MDSWriter
from streaming.base.shared import memory

from esm2_composer.checkpoints.folders import Folder, open_folder
from esm2_composer.command import run_command
from esm2_composer.data.mds import COLUMNS
from esm2_composer.distributed.collectives import end_process_group
from esm2_composer.distributed.launcher import LEAST

ROOT = Path(__file__).parent.parent
REAL_DATA = Path(os.environ.get("ESM2_REAL_DATA") or ROOT.parent / "shared" / "data")
# As many tests run at a time as there are cores, on models too small for several threads, here and in commands.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Of each client that Streaming and moto make, 0.2 s are for reading the same descriptions of the service.
read_json = functools.cache(botocore.loaders.JSONFileLoader().load_file)
botocore.loaders.JSONFileLoader.load_file = lambda _, path: read_json(path)
# Commands called here must not keep the garbage of other tests.
gc.freeze = lambda: None
# An iterator that is left in mid-epoch goes with a cycle of references, after the queues by which it would tell
# its workers to end; then torch waits so many seconds for each.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2

TERMINAL = pytest.StashKey[int]()

# Modules that open no StreamingDataset, nor start what does. Datasets of several processes race for names in
# shared memory, so all others' tests run in one of pytest's workers, one after the other.
WITHOUT_STREAMING = """
    addresses alphabet attention benchmark benchmark_convert benchmark_profile benchmark_step build_clusters
    callbacks checksums collectives command config conversion_plan convert divergence docs draw embed epochs
    errors estimate export_hf fasta files folders fp8 fsdp gpu_memory imports index journal kernels_attention
    kernels_elementwise kernels_fp8 kernels_layer launcher layouts loggers markers masking mds model optim
    parts pool precision progress proteins records report resume retry running sample_data schema sharded
    sockets spark splits storage strict task verification weights workers
""".split()  # noqa: SIM905, which would be a line each


@pytest.hookimpl(tryfirst=True)  # xdist's own reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") not in WITHOUT_STREAMING:
            item.add_marker(pytest.mark.xdist_group("streaming"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TERMINAL] = os.dup(2)  # nothing is captured here


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """A test that never ends is reported, with what each thread was doing, and ends its process.

    The thread that does so needs no lock of Python's, which such a test may hold. It is set for each phase anew,
    since pytest stops it when a phase fails.
    """
    seconds = 3600 if item.get_closest_marker("slow") else 1800
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[TERMINAL])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


pytest_runtest_call = pytest_runtest_teardown = pytest_runtest_setup


@pytest.fixture(scope="module", autouse=True)
def shared_memory_is_given_back() -> Iterator[None]:
    """Streaming keeps a dataset's shared memory until its process ends, and opens that of every other dataset:
    those of all tests in one process would take more open files than there may be."""
    cleanups: list[Callable[[], None]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "atexit", SimpleNamespace(register=cleanups.append))
        yield
    gc.collect()  # datasets that still look into it
    for cleanup in cleanups:
        with contextlib.suppress(BufferError):
            cleanup()


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """As a Trainer leaves one, and its place among the ranks in the environment; other tests' ranks would inherit
    both."""
    names = [*LEAST, "MASTER_ADDR", "MASTER_PORT"]
    before = {name: os.environ[name] for name in names if name in os.environ}
    yield
    if torch.distributed.is_initialized():
        end_process_group()
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture
def one_rank(tmp_path: Path) -> None:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real proteins, with `tiny/` and `full/`."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data in {REAL_DATA}; set ESM2_REAL_DATA")
    return REAL_DATA


def run(
    *command: str | Path, cwd: Path = ROOT, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command to its end, its output as text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return run(sys.executable, *command, **options)


def composer(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Composer's launcher, on the project's train.py."""
    return run(Path(sys.executable).with_name("composer"), *command, **options)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """An empty checkout: the project's commands, and nothing that they have made."""
    for name in ("tools", "yamls", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def follow(folder: Path, command: str, **options) -> str:
    """Run lines of shell as they stand on a page, in `folder`; gives all they printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = run("bash", "-e", "-c", command, cwd=folder, PATH=path, PYTHONPATH=str(ROOT), **options)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def call(monkeypatch, capsys) -> Callable:
    """Calls the `main` of a tool with arguments, in this process: (exit code, standard output, standard error)."""

    def call(main: Callable, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_command(main)
        return exit.value.code or 0, *capsys.readouterr()

    return call


class Run:
    """Composer's launcher on train.py, watched while it runs; or, without one, the only rank, which is faster.

    `inside` is a command that becomes the one which it is given. Use as a context: nothing of it outlives that.
    """

    def __init__(
        self,
        *command: str | Path,
        cwd: Path,
        launcher: bool = True,
        inside: Sequence[str] = (),
        **environment: str,
    ) -> None:
        python = Path(sys.executable)
        self._has_launcher = launcher
        self._process = subprocess.Popen(
            [*inside, python.with_name("composer") if launcher else python, *(str(part) for part in command)],
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.launcher = psutil.Process(self._process.pid)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self._process.stderr), daemon=True)
        self._reader.start()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_until(self, condition: Callable[[], object], seconds: float = 540) -> None:
        """Wait for `condition`, but not longer than the run lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, "".join(self.lines)
            assert time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.01)

    def wait_for(self, start: str) -> None:
        """Wait for a line of the log that starts so."""
        self.wait_until(lambda: any(line.startswith(start) for line in self.lines))

    def ranks(self) -> list[psutil.Process]:
        """The ranks' processes, in order; fewer while the launcher is starting them."""
        if not self._has_launcher:
            return [self.launcher]
        found = {}
        for child in self.launcher.children():
            try:
                if "train.py" in " ".join(child.cmdline()[:3]):
                    found[int(child.environ()["RANK"])] = child
            except psutil.Error:  # a short-lived helper
                continue
        return [found[rank] for rank in sorted(found)]

    def end(self) -> tuple[int, float]:
        """The launcher's exit code, and the seconds it took from now until no rank was left."""
        start = time.monotonic()
        code = self._process.wait(timeout=540)
        self._reader.join()
        return code, time.monotonic() - start

    def kill(self) -> None:
        """SIGKILL to everything, at once."""
        family = [self.launcher, *self.launcher.children(recursive=True)] if self.launcher.is_running() else []
        for process in family:
            try:
                process.kill()
            except psutil.Error:
                continue
        self._process.wait()
        psutil.wait_procs(family, timeout=30)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 synthetic training clusters and 10 validation clusters in the BioNeMo layout."""
    folder = tmp_path_factory.mktemp("sample") / "raw"
    made = python(ROOT / "tools/sample_data.py", folder, "--clusters", "96", "--valid-clusters", "10")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="session")
def shards(raw: Path) -> Path:
    """The shards of `raw`."""
    folder = raw.parent
    for split, sequences in (("train", "train.db"), ("valid", "validation.db")):
        converted = python(
            ROOT / "tools/convert.py",
            *("--clusters", raw / f"{split}_clusters.parquet"),
            *("--sequences", raw / sequences),
            *("--out", folder / "shards", "--split", split),
        )
        assert converted.returncode == 0, converted.stderr
    return folder / "shards"


def command(shards: Path, *overrides: str, script: str = "train.py") -> list[str]:
    """Arguments for composer or python: demo.yaml shrunk to a model and a run of seconds."""
    return [
        str(ROOT / script),
        str(ROOT / "yamls/demo.yaml"),
        *(f"data.remote={shards}", "data.max_length=128", "device_microbatch_tokens=2048"),
        *("model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=64"),
        *("max_duration=14ba", "schedule.warmup=3", "eval_interval=7ba", "save_interval=2ba"),
        "callbacks.best_checkpoints=0",
        *overrides,
    ]


# What trains sharded by each version of FSDP on CPU ranks, and the key that asks for it.
SHARDED = {1: ("tests/gpu_train.py", "fsdp.version=1"), 2: ("train.py", "fsdp.version=2")}
COPIES = ("fsdp.data_parallel_shard_degree=2", "fsdp.data_parallel_replicate_degree=-1")  # HSDP


@pytest.fixture(scope="session")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a run of `command` that nothing disturbed, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    result = python(*command(shards, "save_num_checkpoints_to_keep=7"), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def cluster(*members: bytes, name: str = "c") -> dict[str, Any]:
    lengths = np.array([len(member) for member in members], np.int32)
    return {"cluster_id": name, "lengths": lengths, "residues": b"".join(members)}


@pytest.fixture(scope="session")
def clusters() -> list[dict[str, Any]]:
    """37 clusters of one to four members, most longer than a window."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"LAGVSERTIDPKQNFYMHWC", np.uint8)

    def member() -> bytes:
        return rng.choice(letters, rng.integers(5, 80)).tobytes()

    return [cluster(*(member() for _ in range(rng.integers(1, 5))), name=f"UniRef50_{i}") for i in range(37)]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, clusters: list[dict[str, Any]]) -> Path:
    out = tmp_path_factory.mktemp("shards") / "all"
    with MDSWriter(out=str(out), columns=COLUMNS, compression="zstd", hashes=["xxh64"], size_limit=1500) as writer:
        for each in clusters:
            writer.write(each)
    assert len(list(out.glob("shard.*"))) > 3
    return out


@pytest.fixture
def fresh(tmp_path: Path, written: Path) -> Callable[[], str]:
    """A new copy of the shards at each call: Streaming opens a folder only once in a process."""
    names = itertools.count()

    def copy() -> str:
        return str(shutil.copytree(written, tmp_path / f"copy{next(names)}"))

    return copy


@pytest.fixture(scope="module")
def store():
    """A bucket on a loopback S3 endpoint, told to boto3 by the environment."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=settings["S3_ENDPOINT_URL"]).create_bucket(Bucket="bucket")
        yield
    server.stop()


@pytest.fixture(params=["local", "s3"])
def folder(request, store, tmp_path) -> Folder:
    folder = open_folder(str(tmp_path / "run") if request.param == "local" else f"s3://bucket/{tmp_path.name}/run")
    folder.make()
    return folder
