"""Sharded checkpoints are read, and nothing in them is run."""

import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from benchmarks.parity import random_model
from test_model import CONFIGS
from test_weights import Payload, assert_same_weights
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from esm2_composer.errors import UserError
from esm2_composer.model import ESM2


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
    with pytest.raises(UserError, match="ep0-ba1: damaged"):
        ESM2.from_pretrained(sharded)
