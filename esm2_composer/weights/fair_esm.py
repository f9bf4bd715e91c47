"""Weights of fair-esm: a `.pt` file, and another one beside it that holds the contact head."""

from __future__ import annotations

from pathlib import Path

from esm2_composer.errors import UserError, tell
from esm2_composer.weights.files import State, torch_load
from esm2_composer.weights.names import FAIR_LAYER, Stored, count_layers, renamed

_PREFIXES = ("encoder.sentence_encoder.", "encoder.")
_ROTARY = f"{FAIR_LAYER}.0.self_attn.rot_emb.inv_freq"  # the same in every layer
_CONTACT = "contact_head.regression.weight"


def in_file(content: dict, path: Path) -> Stored:
    """What the file at `path` holds, whose content is given. Raises UserError if that is not an ESM-2."""
    foreign = content.get("model")
    if not isinstance(foreign, dict):
        raise UserError(f"{path}: neither a fair-esm file nor a Composer checkpoint")
    for prefix in _PREFIXES:
        foreign = {key.removeprefix(prefix): tensor for key, tensor in foreign.items()}
    frequencies = foreign.get(_ROTARY)
    if frequencies is None or "embed_tokens.weight" not in foreign:
        raise UserError(f"{path}: not an ESM-2 (no rotary embedding)")
    beside = path.with_name(f"{path.stem}-contact-regression.pt")
    if beside.exists():
        foreign = {**foreign, **torch_load(beside)["model"]}
    hidden_size = foreign["embed_tokens.weight"].shape[1]
    dimensions = {
        "num_layers": count_layers(foreign, f"{FAIR_LAYER}."),
        "hidden_size": hidden_size,
        "num_heads": hidden_size // (2 * len(frequencies)),
        "ffn_hidden_size": foreign["layers.0.fc1.weight"].shape[0],
    }

    def read() -> State:
        if _CONTACT not in foreign:
            tell(f"{path}: no contact head, there is no {beside.name} beside it; contacts cannot be predicted")
        return renamed(foreign, dimensions, True, path)

    return Stored(dimensions, read)
