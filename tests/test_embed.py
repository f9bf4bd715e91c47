"""tools/embed.py and what it is made of: equal to transformers, whatever the batches, also after a kill."""

import gzip
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, python
from test_journal import COLUMNS, release
from transformers import EsmModel

from esm2_composer import alphabet
from esm2_composer.embedding import Embedder, embed_file, read_proteins, survey, windows
from esm2_composer.errors import UserError
from esm2_composer.journal import Journal
from esm2_composer.model import ESM2, ESM2Config

TOOL = ROOT / "tools/embed.py"
LETTERS = "ACDEFGHIKLMNPQRSTVWYXBUZO"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a small model far from its initialisation."""
    torch.manual_seed(0)
    model = ESM2(ESM2Config(2, 32, 2, 64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    folder = tmp_path_factory.mktemp("weights")
    model.save_hf(folder)
    return folder


def random_proteins(lengths: list[int]) -> list[tuple[str, bytes]]:
    generator = random.Random(0)
    return [(f"p{i}", "".join(generator.choices(LETTERS, k=n)).encode()) for i, n in enumerate(lengths)]


def write_fasta(path: Path, proteins: list[tuple[str, bytes]]) -> Path:
    path.write_bytes(b"".join(f">{name} x\n".encode() + residues + b"\n" for name, residues in proteins))
    return path


def embedder(weights: Path, **changes) -> Embedder:
    wanted = {"layer": 2, "max_length": 1024, "batch_tokens": 16384, "per_residue": True, **changes}
    return Embedder(ESM2.from_pretrained(weights).eval(), **wanted)


@pytest.fixture
def tool(monkeypatch, capfd):
    """Run the tool within this process, which spares its imports; gives the exit code and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name="__main__")
        out, err = capfd.readouterr()
        assert not out
        return stop.value.code or 0, err

    return run


def assert_refused(result: tuple[int, str], words: list[str]) -> None:
    code, stderr = result
    assert code == 2
    (line,) = (line for line in stderr.splitlines() if line.startswith("error:"))
    assert all(word in line for word in words), line


