"""Recipes load as written; every mistake is a UserError that names the file and the key."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esm2_composer.errors import UserError
from esm2_composer.recipe.config import changes, load_recipe, to_yaml
from esm2_composer.recipe.schema import Recipe

RECIPES = sorted((Path(__file__).parents[1] / "yamls").glob("*.yaml"))

MINIMAL = """
run_name: tiny
max_duration: 100ba
eval_interval: 50ba
global_train_batch_size: 8
device_microbatch_tokens: 2048
save_folder: runs/tiny
model: {size: 8m, attention: auto}
data: {remote: shards, mask_split: [0.8, 0.1, 0.1]}
optimizer: {lr: 1.0e-3, eps: 1.0e-8}
schedule: {warmup: 10, floor: 0.1}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an index of each split in `shards`."""
    for split in ("train", "valid"):
        (tmp_path / "shards" / split).mkdir(parents=True)
        (tmp_path / "shards" / split / "index.json").write_text('{"version": 2, "shards": [{"samples": 2048}]}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*overrides: str, text: str = MINIMAL) -> Recipe:
    Path("tiny.yaml").write_text(text)
    return load_recipe("tiny.yaml", overrides)


def mistake(*overrides: str, text: str = MINIMAL) -> str:
    """The message of a mistake, after the name of the file."""
    with pytest.raises(UserError) as caught:
        load(*overrides, text=text)
    file, message = str(caught.value).split(": ", maxsplit=1)
    assert file == "tiny.yaml"
    return message


def assert_mistake(override: str, message: str) -> None:
    told = mistake(override)
    assert told.startswith(message)
    assert len(told.splitlines()) == 1


# What loads


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    recipe = load_recipe(str(path), ["data.remote=shards"])
    assert recipe.model.size == (None if path.stem in ("demo", "continue") else path.stem)
    assert recipe.save_folder.split("/")[:2] == ["runs", recipe.run_name]
    assert recipe.run_name in (path.stem, f"esm2_{path.stem}")


@pytest.mark.parametrize(
    ("size", "updates", "lr", "weight_decay", "warmup"),
    [
        ("8m", 500_000, 4e-4, 0.01, 2_000),
        ("35m", 500_000, 4e-4, 0.01, 2_000),
        ("150m", 500_000, 4e-4, 0.01, 2_000),
        ("650m", 500_000, 4e-4, 0.01, 2_000),
        ("3b", 500_000, 4e-4, 0.01, 20_000),
        ("15b", 270_000, 1.6e-4, 0.1, 2_000),
    ],
)
def test_recipes_have_the_published_settings(
    size: str, updates: int, lr: float, weight_decay: float, warmup: int
) -> None:
    (path,) = (path for path in RECIPES if path.stem == size)
    recipe = load_recipe(str(path), ["data.remote=shards"])
    assert (recipe.updates, recipe.schedule.warmup) == (updates, warmup)
    assert dataclasses.astuple(recipe.optimizer) == (lr, (0.9, 0.98), 1e-8, weight_decay, 1.0)
    assert (recipe.schedule.decay_fraction, recipe.schedule.floor) == (0.9, 0.1)
    assert (recipe.global_train_batch_size, recipe.data.max_length) == (2048, 1024)
    assert (recipe.data.mask_fraction, recipe.data.mask_split) == (0.15, (0.8, 0.1, 0.1))


def test_keys_left_out_have_esm2s_values() -> None:
    recipe = load()
    assert (recipe.data.max_length, recipe.data.min_length) == (1024, 1)
    assert (recipe.data.mask_fraction, recipe.data.mask_split) == (0.15, (0.8, 0.1, 0.1))
    assert (recipe.optimizer.betas, recipe.optimizer.weight_decay) == ((0.9, 0.98), 0.01)
    assert (recipe.schedule.decay_fraction, recipe.schedule.floor) == (0.9, 0.1)
    assert recipe.autoresume is True
    assert recipe.fsdp is recipe.loggers.wandb is None


@pytest.mark.parametrize("written", ["20260101_120000", "007", "12:30", "0x10", "0b11", "+17", "-0", "17", "-3"])
def test_a_name_of_digits_stays_as_it_is_written(written: str) -> None:
    recipe = load(f"run_name={written}")
    assert recipe.run_name == load(text=MINIMAL.replace("tiny", written, 1)).run_name == written
    assert load(text=to_yaml(recipe)) == recipe


def test_whole_numbers_may_be_grouped_by_underscores() -> None:
    assert load("schedule.updates=500_000", "max_duration=500000ba").schedule.updates == 500_000
    with pytest.raises(UserError, match="'seed' must be a whole number, not '1_0'"):
        load("seed=1_0")


def test_overrides_win_over_the_file_the_last_one_over_all() -> None:
    recipe = load("seed=3", "optimizer.lr=2e-4", "data.mask_split=[0.5, 0.3, 0.2]", "compile=true", "seed=4")
    assert (recipe.seed, recipe.optimizer.lr, recipe.compile) == (4, 2e-4, True)
    assert recipe.data.mask_split == (0.5, 0.3, 0.2)
    assert recipe.optimizer.eps == 1e-8, "its neighbours stay"


def test_an_override_may_make_a_section() -> None:
    recipe = load("fsdp.version=2", "loggers.wandb.project=esm2", "loggers.wandb.tags=[a, b]")
    assert recipe.fsdp is not None
    assert (recipe.fsdp.version, recipe.fsdp.sharding_strategy) == (2, "FULL_SHARD")
    assert recipe.loggers.wandb is not None
    assert (recipe.loggers.wandb.project, recipe.loggers.wandb.tags) == ("esm2", ("a", "b"))


def test_an_override_may_hold_equals_signs_and_null() -> None:
    recipe = load("run_name=lr=2", "tensorboard_folder=null")
    assert (recipe.run_name, recipe.tensorboard_folder) == ("lr=2", None)


def test_interpolation_sees_overrides_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH_OF_TEST", "/scratch")
    text = MINIMAL.replace("runs/tiny", "${oc.env:SCRATCH_OF_TEST}/${run_name}/${optimizer.lr}")
    assert load("run_name=other", text=text).save_folder == "/scratch/other/0.001"


def test_a_folder_may_lie_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    folders = ("save_folder=~/runs", "data.remote=~/shards", "data.local=~/cache", "tensorboard_folder=null")
    recipe = load(*folders, "load_path=~/run/ep0-ba9")
    assert (recipe.save_folder, recipe.data.remote) == (f"{folder}/runs", f"{folder}/shards")
    assert recipe.load_path == f"{folder}/run/ep0-ba9"
    assert (recipe.data.local, recipe.tensorboard_folder) == (f"{folder}/cache", None)
    text = MINIMAL.replace("size: 8m", "init_from: ~/hugging_face")
    assert load(text=text).model.init_from == f"{folder}/hugging_face"


def test_whole_numbers_become_floats_and_numbers_names() -> None:
    recipe = load("optimizer.weight_decay=0", "optimizer.lr=1", "run_name=17")
    assert [type(value) for value in (recipe.optimizer.weight_decay, recipe.optimizer.lr)] == [float, float]
    assert recipe.run_name == "17"


def test_dimensions_or_weights_take_the_place_of_a_size() -> None:
    sizes = dict(num_layers=2, hidden_size=64, num_heads=4, ffn_hidden_size=128)
    recipe = load("model.size=null", *(f"model.{key}={value}" for key, value in sizes.items()))
    assert recipe.model.dimensions == sizes
    assert load("model.size=null", "model.init_from=weights.pt").model.init_from == "weights.pt"


def test_shards_are_read_in_place_or_through_a_cache() -> None:
    assert load().data.split("train") == (None, "shards/train")
    assert load("data.local=cache").data.split("valid") == ("shards/valid", "cache/valid")
    stored = load("data.remote=s3://bucket/prefix", "data.local=/cache")
    assert stored.data.split("train") == ("s3://bucket/prefix/train", "/cache/train")


def test_updates_are_the_duration_in_batches() -> None:
    assert load("max_duration=12345ba").updates == 12_345


def test_the_schedule_is_laid_out_for_the_duration_unless_it_is_told() -> None:
    assert load().schedule.updates == 100
    early = load("max_duration=20ba", "schedule.updates=100")
    assert (early.updates, early.schedule.updates) == (20, 100)


def test_fsdp_2_is_given_nothing_it_would_ignore() -> None:
    assert "cannot replicate shards" in mistake("fsdp.version=2", "fsdp.data_parallel_shard_degree=2")


def test_data_need_not_be_there_to_plan(folder: Path) -> None:
    Path("tiny.yaml").write_text(MINIMAL)
    assert load_recipe("tiny.yaml", ["data.remote=/nowhere"], data_is_here=False).data.remote == "/nowhere"


def test_a_recipe_told_in_full_is_the_same_recipe(folder: Path) -> None:
    recipe = load("fsdp.version=2", "loggers.wandb.project=p", "optimizer.eps=1e-9", "run_name=17")
    assert load(text=to_yaml(recipe)) == recipe
    assert changes(to_yaml(recipe), recipe) == []


def test_limits_belong_to_the_range() -> None:
    recipe = load("schedule.warmup=99", "device_microbatch_tokens=1024", "data.mask_fraction=1", "seed=0")
    assert (recipe.schedule.warmup, recipe.device_microbatch_tokens) == (99, 1024)
    assert load("schedule.warmup=0", "data.num_workers=0", "schedule.floor=0").schedule.floor == 0


# Mistakes


@pytest.mark.parametrize("override", ["seed=???", "data.local=???", "loggers.wandb.tags=[a, '???']"])
def test_a_value_that_is_missing_is_no_override(override: str) -> None:
    told = mistake(override)
    assert told.startswith(f"override '{override.partition('=')[0]}' does not fit (")
    assert "Missing mandatory value" in told


def test_a_value_that_is_missing_in_the_file_is_to_be_given() -> None:
    text = MINIMAL.replace("tiny", "???", 1)
    assert mistake(text=text) == "'run_name': Missing mandatory value: run_name"
    assert load("run_name=given", text=text).run_name == "given"


def test_what_is_nested_too_deep_is_one_line() -> None:
    deep = f"{'[' * 2000}{']' * 2000}"
    for message in (mistake(f"seed={deep}"), mistake(text=f"{MINIMAL}seed: {deep}\n")):
        (line,) = message.splitlines()
        assert re.search("nested too deep|exceeded maximum nesting depth", line)  # ours, or PyYAML's since 6.0.4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"optimizer.lr=1{5000 * '0'}", "override 'optimizer.lr' does not fit (Exceeds the limit"),
        ("data.remote=elsewhere", "'data.remote': elsewhere: no such folder in "),
        ("data.remote=s3://bucket/prefix", "'data.remote' is s3://bucket/prefix; set 'data.local'"),
        ("data.remote=s3://", "'data.remote' is s3://; write a folder or s3://bucket/prefix"),
        ("data.remote=s3:/bucket/x", "'data.remote' is s3:/bucket/x; write a folder or s3://bucket/prefix"),
        ("schedule.warmup=100", "'schedule.warmup' is 100; it must be below schedule.updates"),
        ("max_duration=3ep", "'max_duration' is '3ep'; write a number of updates such as"),
        ("max_duration=100", "'max_duration' is '100'; write"),
        ("max_duration=1000000000ba", "'max_duration' is '1000000000ba'; write"),
        ("eval_interval=0ba", "'eval_interval' is '0ba'; write"),
        ("save_interval=5.5ba", "'save_interval' is '5.5ba'; write"),
        ("device_microbatch_tokens=1023", "'device_microbatch_tokens' is 1023; it must hold"),
        ("data.max_length=4096", "'device_microbatch_tokens' is 2048; it must hold a sequence of data.max_length"),
        ("data.mask_split=[0.8, 0.1, 0.2]", "'data.mask_split' adds up to 1.1, not 1"),
        ("data.min_length=1023", "'data.min_length' is 1023; with <cls> and <eos> that exceeds data.max_length"),
        ("data.cache_limit=many", "'data.cache_limit' is 'many'; write a size such as 200gb"),
        ("data.cache_limit=٣gb", "'data.cache_limit' is '٣gb'; write a size such as 200gb"),
        (f"data.cache_limit={'9' * 400}gb", "'data.cache_limit' is '999"),
        ("data.cache_limit=0gb", "'data.cache_limit' is '0gb'; write a size such as 200gb"),
        ("loggers.wandb.project=team/esm2", "'loggers.wandb.project' is 'team/esm2'; W&B takes at most"),
        (f"loggers.wandb.project={'p' * 129}", "'loggers.wandb.project' is 'ppp"),
        ("save_folder=/dev/null/x", "'save_folder' is /dev/null/x; it must be a folder"),
        ("save_folder=tiny.yaml", "'save_folder' is tiny.yaml; it must be a folder"),
        ("tensorboard_folder=tiny.yaml/a/b", "'tensorboard_folder' is tiny.yaml/a/b; it must be a folder"),
        ("save_folder=shards/train/runs", "'save_folder' is shards/train/runs, among the shards of data.remote"),
        ("tensorboard_folder=shards/valid", "'tensorboard_folder' is shards/valid, among the shards of"),
        ("data.local=shards/train", "'data.local' is shards/train, where the shards themselves lie"),
        ("run_name=..", "'run_name' is '..'; write a name such as a or a/b, with no part empty, . or .."),
        ("run_name=.", "'run_name' is '.'; write"),
        ("run_name=a/../../b", "'run_name' is 'a/../../b'; write"),
        ("run_name=/tmp/a", "'run_name' is '/tmp/a'; write"),
        ("run_name=a//b", "'run_name' is 'a//b'; write"),
        ("data.local=s3://bucket/cache", "'data.local' is s3://bucket/cache; it must be a folder"),
        ("data.local=/dev/null", "'data.local' is /dev/null; it must be a folder"),
        ("data.local=tiny.yaml/a/b", "'data.local' is tiny.yaml/a/b; it must be a folder"),
        ("data.cache_limit=2gb", "'data.cache_limit' is the limit of data.local, which is not set"),
        ("save_folder=gs://bucket/run", "'save_folder' is gs://bucket/run; write a folder or s3://bucket/prefix"),
        ("save_folder=s3://", "'save_folder' is s3://; write a folder or s3://bucket/prefix"),
        ("tensorboard_folder=s3://bucket/logs", "'tensorboard_folder' is s3://bucket/logs; it must be a folder"),
        ("save_folder=runs/{run_name}", "'save_folder' is runs/{run_name}, with braces; write ${run_name}"),
        ("load_path=runs/{run_name}/ep0-ba9", "'load_path' is runs/{run_name}/ep0-ba9, with braces; write"),
        ("load_path=gs://bucket/ep0-ba9", "'load_path' is gs://bucket/ep0-ba9; write a path or s3://bucket/"),
        ("load_path=s3://bucket", "'load_path' is s3://bucket; write a path or s3://bucket/prefix/checkpoint"),
        ("fsdp.data_parallel_replicate_degree=0", "'fsdp.data_parallel_replicate_degree' is 0; it must be"),
        ("fsdp.data_parallel_replicate_degree=-1", "'fsdp.data_parallel_replicate_degree' and"),
        ("fsdp.data_parallel_shard_degree=1", "'fsdp.data_parallel_shard_degree' is 1, which shards nothing"),
        ("model.num_layers=3", "'model' needs exactly one of: size, init_from"),
        ("model.init_from=weights.pt", "'model' needs exactly one of: size, init_from"),
        ("model.size=null", "'model' needs exactly one of: size, init_from"),
    ],
)
def test_a_mistake_is_one_line_with_the_key(override: str, message: str) -> None:
    assert_mistake(override, message)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("data.mask_split[0]=0.7", "data.mask_split"),
    ],
)
def test_values_that_cannot_train_are_refused(override: str, key: str) -> None:
    assert key in mistake(override)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_both_splits_must_have_shards(folder: Path, split: str) -> None:
    (folder / "shards" / split / "index.json").unlink()
    assert f"no {split} shards ({split}/index.json)" in mistake()


def test_a_split_in_place_of_its_folder_is_seen(folder: Path) -> None:
    assert "shards/train is a split itself" in mistake("data.remote=shards/train")


def test_shards_that_cannot_be_unpacked_in_their_place_need_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not bind who runs tests as root
    assert load().data.local is None  # all are unpacked
    Path("shards/valid/shard.00000.00.mds.zstd").touch()
    told = "'data.remote' is shards, where shards cannot be unpacked; set 'data.local' to a folder"
    assert mistake() == told
    assert load("data.local=cache").data.local == "cache"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shards": []}', "\\ud800"])
def test_an_index_must_be_one(folder: Path, content: str) -> None:
    (folder / "shards/valid/index.json").write_text(content)
    assert mistake() == "'data.remote' is shards, whose valid/index.json is no index of MDS shards"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_heads=0"], "'model.num_heads' is 0; it must be at least 1"),
        (["model.num_layers=-1"], "'model.num_layers' is -1; it must be at least 1"),
        (["model.num_heads=3"], "'model.hidden_size' is 64; it must be a multiple of 8 times"),
        (
            ["model.num_heads=16"],
            "'model.hidden_size' is 64; it must be a multiple of 8 times",
        ),
    ],
)
def test_dimensions_that_make_no_model_are_refused(overrides: list[str], message: str) -> None:
    sizes = ("num_layers=2", "hidden_size=64", "num_heads=4", "ffn_hidden_size=128")
    assert mistake("model.size=null", *(f"model.{size}" for size in sizes), *overrides).startswith(message)


def test_some_dimensions_without_the_others_are_refused() -> None:
    message = mistake("model.size=null", "model.num_layers=3", "model.num_heads=4")
    assert message == "'model' gives num_layers, num_heads but not hidden_size, ffn_hidden_size"


@pytest.mark.parametrize("text", ["seed: [1", "a:\n\t- b", MINIMAL + "run_name: again\n", "a: 1\n---\nb: 2"])
def test_what_is_not_yaml_is_refused(text: str) -> None:
    message = mistake(text=text)
    assert message.startswith("not YAML: ")
    assert "line" in message


def test_yaml_that_is_no_mapping_is_refused() -> None:
    assert mistake(text="- seed: 1\n- 2\n") == "a recipe is a mapping of keys, this is not"
    assert len(mistake(text="17\n").splitlines()) == 1


def test_an_empty_file_misses_its_first_key() -> None:
    assert mistake(text="") == "key 'run_name' is missing"


def test_an_interpolation_that_finds_nothing_is_told_in_plain_words() -> None:
    told = "'save_folder': the environment variable NO_SUCH_VARIABLE_OF_TEST is not set"
    assert mistake("save_folder=${oc.env:NO_SUCH_VARIABLE_OF_TEST}/runs") == told
    assert mistake("data.local=${nothing}") == "'data.local': Interpolation key 'nothing' not found"


@pytest.mark.parametrize("reference", ["${nothing}", "${oc.env:NO_SUCH_VARIABLE_OF_TEST}"])
def test_an_interpolation_that_finds_nothing_names_both_ends(reference: str) -> None:
    message = mistake(f"save_folder={reference}")
    assert "save_folder" in message
    assert reference.strip("${}").split(":")[-1] in message


def test_an_override_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match=r"^'seed' is not an override; write key=value"):
        load("run_name=a", "seed")
    with pytest.raises(UserError, match=r"^'=3' is not an override; write key=value"):
        load("=3")


def test_a_name_may_have_parts() -> None:
    assert load("run_name=group/tiny.2").run_name == "group/tiny.2"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.yaml", "no such recipe$"),
        ("shards", "not a regular file$"),
        ("pipe", "not a regular file$"),
        ("loop", ".*symbolic links"),
        ("binary.yaml", ".*utf-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(folder: Path, name: str, reason: str) -> None:
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    with pytest.raises(UserError, match=f"^{name}: {reason}"):
        load_recipe(name)


@pytest.mark.parametrize("text", [MINIMAL, MINIMAL + "sead: 3\n"])
def test_a_recipe_is_checked_without_importing_torch_or_composer(text: str) -> None:
    Path("tiny.yaml").write_text(text)
    program = """
