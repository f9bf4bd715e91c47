"""tools/build_clusters.py: a real run of MMseqs2 on real proteins and made families, and mistakes."""

import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import build_clusters as tool
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, python

from esm2_composer.conversion import clustering
from esm2_composer.conversion.clustering import build_clusters
from esm2_composer.conversion.fasta import read_fasta
from esm2_composer.errors import TransientError, UserError

needs_mmseqs = pytest.mark.skipif(not shutil.which("mmseqs"), reason="no mmseqs on PATH")
TRIPLES = 24
ODD = "a space, and what is not UTF-8 \udcff"  # a path may hold both
FAULTS = (
    ">kept\n" + "acdefghiklmnpqrstvwy" * 3 + "*\n"
    ">lower\n" + "acdefghiklmnpqrstvwy" * 4 + "*\n"
    ">short\nACDEFGHIKL\n"
    ">again\n" + "MKVLAAGIVG" * 5 + "\n>again\n" + "MKVLAAGIVG" * 5 + "\n"
    ">lower\n" + "MKVLAAGIVG" * 4 + "\n"  # nobody can tell which is meant
    ">good\n" + "MKVLAAGIVH" * 5 + "\n>good\nM-K\n"  # likewise
    ">nothing\n>bad\nMK-V*LAAGIVGACDEF\n>\nMKVLAAGIVGMKVLAAG\n"
)


def families() -> dict[str, str]:
    """Triples of proteins: `q` is like `r` and like `p`, which are not alike. One of these represents its cluster,
    the other another."""
    generator = random.Random(0)

    def draw(count: int) -> list[str]:
        return generator.choices("ACDEFGHIKLMNPQRSTVWY", k=count)

    proteins = {}
    for i in range(TRIPLES):
        q = draw(300)
        places = generator.sample(range(300), 260)
        for name, changed, longer in (("r", places[:130], 20), ("p", places[130:], 10)):
            other = q.copy()
            for place in changed:
                other[place] = draw(1)[0]
            proteins[f"{name}{i}"] = "".join(other + draw(longer))
        proteins[f"q{i}"] = "".join(q)
    return proteins


def build(*fasta: Path, out: Path, **changes) -> dict:
    options = {"valid_fraction": 0.3, "seed": 17, "threads": 2, "max_reject_fraction": 0.01}
    return build_clusters(fasta, out, **{**options, **changes}, say=lambda line: None)


def sequences(path: Path) -> dict[str, str]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return dict(database.execute("SELECT id, sequence FROM protein"))


@pytest.fixture(scope="module")
def inputs(real_data, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("made") / ODD
    folder.mkdir()
    made = folder / "made.fasta"
    made.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in families().items()) + FAULTS)
    return [real_data / "tiny/fasta/members.fasta", made]


