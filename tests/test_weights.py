"""Weights pass between Hugging Face, fair-esm, Composer checkpoints and here unchanged, or are refused."""

import argparse
import json
import logging
import os
import pickle
import re
import shutil
import zipfile

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from benchmarks.parity import fair_esm, hugging_face, random_batch, random_model, reference_logits
from esm import Alphabet, ProteinBertModel
from safetensors.torch import load_file, save_file
from test_model import CONFIGS
from transformers import AutoModelForMaskedLM, AutoTokenizer

from esm2_composer import alphabet
from esm2_composer.errors import UserError
from esm2_composer.model import ESM2
from esm2_composer.weights.pretrained import read_config


@pytest.fixture
def model() -> ESM2:
    return random_model(CONFIGS[24])


def assert_same_weights(a: ESM2, b: ESM2) -> None:
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def save_fair_esm(model: ESM2, path, prefix: str) -> None:
    """As the published files: contact head in a file beside, layers under a prefix."""
    state = fair_esm(model).state_dict()
    contact = {key: state.pop(key) for key in list(state) if key.startswith("contact_head")}
    arguments = argparse.Namespace(encoder_layers=model.config.num_layers)
    content = {"cfg": {"model": arguments}, "model": {prefix + key: value for key, value in state.items()}}
    torch.save(content, path)
    torch.save({"model": contact}, path.with_name(f"{path.stem}-contact-regression.pt"))


def test_transformers_loads_an_export_whole_with_equal_logits(model, tmp_path, caplog):
    model.save_hf(tmp_path)
    with caplog.at_level(logging.WARNING):
        reference, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not caplog.records
    lengths = [3, 40, 200]
    tokens, cu_seqlens = random_batch(lengths)
    with torch.no_grad():
        difference = model.eval()(tokens, cu_seqlens) - reference_logits(reference.eval(), tokens, lengths)
    assert difference.abs().max() <= 1e-4


