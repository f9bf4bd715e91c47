"""tools/convert.py: what it writes and prints, and that a mistake is one line, exit code 2 and no shards."""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import hashes, write_layout

from esm2_composer.conversion.fasta import read_fasta

TOOL = Path(__file__).parents[1] / "tools" / "convert.py"
DOCS = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
COLUMNS = {"ur50_id": ["c1", "c2"], "ur90_id": [["a", "b"], ["d"]]}
PROTEINS = {"a": "MKV", "b": "MK", "d": "MKVLA"}

Convert = Callable[..., "tuple[int, str]"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_layout(folder, COLUMNS, PROTEINS)
    return folder


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Convert:
    """Run the tool within this process, which spares its imports; gives the exit code and stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name="__main__")
        printed = capfd.readouterr()
        assert not printed.out
        return stop.value.code or 0, printed.err

    return run


def run_tool(*arguments: str) -> tuple[int, str]:
    """Run the tool as a user does."""
    done = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=120)
    assert not done.stdout
    return done.returncode, done.stderr


def options(data: Path, out: object) -> list[str]:
    return [
        *("--clusters", str(data / "clusters.parquet")),
        *("--sequences", str(data / "proteins.db")),
        *("--out", str(out)),
    ]


def assert_refused(result: tuple[int, str], message: str) -> None:
    code, stderr = result
    assert code == 2
    assert stderr.endswith("\n")
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def store_clusters(data: Path, columns: dict[str, object]) -> None:
    pq.write_table(pa.table(columns), data / "clusters.parquet")


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def replace_database(data: Path, statement: str) -> None:
    (data / "proteins.db").unlink()
    database = sqlite3.connect(data / "proteins.db")
    database.execute(statement)
    database.close()


def overwrite(path: Path, start: int, stop: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(range(256)) * ((stop - start) // 256))


def damage_columns(data: Path) -> None:
    store_clusters(data, {"ur90_id": [[f"member{i}"] for i in range(20_000)]})
    overwrite(data / "clusters.parquet", 100, 20_000)


def damage_pages(data: Path) -> None:
    (data / "proteins.db").unlink()
    write_layout(data, {"ur90_id": [[f"m{i}"] for i in range(2000)]}, {f"m{i}": "MKV" * 20 for i in range(2000)})
    overwrite(data / "proteins.db", 8192, (data / "proteins.db").stat().st_size)


WRONG_INPUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing parquet": (lambda data: (data / "clusters.parquet").unlink(), "clusters.parquet: no such file"),
    "missing database": (lambda data: (data / "proteins.db").unlink(), "proteins.db: no such file"),
    "no column of ids": (
        lambda data: store_clusters(data, {"cluster": ["c1"], "size": [1]}),
        "clusters.parquet: neither a column 'ur90_id' (members) nor 'ur50_id'; it has cluster, size",
    ),
    "members are numbers": (
        lambda data: store_clusters(data, {"ur50_id": ["c1"], "ur90_id": [[1, 2]]}),
        "column 'ur90_id' is list<element: int64>; it must be a list of strings",
    ),
    "members are no list": (
        lambda data: store_clusters(data, {"ur50_id": ["c1"], "ur90_id": ["a"]}),
        "column 'ur90_id' is string; it must be a list of strings",
    ),
    "cluster ids are numbers": (
        lambda data: store_clusters(data, {"ur50_id": [1]}),
        "column 'ur50_id' is int64; it must be a string",
    ),
    "text as parquet": (
        lambda data: (data / "clusters.parquet").write_text("ur90_id\na\n" * 99),
        "clusters.parquet: not a parquet file",
    ),
    "folder as parquet": (
        lambda data: (data / "clusters.parquet").unlink() or (data / "clusters.parquet").mkdir(),
        "clusters.parquet: not a regular file",
    ),
    "pipe as parquet": (
        lambda data: (data / "clusters.parquet").unlink() or os.mkfifo(data / "clusters.parquet"),
        "clusters.parquet: not a regular file",
    ),
    "folder as database": (
        lambda data: (data / "proteins.db").unlink() or (data / "proteins.db").mkdir(),
        "proteins.db: not a regular file",
    ),
    "a column twice": (
        lambda data: pq.write_table(
            pa.table([[["a"]], ["c"], ["d"]], ["ur90_id", "ur50_id", "ur50_id"]), data / "clusters.parquet"
        ),
        "clusters.parquet: the columns ur50_id, ur50_id have one name, but for case",
    ),
    "a column in two cases": (
        lambda data: store_clusters(data, {"UR50_ID": ["c"], "ur50_id": ["d"]}),
        "clusters.parquet: the columns UR50_ID, ur50_id have one name, but for case",
    ),
    "empty parquet file": (lambda data: truncate(data / "clusters.parquet", 0), "not a parquet file"),
    "truncated parquet": (lambda data: truncate(data / "clusters.parquet", 0.8), "not a parquet file"),
    "parquet without rows": (
        lambda data: store_clusters(data, {"ur90_id": pa.array([], pa.list_(pa.string()))}),
        "no cluster to write: the input is empty",
    ),
    "text as database": (
        lambda data: (data / "proteins.db").write_text(">a\nMKV\n" * 99),
        "proteins.db: cannot be read as an SQLite database",
    ),
    "truncated database": (
        lambda data: truncate(data / "proteins.db", 0.5),
        "cannot be read as an SQLite database",
    ),
    "parquet damaged inside": (damage_columns, "clusters.parquet: damaged"),
    "database damaged inside": (damage_pages, "proteins.db: cannot be read"),
    "database without table protein": (
        lambda data: replace_database(data, "CREATE TABLE proteins (id TEXT, sequence TEXT)"),
        "proteins.db: no table 'protein' with columns 'id' and 'sequence'",
    ),
    "table protein without sequences": (
        lambda data: replace_database(data, "CREATE TABLE protein (id TEXT, length INTEGER)"),
        "proteins.db: no table 'protein' with columns 'id' and 'sequence'",
    ),
    "database of other proteins": (
        lambda data: replace_database(data, "CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)"),
        "100.0% of 3 members rejected, more than 1.0%: member without sequence 3 (such as '",
    ),
    "database without an index": (
        lambda data: replace_database(data, "CREATE TABLE protein (id TEXT, sequence TEXT)"),
        "proteins.db: table 'protein' has no index on 'id'",
    ),
    "too many bad sequences": (
        lambda data: store_clusters(data, {"ur90_id": [["a", "b", "gone"]]}),
        "33.3% of 3 members rejected, more than 1.0%: member without sequence 1 (such as 'gone'); "
        "correct the input, or allow more with --max-reject-fraction",
    ),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_input_is_one_line_and_leaves_nothing(
    convert: Convert, data: Path, tmp_path: Path, case: str
) -> None:
    damage, message = WRONG_INPUTS[case]
    damage(data)
    assert_refused(convert(*options(data, tmp_path / "shards")), message)
    assert not list(tmp_path.glob("shards/*"))


def test_wrong_database_is_one_line_in_a_process_of_its_own(data: Path, tmp_path: Path) -> None:
    replace_database(data, "CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
    assert_refused(run_tool(*options(data, tmp_path / "shards")), "member without sequence 3 (such as '")
    assert not list(tmp_path.glob("shards/*"))


WRONG_OPTIONS = {
    "give one of: --clusters with --sequences, --flat, --fasta, --verify": ["--out", "x"],
    "give one of": ["--out", "x", "--flat", "f", "--fasta", "g"],
    "--clusters and --sequences go together": ["--out", "x", "--clusters", "c"],
    "--cluster-tsv goes with --fasta": ["--out", "x", "--flat", "f", "--cluster-tsv", "t"],
    "--out is missing": ["--flat", "f"],
    "s3:b/x: write a folder (as ./s3:b/x), or a store as s3://bucket/prefix": ["--flat", "f", "--out", "s3:b/x"],
    "s3:x: write a folder (as ./s3:x), or a store": ["--verify", "s3:x"],
    "argument --workers: 0; it must be at least 1": ["--out", "x", "--flat", "f", "--workers", "0"],
    "argument --max-members-per-cluster: 0; it must": [
        "--out",
        "x",
        "--flat",
        "f",
        "--max-members-per-cluster",
        "0",
    ],
    "gone.parquet: no such file": ["--out", "x", "--flat", "gone.parquet"],
    "gone.fasta: no such file": ["--out", "x", "--fasta", "gone.fasta"],
    "x: no index.json there, nor in train/ or valid/": ["--verify", "x"],
    "--verify goes without --out": ["--verify", "x", "--out", "x"],
    "--verify goes without --max-reject-fraction": ["--verify", "x", "--max-reject-fraction", "0"],
    "--seed goes with --max-members-per-cluster": ["--out", "x", "--flat", "f", "--seed", "0"],
    "--seed must not be longer than 64 characters": [
        *("--out", "x", "--flat", "f", "--max-members-per-cluster", "2", "--seed", "1" * 65)
    ],
    "--scratch goes with object storage": ["--out", "x", "--flat", "f", "--scratch", "s"],
    "--out f/g/x lies in --flat f": ["--out", "f/g/x", "--flat", "f"],
    "what follows --spark is empty": ["--out", "x", "--flat", "f", "--spark", ""],
    r"\udcff: not UTF-8": ["--out", "\udcff", "--flat", "f"],
    f"{os.devnull}: not a regular file": ["--out", "x", "--fasta", os.devnull],
}


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_wrong_options_are_one_line(
    convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(convert(*WRONG_OPTIONS[message]), message)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_link_to_itself_is_one_line(convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    result = convert("--flat", str(tmp_path / "loop"), "--out", str(tmp_path / "out"))
    assert_refused(result, "Too many levels of symbolic links")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nc\n", "t.tsv: damaged (Invalid Input Error: CSV Error on Line: 2"),
        (b"a\tb\tc\n", "t.tsv: damaged (Invalid Input Error: CSV Error on Line: 1"),
        (b"a\tb\n\xff\tb\n", "This file is not utf-8 encoded"),
        (b"", "no cluster to write: the input is empty"),
        (b"a\tb\n", "100.0% of 1 members rejected, more than 1.0%: member without sequence 1 (such as 'b')"),
    ],
)
def test_a_wrong_cluster_tsv_is_one_line(convert: Convert, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f.fasta").write_text(">a\nMK\n")
    (tmp_path / "t.tsv").write_bytes(content)
    arguments = ["--fasta", str(tmp_path / "f.fasta"), "--cluster-tsv", str(tmp_path / "t.tsv")]
    refused = convert(*arguments, "--out", str(tmp_path / "out"))
    assert_refused(refused, message)
    assert not re.search(
        "Possible|strict_mode|auto|ignore_errors", refused[1]
    )  # DuckDB's options are none of ours
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b">a\nMKV\n" * 999, mtime=0)[:-30], "f.fasta: damaged or cut short"),
        (b"a,MKV\n", "f.fasta: not FASTA"),
        (b"", "f.fasta: empty"),
        (b">a\n>b\n", "100.0% of 2 members rejected, more than 1.0%: empty sequence 2 (such as '"),
    ],
)
def test_wrong_fasta_is_one_line_and_leaves_nothing(
    convert: Convert, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "f.fasta").write_bytes(content)
    assert_refused(convert("--fasta", str(tmp_path / "f.fasta"), "--out", str(tmp_path / "out")), message)
    assert not list(tmp_path.glob("out/*"))


def interrupt(command: list[str], begun: Callable[[], bool]) -> tuple[int, str]:
    """Ctrl-C as soon as `begun`, which a terminal sends to all processes of it; its exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *command], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while not begun():
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=120)  # which is when the last of them is gone
    return process.returncode, told


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(convert: Convert, data: Path, tmp_path: Path) -> None:
    """It comes while workers start, which is when each would have a traceback to tell."""
    members = [f"m{number}" for number in range(200_000)]
    (data / "proteins.db").unlink()
    write_layout(data, {"ur50_id": members}, dict.fromkeys(members, "MKV"))
    command = [*options(data, tmp_path / "out"), "--workers", "2"]
    interrupted = interrupt(command, (tmp_path / "out/.train.work/plan.json").exists)
    assert interrupted == (130, "interrupted; the work is kept: run the same command again to go on\n")
    assert not (tmp_path / "out/train").exists()
    code, stderr = convert(*command)
    assert code == 0
    assert stderr.startswith("train: 200,000 clusters, 200,000 members, 600,000 residues in ")


