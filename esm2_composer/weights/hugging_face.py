"""Weights of transformers, read and written: a folder, or a model on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from esm2_composer import alphabet
from esm2_composer.checkpoints.names import LATEST
from esm2_composer.errors import UserError, system_error
from esm2_composer.model import ESM2, LAYER_NORM_EPS, ESM2Config
from esm2_composer.weights.files import State, read_tensors
from esm2_composer.weights.names import HF_LAYER, Stored, foreign_keys, renamed

_ROTARY = HF_LAYER + ".{}.attention.self.rotary_embeddings.inv_freq"


def in_folder(folder: Path) -> Stored:
    """What a folder holds. Raises UserError if that is not an ESM-2."""
    try:
        hf = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder}: neither a Hugging Face folder (no config.json) nor a checkpoint{_newest(folder)}"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    expected = {
        "model_type": "esm",
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "vocab_size": alphabet.VOCAB_SIZE,
        "token_dropout": True,
        "layer_norm_eps": LAYER_NORM_EPS,
        "mask_token_id": alphabet.MASK,
        "is_decoder": False,
        "quantization_config": False,
    }
    for key, value in expected.items():
        if (hf.get(key) or False) != value:
            raise UserError(f"{folder}: not an ESM-2 ({key} is {hf.get(key)!r}, not {value!r})")
    vocabulary = folder / "vocab.txt"
    if vocabulary.exists() and tuple(vocabulary.read_text().split()) != alphabet.TOKENS:
        raise UserError(f"{vocabulary}: not ESM-2's tokens in their order; its weights would mean others here")
    dimensions = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_heads": hf["num_attention_heads"],
        "ffn_hidden_size": hf["intermediate_size"],
    }
    return Stored(dimensions, lambda: renamed(_read_folder(folder), dimensions, False, folder))


def _newest(folder: Path) -> str:
    """What to name instead, where `folder` is a run's."""
    for path in (folder / LATEST, folder / "checkpoints" / LATEST):
        if path.exists():
            return f"; its newest checkpoint is {path}"
    return ""


def _read_folder(folder: Path) -> State:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():  # first, as transformers does: an index may be of older weights
            files = [name]
        elif index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            continue
        state: dict[str, torch.Tensor] = {}
        for file in files:
            state.update(read_tensors(folder / file))
        return {_current_name(key): tensor for key, tensor in state.items()}
    raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin")


def _current_name(key: str) -> str:
    """Undo TensorFlow's names of a LayerNorm's tensors, which transformers 5 gives those of models made anew."""
    for old, current in (("gamma", "weight"), ("beta", "bias")):
        if key.endswith(f"LayerNorm.{old}"):
            return key.removesuffix(old) + current
    return key


def on_hub(name: str) -> Stored:
    """What the hub, or its cache here, has by that name. Raises UserError if that is nothing, or not an ESM-2."""
    folder = _download(name, "*.json", "*.txt")
    dimensions, read = in_folder(folder)

    def fetch_and_read() -> State:
        _download(name, "*.safetensors", revision=folder.name)
        if not any(folder.glob("*.safetensors")):
            _download(name, "*.bin", revision=folder.name)
        return read()

    return Stored(dimensions, fetch_and_read)


def _download(name: str, *patterns: str, revision: str | None = None) -> Path:
    """The folder of a snapshot, named after its revision."""
    from huggingface_hub import constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE  # newer ones would ask the hub for its list of a revision's files even so
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
        )
    except Exception as error:  # network, permission and spelling all arrive as different types
        raise UserError(f"{name}: neither a path here nor a model on the hub ({error})") from error


def save_hugging_face(model: ESM2, path: str | Path) -> None:
    """Write `model` as a Hugging Face folder: config, safetensors (fp32), tokenizer and vocabulary."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise system_error(f"{folder}: cannot be written ({error.strerror})", error) from error
    config = model.config
    state = model.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for ours, keys in foreign_keys(config.num_layers, fair=False):
        parts = state[ours].detach().float().cpu().chunk(len(keys))
        tensors.update(zip(keys, (part.contiguous() for part in parts), strict=True))
    tensors["lm_head.decoder.weight"] = tensors["esm.embeddings.word_embeddings.weight"].clone()
    for i in range(config.num_layers):
        tensors[_ROTARY.format(i)] = state["rotary_bits"].cpu().view(torch.float32).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", hugging_face_config(config))
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # which is its owner's alone
    (folder / "vocab.txt").write_text("\n".join(alphabet.TOKENS) + "\n")
    special = {f"{name}_token": f"<{name}>" for name in ("cls", "pad", "eos", "unk", "mask")}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {**special, "tokenizer_class": "EsmTokenizer", "model_max_length": 1024},
    )


def hugging_face_config(config: ESM2Config) -> dict:
    """The config.json by which transformers makes an EsmForMaskedLM of these dimensions."""
    return {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_hidden_size,
        "vocab_size": alphabet.VOCAB_SIZE,
        "pad_token_id": alphabet.PAD,
        "mask_token_id": alphabet.MASK,
        "position_embedding_type": "rotary",
        "max_position_embeddings": 1026,
        "layer_norm_eps": LAYER_NORM_EPS,
        "token_dropout": True,
        "emb_layer_norm_before": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "is_folding_model": False,
        "use_cache": False,
        "torch_dtype": "float32",
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
