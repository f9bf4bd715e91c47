"""A recipe, read from YAML with overrides, and checked before anything heavy is imported.

An unknown key, a wrong type or an impossible value is a `UserError` that names the file, the key and what would be
valid. This module imports neither torch nor Composer.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.omegaconf import get_yaml_loader

from esm2_composer.addresses import is_remote, lies_in, names_bucket
from esm2_composer.data.splits import (
    SPLITS,
    cache_problem,
    can_be_folder,
    cannot_be_unpacked,
    count_clusters,
    lacking,
)
from esm2_composer.errors import UserError
from esm2_composer.files import refuse_irregular
from esm2_composer.recipe.schema import DataSection, FSDPSection, ModelSection, Recipe, batches
from esm2_composer.recipe.strict import build

T = TypeVar("T")


# What may differ between a checkpoint and the run that resumes it; every other key decides what is trained. A new
# key of `schema` must be added here unless it does.
MAY_CHANGE = (
    "run_name",
    "max_duration",
    "eval_interval",
    "device_microbatch_tokens",
    "precision",
    "compile",
    "fp8",
    "save_folder",
    "save_interval",
    "save_num_checkpoints_to_keep",
    "autoresume",
    "tensorboard_folder",
    "model.attention",
    "data.remote",
    "data.local",
    "data.cache_limit",
    "data.num_workers",
    "fsdp",
    "loggers",
    "callbacks",
)
# What may differ in a run that branches off: the model and the order of clusters are the checkpoint's.
BRANCH_MAY_CHANGE = (*MAY_CHANGE, "load_path", "optimizer", "schedule", "data")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, with every key, as a file that `load_recipe` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)))


def changes(before: str, recipe: Recipe, may_change: Sequence[str] = MAY_CHANGE) -> list[str]:
    """What the recipe would train differently from `before`, another's `to_yaml`, as "key was 1, is 2".

    A key that `before` does not have, as of an earlier version, counts as null.
    """
    old, new = (flatten(OmegaConf.to_container(OmegaConf.create(text))) for text in (before, to_yaml(recipe)))
    return [
        f"{key} was {old.get(key, 'not set')}, is {new[key]}"
        for key in new
        if old.get(key) != new[key] and not any(key == f or key.startswith(f"{f}.") for f in may_change)
    ]


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's values by full key, as overrides name them: {"data.replacement": "amino_acids", ...}."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        values |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


def load_recipe(path: str, overrides: Sequence[str] = (), data_is_here: bool = True) -> Recipe:
    """Read the recipe at `path`, apply `key.subkey=value` overrides, check it.

    Only decimal numbers are numbers, unlike in YAML 1.1. `${other.key}`, `${oc.env:VARIABLE}` and a folder's `~`
    are resolved. Files and folders are checked if `data_is_here`.

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    refuse_irregular(Path(path))
    try:
        with open(path, encoding="utf-8") as file:
            content = _yaml(file)
        if not isinstance(content, dict | None):
            raise UserError(f"{path}: a recipe is a mapping of keys, this is not")
        content = OmegaConf.create(content or {})
        for override in overrides:
            content = _override(content, override, path)
        content = OmegaConf.to_container(content, resolve=True, throw_on_missing=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except OmegaConfBaseException as error:  # some are ValueErrors, too
        raise UserError(f"{path}: {_reason(error)}") from error
    except (yaml.YAMLError, ValueError) as error:  # not text, or a number of thousands of digits
        raise UserError(f"{path}: not YAML: {error}") from error
    except RecursionError:
        raise UserError(f"{path}: nested too deep, in the file or an override") from None
    except OSError as error:
        raise UserError(f"{path}: {error}") from error
    recipe = _with_home(build(Recipe, content, path))
    if recipe.schedule.updates is None:
        recipe = replace(recipe, schedule=replace(recipe.schedule, updates=recipe.updates))
    if problem := next(_problems(recipe, data_is_here), None):
        raise UserError(f"{path}: {problem}")
    return recipe


def _yaml(text: str | TextIO) -> Any:
    """Parse YAML, but keep its non-decimal integers as text: 007, 12:30, 0x10, 20260101_120000."""
    loader = get_yaml_loader()
    integer = "tag:yaml.org,2002:int"
    for resolvers in loader.yaml_implicit_resolvers.values():
        resolvers[:] = [each for each in resolvers if each[0] != integer]
    loader.add_implicit_resolver(integer, re.compile(r"(?:0|-?[1-9][0-9]*)$"), list("-0123456789"))
    return yaml.load(text, Loader=loader)


def _with_home(recipe: Recipe) -> Recipe:
    """The recipe with `~` in its folders expanded: no shell does that in a file, nor reliably in key=value."""

    def expand(section: T, *keys: str) -> T:
        given = {key: getattr(section, key) for key in keys}
        return replace(section, **{key: value and os.path.expanduser(value) for key, value in given.items()})

    return replace(
        expand(recipe, "save_folder", "tensorboard_folder", "load_path"),
        data=expand(recipe.data, "remote", "local"),
        model=expand(recipe.model, "init_from"),
    )


def _reason(error: OmegaConfBaseException) -> str:
    """OmegaConf's message, without the lines about its own objects."""
    text = str(error).partition("\n")[0]
    if variable := re.search(r"Environment variable '(.*)' not found", text):
        text = f"the environment variable {variable[1]} is not set"
    return f"'{error.full_key}': {text}" if error.full_key else text


def _override(content: DictConfig, override: str, path: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not (key and equals):
        raise UserError(f"'{override}' is not an override; write key=value or key.subkey=value")
    given = OmegaConf.create()
    try:
        OmegaConf.update(given, key, _yaml(value))
        OmegaConf.to_container(given, throw_on_missing=True)  # a merge would skip ???
        return OmegaConf.merge(content, given)
    except (TypeError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = _reason(error) if isinstance(error, OmegaConfBaseException) else error
        raise UserError(
            f"{path}: override '{key}' does not fit ({reason}); a list is given whole, as key=[a,b]"
        ) from error


def _problems(r: Recipe, data_is_here: bool) -> Iterator[str]:
    """What is wrong with values that each have the right type and range."""
    for key in ("max_duration", "eval_interval", "save_interval"):
        if not batches(getattr(r, key)):
            yield f"'{key}' is {getattr(r, key)!r}; write a number of updates such as 1000ba"
    if r.data.min_length > r.data.max_length - 2:
        yield f"'data.min_length' is {r.data.min_length}; with <cls> and <eos> that exceeds data.max_length"
    if (wandb := r.loggers.wandb) and (len(wandb.project) > 128 or re.search(r"[/\\#?%:]", wandb.project)):
        yield (
            f"'loggers.wandb.project' is {wandb.project!r}; W&B takes at most 128 characters, "
            "and none of / \\ # ? % :"
        )
    if any(part in ("", ".", "..") for part in r.run_name.split("/")):
        yield f"'run_name' is {r.run_name!r}; write a name such as a or a/b, with no part empty, . or .."
    if r.data.cache_limit is not None:
        limit = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:kb|mb|gb|tb)", r.data.cache_limit)
        if not limit or not float(limit[1]):
            yield f"'data.cache_limit' is {r.data.cache_limit!r}; write a size such as 200gb"
        if r.data.local is None:
            yield "'data.cache_limit' is the limit of data.local, which is not set"
    if abs(sum(r.data.mask_split) - 1) > 1e-6:
        yield f"'data.mask_split' adds up to {sum(r.data.mask_split):g}, not 1"
    if r.schedule.warmup >= r.schedule.updates:
        yield (
            f"'schedule.warmup' is {r.schedule.warmup}; it must be below schedule.updates "
            f"(by default max_duration), {r.schedule.updates}"
        )
    if r.device_microbatch_tokens < r.data.max_length:
        yield (
            f"'device_microbatch_tokens' is {r.device_microbatch_tokens}; "
            f"it must hold a sequence of data.max_length, {r.data.max_length}"
        )
    if is_remote(r.save_folder) and not re.match(r"s3://[^/]+", r.save_folder):
        yield f"'save_folder' is {r.save_folder}; write a folder or s3://bucket/prefix"
    if r.tensorboard_folder is not None and is_remote(r.tensorboard_folder):
        yield f"'tensorboard_folder' is {r.tensorboard_folder}; it must be a folder, not in a store"
    if r.load_path is not None and is_remote(r.load_path) and not re.match(r"s3://[^/]+/", r.load_path):
        yield f"'load_path' is {r.load_path}; write a path or s3://bucket/prefix/checkpoint"
    for key, path in (("save_folder", r.save_folder), ("load_path", r.load_path or "")):
        if re.search("[{}]", path):  # Composer would fill them in
            yield f"'{key}' is {path}, with braces; write ${{run_name}} for the name of the run"
    if r.fp8 and r.precision != "amp_bf16":
        yield f"'fp8' is true and 'precision' {r.precision}; it needs amp_bf16"
    if r.model.attention in ("triton", "torch", "flash") and r.precision == "fp32":
        yield f"'model.attention' is {r.model.attention}, which computes in 16 bits, and 'precision' is fp32"
    if r.fsdp is not None:
        yield from _fsdp_problems(r.fsdp)
    yield from _model_problems(r.model)
    if data_is_here:
        yield from _data_problems(r.data, r.global_train_batch_size)
        for key, folder in (("save_folder", r.save_folder), ("tensorboard_folder", r.tensorboard_folder)):
            if folder is None:
                continue
            if not is_remote(folder) and not can_be_folder(Path(folder)):
                yield f"'{key}' is {folder}; it must be a folder"
            if any(lies_in(folder, f"{r.data.remote}/{split}") for split in SPLITS):
                yield f"'{key}' is {folder}, among the shards of data.remote; take another folder"


def _fsdp_problems(fsdp: FSDPSection) -> Iterator[str]:
    replicate, shard = fsdp.data_parallel_replicate_degree, fsdp.data_parallel_shard_degree
    for key, degree in (("data_parallel_replicate_degree", replicate), ("data_parallel_shard_degree", shard)):
        if degree is not None and degree != -1 and degree < 1:
            yield f"'fsdp.{key}' is {degree}; it must be at least 1, or -1 for what the other one leaves"
    if shard == 1:
        yield "'fsdp.data_parallel_shard_degree' is 1, which shards nothing; leave it out, or set fsdp=null"
    if replicate == shard == -1:
        yield "'fsdp.data_parallel_replicate_degree' and 'fsdp.data_parallel_shard_degree' are both -1; set one"
    if fsdp.version == 2 and (replicate, shard) != (None, -1):
        yield "'fsdp.version' is 2, which cannot replicate shards; leave out the data_parallel degrees"


def _model_problems(model: ModelSection) -> Iterator[str]:
    given = [name for name, value in model.dimensions.items() if value is not None]
    sources = [model.size is not None, bool(given), model.init_from is not None]
    if sum(sources) != 1:
        yield (
            "'model' needs exactly one of: size, init_from, "
            "or all of num_layers, hidden_size, num_heads, ffn_hidden_size"
        )
    if given and len(given) < len(model.dimensions):
        absent = ", ".join(name for name in model.dimensions if name not in given)
        yield f"'model' gives {', '.join(given)} but not {absent}"
        return
    if given and model.hidden_size % (8 * model.num_heads):
        yield (
            f"'model.hidden_size' is {model.hidden_size}; it must be a multiple of 8 times model.num_heads, "
            f"{8 * model.num_heads}: attention kernels need that"
        )


def _data_problems(data: DataSection, batch: int) -> Iterator[str]:
    if data.local is not None and (problem := cache_problem(data.remote, data.local)):
        yield f"'data.local' is {problem}"
    if is_remote(data.remote):
        if not names_bucket(data.remote):
            yield f"'data.remote' is {data.remote}; write a folder or s3://bucket/prefix"
        if data.local is None:
            yield f"'data.remote' is {data.remote}; set 'data.local' to a folder for its cache"
        return
    for split in SPLITS:
        folder = Path(data.remote) / split
        if lack := lacking(data.remote, split):
            yield f"'data.remote': {lack}"
        elif not (clusters := count_clusters((folder / "index.json").read_bytes())):
            yield f"'data.remote' is {data.remote}, whose {split}/index.json is no index of MDS shards"
        elif split == "train" and clusters < batch:
            yield f"{folder} holds {clusters} clusters, fewer than one global_train_batch_size of {batch}"
        elif data.local is None and cannot_be_unpacked(folder):
            yield f"'data.remote' is {data.remote}, where shards cannot be unpacked; set 'data.local' to a folder"
