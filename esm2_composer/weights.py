"""Weights in and out: Hugging Face, fair-esm, and Composer checkpoints.

One table holds the three namings. Files are read without running code from them: safetensors, or
`torch.load(weights_only=True)`, or `checkpoints.sharded`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from esm2_composer import alphabet
from esm2_composer.checkpoints.checksums import is_damaged
from esm2_composer.checkpoints.sharded import MODEL_PREFIX, read_sharded
from esm2_composer.errors import UserError, system_error, tell
from esm2_composer.model import ESM2, LAYER_NORM_EPS, ESM2Config, rotary_frequencies

State = Mapping[str, torch.Tensor]

LATEST = "latest-rank0.pt"  # a link to a run's newest checkpoint, in local folders, for people and tools
COMPOSER_PREFIX = "net."  # the attribute of task.MaskedLanguageModel that holds the ESM2

# module here, in transformers' EsmForMaskedLM, in fair-esm; the three of `qkv` lie stacked here
_LAYER_MODULES = (
    ("attention_norm", ("attention.LayerNorm",), ("self_attn_layer_norm",)),
    (
        "qkv",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    ("out", ("attention.output.dense",), ("self_attn.out_proj",)),
    ("ffn_norm", ("LayerNorm",), ("final_layer_norm",)),
    ("fc1", ("intermediate.dense",), ("fc1",)),
    ("fc2", ("output.dense",), ("fc2",)),
)
_MODULES = (
    ("norm", "esm.encoder.emb_layer_norm_after", "emb_layer_norm_after"),
    ("head.dense", "lm_head.dense", "lm_head.dense"),
    ("head.norm", "lm_head.layer_norm", "lm_head.layer_norm"),
    ("contact_head", "esm.contact_head.regression", "contact_head.regression"),
)
_TENSORS = (
    ("embed.weight", "esm.embeddings.word_embeddings.weight", "embed_tokens.weight"),
    ("head.bias", "lm_head.bias", "lm_head.bias"),
)
_TIED = ("lm_head.decoder.weight", "lm_head.weight")  # the embedding's, in transformers and in fair-esm
_HF_LAYER, _FAIR_LAYER = "esm.encoder.layer", "layers"
_FAIR_ROTARY = f"{_FAIR_LAYER}.0.self_attn.rot_emb.inv_freq"  # the same in every layer
_HF_ROTARY = _HF_LAYER + ".{}.attention.self.rotary_embeddings.inv_freq"
_FAIR_CONTACT = "contact_head.regression.weight"
_FAIR_PREFIXES = ("encoder.sentence_encoder.", "encoder.")


def foreign_keys(num_layers: int, fair: bool) -> Iterable[tuple[str, list[str]]]:
    """(our key, the foreign keys whose tensors it stacks) of a whole model."""
    for ours, hf_key, fair_key in _TENSORS:
        yield ours, [fair_key if fair else hf_key]
    for ours, hf_module, fair_module in _MODULES:
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", [f"{fair_module if fair else hf_module}.{kind}"]
    for i in range(num_layers):
        layer = f"{_FAIR_LAYER if fair else _HF_LAYER}.{i}"
        for ours, hf_modules, fair_modules in _LAYER_MODULES:
            for kind in ("weight", "bias"):
                modules = fair_modules if fair else hf_modules
                yield f"layers.{i}.{ours}.{kind}", [f"{layer}.{module}.{kind}" for module in modules]


def load_pretrained(path: str | Path, attention: str = "auto") -> ESM2:
    """An ESM2 on the CPU, fp32, with the weights at `path`.

    Args:
        path: a Hugging Face folder or hub name, a fair-esm `.pt` file, or a Composer checkpoint (a file, or
            the folder of a sharded one).
        attention: the backend the model is to run on.

    Raises:
        UserError: nothing is there, the file is damaged or would run code, or it is not an ESM-2.
    """
    path = Path(path)
    with _naming(path):
        config, read = _open(path)
        _check_sums(path)
        with torch.device("meta"):
            model = ESM2(ESM2Config(**config, attention=attention))
        return _fill(model, read(), path)


def read_config(path: str | Path, attention: str = "auto") -> ESM2Config:
    """The configuration alone of what `load_pretrained` would load, without reading the weights.

    Raises:
        UserError: nothing is there, or it can be seen not to be an ESM-2.
    """
    path = Path(path)
    with _naming(path):
        return ESM2Config(**_open(path)[0], attention=attention)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise system_error(f"{path}: cannot be read ({error})", error) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Where names and shapes of another model lead; files that are damaged or missing have raised before.
        raise UserError(f"{path}: not an ESM-2 ({type(error).__name__}: {error})") from error


def _open(path: Path) -> tuple[dict, Callable[[], State]]:
    """The dimensions of what is at `path`, and what reads its tensors, under our names."""
    if path.is_dir() and (path / ".metadata").exists():
        return _from_composer(read_sharded(path, "meta"), lambda: read_sharded(path), path)
    if path.is_dir():
        return _from_hugging_face(path)
    if path.is_file():
        content = _torch_load(path)
        if "state" not in content:
            return _from_fair_esm(content, path)
        stored = content["state"]["model"]
        return _from_composer(stored, lambda: {name: tensor.clone() for name, tensor in stored.items()}, path)
    hub_name = len(path.parts) == 2 and not path.is_absolute() and path.parts[0] not in (".", "..")
    if hub_name and path.suffix != ".pt":
        return _from_hub(str(path))
    raise UserError(f"{path}: no such file or folder")


def _fill(model: ESM2, state: State, path: Path) -> ESM2:
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in state:
            raise UserError(f"{path}: not a whole ESM-2, '{name}' is missing")
        if state[name].shape != shape:
            raise UserError(f"{path}: '{name}' has shape {tuple(state[name].shape)}, not {tuple(shape)}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise UserError(f"{path}: not an ESM-2, it has '{unknown[0]}'")
    _check_types({name: tensor for name, tensor in state.items() if name != "rotary_bits"}, path)
    if not state["rotary_bits"].view(torch.float32).isfinite().all():
        raise UserError(f"{path}: its rotary frequencies hold NaN or infinity")
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
    tensors["rotary_bits"] = state["rotary_bits"].clone()
    for name, tensor in tensors.items():
        if tensor.isfinite().all():
            continue
        if not name.startswith("contact_head."):  # some published models have one of NaN, which is as good as none
            raise UserError(f"{path}: '{name}' holds NaN or infinity")
        tensors[name] = torch.zeros_like(tensor)
    model.load_state_dict(tensors, assign=True)
    model.contact_head.requires_grad_(False)
    return model


def _check_types(state: State, path: Path) -> None:
    """Raise a UserError, if one holds no floating-point numbers: quantized weights have scales elsewhere."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: '{name}' is of {tensor.dtype}, no type of ESM-2's weights")