def test_existing_split_is_refused_and_left_alone(convert: Convert, data: Path, tmp_path: Path) -> None:
    kept = tmp_path / "shards" / "train" / "index.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    assert_refused(convert(*options(data, tmp_path / "shards")), f"{kept.parent} exists already")
    assert sorted(tmp_path.glob("shards/**/*")) == [kept.parent, kept]
    assert kept.read_text() == "mine"


def test_the_commands_of_the_docs_convert_every_layout(
    convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_layout(tmp_path, COLUMNS, PROTEINS)
    Path("clusters.parquet").rename("train_clusters.parquet")
    Path("proteins.db").rename("train.db")
    Path("uniref/train").mkdir(parents=True)
    columns = {"ur50_id": ["c2", "c1", "c1"], "ur90_id": ["d", "a", "b"], "sequence": ["MKVLA", "MKV", "MK"]}
    pq.write_table(pa.table(columns), "uniref/train/flat.parquet")
    Path("proteins.fasta").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS.items()))
    Path("a.fasta.gz").write_bytes(gzip.compress(b">a\nMKV\n>d\nMKVLA\n"))
    Path("b.fasta").write_text(">b\nMK\n")
    Path("clusters.tsv").write_text("c1\ta\nc1\tb\nc2\td\n")
    bionemo, *others, alone = re.findall(r"^\| [^|]+ \| `(--[^`]+)` \|$", DOCS, re.MULTILINE)
    for number, arguments in enumerate([bionemo, *others]):
        code, stderr = convert(*arguments.split(), "--out", f"out{number}")
        assert code == 0, stderr
        assert hashes(tmp_path / f"out{number}/train") == hashes(tmp_path / "out0/train")
    assert len(others) == 2
    code, stderr = convert(*alone.split(), "--out", "alone")
    assert stderr.startswith("train: 3 clusters, 3 members, 10 residues in ")