def matrices(table: pa.Table | pa.RecordBatch) -> list[np.ndarray]:
    return [np.array(rows.as_py(), np.float32) for rows in table["residue_embeddings"]]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_embeddings_are_those_of_transformers(weights, layer):
    proteins = random_proteins([5, 300, 1, 1022, 77])
    rows = embedder(weights, layer=layer).rows(proteins)
    reference = EsmModel.from_pretrained(weights, add_pooling_layer=False).eval()
    assert rows["id"].to_pylist() == [name for name, _ in proteins]
    assert rows["length"].to_pylist() == [5, 300, 1, 1022, 77]
    assert rows["windows"].to_pylist() == [1] * 5
    for (_, residues), mean, matrix in zip(proteins, rows["embedding"], matrices(rows), strict=True):
        tokens = torch.from_numpy(alphabet.encode(residues)).long()[None]
        with torch.no_grad():
            hidden = reference(tokens, torch.ones_like(tokens), output_hidden_states=True).hidden_states[layer]
        expected = hidden[0, 1:-1].numpy()
        assert np.abs(matrix - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
        assert np.abs(np.array(mean.as_py()) - expected.mean(0)).max() <= 1e-5


def test_results_do_not_depend_on_batches_or_neighbours(weights):
    proteins = random_proteins([3, 400, 60, 61, 59, 400, 12, 1500, 200])
    together = embedder(weights, batch_tokens=16384).rows(proteins)
    for one in (
        embedder(weights, batch_tokens=1024).rows(proteins),
        pa.Table.from_batches([embedder(weights).rows([protein]) for protein in proteins]),
        embedder(weights, batch_tokens=2000).rows(proteins[::-1]).take(list(range(9))[::-1]),
    ):
        assert one["id"].to_pylist() == together["id"].to_pylist()
        for a, b in zip(matrices(one), matrices(together), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(one["embedding"].to_pylist(), together["embedding"].to_pylist(), atol=1e-5)


@pytest.mark.parametrize("max_length", [8, 9, 100, 1024])
def test_windows_take_every_residue_once_away_from_cuts(max_length):
    lengths = [*range(3, 5 * max_length)] if max_length < 200 else [3, 1024, 1025, 1026, 1791, 1792, 1793, 35_002]
    for tokens in lengths:
        cut = windows(tokens, max_length)
        taken = [place for window in cut for place in range(window.first, window.last)]
        assert taken == list(range(1, tokens - 1))
        assert (len(cut) == 1) == (tokens <= max_length)
        for window in cut:
            assert 0 <= window.start < window.stop <= tokens
            assert window.stop - window.start == min(max_length, tokens)
            margin = max_length // 8
            assert window.start == 0 or window.first - window.start >= margin
            assert window.stop == tokens or window.stop - window.last >= margin


def test_a_long_protein_is_joined_from_windows_and_its_mean_is_over_all_residues(weights):
    ((_, residues),) = proteins = random_proteins([150])
    small = embedder(weights, max_length=64, batch_tokens=64)
    rows = small.rows(proteins)
    tokens = torch.from_numpy(alphabet.encode(residues))
    cut = windows(152, 64)
    expected = []
    for window in cut:
        shown = tokens[window.start : window.stop]
        with torch.no_grad():
            x = small.model.represent(shown, torch.tensor([0, len(shown)], dtype=torch.int32))
        expected.append(x[window.first - window.start : window.last - window.start].numpy())
    expected = np.concatenate(expected)
    assert rows["windows"].to_pylist() == [len(cut)] == [3]
    np.testing.assert_allclose(matrices(rows)[0], expected, atol=1e-5)
    np.testing.assert_allclose(rows["embedding"][0].as_py(), expected.mean(0), atol=1e-5)


def test_the_tool_writes_rows_in_the_order_of_the_input(tool, weights, real_data, tmp_path):
    fasta, out = real_data / "tiny/fasta/uniref50.fasta.gz", tmp_path / "new/out.parquet"
    code, stderr = tool(fasta, "--model", weights, "--out", out, "--batch-tokens", "2048", "--layer", "1")
    assert code == 0
    assert "352 proteins" in stderr
    table = pq.read_table(tmp_path / "new/out.parquet")
    lines = gzip.decompress(fasta.read_bytes()).decode().splitlines()
    assert table["id"].to_pylist() == [line.split()[0][1:] for line in lines if line.startswith(">")]
    assert "residue_embeddings" not in table.column_names
    assert sum(table["length"].to_pylist()) == sum(len(line) for line in lines if not line.startswith(">"))
    assert max(table["windows"].to_pylist()) == 6  # 4,625 residues
    origin = json.loads(table.schema.metadata[b"esm2_composer"])
    assert (origin["layer"], origin["pooling"], origin["precision"]) == (1, "mean over residues", "fp32")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_where_it_was(weights, tmp_path, number):
    proteins = random_proteins([200] * 100)
    fasta = write_fasta(tmp_path / "in.fasta", proteins)
    options = ("--batch-tokens", "256", "--max-length", "256", "--per-residue")  # one protein a chunk
    journal = tmp_path / ".out.parquet.partial"
    command = [sys.executable, TOOL, fasta, "--model", weights, "--out", tmp_path / "out.parquet", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (journal.exists() and journal.stat().st_size > 150_000):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        told = process.stderr.read().splitlines()
    if number == signal.SIGINT:
        assert re.fullmatch(r"interrupted; \d+ proteins are kept: the same command goes on", told[-1])
        assert (process.returncode, len(told)) == (130, 2)
    assert not (tmp_path / "out.parquet").exists()
    os.truncate(journal, journal.stat().st_size - 100)  # a row half-written
    again = python(*command[1:])
    assert again.returncode == 0, again.stderr
    assert "proteins of an earlier run" in again.stderr
    one = embedder(weights, max_length=256, batch_tokens=256)
    undisturbed = pa.Table.from_batches([one.rows(chunk) for chunk in one.chunks(proteins)])
    assert pq.read_table(tmp_path / "out.parquet").equals(undisturbed)
    assert {path.name for path in tmp_path.iterdir()} == {"in.fasta", "out.parquet"}


def test_faults_are_treated_as_in_conversion_and_repeated_ids_keep_their_rows(tmp_path):
    path = tmp_path / "in.fasta"
    path.write_bytes(b">a\nmkv*\r\n>b\n>a\nMJV L\n>c\nM*V\n>a\nMKV\n")
    found = survey(path, 1024, 0.5)
    assert (found.proteins, found.residues, found.over_limit) == (3, 10, 0)
    assert found.rejected == {"empty sequence": 1, "bad residue": 1}
    assert found.examples == {"empty sequence": "b", "bad residue": "c"}
    assert found.changed["J made X"] == 1
    assert (found.repeated, found.repeated_id) == (1, "a")
    assert list(read_proteins(path)) == [("a", b"MKV"), ("a", b"MXVL"), ("a", b"MKV")]
    path.write_bytes(path.read_bytes() + b"> \nMKV\n")
    assert survey(path, 1024, 0.5).examples["header without id"] == "record 6"
    assert len(list(read_proteins(path))) == 3
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(
        UserError, match=r"2 of 5 sequences rejected, more than 30.0%: empty sequence 1 \(first: 'b'\)"
    ):
        survey(path, 1024, 0.3)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", [], ["in.fasta: empty"]),
        (b">a\n>b\n", [], ["no protein to embed", "empty sequence 2"]),
        (b"id,sequence\n", [], ["not FASTA"]),
        (gzip.compress(b">a\nMKV\n" * 1000, mtime=0)[:-20], [], ["cut short"]),
        (b">a\nMKVLLAMKVL\n", ["--max-length", "8", "--long", "refuse"], ["longer than 6", "10", "--long window"]),
        (b"no FASTA", ["--layer", "3"], ["--layer 3", "layers 0 to 2"]),
        (b"no FASTA", ["--model", "/nowhere"], ["/nowhere", "no such file"]),
    ],
    ids=["empty", "no sequences", "not FASTA", "truncated", "long", "layer", "model"],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tool, weights, tmp_path, content, options, words):
    (tmp_path / "in.fasta").write_bytes(content)
    fasta, out = tmp_path / "in.fasta", tmp_path / "out.parquet"
    assert_refused(tool(fasta, "--model", weights, "--out", out, *options), words)
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


def test_a_pipe_is_refused_without_waiting_for_its_writer(tool, tmp_path):
    os.mkfifo(tmp_path / "in.fasta")
    result = tool(tmp_path / "in.fasta", "--model", "nothing", "--out", tmp_path / "out.parquet")
    assert_refused(result, ["in.fasta", "a pipe will not do"])


def test_weights_that_are_no_numbers_are_refused(tool, tmp_path):
    model = ESM2(ESM2Config(1, 32, 2, 64))
    with torch.no_grad():
        model.layers[0].fc1.weight[3, 4] = torch.nan
    model.save_hf(tmp_path / "weights")
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins([20]))
    result = tool(fasta, "--model", tmp_path / "weights", "--out", tmp_path / "out.parquet")
    assert_refused(result, ["weights", "'groups.0.0.fc1.weight' holds NaN or infinity"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fasta", "weights"]


def test_weights_that_are_half_written_or_of_another_alphabet_are_refused(tool, weights, tmp_path):
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins([20]))
    for name, words in (("model.safetensors", "cannot be read as weights"), ("vocab.txt", "not ESM-2's tokens")):
        damaged = Path(shutil.copytree(weights, tmp_path / name)) / name
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
        result = tool(fasta, "--model", tmp_path / name, "--out", tmp_path / "out.parquet")
        assert_refused(result, [str(damaged), words])
    assert not list(tmp_path.glob("*out*"))


def test_a_model_that_overflows_is_refused_by_the_first_protein_and_leaves_nothing(tool, tmp_path):
    model = ESM2(ESM2Config(2, 32, 2, 64))
    with torch.no_grad():
        model.embed.weight[alphabet.TOKENS.index("W")] = 3e38
        model.layers[0].fc2.bias.fill_(2e38)  # to overflow where both meet, in the first layer's output
    model.save_hf(tmp_path / "weights")
    proteins = [("a", b"MKV" * 40), ("b", b"MKV"), ("c", b"MWV"), ("d", b"MKV"), ("e", b"WWW")]
    fasta = write_fasta(tmp_path / "in.fasta", proteins)
    options = ("--layer", "1", "--batch-tokens", "100", "--max-length", "100")  # the first is a chunk of its own
    arguments = (fasta, "--model", tmp_path / "weights", "--out", tmp_path / "out.parquet", *options)
    assert_refused(tool(*arguments), ["'c'", "no finite number"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fasta", "weights"]
    write_fasta(fasta, [protein for protein in proteins if b"W" not in protein[1]])
    assert tool(*arguments)[0] == 0


def test_a_file_that_changes_while_it_is_read_is_not_taken_for_whole(weights, tmp_path):
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins([20, 30]))
    one = embedder(weights)
    journal = Journal(tmp_path / "out.parquet", one.columns, {})
    with pytest.raises(UserError, match=r"3 proteins at first, 2 at last; remove .*partial"):
        embed_file(fasta, 3, journal, one, lambda residues: None)
    assert not (tmp_path / "out.parquet").exists()
    release(journal)


@pytest.mark.parametrize("out", ["link.parquet", "folder", "folder/..", "nowhere/.."])
def test_an_output_that_is_a_link_or_a_folder_is_refused_and_stays(tool, weights, tmp_path, out):
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins([20]))
    (tmp_path / "link.parquet").symlink_to("nothing")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert_refused(tool(fasta, "--model", weights, "--out", f"{tmp_path}/{out}"), [out, "exists already"])
    with pytest.raises(UserError, match="exists already"):
        Journal(Path(f"{tmp_path}/{out}"), COLUMNS, {})
    assert sorted(tmp_path.rglob("*")) == before
    assert os.readlink(tmp_path / "link.parquet") == "nothing"


@pytest.mark.parametrize("place", ["fasta", "--model", "--out"])
@pytest.mark.parametrize("path", ["file/inside.parquet", f"{'n' * 300}.parquet", f"{'n' * 242}.parquet"])
def test_a_path_that_the_system_refuses_is_one_line_and_leaves_nothing(tool, weights, tmp_path, place, path):
    (tmp_path / "file").touch()
    fasta = write_fasta(tmp_path / "in.fasta", random_proteins([20]))
    given = {"fasta": fasta, "--model": weights, "--out": tmp_path / "out.parquet", place: tmp_path / path}
    assert_refused(tool(given["fasta"], "--model", given["--model"], "--out", given["--out"]), [path])
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "in.fasta"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["out.parquet exists already"]),
        (["--max-length", "7"], ["--max-length: 7; it must be at least 8"]),
        (["--max-length", "2147483648"], ["--max-length: 2147483648; it must be", "at most 2147483647"]),
        (["--batch-tokens", "2147483648"], ["--batch-tokens: 2147483648; it must be", "at most 2147483647"]),
        (["--batch-tokens", "100"], ["--batch-tokens 100 must hold a window of 1024"]),
        (["--max-reject-fraction", "2"], ["--max-reject-fraction: 2.0; it must be at least 0 and at most 1"]),
    ],
)
def test_wrong_options_and_an_output_that_exists_are_told_before_anything_is_read(tool, tmp_path, options, words):
    (tmp_path / "out.parquet").touch()
    out = tmp_path / "out.parquet"
    assert_refused(tool("nothing.fasta", "--model", "nothing", "--out", out, *options), words)