@pytest.fixture(scope="module")
def built(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / ODD
    build(*inputs, out=out)
    return out.rename(out.with_name("clusters"))  # which pyarrow can read


@needs_mmseqs
def test_the_folder_holds_the_layout_and_a_report_that_adds_up(built):
    assert {path.name for path in built.iterdir()} == {
        *("train_clusters.parquet", "train.db", "valid_clusters.parquet", "validation.db", "report.json")
    }
    assert not list(built.parent.glob(".*"))
    report = json.loads((built / "report.json").read_text())
    counts = report["counts"]
    assert counts["sequences_read"] == 527 + 3 * TRIPLES + 11
    assert (counts["sequences_too_short"], counts["sequences_given_again"]) == (1, 3)
    rejected = {reason: told["examples"] for reason, told in report["rejected"].items()}
    assert rejected == {
        "different sequences under one id": ["lower", "good"],
        "empty sequence": ["nothing"],
        "bad residue": ["bad"],
        "header without id": ["record 83 of made.fasta"],
    }
    assert report["changed"] == {"lower case made upper": 1, "final * dropped": 1}  # of what is used
    assert counts["sequences_given_under_another_id"] == 0
    assert counts["sequences_used"] == counts["sequences_read"] - 3 - 5 - 1
    assert counts["clusters_valid"] == round(0.3 * counts["clusters_at_50"])
    assert (
        counts["clusters_train"]
        == counts["clusters_at_50"] - counts["clusters_valid"] - counts["clusters_emptied"]
    )
    train, valid = (pq.read_table(built / f"{name}_clusters.parquet") for name in ("train", "valid"))
    assert train.num_rows == counts["clusters_train"]
    assert valid.num_rows == counts["clusters_valid"]
    assert sum(map(len, train["ur90_id"].to_pylist())) == counts["members_train"]


@needs_mmseqs
def test_clusters_name_the_sequences_of_the_input_and_splits_share_none(built, inputs):
    given = {name: residues.decode() for path in inputs for name, residues in read_fasta(path)}
    given["kept"] = "ACDEFGHIKLMNPQRSTVWY" * 3
    train, valid = sequences(built / "train.db"), sequences(built / "validation.db")
    assert all(given[name] == sequence for name, sequence in [*train.items(), *valid.items()])
    members = pq.read_table(built / "train_clusters.parquet")["ur90_id"].to_pylist()
    assert Counter(name for names in members for name in names) == Counter(train.keys())
    assert set(pq.read_table(built / "valid_clusters.parquet")["ur50_id"].to_pylist()) == set(valid)
    assert not set(train) & set(valid)


@needs_mmseqs
def test_clusters_are_near_those_made_within_a_larger_set(built, real_data):
    """The tiny set's clusters come from the same two steps over 90,067 sequences."""
    expected: dict[str, set] = {}
    for line in (real_data / "tiny/fasta/cluster.tsv").read_text().splitlines():
        representative, member = line.split("\t")
        expected.setdefault(representative, set()).add(member)
    found = pq.read_table(built / "train_clusters.parquet")["ur90_id"].to_pylist()
    real = [set(names) for names in found if names[0].startswith("UniRef90_")]
    whole = sum(names in expected.values() for names in real)
    assert whole >= 0.9 * len(real)
    assert sum(len(names) > 1 for names in real) > 40


@needs_mmseqs
def test_no_training_member_is_like_a_validation_sequence(built):
    train, valid = sequences(built / "train.db"), sequences(built / "validation.db")
    for i in range(TRIPLES):
        r, q, p = (f"{name}{i}" for name in "rqp")
        assert not (q in train and (r in valid or p in valid))
    counts = json.loads((built / "report.json").read_text())["counts"]
    assert counts["members_like_valid"] >= 3  # each a `q` whose cluster is in training, while another is not


@needs_mmseqs
@pytest.mark.parametrize("split", ["train", "valid"])
def test_the_converter_reads_it_whole(built, tmp_path, split):
    db = {"train": "train.db", "valid": "validation.db"}[split]
    done = python(
        *(ROOT / "tools/convert.py", "--clusters", built / f"{split}_clusters.parquet", "--sequences", built / db),
        *("--out", tmp_path, "--split", split),
    )
    assert done.returncode == 0, done.stderr
    conversion = json.loads((tmp_path / split / "conversion.json").read_text())
    counts = json.loads((built / "report.json").read_text())["counts"]
    assert conversion["clusters_written"] == counts[f"clusters_{split}"]
    assert conversion["members_written"] == counts["members_train" if split == "train" else "clusters_valid"]
    assert not conversion["rejected"]


@needs_mmseqs
@pytest.mark.slow
def test_threads_change_nothing_and_the_seed_only_the_split(built, inputs, tmp_path):
    build(*inputs, out=tmp_path / "same", threads=1)
    build(*inputs, out=tmp_path / "other", seed=18)
    for name in ("train_clusters.parquet", "train.db", "valid_clusters.parquet", "validation.db"):
        assert (tmp_path / "same" / name).read_bytes() == (built / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (built / name).read_bytes()
    reports = [json.loads((folder / "report.json").read_text()) for folder in (built, tmp_path / "other")]
    for name in ("members_at_90", "clusters_at_50", "clusters_valid"):
        assert reports[0]["counts"][name] == reports[1]["counts"][name]


@pytest.fixture
def failing_mmseqs(tmp_path, monkeypatch) -> Path:
    """An `mmseqs` that knows its version and fails at all else, alone on PATH."""
    script = tmp_path / "bin/mmseqs"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\n[ "$1" = version ] && echo 14 && exit 0\necho "Error: no space"; exit 3\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    return tmp_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (">a\nMKVLAAGIVGACDEF\n", "mmseqs easy-cluster failed with exit code 3: Error: no space"),
        (">a\nMKV\n", "no sequence of 11 residues or more"),
        (
            ">a\nMKV\n>b\n",
            r"1 of 2 sequences .* 1.0%: empty sequence 1 \(such as 'b'\); .* --max-reject-fraction$",
        ),
        ("MKV\n", "not FASTA"),
    ],
)
def test_a_mistake_is_a_user_error_and_leaves_nothing(failing_mmseqs, content, message):
    (failing_mmseqs / "in.fasta").write_text(content)
    (failing_mmseqs / ".out.partial").mkdir()  # of a run that was killed
    (failing_mmseqs / ".out.partial/train.db").touch()
    with pytest.raises(UserError, match=message):
        build(failing_mmseqs / "in.fasta", out=failing_mmseqs / "out")
    assert {path.name for path in failing_mmseqs.iterdir()} == {"bin", "in.fasta"}