def test_the_docs_make_a_table_of_representatives(tmp_path: Path) -> None:
    (tmp_path / "valid.tsv").write_text("d\ta\nb\tb\nd\td\n")
    (command,) = re.findall(r"`(cut [^`]+)`", DOCS)
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "b\tb\nd\td\n"


def test_the_docs_take_validation_out_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "valid.tsv").write_text("d\ta\nd\td\n")
    (tmp_path / "clusters.tsv").write_text("b\tb\nd\ta\nb\td2\nd\td\ne\te\n")
    (command,) = re.findall(r"`(awk [^`]+)`", DOCS)
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "b\tb\nb\td2\ne\te\n"


def test_the_docs_take_prefixes_off_as_mmseqs_does(tmp_path: Path) -> None:
    headers = (
        "gi|1|ref|NP_1.1| x",
        "gi|3|gb|AA2",
        "ref|NP_2.1| k|l",
        "gb|AB|XX",
        "lcl|loc1 x",
        "gnl|db|G1 x",
        "a b|c",
    )
    (tmp_path / "ncbi.fasta").write_text("".join(f">{header}\n{'MKVLA' * 9}\n" for header in headers))
    (command,) = re.findall(r"`(sed [^`]+)`", DOCS)
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, check=True)
    (tmp_path / "bare.fasta").write_bytes(done.stdout)
    expected = ["NP_1.1", "AA2", "NP_2.1", "AB", "loc1", "G1", "a"]
    assert [name for name, _ in read_fasta(tmp_path / "bare.fasta")] == expected
    if shutil.which("mmseqs"):
        for name in ("ncbi", "bare"):
            command = ["mmseqs", "createdb", f"{name}.fasta", name, "-v", "1", "--shuffle", "0"]
            subprocess.run(command, cwd=tmp_path, check=True)
            lines = (tmp_path / f"{name}.lookup").read_text().splitlines()
            assert [line.split("\t")[1] for line in lines] == expected


