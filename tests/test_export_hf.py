"""An export is a whole folder that transformers loads, or nothing."""

import errno
import os
import subprocess
import sys

import export_hf
import pytest
import torch
from benchmarks.parity import hugging_face, random_model
from test_model import CONFIGS
from transformers import AutoModelForMaskedLM


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint, in a folder of its own."""
    (tmp_path / "checkpoint").mkdir()
    state = {f"net.{name}": tensor for name, tensor in random_model(CONFIGS[16]).state_dict().items()}
    torch.save({"state": {"model": state}}, tmp_path / "checkpoint/latest-rank0.pt")
    return tmp_path / "checkpoint/latest-rank0.pt"


def assert_exported(folder):
    expected = hugging_face(random_model(CONFIGS[16])).state_dict()
    found = AutoModelForMaskedLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if "position_ids" not in name)


def test_the_export_is_what_transformers_loads(checkpoint, tmp_path, call):
    code, out, err = call(export_hf.main, checkpoint, tmp_path / "deep/er/hf")
    assert code == 0, err
    assert "model.safetensors" in out
    assert_exported(tmp_path / "deep/er/hf")
    assert os.listdir(tmp_path / "deep/er") == ["hf"]


@pytest.mark.parametrize(
    "make", [lambda out: out.mkdir(), lambda out: out.write_text("mine"), lambda out: out.symlink_to("x")]
)
def test_what_exists_stays(checkpoint, tmp_path, call, make):
    make(tmp_path / "hf")
    before = os.lstat(tmp_path / "hf")
    code, _, err = call(export_hf.main, checkpoint, tmp_path / "hf")
    assert code == 2
    assert "exists already" in err
    assert os.lstat(tmp_path / "hf") == before
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "hf"]


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, call, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("esm2_composer.weights.hugging_face._write_json", no_space)  # after the tensors
    code, _, err = call(export_hf.main, checkpoint, tmp_path / "hf")
    assert code == 1  # another time it may do
    assert err.startswith("error: ")
    assert "No space left on device" in err
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_limit_on_file_size_is_one_line_and_leaves_nothing(checkpoint, tmp_path):
    """The same from the system itself, in the middle of the tensors."""
    command = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    command += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    command += "import export_hf; from esm2_composer.command import run_command; run_command(export_hf.main)"
    result = subprocess.run(
        [sys.executable, "-c", command, checkpoint, tmp_path / "hf"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert "File too large" in result.stderr
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_what_a_killed_export_left_is_replaced(checkpoint, tmp_path, call):
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial/stray").write_text("")
    code, _, err = call(export_hf.main, checkpoint, tmp_path / "hf")
    assert code == 0, err
    assert_exported(tmp_path / "hf")
    assert not (tmp_path / "hf/stray").exists()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "hf"]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file/hf", "cannot be written"),
        ("n" * 250, "cannot be written"),  # its name while it is made is longer
        ("n" * 300, "name too long"),
        ("nowhere/..", "exists already"),
    ],
)
def test_a_folder_that_cannot_be_made_is_one_line_and_leaves_nothing(checkpoint, tmp_path, call, out, words):
    (tmp_path / "file").write_text("")
    code, _, err = call(export_hf.main, checkpoint, f"{tmp_path}/{out}")
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "file"]


@pytest.mark.parametrize("path", ["file/inside", "n" * 300])
def test_a_checkpoint_that_the_system_refuses_is_one_line(tmp_path, call, path):
    (tmp_path / "file").write_text("")
    code, _, err = call(export_hf.main, tmp_path / path, tmp_path / "hf")
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert path in err
    assert os.listdir(tmp_path) == ["file"]


def test_a_checkpoint_that_is_half_written_leaves_nothing(checkpoint, tmp_path, call):
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    code, _, err = call(export_hf.main, checkpoint, tmp_path / "hf")
    assert code == 2
    assert "cannot be read as weights" in err
    assert os.listdir(tmp_path) == ["checkpoint"]