def test_the_exported_tokenizer_gives_the_ids_the_model_was_trained_on(model, tmp_path):
    model.save_hf(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    residues = "MKTAYIAKQRXBUZO"
    assert tokenizer(residues)["input_ids"] == alphabet.encode(residues.encode()).tolist()
    assert tokenizer.mask_token_id == alphabet.MASK
    assert tokenizer.pad_token_id == alphabet.PAD


@pytest.mark.parametrize("safe", [True, False])
def test_weights_that_transformers_wrote_come_back_exactly(model, tmp_path, safe):
    hugging_face(model).save_pretrained(tmp_path, safe_serialization=safe)
    assert_same_weights(ESM2.from_pretrained(tmp_path), model)


def test_sharded_hugging_face_folders_are_read(model, tmp_path):
    hugging_face(model).save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same_weights(ESM2.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("size", ["5GB", "300KB"])
def test_old_names_of_layer_norms_are_read(model, tmp_path, size):
    """As transformers 5 writes them for models that it made from scratch."""
    hugging_face(model).save_pretrained(tmp_path, max_shard_size=size)
    renamed = 0
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        old = {re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", key): tensor for key, tensor in tensors.items()}
        old = {re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", key): tensor for key, tensor in old.items()}
        renamed += len(old.keys() - tensors.keys())
        save_file(old, file)
    assert renamed == 4 * model.config.num_layers
    assert_same_weights(ESM2.from_pretrained(tmp_path), model)


def test_an_export_is_for_whom_the_umask_lets_read(model, tmp_path):
    before = os.umask(0o027)
    try:
        model.save_hf(tmp_path / "hf")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {0o640}


def test_own_round_trip_is_exact(model, tmp_path):
    model.save_hf(tmp_path)
    assert_same_weights(ESM2.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("prefix", ["encoder.", "encoder.sentence_encoder.", ""])
def test_fair_esm_files_are_read_with_the_contact_head_beside(model, tmp_path, prefix):
    save_fair_esm(model, tmp_path / "esm2.pt", prefix)
    assert_same_weights(ESM2.from_pretrained(tmp_path / "esm2.pt"), model)


def test_rounded_rotary_frequencies_are_kept_both_ways(model, tmp_path):
    """As the published 3B and 15B weights have them."""
    reference = hugging_face(model)
    for layer in reference.esm.encoder.layer:
        layer.attention.self.rotary_embeddings.inv_freq.copy_(
            layer.attention.self.rotary_embeddings.inv_freq.half().float()
        )
    reference.save_pretrained(tmp_path / "theirs")
    ours = ESM2.from_pretrained(tmp_path / "theirs").eval()
    assert not torch.equal(ours.rotary_bits, model.rotary_bits)
    tokens, cu_seqlens = random_batch([1024])
    with torch.no_grad():
        expected = reference.eval()(tokens[None]).logits[0]
        assert (ours(tokens, cu_seqlens) - expected).abs().max() <= 1e-4
        assert (model.eval()(tokens, cu_seqlens) - expected).abs().max() > 1e-3  # so the rounding is seen
    ours.save_hf(tmp_path / "back")
    assert_same_weights(ESM2.from_pretrained(tmp_path / "back"), ours)


def test_rotary_frequencies_that_are_no_numbers_are_refused(model, tmp_path):
    reference = hugging_face(model)
    for layer in reference.esm.encoder.layer:
        layer.attention.self.rotary_embeddings.inv_freq.fill_(torch.nan)
    reference.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="rotary frequencies hold NaN or infinity"):
        ESM2.from_pretrained(tmp_path)


def test_layers_beyond_those_that_the_config_names_are_refused(model, tmp_path):
    model.save_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="it has more layers than the 1 it is said to have"):
        ESM2.from_pretrained(tmp_path)


def test_weights_without_a_contact_head_get_a_finite_one_and_it_is_told(model, tmp_path, capsys):
    save_fair_esm(model, tmp_path / "esm2.pt", "encoder.")
    ESM2.from_pretrained(tmp_path / "esm2.pt")
    (tmp_path / "esm2-contact-regression.pt").unlink()
    read_config(tmp_path / "esm2.pt")
    assert capsys.readouterr().err == ""
    assert torch.isfinite(ESM2.from_pretrained(tmp_path / "esm2.pt").contact_head.weight).all()
    (line,) = capsys.readouterr().err.splitlines()
    assert "esm2.pt: no contact head, there is no esm2-contact-regression.pt beside it" in line


class Payload:
    """Unpickled naively, this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"model": Payload(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"would run code: \w+\.mkdir"):
        ESM2.from_pretrained(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(UserError, match=r"plain\.pt"):
        ESM2.from_pretrained(tmp_path / "plain.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("core", [b"core", b"_core"])
def test_checkpoints_are_read_whichever_numpy_wrote_them(model, tmp_path, core):
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    content = {"state": {"model": state}, "rng": [{"numpy": np.random.get_state()}]}
    torch.save(content, tmp_path / "here.pt")
    with zipfile.ZipFile(tmp_path / "here.pt") as here, zipfile.ZipFile(tmp_path / "there.pt", "w") as there:
        for name in here.namelist():
            there.writestr(name, re.sub(rb"numpy\._?core\.", b"numpy." + core + b".", here.read(name)))
    assert_same_weights(ESM2.from_pretrained(tmp_path / "there.pt"), model)


def test_the_configuration_is_read_without_the_weights(model, tmp_path, monkeypatch):
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state": {"model": state}}, tmp_path / "composer.pt")
    save_fair_esm(model, tmp_path / "fair.pt", "encoder.")
    dcp.save({"state": {"model": state}}, checkpoint_id=tmp_path / "sharded", no_dist=True)
    model.save_hf(tmp_path / "hf")
    for weights in (*(tmp_path / "sharded").glob("*.distcp"), tmp_path / "hf/model.safetensors"):
        weights.unlink()
    monkeypatch.setattr(torch.Tensor, "clone", lambda _: pytest.fail("a tensor is read"))
    monkeypatch.setattr(torch, "cat", lambda _: pytest.fail("tensors are read"))
    for name in ("composer.pt", "fair.pt", "sharded", "hf"):
        assert read_config(tmp_path / name) == model.config


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["esm.encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors")


def change(name, new):
    def change_tensor(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = new(tensors[name]).contiguous()
        save_file(tensors, folder / "model.safetensors")

    return change_tensor


KEY = "esm.encoder.layer.0.attention.self.key.weight"
ROTARY = "esm.encoder.layer.1.attention.self.rotary_embeddings.inv_freq"


def only_an_index(text):
    def replace(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return replace


def set_config(key, value):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncate, "cannot be read as weights"),
        (drop_a_tensor, r"layer\.1\.output\.dense\.weight' is missing"),
        (change("lm_head.dense.weight", lambda weight: weight[:, :-1]), "has shape"),
        (change(KEY, lambda weight: weight[:, :-1]), "not an ESM-2"),
        (change(KEY, lambda weight: weight[:-1]), "has shape"),
        (change(KEY, lambda weight: weight / 0), "holds NaN or infinity"),
        (change("lm_head.decoder.weight", torch.randn_like), "whose 'lm_head.decoder.weight' is its embedding"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (set_config("position_embedding_type", "absolute"), "not an ESM-2"),  # ESM-1b
        (set_config("emb_layer_norm_before", True), "not an ESM-2"),
        (set_config("model_type", "esmc"), "not an ESM-2"),
        (set_config("mask_token_id", 5), "mask_token_id is 5, not 32"),
        (set_config("is_decoder", True), "not an ESM-2"),
        (set_config("quantization_config", {"bits": 8}), "not an ESM-2"),
        (change(KEY, lambda weight: (100 * weight).to(torch.int8)), r"is of torch\.int8, no type of"),
        (change(KEY, lambda weight: weight.cfloat()), r"is of torch\.complex64, no type of"),
        (change(ROTARY, lambda frequencies: 3 * frequencies), "whose layers have the same rotary frequencies"),
    ],
)
def test_damaged_and_foreign_folders_are_refused(model, tmp_path, damage, complaint):
    model.save_hf(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=complaint):
        ESM2.from_pretrained(tmp_path)


def test_an_old_index_beside_the_weights_is_not_read(model, tmp_path):
    old = ESM2(model.config)
    hugging_face(old).save_pretrained(tmp_path, max_shard_size="100KB")
    model.save_hf(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same_weights(ESM2.from_pretrained(tmp_path), model)


def test_a_contact_head_of_nan_is_as_none(model, tmp_path):
    model.save_hf(tmp_path)
    change("esm.contact_head.regression.weight", lambda weight: weight / 0 * 0)(tmp_path)
    assert not ESM2.from_pretrained(tmp_path).contact_head.weight.any()


OTHERS = [
    *([1], {"model": 3}, {"model": {"embed_tokens.weight": torch.ones(2)}}),
    *({"state": 3}, {"state": {"model": None}}, {"state": {}, "param_groups": []}),
    {"state": {"model": {"net.embed.weight": torch.ones(2, 2), "net.contact_head.weight": torch.ones(1, 2)}}},
    {"state": {"model": {"net.embed.weight": 3, "net.groups.0.0.fc1.weight": 1}}},
]


@pytest.mark.parametrize("content", OTHERS)
def test_other_torch_files_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt"):
        ESM2.from_pretrained(tmp_path / "other.pt")


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_checkpoint_with_more_than_an_esm2_is_refused(model, tmp_path, prefix):
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state": {"model": {**state, f"{prefix}more": torch.ones(1)}}}, tmp_path / "more.pt")
    with pytest.raises(UserError, match="not an ESM-2, it has 'more'"):
        ESM2.from_pretrained(tmp_path / "more.pt")


@pytest.mark.parametrize("name", ["layers.0.fc1.weight", "layers.x.y"])
def test_a_fair_esm_file_with_other_names_is_refused(model, tmp_path, name):
    state = dict(fair_esm(model).state_dict())
    if state.pop(name, None) is None:
        state[name] = torch.ones(1)
    torch.save({"model": state}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"not an? (whole )?ESM-2"):
        ESM2.from_pretrained(tmp_path / "model.pt")


def esm_1b() -> dict:
    names = ("attention_heads", "embed_dim", "ffn_embed_dim", "layers", "logit_bias", "token_dropout")
    args = argparse.Namespace(
        **dict.fromkeys(names, 4), arch="roberta_large", max_positions=8, emb_layer_norm_before=True
    )
    letters = Alphabet.from_architecture("ESM-1b")
    return {"args": args, "model": ProteinBertModel(args, letters).state_dict()}


def esm_c() -> dict:
    tensor = torch.ones(2, 2)
    return {"embed.weight": tensor, "transformer.blocks.0.attn.layernorm_qkv.1.weight": tensor}


@pytest.mark.parametrize(("make", "complaint"), [(esm_1b, "not an ESM-2"), (esm_c, "neither a fair-esm file nor")])
def test_files_of_other_architectures_are_refused(make, complaint, tmp_path):
    torch.save(make(), tmp_path / "model.pt")
    with pytest.raises(UserError, match=rf"model\.pt: {complaint}"):
        ESM2.from_pretrained(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["runs/c", "runs/c/checkpoints"])
def test_of_a_runs_folder_the_newest_checkpoint_is_named(tmp_path, name):
    latest = tmp_path / "runs/c/checkpoints/latest-rank0.pt"
    latest.parent.mkdir(parents=True)
    latest.touch()
    with pytest.raises(UserError, match=f"nor a checkpoint; its newest checkpoint is {latest}$"):
        ESM2.from_pretrained(tmp_path / name)
    latest.unlink()
    with pytest.raises(UserError, match=r"nor a checkpoint$"):
        ESM2.from_pretrained(tmp_path / name)


def test_a_file_that_is_missing_is_not_looked_for_on_the_hub():
    with pytest.raises(UserError, match=r"^checkpoints/latest\.pt: no such file"):
        ESM2.from_pretrained("checkpoints/latest.pt")


@pytest.mark.parametrize("safe", [True, False])
def test_a_name_on_the_hub_is_read_from_its_cache(model, tmp_path, monkeypatch, safe):
    """As huggingface_hub lays out what it has downloaded; no network is used."""
    revision = 5 * "0123abcd"
    snapshot = tmp_path / "models--lab--protein/snapshots" / revision
    hugging_face(model).save_pretrained(snapshot, safe_serialization=safe)
    (tmp_path / "models--lab--protein/refs").mkdir()
    (tmp_path / "models--lab--protein/refs/main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert_same_weights(ESM2.from_pretrained("lab/protein"), model)
    with pytest.raises(UserError, match="lab/other: neither a path here nor a model on the hub"):
        ESM2.from_pretrained("lab/other")


@pytest.mark.parametrize("kind", ["safetensors", "bin", "two files, of which one has come before"])
def test_a_configuration_on_the_hub_is_read_without_its_weights(model, tmp_path, monkeypatch, kind):
    hub, cache = tmp_path / "hub", tmp_path / "cache" / (5 * "0123abcd")
    cache.mkdir(parents=True)
    half = sum(tensor.nbytes for tensor in model.state_dict().values()) // 2
    size = half if kind.startswith("two") else 10**9
    hugging_face(model).save_pretrained(hub, safe_serialization=kind != "bin", max_shard_size=size)
    if kind.startswith("two"):
        first, *_ = sorted(hub.glob("*.safetensors"))
        shutil.copy(first, cache)
    before = set(cache.iterdir())

    def snapshot_download(
        name: str, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        assert not local_files_only
        assert revision in (None, cache.name)  # weights of the configuration that was read, whatever is newest
        for path in (path for pattern in allow_patterns for path in hub.glob(pattern)):
            shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert read_config("lab/protein") == model.config
    assert {*cache.glob("*.safetensors"), *cache.glob("*.bin")} == before
    assert_same_weights(ESM2.from_pretrained("lab/protein"), model)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        ESM2.from_pretrained(tmp_path / "nothing")
