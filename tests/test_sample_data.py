"""tools/sample_data.py: the layout of its files and the statistics that its users rely on."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sample_data

TOOL = Path(__file__).parents[1] / "tools" / "sample_data.py"
# Percent in UniProtKB/Swiss-Prot.
BACKGROUND = dict(A=8.25, R=5.52, N=4.06, D=5.46, C=1.38, Q=3.93, E=6.71, G=7.07, H=2.27, I=5.91, L=9.64)
BACKGROUND |= dict(K=5.79, M=2.41, F=3.86, P=4.74, S=6.65, T=5.36, W=1.10, Y=2.92, V=6.85)
FILES = ["train.db", "train_clusters.parquet", "valid_clusters.parquet", "validation.db"]


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def proteins(path: Path) -> dict[str, str]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return dict(database.execute("SELECT id, sequence FROM protein"))


def five_mers(sequences: Iterable[str]) -> list[str]:
    return [seq[i : i + 5] for seq in sequences for i in range(len(seq) - 4)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "data"
    out.mkdir()  # an empty folder will do, as well as none
    done = run_tool(out)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["data"], "the scratch folder is gone"
    assert sorted(path.name for path in out.iterdir()) == FILES
    return out


@pytest.fixture(scope="module")
def train(data: Path) -> dict[str, str]:
    return proteins(data / "train.db")


@pytest.fixture(scope="module")
def valid(data: Path) -> dict[str, str]:
    return proteins(data / "validation.db")


def test_clusters_and_databases_agree(data: Path, train: dict[str, str], valid: dict[str, str]) -> None:
    clusters, held_out = (pq.read_table(data / f"{name}_clusters.parquet") for name in ("train", "valid"))
    assert clusters.schema == pa.schema({"ur50_id": pa.string(), "ur90_id": pa.list_(pa.string())})
    assert held_out.schema == pa.schema({"ur50_id": pa.string()})
    ids, members = set(clusters["ur50_id"].to_pylist()), clusters["ur90_id"].to_pylist()
    assert (len(ids), len(members), len(valid)) == (2000, 2000, 120)
    assert sorted(key for family in members for key in family) == sorted(train)
    assert set(held_out["ur50_id"].to_pylist()) == set(valid)
    assert not ids & set(valid)
    sizes = [len(family) for family in members]
    assert 2.5 < sum(sizes) / len(sizes) < 3.3
    assert sizes.count(1) > len(sizes) / 2
    assert 20 < max(sizes) <= 50


def test_composition(train: dict[str, str], valid: dict[str, str]) -> None:
    assert all(seq.startswith("M") for seq in [*train.values(), *valid.values()])
    text = "".join(train.values())
    assert set(text) == {*BACKGROUND, "X"}
    percent = {residue: 100 * text.count(residue) / len(text) for residue in BACKGROUND}
    assert percent == pytest.approx(BACKGROUND, abs=1)


def test_lengths(train: dict[str, str]) -> None:
    lengths = sorted(map(len, train.values()))
    assert lengths[0] >= 10
    assert 250 <= lengths[len(lengths) // 2] <= 310
    assert 300 <= sum(lengths) / len(lengths) <= 370
    assert 0.015 <= sum(length > 1022 for length in lengths) / len(lengths) <= 0.04


def test_validation_has_new_sequences_of_known_domains(train: dict[str, str], valid: dict[str, str]) -> None:
    assert not set(train.values()) & set(valid.values())
    frequent = {word for word, count in Counter(five_mers(train.values())).items() if count >= 20}
    shuffler = random.Random(0)
    by_chance = ["".join(shuffler.sample(seq, len(seq))) for seq in valid.values()]
    hits, chance_hits = ([w in frequent for w in five_mers(texts)] for texts in (valid.values(), by_chance))
    assert sum(hits) / len(hits) > 0.4
    assert sum(chance_hits) / len(chance_hits) < 0.02


def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in {"one": 3, "two": 3, "other": 4}.items():
        done = run_tool(tmp_path / name, "--seed", seed, "--clusters", 30, "--valid-clusters", 4)
        assert done.returncode == 0, done.stderr
    one, two, other = (
        proteins(tmp_path / name / "train.db") | proteins(tmp_path / name / "validation.db")
        for name in ("one", "two", "other")
    )
    assert one == two
    assert not set(one.values()) & set(other.values())


@pytest.mark.parametrize(
    ("out", "options"),
    [
        *((out, []) for out in ("full", "nowhere", "loop", "loop/new", "s3://bucket/new", "dbfs:/new", "")),
        *(("new", [option, count]) for option in ("--clusters", "--valid-clusters") for count in ("0", "1000001")),
        ("new", ["--seed", f"{2**63}"]),
    ],
)
def test_a_mistake_is_refused_in_one_line(tmp_path: Path, monkeypatch, call, out: str, options: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/mine.txt").touch()
    Path("nowhere").symlink_to("nothing")
    Path("loop").symlink_to("loop")
    code, _, err = call(sample_data.main, out, *options)
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert sorted(map(str, Path().rglob("*"))) == ["full", "full/mine.txt", "loop", "nowhere"]
