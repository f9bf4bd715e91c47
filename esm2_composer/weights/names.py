"""The names of an ESM-2's tensors: one table for ours, transformers' and fair-esm's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from esm2_composer.errors import UserError
from esm2_composer.model import layer_name, rotary_frequencies
from esm2_composer.weights.files import State, check_types

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
HF_LAYER, FAIR_LAYER = "esm.encoder.layer", "layers"


def foreign_keys(num_layers: int, fair: bool) -> Iterable[tuple[str, list[str]]]:
    """(our key, the foreign keys whose tensors it stacks) of a whole model."""
    for ours, hf_key, fair_key in _TENSORS:
        yield ours, [fair_key if fair else hf_key]
    for ours, hf_module, fair_module in _MODULES:
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", [f"{fair_module if fair else hf_module}.{kind}"]
    for i in range(num_layers):
        layer = f"{FAIR_LAYER if fair else HF_LAYER}.{i}"
        for ours, hf_modules, fair_modules in _LAYER_MODULES:
            for kind in ("weight", "bias"):
                modules = fair_modules if fair else hf_modules
                yield f"{layer_name(i)}.{ours}.{kind}", [f"{layer}.{module}.{kind}" for module in modules]


class Stored(NamedTuple):
    """An ESM-2 in some file or folder."""

    dimensions: dict[str, int]  # those of its ESM2Config
    read: Callable[[], State]  # reads its tensors; by our names


def renamed(foreign: State, dimensions: dict[str, int], fair: bool, path: Path) -> State:
    """The tensors of transformers, or of fair-esm, by our names.

    Rotary frequencies are taken as stored, if they are: weights trained with rounded ones need those. Without
    a contact head the model gets one that is finite and predicts nothing.

    Raises:
        UserError: they are not an ESM-2's.
    """
    num_layers, num_heads = dimensions["num_layers"], dimensions["num_heads"]
    state = _stacked(foreign, num_layers, fair, path)
    stored = [tensor for key, tensor in foreign.items() if key.endswith(".inv_freq")]
    stored = stored or [rotary_frequencies(dimensions["hidden_size"] // num_heads)]
    bits = [frequencies.float().contiguous().view(torch.int32) for frequencies in stored]
    if not all(torch.equal(other, bits[0]) for other in bits):
        raise UserError(f"{path}: not an ESM-2, whose layers have the same rotary frequencies")
    state["rotary_bits"] = bits[0]
    state.setdefault("contact_head.weight", torch.zeros(1, num_layers * num_heads))
    state.setdefault("contact_head.bias", torch.zeros(1))
    return state


def _stacked(foreign: State, num_layers: int, fair: bool, path: Path) -> dict[str, torch.Tensor]:
    state = {}
    for decoder in _TIED:
        if decoder in foreign and not torch.equal(foreign[decoder], foreign[_TENSORS[0][2 if fair else 1]]):
            raise UserError(f"{path}: not an ESM-2, whose '{decoder}' is its embedding")
    if any(key.startswith(f"{FAIR_LAYER if fair else HF_LAYER}.{num_layers}.") for key in foreign):
        raise UserError(f"{path}: it has more layers than the {num_layers} it is said to have")
    for ours, keys in foreign_keys(num_layers, fair):
        if ours.startswith("contact_head") and keys[0] not in foreign:
            continue  # shipped apart, or not at all
        missing = [key for key in keys if key not in foreign]
        if missing:
            raise UserError(f"{path}: not a whole ESM-2, '{missing[0]}' is missing")
        parts = {key: foreign[key] for key in keys}
        check_types(parts, path)  # before the others' type hides it
        state[ours] = torch.cat([*parts.values()])
    return state


def count_layers(keys: Iterable[str], prefix: str) -> int:
    """The number of layers, in whose keys a number follows `prefix`."""
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in keys if key.startswith(prefix))
