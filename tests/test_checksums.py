"""Damage inside a checkpoint is found by its checksums; what hides it is none."""

import errno
import pickle
from pathlib import Path

import pytest
import torch
from test_sharded import model, sharded  # noqa: F401, fixtures

from esm2_composer.checkpoints import checksums
from esm2_composer.checkpoints.checksums import is_damaged
from esm2_composer.checkpoints.sharded import MODEL_PREFIX
from esm2_composer.errors import UserError
from esm2_composer.model import ESM2


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def file(model, tmp_path) -> Path:  # noqa: F811
    """A Composer checkpoint of `model`, as far as weights go."""
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state": {"model": state}}, tmp_path / "ep0-ba1-rank0.pt")
    return tmp_path / "ep0-ba1-rank0.pt"


def test_one_bit_of_a_file_is_found_though_torch_loads_it(file):
    assert not is_damaged(file)
    flip(file, file.stat().st_size // 2)
    torch.load(file, weights_only=True)
    assert is_damaged(file)
    assert not is_damaged(file, rank=1, ranks=2)  # the first rank reads it
    with pytest.raises(UserError, match="damaged, something is missing or not what was written"):
        ESM2.from_pretrained(file)


def test_one_bit_of_a_files_directory_is_found_where_torch_cannot_read_it(file):
    """The last 22 bytes tell where the directory lies, 56 and 20 before them the same in 64 bits."""
    content = file.read_bytes()
    failed = 0
    for end in range(1, 99):
        at = len(content) - end
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        try:
            torch.load(file, weights_only=True)
        except Exception:
            failed += 1
            assert is_damaged(file), end
    assert failed > 20


def test_a_name_that_has_become_anothers_is_found(file):
    content = file.read_bytes()
    at = content.rindex(b"/data/4")
    file.write_bytes(content[: at + 6] + b"5" + content[at + 7 :])
    assert is_damaged(file)


def test_one_bit_of_weights_in_a_hugging_face_folder_is_found(model, tmp_path):  # noqa: F811
    model.save_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"esm": torch.ones(1000)}, tmp_path / "pytorch_model.bin")
    flip(tmp_path / "pytorch_model.bin", 2000)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: damaged"):
        ESM2.from_pretrained(tmp_path)


def test_a_file_of_torchs_older_format_has_no_checksums(tmp_path):
    torch.save([1], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="holds a list"):
        ESM2.from_pretrained(tmp_path / "old.pt")


@pytest.mark.parametrize("damage", ["gone", "cut", "one bit", "another table of contents"])
def test_damage_inside_a_sharded_checkpoint_is_found(sharded, damage):  # noqa: F811
    assert not is_damaged(sharded)
    (part,) = sharded.glob("*.distcp")
    content = part.read_bytes()
    if damage == "gone":
        part.unlink()
    elif damage == "cut":
        part.write_bytes(content[:-1])
    elif damage == "one bit":
        flip(part, len(content) // 2)
    else:
        (sharded / ".metadata").write_bytes(b"no pickle")
    assert is_damaged(sharded)
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        ESM2.from_pretrained(sharded)


def test_ranks_share_the_reading_and_the_model_may_be_all_that_matters(sharded):  # noqa: F811
    flip(next(sharded.glob("*.distcp")), 5000)
    assert sum(is_damaged(sharded, rank, 7) for rank in range(7)) == 1
    assert is_damaged(sharded, prefix=MODEL_PREFIX)
    assert not is_damaged(sharded, prefix="state.optimizers.")


@pytest.mark.parametrize("fault", [OSError(errno.ESTALE, "stale"), OSError(errno.EIO, "fails"), MemoryError()])
def test_a_file_system_that_fails_is_no_damage(file, sharded, monkeypatch, fault):  # noqa: F811
    def fails(*_):
        raise fault

    monkeypatch.setattr(checksums, "open", fails, raising=False)
    monkeypatch.setattr("zipfile.ZipFile.testzip", fails)
    assert not is_damaged(sharded)
    assert not is_damaged(file)


def test_a_type_that_is_not_known_is_no_damage(sharded):  # noqa: F811
    (sharded / ".metadata").write_bytes(pickle.dumps(torch.device("cpu")))
    assert not is_damaged(sharded)