def test_an_output_of_another_kind_is_refused(tool, tmp_path):
    result = tool("nothing.fasta", "--model", "nothing", "--out", tmp_path / "out.csv")
    assert_refused(result, ["--out", "out.csv must end in .parquet"])


def test_ids_that_come_again_are_told(tool, weights, tmp_path):
    (tmp_path / "in.fasta").write_text(">b\nMK\n>a\nMKV\n>a\nMKV\n>a\nMV\n")
    code, stderr = tool(tmp_path / "in.fasta", "--model", weights, "--out", tmp_path / "out.parquet")
    assert code == 0
    assert "ids that come again: 1, such as 'a'\n" in stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(weights, tmp_path):
    measure = (
        "import resource, runpy, sys; from esm2_composer import journal\n"
        "journal.ROW_GROUP_BYTES = 2**20; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = []
    for count in (200, 6000):  # residues' embeddings of 5 and 154 MB
        fasta, out = (
            write_fasta(tmp_path / "in.fasta", random_proteins([200] * count)),
            tmp_path / f"{count}.parquet",
        )
        options = ("--per-residue", "--max-length", "256", "--batch-tokens", "8192")
        done = python("-c", measure, TOOL, fasta, "--model", weights, "--out", out, *options)
        assert done.returncode == 0, done.stderr
        assert pq.ParquetFile(out).metadata.num_rows == count
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 100, peaks  # two runs of the same differ by 40