def test_a_finished_split_is_told_and_verified(convert: Convert, data: Path, tmp_path: Path) -> None:
    for expected in (" s\n", ", converted before; nothing to do\n"):
        code, stderr = convert(*options(data, tmp_path / "shards"), "--workers", "1")
        assert code == 0
        assert stderr.endswith(expected)
    command = [sys.executable, TOOL, "--verify", tmp_path / "shards"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.startswith("train: 1 shards hold what index.json says\ntrain: 2 clusters, 3 members, 10 residues\n")


@pytest.mark.parametrize("fraction", ["-1", "2", "nan"])
def test_an_impossible_reject_fraction_is_refused(
    convert: Convert, data: Path, tmp_path: Path, fraction: str
) -> None:
    result = convert(*options(data, tmp_path / "shards"), "--max-reject-fraction", fraction)
    assert_refused(result, "it must be at least 0 and at most 1")


def test_both_splits_are_written_and_their_counts_printed(convert: Convert, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "shards"
    code, stderr = run_tool(*options(data, out))
    assert code == 0, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("train: 2 clusters, 3 members, 10 residues in ")

    store_clusters(data, {"ur50_id": ["d"]})
    code, stderr = convert(*options(data, out), "--split", "valid")
    assert code == 0
    (line,) = stderr.splitlines()
    assert line.startswith("valid: 1 clusters, 1 members, 5 residues in ")

    assert sorted(path.name for path in out.iterdir()) == ["train", "valid"]
    for split, samples in {"train": 2, "valid": 1}.items():
        index = json.loads((out / split / "index.json").read_text())
        assert sum(shard["samples"] for shard in index["shards"]) == samples
        conversion = json.loads((out / split / "conversion.json").read_text())
        inputs = {role: paths[0]["path"] for role, paths in conversion["state"]["inputs"].items()}
        assert inputs == {"clusters": str(data / "clusters.parquet"), "sequences": str(data / "proteins.db")}


def test_that_one_member_of_a_validation_cluster_is_scored_is_told(
    convert: Convert, data: Path, tmp_path: Path
) -> None:
    code, stderr = convert(*options(data, tmp_path / "shards"), "--split", "valid")
    assert code == 0
    assert stderr.splitlines()[1:] == [
        "valid: evaluation scores one member of each cluster, by its seed; members left out: 1"
    ]


def test_how_many_files_a_folder_gave_is_told(convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for name in "ab":
        columns = {"ur50_id": [name], "ur90_id": [name], "sequence": ["MK"]}
        pq.write_table(pa.table(columns), tmp_path / f"flat/{name}.parquet")
    schema = pa.schema(dict.fromkeys(columns, pa.string()))
    pq.write_table(schema.empty_table(), tmp_path / "flat/no_rows.parquet")
    code, stderr = convert("--flat", str(tmp_path / "flat"), "--out", str(tmp_path / "out"))
    assert code == 0
    assert stderr.startswith("train: 2 clusters, 2 members, 4 residues in ")
    assert stderr.splitlines()[1:] == ["read: 3 parquet files"]


def test_sequences_that_no_line_names_are_told(convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "f.fasta").write_text(">a\nMK\n>b\nMV\n>d\nML\n")
    (tmp_path / "t.tsv").write_text("a\ta\n")
    arguments = ["--fasta", str(tmp_path / "f.fasta"), "--out", str(tmp_path / "out")]
    code, stderr = convert(*arguments, "--cluster-tsv", str(tmp_path / "t.tsv"))
    assert code == 0
    assert stderr.splitlines()[1:] == ["not used: 2 of 3 sequences, which no member to be written names"]
    code, stderr = convert(*arguments, "--split", "valid", "--max-reject-fraction", "0.4")
    assert code == 0
    assert stderr.splitlines()[1:] == [
        "not used: 1 of 3 sequences, which no member to be written names",
        "rejected, cluster of the other split: 1",
    ]


def test_rejected_and_changed_members_are_printed(convert: Convert, data: Path, tmp_path: Path) -> None:
    (data / "proteins.db").unlink()
    write_layout(data, COLUMNS, {"a": "mkv*", "b": "MK", "d": "M-K"})
    code, stderr = convert(*options(data, tmp_path / "shards"), "--max-reject-fraction", "0.34")
    assert code == 0
    first, *others = stderr.splitlines()
    assert first.startswith("train: 1 clusters, 2 members, 5 residues in ")
    assert sorted(others) == [
        "changed, final * dropped: 1",
        "changed, lower case made upper: 1",
        "rejected, bad residue: 1",
        "rejected, cluster with no usable member: 1",
    ]