def test_of_exact_copies_the_first_id_alone_is_kept(tmp_path):
    """Copies once cleaned; an id that is rejected is no copy of another."""
    (tmp_path / "in.fasta").write_text(
        ">b\nMKVLAAGIVGACDEF\n>other\nMKVLAAGIVGACDEW\n>a\nmkvlaagivgacdef*\n>c\nMKVLAAGIVGACDEF\n"
        ">two\nMKVLAAGIVGACDEY\n>two\nMKVLAAGIVGACDEK\n>one\nMKVLAAGIVGACDEY\n"
    )
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        report = clustering._stage([tmp_path / "in.fasta"], database, 0.5, say=lambda line: None)
        kept = [name for (name,) in database.execute("SELECT id FROM protein ORDER BY number")]
    assert kept == ["b", "other", "one"]
    assert report["counts"]["sequences_given_under_another_id"] == 2
    assert report["counts"]["sequences_used"] == 3
    assert not report["changed"]  # of what is used


def choose_valid(*lengths: int, count: int) -> list[int]:
    """The numbers, from 1, of the validation clusters among clusters of one sequence each of these lengths."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(
            "CREATE TABLE protein (number INTEGER PRIMARY KEY, id TEXT, sequence TEXT);"
            "CREATE TABLE member (number INTEGER PRIMARY KEY, cluster INTEGER, valid INTEGER);"
        )
        for number, length in enumerate(lengths, 1):
            database.execute("INSERT INTO protein VALUES (?, ?, ?)", (number, f"id{number}", length * "M"))
            database.execute("INSERT INTO member VALUES (?, ?, 0)", (number, number))
        clustering._choose_valid(database, count, seed=17)
        return [number for (number,) in database.execute("SELECT number FROM member WHERE valid ORDER BY number")]


def test_the_longest_proteins_are_not_chosen_for_validation():
    assert choose_valid(5001, 5000, 9000, 20, count=3) == [2, 4]
    assert len(choose_valid(5001, 5000, 9000, 20, count=1)) == 1
    with pytest.raises(UserError, match="no cluster for validation: all have more than 5,000 residues"):
        choose_valid(5001, 9000, count=1)


def near_copies(length: int) -> list[str]:
    """They differ in 2 % of their places and by ten insertions, without which MMseqs2 joins even long ones."""
    generator = random.Random(length)
    one = generator.choices("ACDEFGHIKLMNPQRSTVWY", k=length)
    other = one.copy()
    for place in generator.sample(range(length), length // 50):
        other[place] = "A"
    for place in range(0, length, length // 10):
        other[place] += "WW"
    return ["".join(one), "".join(other)]


@needs_mmseqs
@pytest.mark.slow
def test_near_copies_are_not_in_both_splits_however_long(tmp_path):
    proteins = [sequence for length in (600, 4900, 9000) for sequence in near_copies(length)]
    (tmp_path / "in.fasta").write_text("".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(proteins)))
    build(tmp_path / "in.fasta", out=tmp_path / "out", valid_fraction=0.9)
    valid = sequences(tmp_path / "out/validation.db")
    train = sequences(tmp_path / "out/train.db")
    assert valid.keys() == {"1", "3"}  # the longer ones, of which the others are copies
    assert train.keys() == {"4", "5"}  # which MMseqs2 takes for different


def test_a_pipe_is_refused_without_waiting_for_its_writer(failing_mmseqs):
    os.mkfifo(failing_mmseqs / "in.fasta")
    with pytest.raises(UserError, match=r"in\.fasta: not a regular file"):
        build(failing_mmseqs / "in.fasta", out=failing_mmseqs / "out")


@pytest.mark.parametrize("threads", ["0", "1025"])
def test_threads_that_no_machine_has_are_refused(call, threads):
    code, _, err = call(tool.main, "--fasta", "in.fasta", "--out", "out", "--threads", threads)
    assert (code, err) == (
        2,
        f"error: argument --threads: {threads}; it must be at least 1 and at most 1024; see --help\n",
    )


def test_ctrl_c_leaves_nothing(failing_mmseqs, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    (failing_mmseqs / "in.fasta").write_text(">a\nMKVLAAGIVGACDEF\n")
    monkeypatch.setattr(clustering, "_mmseqs", stop)
    with pytest.raises(KeyboardInterrupt):
        build(failing_mmseqs / "in.fasta", out=failing_mmseqs / "out")
    assert {path.name for path in failing_mmseqs.iterdir()} == {"bin", "in.fasta"}


def test_a_mistake_in_a_folder_named_disk_is_told_as_one(failing_mmseqs):
    (failing_mmseqs / "disk1").mkdir()
    (failing_mmseqs / "disk1/in.fasta").write_text("MKV\n")
    with pytest.raises(UserError, match=r"^\S+/disk1/in\.fasta: not FASTA"):
        build(failing_mmseqs / "disk1/in.fasta", out=failing_mmseqs / "out")


def test_a_file_that_is_too_large_for_its_disk_is_one_line(failing_mmseqs):
    (failing_mmseqs / "in.fasta").write_text(f">a\n{'MKVLAAGIVG' * 9000}\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"/\.out\.partial: cannot be written \("):
            build(failing_mmseqs / "in.fasta", out=failing_mmseqs / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("step", ["os.open", "_write_fasta"])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), TransientError),
        (OSError(errno.EIO, "Input/output error"), TransientError),
        (OSError(errno.EROFS, "Read-only file system"), UserError),
    ],
)
def test_a_disk_that_is_full_or_fails_is_no_mistake(failing_mmseqs, monkeypatch, step, error, kind):
    def fail(*_: object) -> None:
        raise error

    (failing_mmseqs / "in.fasta").write_text(">a\nMKVLAAGIVGACDEF\n")
    monkeypatch.setattr(f"esm2_composer.conversion.clustering.{step}", fail)
    with pytest.raises(kind, match=rf"/\.out\.partial: cannot be written \(.*{error.strerror}"):
        build(failing_mmseqs / "in.fasta", out=failing_mmseqs / "out")


def test_a_disk_that_is_full_for_sqlite_is_no_mistake(failing_mmseqs, monkeypatch):
    def connect(*arguments, **options) -> sqlite3.Connection:
        database = sqlite3.Connection(*arguments, **options)
        database.execute("PRAGMA max_page_count = 8")
        return database

    (failing_mmseqs / "in.fasta").write_text(f">a\n{'MKVLAAGIVG' * 9000}\n")
    monkeypatch.setattr(sqlite3, "connect", connect)
    with pytest.raises(TransientError, match=r"cannot be written \(database or disk is full"):
        build(failing_mmseqs / "in.fasta", out=failing_mmseqs / "out")
    assert {path.name for path in failing_mmseqs.iterdir()} == {"bin", "in.fasta"}


def test_a_disk_that_mmseqs_has_filled_is_told(failing_mmseqs, monkeypatch):
    (failing_mmseqs / "in.fasta").write_text(">a\nMKVLAAGIVGACDEF\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096 * Path(path).is_dir()))
    with pytest.raises(
        TransientError, match=r"/work: the disk is full \(mmseqs easy-cluster failed with exit code"
    ):
        build(failing_mmseqs / "in.fasta", out=failing_mmseqs / "out")
    assert {path.name for path in failing_mmseqs.iterdir()} == {"bin", "in.fasta"}


def test_a_file_system_without_locks_is_told(failing_mmseqs, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    (failing_mmseqs / "in.fasta").write_text(">a\nMKVLAAGIVGACDEF\n")
    with pytest.raises(UserError, match=r"/\.out\.partial: cannot be locked \(Function not implemented\)"):
        build(failing_mmseqs / "in.fasta", out=failing_mmseqs / "out")


def test_an_output_that_exists_or_is_being_made_is_refused(failing_mmseqs):
    (failing_mmseqs / "in.fasta").write_text(">a\nMKVLAAGIVGACDEF\n")
    with (
        clustering._locked(failing_mmseqs / ".out.partial"),
        pytest.raises(UserError, match="another run is at work there"),
    ):
        build(failing_mmseqs / "in.fasta", out=failing_mmseqs / "out")
    (failing_mmseqs / "out").mkdir()
    (failing_mmseqs / "link").symlink_to("nothing")
    for out in ("out", "link", "nowhere/.."):
        with pytest.raises(UserError, match=f"{out} exists already"):
            build(failing_mmseqs / "in.fasta", out=failing_mmseqs / out)
    assert not (failing_mmseqs / "nowhere").exists()


def test_a_folder_is_free_when_the_mmseqs_of_a_killed_run_is_gone(failing_mmseqs):
    """As the real one, this `mmseqs` starts a process of its own for its work, which no kill of others reaches."""
    (failing_mmseqs / "in.fasta").write_text(">a\nMKVLAAGIVGACDEF\n")
    work = failing_mmseqs / "bin/work"
    os.mkfifo(work)
    script = f'[ "$1" = version ] && exit 0\n/bin/sh -c "echo begun >{work}; read end <{work}"\nexit 3\n'
    (failing_mmseqs / "bin/mmseqs").write_text(f"#!/bin/sh\n{script}")
    command = [sys.executable, ROOT / "tools/build_clusters.py", "--fasta", failing_mmseqs / "in.fasta"]
    killed = subprocess.Popen([*command, "--out", failing_mmseqs / "out"], stderr=subprocess.DEVNULL)
    work.read_text()  # waits until mmseqs is at work
    killed.kill()
    killed.wait()
    partial = failing_mmseqs / ".out.partial"
    handle = os.open(partial, os.O_RDONLY)
    try:
        with pytest.raises(UserError, match="mmseqs of one that was killed"), clustering._locked(partial):
            pass
    finally:
        work.write_text("end\n")
        fcntl.flock(handle, fcntl.LOCK_EX)  # waits
        os.close(handle)
    with clustering._locked(partial):
        assert not list(partial.iterdir())


def test_sequences_are_written_in_the_order_of_clusters_and_not_sorted(tmp_path):
    steps = []

    class Explaining(sqlite3.Connection):
        def execute(self, statement: str, *rest) -> sqlite3.Cursor:
            if statement.startswith("SELECT"):
                steps.extend(what for *_, what in super().execute(f"EXPLAIN QUERY PLAN {statement}", *rest))
            return super().execute(statement, *rest)

    with contextlib.closing(sqlite3.connect(":memory:", factory=Explaining)) as database:
        database.executescript(
            "CREATE TABLE protein (number INTEGER PRIMARY KEY, id TEXT, sequence TEXT);"
            "CREATE TABLE member (number INTEGER PRIMARY KEY, cluster INTEGER, valid INTEGER);"
            "INSERT INTO protein VALUES (1, 'a', 'MA'), (2, 'b', 'MB'), (3, 'c', 'MC'), (4, 'd', 'MD');"
            "INSERT INTO member VALUES (1, 3, 0), (2, 2, 0), (3, 3, 0), (4, 4, 1);"
        )
        clustering._write_layout(database, tmp_path)
    assert pq.read_table(tmp_path / "train_clusters.parquet").to_pylist() == [
        {"ur50_id": "b", "ur90_id": ["b"]},
        {"ur50_id": "c", "ur90_id": ["a", "c"]},
    ]
    assert any("protein" in step for step in steps)
    assert not [step for step in steps if "TEMP B-TREE" in step]


@pytest.mark.parametrize(("count", "told"), [(99, True), (100, False)])
def test_few_clusters_for_validation_are_told(call, monkeypatch, count, told):
    report = {"counts": {"clusters_valid": count}, "rejected": {}, "changed": {}}
    monkeypatch.setattr(clustering, "build_clusters", lambda *_, **__: report)
    code, _, err = call(tool.main, "--fasta", "in.fasta", "--out", "out")
    assert code == 0
    assert ("few to measure perplexity by; raise --valid-fraction" in err) == told


def test_without_mmseqs_the_tool_says_how_to_get_it(tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKVLAAGIVGACDEF\n")
    done = python(
        *(ROOT / "tools/build_clusters.py", "--fasta", tmp_path / "in.fasta", "--out", tmp_path / "out"),
        PATH=os.devnull,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: there is no mmseqs on PATH: install MMseqs2 (Debian and Ubuntu: apt install mmseqs2)"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]
