"""spark.py: a cluster of two executor threads gives the shards of a single machine, whatever it is given."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import convert as convert_tool
import pytest
from conftest import ROOT
from raw_data import MESS, bionemo, flat, hashes, members_of, random_data, read_split
from test_storage import Bucket, bucket  # noqa: F401

from esm2_composer.conversion import plan as conversion_plan
from esm2_composer.conversion.convert import Engine, Interrupted, Options, convert
from esm2_composer.conversion.layouts import Fasta, Flat, Layout
from esm2_composer.conversion.parts import EngineError, Part, PartBuilder, Processes
from esm2_composer.conversion.spark import Spark, _cause
from esm2_composer.conversion.verification import verify
from esm2_composer.errors import UserError
from esm2_composer.storage import Store

pytest.importorskip("pyspark", reason="pyspark is not installed: pip install 'pyspark>=3.5,<4'")
needs_java = pytest.mark.skipif(
    not shutil.which("java") and "JAVA_HOME" not in os.environ, reason="Spark needs Java 17, and there is none"
)


pytestmark = pytest.mark.xdist_group("spark")  # one session for all


@pytest.fixture(scope="module")
def spark() -> Iterator[Spark]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.setenv("PYSPARK_SUBMIT_ARGS", "--conf spark.ui.enabled=false pyspark-shell")
        with Spark("local[2]") as spark:
            yield spark


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_plan, "PART_CLUSTERS", 60)


def make_layouts(folder: Path, clusters: int = 150) -> dict[str, Layout]:
    """The same proteins in every layout, with faults in some; Spark must find them where they lie."""
    named, proteins = random_data(clusters)
    named["mess"] = [name.replace(" ", "_") for name in MESS]
    proteins |= {name.replace(" ", "_"): sequence for name, sequence in MESS.items()}
    named["c0"] = [*named["c0"], "m1_0", "gone"]  # a member of two clusters, and one without sequence
    rows = [(cluster, member, proteins.get(member)) for cluster, members in named.items() for member in members]
    random.Random(1).shuffle(rows)
    (folder / "flat").mkdir(parents=True)
    for number in range(3):
        flat(folder / "flat" / f"{number}.parquet", rows[number::3])
    (folder / "flat" / "again").mkdir()
    flat(
        folder / "flat" / "again" / "x.parquet", [("c2", "m2_0", proteins["m2_0"].lower()), ("c3", "m3_0", "MKW")]
    )
    given = {name: sequence for name, sequence in proteins.items() if sequence is not None}
    text = "".join(f">{name}\n{sequence}\n" for name, sequence in given.items())
    (folder / "p.fasta.gz").write_bytes(gzip.compress(f"{text}>\nMK\n".encode()))
    (folder / "t.tsv").write_text("".join(f"{cluster}\t{member}\n" for cluster, member, _ in rows))
    columns = {"ur50_id": list(named), "ur90_id": list(named.values())}
    return {
        "bionemo": bionemo(folder / "bionemo", columns, proteins),
        "flat": Flat(folder / "flat"),
        "tsv": Fasta([folder / "p.fasta.gz"], folder / "t.tsv"),
        "fasta": Fasta([folder / "p.fasta.gz"]),
    }


@needs_java
@pytest.mark.parametrize("layout", ["bionemo", "flat", pytest.param("tsv", marks=pytest.mark.slow)])
def test_shards_and_counts_are_those_of_one_machine(
    tmp_path: Path, spark: Spark, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esm2_composer.conversion.spark.ROWS_A_SLICE", 200)
    source = make_layouts(tmp_path)[layout]
    options = Options(max_members_per_cluster=12)
    told = {
        out: convert(source, str(tmp_path / out), options, max_reject_fraction=0.5, engine=engine)
        for out, engine in {"one": None, "spark": spark}.items()
    }
    assert hashes(tmp_path / "spark/train") == hashes(tmp_path / "one/train")
    found = [members_of(read_split(tmp_path / out / "train")) for out in told]
    assert found[0] == found[1]
    for conversion in told.values():
        del conversion["elapsed_seconds"]
    assert told["spark"] == told["one"]
    assert told["one"]["parts"] == 3
    assert told["one"]["changed"].keys() >= {"lower case made upper", "J made X"}
    assert told["one"]["rejected"].keys() >= {
        "bad residue",
        "different sequences under one id" if layout == "flat" else "bad residue",
    }


class FailsAfterOnePart:
    def __init__(self, engine: Engine) -> None:
        self._engine, self.stage = engine, engine.stage
        self.asked: list[int] = []

    def build(self, numbers: list[int], builder: PartBuilder) -> Iterator[Part]:
        self.asked = numbers
        yield from self._engine.build(numbers[:1], builder)
        raise EngineError("a node is lost")


@needs_java
def test_whoever_goes_on_builds_only_what_is_missing(tmp_path: Path, spark: Spark) -> None:
    source = make_layouts(tmp_path)["flat"]
    told = convert(source, str(tmp_path / "whole"), Options(), max_reject_fraction=0.5)
    for done, engine in enumerate([FailsAfterOnePart(spark), FailsAfterOnePart(Processes(1))]):
        with pytest.raises(Interrupted, match="a node is lost; the work is kept"):
            convert(source, str(tmp_path / "out"), Options(), max_reject_fraction=0.5, engine=engine)
        assert engine.asked == list(range(done, told["parts"]))
    convert(source, str(tmp_path / "out"), Options(), max_reject_fraction=0.5, engine=spark)
    assert hashes(tmp_path / "out/train") == hashes(tmp_path / "whole/train")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]


@needs_java
def test_a_split_on_object_storage_ends_with_its_index(tmp_path: Path, spark: Spark, bucket: Bucket) -> None:  # noqa: F811
    source = make_layouts(tmp_path)["fasta"]
    told = convert(
        source, "s3://bucket/x", Options(), max_reject_fraction=0.5, scratch=tmp_path / "s", engine=spark
    )
    assert bucket.stored[-1] == "x/train/index.json"
    assert len(bucket.stored) == told["parts"] + 3
    assert not list((tmp_path / "s").iterdir())
    convert(source, str(tmp_path / "one"), Options(), max_reject_fraction=0.5)
    assert verify("s3://bucket/x") == verify(str(tmp_path / "one"))
    store = Store("s3://bucket/x/train", tmp_path)
    assert store.download("index.json", tmp_path).read_bytes() == (tmp_path / "one/train/index.json").read_bytes()


@needs_java
def test_what_an_executor_refuses_is_one_line_and_leaves_nothing(tmp_path: Path, spark: Spark) -> None:
    names = [f"c{number}" for number in range(4000)]
    source = bionemo(tmp_path, {"ur50_id": names}, dict.fromkeys(names, "MKV" * 20))
    with (tmp_path / "proteins.db").open("r+b") as file:
        file.seek(8192)
        file.write(bytes(range(256)) * ((tmp_path / "proteins.db").stat().st_size // 256 - 32))
    with pytest.raises(UserError, match=r"proteins\.db: cannot be read as an SQLite database \([\w ]+\)$"):
        convert(source, str(tmp_path / "out"), Options(), engine=spark)
    assert not (tmp_path / "out").exists()


@needs_java
def test_too_much_rejected_is_refused(tmp_path: Path, spark: Spark) -> None:
    source = bionemo(tmp_path, {"ur50_id": [f"c{number}" for number in range(200)]}, {})
    with pytest.raises(UserError, match=r"% of 200 members rejected, more than 1\.0%: member without sequence"):
        convert(source, str(tmp_path / "out"), Options(), engine=spark)
    assert not (tmp_path / "out").exists()


def test_a_failure_of_spark_keeps_its_last_word() -> None:
    text = """An error occurred while calling z:org.apache.spark.api.python.PythonRDD.runJob.
