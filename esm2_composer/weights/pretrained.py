"""An ESM-2 with the weights at some path, in whichever format they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from esm2_composer.checkpoints.sharded import read_sharded
from esm2_composer.errors import UserError, system_error
from esm2_composer.model import ESM2, ESM2Config, layer_name
from esm2_composer.weights import fair_esm, hugging_face
from esm2_composer.weights.files import State, check_sums, check_types, torch_load
from esm2_composer.weights.names import Stored

COMPOSER_PREFIX = "net."  # the attribute of task.MaskedLanguageModel that holds the ESM2


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
        stored = _open(path)
        check_sums(path)
        with torch.device("meta"):
            model = ESM2(ESM2Config(**stored.dimensions, attention=attention))
        return _fill(model, stored.read(), path)


def read_config(path: str | Path, attention: str = "auto") -> ESM2Config:
    """The configuration alone of what `load_pretrained` would load, without reading the weights.

    Raises:
        UserError: nothing is there, or it can be seen not to be an ESM-2.
    """
    path = Path(path)
    with _naming(path):
        return ESM2Config(**_open(path).dimensions, attention=attention)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise system_error(f"{path}: cannot be read ({error})", error) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Where names and shapes of another model lead; files that are damaged or missing have raised before.
        raise UserError(f"{path}: not an ESM-2 ({type(error).__name__}: {error})") from error


def _open(path: Path) -> Stored:
    if path.is_dir() and (path / ".metadata").exists():
        return _from_composer(read_sharded(path, "meta"), lambda: read_sharded(path), path)
    if path.is_dir():
        return hugging_face.in_folder(path)
    if path.is_file():
        content = torch_load(path)
        if "state" not in content:
            return fair_esm.in_file(content, path)
        stored = content["state"]["model"]
        return _from_composer(stored, lambda: {name: tensor.clone() for name, tensor in stored.items()}, path)
    hub_name = len(path.parts) == 2 and not path.is_absolute() and path.parts[0] not in (".", "..")
    if hub_name and path.suffix != ".pt":
        return hugging_face.on_hub(str(path))
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
    check_types({name: tensor for name, tensor in state.items() if name != "rotary_bits"}, path)
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


def _from_composer(seen: State, load: Callable[[], State], path: Path) -> Stored:
    def ours(stored: State) -> State:
        return {key.removeprefix(COMPOSER_PREFIX): tensor for key, tensor in stored.items()}

    state = ours(seen)
    try:
        num_layers = sum(key.endswith(".fc1.weight") for key in state)
        dimensions = {
            "num_layers": num_layers,
            "hidden_size": state["embed.weight"].shape[1],
            # the contact head sees every attention map: layers x heads inputs
            "num_heads": state["contact_head.weight"].shape[1] // num_layers,
            "ffn_hidden_size": state[f"{layer_name(0)}.fc1.weight"].shape[0],
        }
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a Composer checkpoint, but not of an ESM-2 ({error})") from error
    return Stored(dimensions, lambda: ours(load()))
