"""What several test files need: real data where it is, small shards, and the project's commands."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter

from esm2_composer.records import COLUMNS

from esm2_composer.errors import run_command

ROOT = Path(__file__).parent.parent
REAL_DATA = Path(os.environ.get("ESM2_REAL_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real proteins, with `tiny/` and `full/`."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data in {REAL_DATA}; set ESM2_REAL_DATA")
    return REAL_DATA


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command to its end, its output as text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def python(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return run(sys.executable, *command, **options)


def composer(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Composer's launcher, on the project's train.py."""
    return run(Path(sys.executable).with_name("composer"), *command, **options)


@pytest.fixture
def call(monkeypatch, capsys) -> Callable:
    """Calls the `main` of a tool with arguments, in this process: (exit code, standard output, standard error)."""

    def call(main: Callable, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_command(main)
        return exit.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 96 synthetic training clusters and 10 validation clusters."""
    folder = tmp_path_factory.mktemp("sample")
    made = python(ROOT / "tools/sample_data.py", folder / "raw", "--clusters", "96", "--valid-clusters", "10")
    assert made.returncode == 0, made.stderr
    for split, sequences in (("train", "train.db"), ("valid", "validation.db")):
        converted = python(
            ROOT / "tools/convert.py",
            *("--clusters", folder / "raw" / f"{split}_clusters.parquet"),
            *("--sequences", folder / "raw" / sequences),
            *("--out", folder / "shards", "--split", split),
        )
        assert converted.returncode == 0, converted.stderr
    return folder / "shards"


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