# Plain data that checkpoints hold beside tensors: fair-esm's arguments; Composer's clock, versions and NumPy
# random state.
_PLAIN_TYPES = [
    argparse.Namespace,
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    # NumPy's array constructor, under the names that NumPy 1 and 2 write.
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def _torch_load(path: Path) -> dict:
    """What a file holds; its tensors are read when they are looked at, unless it is of torch's older format."""
    with torch.serialization.safe_globals(_PLAIN_TYPES):
        try:
            mmap = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except OSError as error:
            raise system_error(f"{path}: cannot be read as weights ({error})", error) from error
        except Exception as error:  # torch raises half a dozen types for damaged files
            raise UserError(f"{path}: cannot be read as weights ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def _check_sums(path: Path) -> None:
    """Raise a UserError, if a file or sharded checkpoint that has checksums is not what was written."""
    has_them = (path / ".metadata").exists() or zipfile.is_zipfile(path)
    if has_them and is_damaged(path, prefix=MODEL_PREFIX):
        raise UserError(f"{path}: damaged, something is missing or not what was written")


def _reason(error: Exception) -> str:
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if unsafe:
        return f"it would run code: {unsafe[1]}"
    if isinstance(error, RuntimeError | OSError):
        return str(error).splitlines()[0]
    return "not a file that torch wrote"


def _stack(foreign: State, num_layers: int, fair: bool, path: Path) -> dict[str, torch.Tensor]:
    state = {}
    for decoder in _TIED:
        if decoder in foreign and not torch.equal(foreign[decoder], foreign[_TENSORS[0][2 if fair else 1]]):
            raise UserError(f"{path}: not an ESM-2, whose '{decoder}' is its embedding")
    if any(key.startswith(f"{_FAIR_LAYER if fair else _HF_LAYER}.{num_layers}.") for key in foreign):
        raise UserError(f"{path}: it has more layers than the {num_layers} it is said to have")
    for ours, keys in foreign_keys(num_layers, fair):
        if ours.startswith("contact_head") and keys[0] not in foreign:
            continue  # shipped apart, or not at all
        missing = [key for key in keys if key not in foreign]
        if missing:
            raise UserError(f"{path}: not a whole ESM-2, '{missing[0]}' is missing")
        parts = {key: foreign[key] for key in keys}
        _check_types(parts, path)  # before the others' type hides it
        state[ours] = torch.cat([*parts.values()])
    return state


def _complete(state: dict[str, torch.Tensor], foreign: State, config: dict[str, int], path: Path) -> State:
    """Add what other formats hold elsewhere or not at all.

    Rotary frequencies are taken as stored, if they are: weights trained with rounded ones need those. Without
    a contact head the model gets one that is finite and predicts nothing.
    """
    stored = [tensor for key, tensor in foreign.items() if key.endswith(".inv_freq")]
    stored = stored or [rotary_frequencies(config["hidden_size"] // config["num_heads"])]
    bits = [frequencies.float().contiguous().view(torch.int32) for frequencies in stored]
    if not all(torch.equal(other, bits[0]) for other in bits):
        raise UserError(f"{path}: not an ESM-2, whose layers have the same rotary frequencies")
    state["rotary_bits"] = bits[0]
    state.setdefault("contact_head.weight", torch.zeros(1, config["num_layers"] * config["num_heads"]))
    state.setdefault("contact_head.bias", torch.zeros(1))
    return state


def _from_hugging_face(folder: Path) -> tuple[dict, Callable[[], State]]:
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
    config = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_heads": hf["num_attention_heads"],
        "ffn_hidden_size": hf["intermediate_size"],
    }

    def read() -> State:
        foreign = _read_hugging_face(folder)
        return _complete(_stack(foreign, config["num_layers"], False, folder), foreign, config, folder)

    return config, read


def _newest(folder: Path) -> str:
    """What to name instead, where `folder` is a run's."""
    for path in (folder / LATEST, folder / "checkpoints" / LATEST):
        if path.exists():
            return f"; its newest checkpoint is {path}"
    return ""


def _read_hugging_face(folder: Path) -> State:
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
            state.update(_read_tensors(folder / file))
        return {_current_name(key): tensor for key, tensor in state.items()}
    raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin")


def _current_name(key: str) -> str:
    """Undo TensorFlow's names of a LayerNorm's tensors, which transformers 5 gives those of models made anew."""
    for old, current in (("gamma", "weight"), ("beta", "bias")):
        if key.endswith(f"LayerNorm.{old}"):
            return key.removesuffix(old) + current
    return key


def _read_tensors(path: Path) -> State:
    if path.suffix != ".safetensors":
        _check_sums(path)
        return _torch_load(path)
    try:
        return load_file(path)
    except OSError as error:
        raise system_error(f"{path}: cannot be read as weights ({error})", error) from error
    except Exception as error:  # safetensors has its own type for damage
        raise UserError(f"{path}: cannot be read as weights ({error})") from error


def _from_hub(name: str) -> tuple[dict, Callable[[], State]]:
    folder = _download(name, "*.json", "*.txt")
    config, read = _from_hugging_face(folder)

    def fetch_and_read() -> State:
        _download(name, "*.safetensors", revision=folder.name)
        if not any(folder.glob("*.safetensors")):
            _download(name, "*.bin", revision=folder.name)
        return read()

    return config, fetch_and_read


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


def _from_fair_esm(content: dict, path: Path) -> tuple[dict, Callable[[], State]]:
    foreign = content.get("model")
    if not isinstance(foreign, dict):
        raise UserError(f"{path}: neither a fair-esm file nor a Composer checkpoint")
    for prefix in _FAIR_PREFIXES:
        foreign = {key.removeprefix(prefix): tensor for key, tensor in foreign.items()}
    frequencies = foreign.get(_FAIR_ROTARY)
    if frequencies is None or "embed_tokens.weight" not in foreign:
        raise UserError(f"{path}: not an ESM-2 (no rotary embedding)")
    beside = path.with_name(f"{path.stem}-contact-regression.pt")
    if beside.exists():
        foreign = {**foreign, **_torch_load(beside)["model"]}
    hidden_size = foreign["embed_tokens.weight"].shape[1]
    config = {
        "num_layers": _count_layers(foreign, f"{_FAIR_LAYER}."),
        "hidden_size": hidden_size,
        "num_heads": hidden_size // (2 * len(frequencies)),
        "ffn_hidden_size": foreign["layers.0.fc1.weight"].shape[0],
    }

    def read() -> State:
        if _FAIR_CONTACT not in foreign:
            tell(f"{path}: no contact head, there is no {beside.name} beside it; contacts cannot be predicted")
        return _complete(_stack(foreign, config["num_layers"], True, path), foreign, config, path)

    return config, read


def _count_layers(state: State, prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))


def _from_composer(seen: State, load: Callable[[], State], path: Path) -> tuple[dict, Callable[[], State]]:
    def ours(stored: State) -> State:
        return {key.removeprefix(COMPOSER_PREFIX): tensor for key, tensor in stored.items()}

    state = ours(seen)
    try:
        num_layers = _count_layers(state, "layers.")
        config = {
            "num_layers": num_layers,
            "hidden_size": state["embed.weight"].shape[1],
            # the contact head sees every attention map: layers x heads inputs
            "num_heads": state["contact_head.weight"].shape[1] // num_layers,
            "ffn_hidden_size": state["layers.0.fc1.weight"].shape[0],
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: a Composer checkpoint, but not of an ESM-2 ({error})") from error
    return config, lambda: ours(load())


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
        tensors[_HF_ROTARY.format(i)] = state["rotary_bits"].cpu().view(torch.float32).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    _write_json(folder / "config.json", hugging_face_config(config))
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
