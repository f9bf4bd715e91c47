"""Sharded checkpoints are read, and nothing in them is run."""

import errno
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from benchmarks.parity import random_model
from test_model import CONFIGS
from test_weights import Payload, assert_same_weights
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from esm2_composer import sharded_checkpoint
from esm2_composer.checkpoints import naming_damage
from esm2_composer.errors import UserError
from esm2_composer.folders import LocalFolder
from esm2_composer.model import ESM2
from esm2_composer.sharded_checkpoint import is_damaged


@pytest.fixture
def model() -> ESM2:
    return random_model(CONFIGS[24])


@pytest.fixture
def sharded(model, tmp_path):
    """A sharded Composer checkpoint of `model`, as far as weights go."""
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    dcp.save({"state": {"model": state}}, checkpoint_id=tmp_path / "ep0-ba1", no_dist=True)
    return tmp_path / "ep0-ba1"


def test_sharded_checkpoints_are_read(model, sharded):
    assert_same_weights(ESM2.from_pretrained(sharded), model)


def test_a_sharded_checkpoint_that_would_run_code_is_refused_and_does_not_run(sharded, tmp_path):
    (sharded / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(UserError, match=r"would run code: \w+\.mkdir"):
        ESM2.from_pretrained(sharded)
    assert not (tmp_path / "owned").exists()


def test_what_a_sharded_checkpoint_calls_no_tensor_is_not_unpickled(sharded, tmp_path):
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    key = "state.model.net.norm.bias"
    tensor, told = metadata.state_dict_metadata[key], BytesStorageMetadata()
    told.size, told.properties = tensor.size, tensor.properties  # all that is asked of a tensor
    metadata.state_dict_metadata[key] = told
    for index in [index for index in metadata.storage_data if index.fqn == key]:
        del metadata.storage_data[index]
    torch.save(Payload(tmp_path / "owned"), sharded / "evil")
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo("evil", 0, (sharded / "evil").stat().st_size)
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"not a whole ESM-2, 'norm\.bias' is missing"):
        ESM2.from_pretrained(sharded)
    assert not (tmp_path / "owned").exists()


def test_a_sharded_checkpoint_without_one_of_its_files_is_refused(sharded):
    next(sharded.glob("*.distcp")).unlink()
    with pytest.raises(UserError, match="cannot be read as a sharded checkpoint"):
        ESM2.from_pretrained(sharded)


@pytest.mark.parametrize("damage", ["gone", "cut", "other bytes", "another table of contents"])
def test_damage_inside_is_found(sharded, damage):
    assert not is_damaged(sharded)
    (part,) = sharded.glob("*.distcp")
    content = part.read_bytes()
    if damage == "gone":
        part.unlink()
    elif damage == "cut":
        part.write_bytes(content[:-1])
    elif damage == "other bytes":
        middle = len(content) // 2
        part.write_bytes(content[:middle] + bytes(3000) + content[middle + 3000 :])
    else:
        (sharded / ".metadata").write_bytes(b"no pickle")
    assert is_damaged(sharded)
    assert LocalFolder(str(sharded.parent)).is_damaged(sharded.name)
    with (
        pytest.raises(UserError, match="ep0-ba1 is damaged; remove it, to go on from the one before"),
        naming_damage(LocalFolder(str(sharded.parent)), sharded.name),
    ):
        raise dcp.CheckpointException("", {})


@pytest.mark.parametrize("fault", [OSError(errno.ESTALE, "stale"), OSError(errno.EIO, "fails"), MemoryError()])
def test_a_file_system_that_fails_is_no_damage(sharded, monkeypatch, fault):
    def fails(*_):
        raise fault

    monkeypatch.setattr(sharded_checkpoint, "open", fails, raising=False)
    assert not is_damaged(sharded)


def test_a_type_that_is_not_known_is_no_damage(sharded):
    (sharded / ".metadata").write_bytes(pickle.dumps(torch.device("cpu")))
    assert not is_damaged(sharded)


def test_what_has_nothing_to_do_with_loading_is_not_looked_into(sharded):
    next(sharded.glob("*.distcp")).write_bytes(b"")
    with (
        pytest.raises(torch.OutOfMemoryError),
        naming_damage(LocalFolder(str(sharded.parent)), sharded.name),
    ):
        raise torch.OutOfMemoryError
