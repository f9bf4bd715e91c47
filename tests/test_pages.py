"""README.md and docs/: every command that they tell runs here, taken from its page and in its page's order.

`SMALL` says what stands here for what a page has for many GPUs and many proteins, `NOT_HERE` what no test can run,
and why. docs/continue.md is followed in test_continue.py. A new command is run with the others of its page.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, Run, command, follow
from plot_convergence import read_run
from test_docs import PAGES, commands, shell
from test_spark import needs_java
from test_storage import Bucket, bucket  # noqa: F401
from transformers import AutoModelForMaskedLM

from esm2_composer.conversion.fasta import read_fasta
from esm2_composer.data.splits import SPLITS
from esm2_composer.errors import EXIT_PREEMPTED

SMALL = {
    "sbatch --nodes=8 docs/jobs/slurm.sh yamls/": "composer --nproc 2 train.py yamls/",
    "sbatch --nodes=2 docs/jobs/slurm.sh yamls/": "composer --nproc 2 train.py yamls/",
    "--nproc 8": "--nproc 2",
    "-n 8": "-n 2",
    "/data/uniref50": "data/uniref50",
    "/shared/": "shared/",
    "/local/": "local/",
    "s3://proteins/": "data/",
    "spark://host:7077": "local[2]",
    "https://…": "$S3_ENDPOINT_URL",
    "OUT_OR_SPLIT": "data/uniref50",
    "CHECKPOINT": "runs/esm2_650m/checkpoints/latest-rank0.pt",
    "global_train_batch_size=1024": "global_train_batch_size=16",
    "max_duration=200ba schedule.updates=200 schedule.warmup=20 save_interval=50ba eval_interval=100ba": "",
    "max_duration=25000ba": "max_duration=4ba",
    "max_duration=600000ba": "max_duration=6ba",
    "ep0-ba1000-rank0.pt": "ep0-ba2-rank0.pt max_duration=4ba",
    "max_duration=20000ba schedule.updates=20000": "max_duration=2ba schedule.updates=2",
    "--sizes 8m 35m 150m 650m": "--sizes 8m --layers 1",
    "--sizes 3b 15b --layers 2": "--sizes 35m 150m --layers 1",
    "--size 650m --device cuda": "--size 8m --device cpu",
    "--clusters 10000 100000 1000000": "--clusters 300",
    "--clusters 1000000 10000000": "--clusters 300",
    "tensorboard --logdir": "tensorboard --inspect --logdir",  # rather than serve until it is stopped
    "pytest ": "pytest --collect-only ",  # they run where they are
}
# What makes a recipe a run of seconds; what a command sets comes after it.
SHORT = (
    "data.num_workers=1 data.max_length=128 device_microbatch_tokens=2048 global_train_batch_size=16 "
    "max_duration=2ba schedule.warmup=1 eval_interval=2ba save_interval=2ba "
    "model.size=null model.num_layers=1 model.hidden_size=32 model.num_heads=2 model.ffn_hidden_size=64"
)
STEPS = "--batches 1 --sequences 1 --steps 1"
BENCHMARKS = {
    "parity": "",
    "convert": "--workers 1",
    "step": f"{STEPS} --rounds 1",
    "attention": "--sizes 8m --tokens 1024 --rounds 1",
    "profile": STEPS,
    "host": "--updates 3 --rounds 1 --ranks 2",
    "sharding": "--steps 1 --ranks 4",
    "loader": "--clusters 2048 --rounds 1 --workers 1 --ranks 8",
    "startup": "--clusters 70000",
    "embed": "--proteins 12 --rounds 1 --batch-sizes 4",
}
NOT_HERE = {
    "make clean setup LOCK=requirements-torch2.11.lock": "it exchanges the environment that tests run in",
    "make setup": "it makes the environment that tests run in",
    "make setup LOCK=requirements-torch2.11.lock": "it makes another",
    "source .venv/bin/activate": "and this is to be in it",
    "make test": "runs all tests but the slow ones, and was called if these are run",
    "make test-slow": "runs this one",
    "apt install mmseqs2": "changes the machine",
    "apt install openjdk-17-jre-headless": "changes the machine",
    'hf download nvidia/esm2_uniref_pretraining_data --repo-type dataset --include "[tv]*/*.parquet" '
    "--local-dir uniref": "35 GB",
    "download_bionemo_data esm2/fulldata_esm2_pretrain:2.0 --source ngc": "80 GB, and a program of NVIDIA's",
    "sbatch docs/jobs/slurm.sh yamls/NAME.yaml key=value …": "no cluster here, see test_running.py",
    "kubectl delete node NAME": "no cluster here",
    "kubectl apply -f docs/jobs/kubernetes.yaml": "no cluster here, see test_running.py",
}
APART = (  # by tests of their own, below
    *("make demo", "sed ", "cut ", "awk ", "zcat ", "pkill "),
    "python tools/convert.py --fasta uniref",
)


def lines(page: str) -> list[str]:
    """What runs here for the commands of a page: each, or, where it has [options], it without and with them."""
    found = []
    for line in commands(ROOT / page):
        if line not in NOT_HERE and not line.startswith(APART):
            forms = dict.fromkeys((re.sub(r" \[[^]]*\]", "", line), re.sub(r"[][]", "", line)))
            found += map(small, forms)
    return found


def small(line: str) -> str:
    for large, ours in SMALL.items():
        line = line.replace(large, ours)
    if "train.py" in line and "--dry-run" not in line:
        line = re.sub(r"(?<=\.yaml)", f" {SHORT}", line, count=1)
    elif "train.py" in line:
        line = line.replace(".yaml", ".yaml global_train_batch_size=16")
    if benchmark := re.search(r"benchmark\.py (\w+)", line):
        line += f" {BENCHMARKS[benchmark[1]]}"
    return line


def the_one(start: str) -> str:
    """The only command of all pages that starts so."""
    (found,) = {command for page in PAGES for command in commands(page) if command.startswith(start)}
    return found


def test_every_page_with_commands_is_followed_and_every_entry_is_of_use() -> None:
    everything = {page.name: commands(page) for page in PAGES}
    followed = {"README.md", "data.md", "performance.md", "results.md", "running.md"} | {"continue.md"}
    assert {name for name, found in everything.items() if found} == followed
    assert all(lines(page.relative_to(ROOT)) for page in PAGES if everything[page.name])
    found = [command for each in everything.values() for command in each]
    assert set(NOT_HERE) <= set(found)
    for used in (*SMALL, *APART, *(f"benchmark.py {name}" for name in BENCHMARKS)):
        assert any(used in command for command in found), used


@pytest.fixture
def home(checkout: Path, raw: Path, shards: Path, finished: Path) -> Path:
    """A checkout in which there are files and runs of the names that pages give."""
    for name in ("tests", "docs", "README.md", "pyproject.toml"):
        (checkout / name).symlink_to(ROOT / name)
    for source in raw.iterdir():
        (checkout / source.name).symlink_to(source)
    write_layouts(checkout)
    (checkout / "data/demo").mkdir(parents=True)
    (checkout / "data/demo/shards").symlink_to(shards)
    (checkout / "proteins.fasta").write_text(">a\nMKTAYIAKQR\n>b\nMSDKPDLSE\n")
    shutil.copytree(finished / "runs/demo", checkout / "runs/demo")
    return checkout


@pytest.mark.slow
def test_readme(home: Path) -> None:
    """After `make demo`; conversion first, for what comes before it is for when shards are there."""
    for line in sorted(lines("README.md"), key=lambda line: "convert.py" not in line):
        follow(home, line)
    for made in ("runs/esm2_8m/checkpoints", "runs/esm2_650m/checkpoints", "runs/demo2/checkpoints", "curve.png"):
        assert (home / made).exists()
    assert read_run(home / "runs/esm2_650m").curve.keys() == {0, 2}
    assert AutoModelForMaskedLM.from_pretrained(home / "my_esm2").config.hidden_size == 32
    assert pq.read_table(home / "embeddings.parquet")["id"].to_pylist() == ["a", "b"]


@pytest.mark.slow
def test_running(home: Path) -> None:
    for line in sorted(lines("docs/running.md"), key=lambda line: "convert.py" not in line):
        follow(home, line)
    assert read_run(home / "runs/esm2_650m").curve.keys() == {0, 2, 4, 6}  # went on twice
    assert read_run(home / "runs/short").curve.keys() == {0, 2}


@pytest.mark.slow
def test_results(home: Path) -> None:
    """The settings of the real run are others here, under their names."""
    (home / "data/uniref50").symlink_to(home / "data/demo/shards")
    shutil.copytree(home / "runs/demo", home / "runs/esm2_650m")
    settings = {"DATA": str(home), "UPDATES": "6", "WARMUP": "2", "EVERY": "3"}
    (given,) = (line for line in shell(ROOT / "docs/results.md") if re.match(r"\w+=", line))
    assert [setting.split("=")[0] for setting in given.split()] == list(settings)
    printed = [follow(home, line, **settings) for line in lines("docs/results.md")]
    assert (home / "curve.png").exists()
    assert (home / "runs/real/convergence.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(read_run(home / "runs/real").curve) == [0, 3, 6]
    assert any("real is not comparable with the published curve" in " ".join(text.split()) for text in printed)


@pytest.mark.slow
def test_performance(home: Path) -> None:
    for line in lines("docs/performance.md"):
        follow(home, line)


@needs_java
@pytest.mark.slow
def test_data(home: Path, bucket: Bucket) -> None:  # noqa: F811
    """Those of the table of layouts too, which leave out how they begin and where they go to."""
    layouts = re.findall(r"^\|.*\| `(--[^`]*)` \|$", (ROOT / "docs/data.md").read_text(), re.MULTILINE)
    assert len(layouts) == 4
    for i, options in enumerate(layouts):
        follow(home, f"python tools/convert.py {options} --out out/{i}")
    for line in lines("docs/data.md"):
        follow(home, line, SPARK_LOCAL_IP="127.0.0.1")
    written = [home / f"out/{i}/train/index.json" for i in range(3)] + [home / "shared/uniref50/train/index.json"]
    assert {path.read_bytes() for path in written} == {written[0].read_bytes()}  # hashes of all shards
    assert json.loads((home / "out/3/train/conversion.json").read_text())["clusters_written"] == 2
    assert bucket.stored[-1] == "uniref50/train/index.json"


def write_layouts(home: Path) -> None:
    """What is in the raw files, as flat parquet; and training as FASTA with a TSV."""
    clusters = pq.read_table(home / "train_clusters.parquet").to_pylist()
    with contextlib.closing(sqlite3.connect(home / "train.db")) as database:
        proteins = dict(database.execute("SELECT id, sequence FROM protein"))
    rows = [(cluster["ur50_id"], member) for cluster in clusters for member in cluster["ur90_id"]]
    columns = [*zip(*rows, strict=True), [proteins[member] for _, member in rows]]
    table = pa.table(dict(zip(("ur50_id", "ur90_id", "sequence"), columns, strict=True)))
    (held_out,) = pq.read_table(home / "valid_clusters.parquet").columns
    with contextlib.closing(sqlite3.connect(home / "validation.db")) as database:
        residues = dict(database.execute("SELECT id, sequence FROM protein"))
    valid = {"ur50_id": held_out, "ur90_id": held_out, "sequence": [residues[i] for i in held_out.to_pylist()]}
    for folder, rows_of in (
        ("uniref/train", table),
        ("shared/uniref", table),
        ("uniref/validation", pa.table(valid)),
    ):
        (home / folder).mkdir(parents=True)
        pq.write_table(rows_of, home / folder / "000.parquet")
    records = [f">{name} x\n{sequence}\n" for name, sequence in proteins.items()]
    (home / "a.fasta.gz").write_bytes(gzip.compress("".join(records[::2]).encode()))
    (home / "b.fasta").write_text("".join(records[1::2]))
    (home / "clusters.tsv").write_text("".join(f"{cluster}\t{member}\n" for cluster, member in rows))


@pytest.mark.slow
def test_make_demo(checkout: Path) -> None:
    """Whole, but with the environment as it is: some minutes. It ends where README.md says, below both floors."""
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("no .venv of make setup")
    for name in ("Makefile", "requirements.lock", "pyproject.toml", ".venv"):
        (checkout / name).symlink_to(ROOT / name)
    line = f"{the_one('make demo')} --old-file .venv/.installed"
    printed = follow(checkout, line, timeout=3000, OMP_NUM_THREADS=str(len(os.sched_getaffinity(0))))
    curve = read_run(checkout / "runs/demo").curve
    assert sorted(curve) == [0, 60, 120, 180, 240]
    floors = {name: float(value) for value, name in re.findall(r"^ +([\d.]+) +(unigram|copier)$", printed, re.M)}
    assert curve[240] < floors["copier"] < floors["unigram"] < curve[0]
    assert (checkout / "runs/demo/perplexity.png").exists()
    assert AutoModelForMaskedLM.from_pretrained(checkout / "runs/demo/hugging_face").config.hidden_size == 128


@pytest.mark.slow
def test_the_early_warning_makes_a_run_save_and_leave(shards: Path, tmp_path: Path) -> None:
    """Sent to the children of one launcher only: others may train on this machine."""
    with Run(*command(shards, "max_duration=200ba", "save_interval=200ba"), cwd=tmp_path) as run:
        run.wait_for("update 10/")
        follow(tmp_path, f"{the_one('pkill ')} --parent {run.launcher.pid}")
        code, _ = run.end()
    assert code == EXIT_PREEMPTED
    assert (tmp_path / "runs/demo/checkpoints/latest-rank0.pt").exists()


def test_uniprots_releases_become_a_training_and_a_validation_split(tmp_path: Path) -> None:
    """2,000 clusters of two members each, and entries without a cluster; one in 200 is set aside."""
    entries = [(f"P{i}", f"UniRef90_P{i}", f"UniRef50_P{i - i % 2}") for i in range(4000)]
    rows = ["\t".join([name, *6 * ["x"], "UniRef100_x", *clusters, "UPI"]) for name, *clusters in entries]
    table = "\n".join([*rows, *rows[:9], "\t".join(["Q1", *6 * ["x"], "", "", "", "UPI"])])
    (tmp_path / "idmapping_selected.tab.gz").write_bytes(gzip.compress(table.encode() + b"\n"))
    fasta = {"uniref90": {ur90 for _, ur90, _ in entries}, "uniref50": {ur50 for _, _, ur50 in entries}}
    for name, ids in fasta.items():
        records = "".join(f">{each} Protein n=2 Tax=x\nMKTAYIAKQRVVLSLKE\n" for each in sorted(ids))
        (tmp_path / f"{name}.fasta.gz").write_bytes(gzip.compress(records.encode()))
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    section = (ROOT / "docs/data.md").read_text().partition("## Layouts")[0]
    for line in re.findall(r"^    ((?:zcat|awk|python).*)$", section.partition("As UniProt releases it")[2], re.M):
        follow(tmp_path, line)
    train, valid = (
        json.loads((tmp_path / f"data/uniprot/{split}/conversion.json").read_text()) for split in SPLITS
    )
    assert 2 <= valid["clusters_written"] <= 20
    assert valid["members_written"] == valid["clusters_written"] == 2000 - train["clusters_written"]
    assert train["members_written"] == 2 * train["clusters_written"]
    assert not train["rejected"]


def test_prefixes_of_ncbi_are_taken_off_and_leave_the_id(tmp_path: Path) -> None:
    headers = ["gi|1|ref|NP_1.1| a protein", "ref|NP_2.1| b", "gb|AAA3.1|", "lcl|four c", "gnl|db|five", "six d|e"]
    headers += ["pir||S12345", "prf||123 a peptide", "gi|7|pir||S7 c"]
    (tmp_path / "ncbi.fasta").write_text("".join(f">{header}\nMKV\n" for header in headers))
    (tmp_path / "plain.fasta").write_text(follow(tmp_path, the_one("sed ")))
    assert list(read_fasta(tmp_path / "plain.fasta")) == [
        (name, b"MKV") for name in ("NP_1.1", "NP_2.1", "AAA3.1", "four", "five", "six", "S12345", "123", "S7")
    ]


def test_a_table_of_representatives_alone_is_made_of_one_of_members(tmp_path: Path) -> None:
    (tmp_path / "valid.tsv").write_text("b\tb\na\tc\na\ta\nb\td\n")
    assert follow(tmp_path, the_one("cut ")) == "a\ta\nb\tb\n"