import sys
from esm2_composer.recipe.config import load_recipe
from esm2_composer.errors import UserError
try:
    print(load_recipe("tiny.yaml").run_name)
except UserError as error:
    print(error)
print([name for name in ("torch", "composer", "streaming", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told, imported = done.stdout.splitlines()
    assert told.startswith("tiny")
    assert imported == "[]"


def test_a_loaded_recipe_cannot_be_changed() -> None:
    recipe: Any = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 4


def test_fp8_goes_with_bf16_only() -> None:
    assert load("fp8=true").fp8
    assert mistake("fp8=true", "precision=fp32") == "'fp8' is true and 'precision' fp32; it needs amp_bf16"


@pytest.mark.parametrize("attention", ["torch", "flash"])
def test_a_kernel_of_16_bits_does_not_go_with_fp32(attention: str) -> None:
    assert mistake(f"model.attention={attention}", "precision=fp32") == (
        f"'model.attention' is {attention}, which computes in 16 bits, and 'precision' is fp32"
    )


@pytest.mark.parametrize("local", ["{}", "{}/", "{}/train/..", "link"])
def test_a_cache_in_the_shards_own_folder_is_refused(tmp_path: Path, monkeypatch: Any, local: str) -> None:
    """Streaming would take the packed shards for copies of its own, and remove them once unpacked."""
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(tmp_path / "packed")
    for split in ("train", "valid"):
        Path("packed", split).mkdir(parents=True)
        Path("packed", split, "index.json").write_text('{"shards": [1]}')
    overrides = [f"data.remote={tmp_path}/packed", f"data.local={local.format('packed')}"]
    Path("tiny.yaml").write_text(MINIMAL)
    with pytest.raises(
        UserError, match=r"'data\.local' is \S+, where the shards themselves lie and would be lost"
    ):
        load_recipe("tiny.yaml", overrides)


def test_a_slash_at_the_end_of_a_remote_is_none_of_its_name() -> None:
    assert load("data.remote=s3://bucket/prefix/", "data.local=/cache").data.split("train") == (
        "s3://bucket/prefix/train",
        "/cache/train",
    )