: org.apache.spark.SparkException: Job aborted due to stage failure: Task 0: Traceback (most recent call last):
  File "worker.py", line 1, in main
{}

\tat org.apache.spark.api.python.BasePythonRunner.handlePythonException(PythonRunner.scala:561)
"""
    lost = _cause(
        Exception(text.format("FileNotFoundError: [Errno 2] No such file or directory: '/x/plan.parquet'"))
    )
    assert isinstance(lost, EngineError)
    assert str(lost) == "Spark failed (FileNotFoundError: [Errno 2] No such file or directory: '/x/plan.parquet')"
    mistake = _cause(Exception(text.format("esm2_composer.errors.UserError: cluster c is too large")))
    assert isinstance(mistake, UserError)
    assert str(mistake) == "cluster c is too large"


def run_tool(tmp_path: Path, *arguments: str, code: str = "pass", **environment: str) -> tuple[int, list[str]]:
    """Exit code and standard error of tools/convert.py, after `code`."""
    source = bionemo(tmp_path, {"ur50_id": ["a"]}, {"a": "MKV"})
    command = ["convert.py", "--out", str(tmp_path / "out"), *arguments]
    for role, (path,) in source.inputs.items():
        command += [f"--{role}", str(path)]
    script = (
        f"import runpy, sys; {code}; sys.argv = {command!r}; runpy.run_path({str(ROOT / 'tools/convert.py')!r}, "
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{script} run_name='__main__')"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not (tmp_path / "out").exists()
    return done.returncode, done.stderr.splitlines()


@needs_java
def test_the_tool_runs_on_the_master_it_is_given(
    tmp_path: Path, spark: Spark, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    masters = []
    monkeypatch.setattr(
        "esm2_composer.conversion.spark.Spark", lambda master: masters.append(master) or nullcontext(spark)
    )
    bionemo(tmp_path, {"ur50_id": ["a"]}, {"a": "MKV"})
    files = "--clusters", tmp_path / "clusters.parquet", "--sequences", tmp_path / "proteins.db"
    code, _, stderr = call(convert_tool.main, *files, "--out", tmp_path / "out", "--spark", "yarn")
    assert code == 0, stderr
    assert masters == ["yarn"]
    assert "train: 1 clusters, 1 members, 3 residues in " in stderr
    assert members_of(read_split(tmp_path / "out/train")) == {"a": [b"MKV"]}


@needs_java
def test_a_master_that_is_none_is_named(tmp_path: Path) -> None:
    code, lines = run_tool(tmp_path, "--spark", "nonsense")
    assert code == 2
    assert lines[-1].startswith("error: --spark nonsense: cannot be started (")


def test_without_pyspark_or_java_the_tool_says_what_it_needs(tmp_path: Path) -> None:
    assert run_tool(tmp_path / "a", "--spark", "local", code="sys.modules['pyspark'] = None") == (
        2,
        ["error: --spark needs pyspark: pip install 'pyspark>=3.5,<4'"],
    )
    assert run_tool(tmp_path / "b", "--spark", "local", JAVA_HOME="/nowhere") == (
        2,
        ["error: --spark needs Java 17, and there is no /nowhere/bin/java (apt install openjdk-17-jre-headless)"],
    )


def test_spark_does_not_verify(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/convert.py", "--verify", tmp_path, "--spark", "local"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (2, "error: --verify goes without --spark\n")
