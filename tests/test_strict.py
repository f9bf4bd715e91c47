"""recipe/strict.py: an unknown key, one left out, and a value of another type are each one line with the key."""

from __future__ import annotations

import pytest
from test_config import MINIMAL, assert_mistake, folder, mistake  # noqa: F401


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sead=3", "unknown key 'sead'; did you mean 'seed'?"),
        ("optimiser.lr=3", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("data.max_lenght=9", "unknown key 'data.max_lenght'; did you mean 'data.max_length'?"),
        ("loggers.wandb.projekt=a", "unknown key 'loggers.wandb.projekt'; did you mean 'loggers.wandb.project'?"),
        ("lr=1e-4", "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        ("schedule.betas=1", "unknown key 'schedule.betas'; did you mean 'optimizer.betas'?"),
        ("17=3", "unknown key '17'; known here: run_name, max_duration, eval_interval, global_train_batch_size, "),
        ("schedule.zzz=1", "unknown key 'schedule.zzz'; known here: warmup, decay_fraction, floor"),
        ("seed=true", "'seed' must be a whole number, not True"),
        ("seed=010", "'seed' must be a whole number, not '010'"),
        ("global_train_batch_size=1_0", "'global_train_batch_size' must be a whole number, not '1_0'"),
        ("seed=1.5", "'seed' must be a whole number, not 1.5"),
        ("data.num_workers=four", "'data.num_workers' must be a whole number, not 'four'"),
        ("optimizer.lr=fast", "'optimizer.lr' must be a number, not 'fast'"),
        (f"optimizer.lr=1{400 * '0'}", "'optimizer.lr' is too large a number"),
        ("optimizer.lr=true", "'optimizer.lr' must be a number, not True"),
        ("optimizer.lr=null", "'optimizer.lr' must be a number, not None"),
        ("compile=1", "'compile' is 1; allowed: true, false, auto"),
        ("compile=always", "'compile' is 'always'; allowed: true, false, auto"),
        ("fp8=1", "'fp8' must be true or false, not 1"),
        ("run_name=[a]", "'run_name' must be a string, not ['a']"),
        ("data.mask_split=0.8", "'data.mask_split' must be a list of 3 values, not 0.8"),
        ("data.mask_split=[0.8, 0.2]", "'data.mask_split' must be a list of 3 values, not [0.8, 0.2]"),
        ("optimizer.betas=[0.9, b]", "'optimizer.betas[1]' must be a number, not 'b'"),
        ("data=shards", "'data' must be a mapping of keys, not 'shards'"),
        ("model.size=9m", "'model.size' is '9m'; allowed: 8m, 35m, 150m, 650m, 3b, 15b"),
        ("precision=amp_bf61", "'precision' is 'amp_bf61'; allowed: fp32, amp_bf16; did you mean"),
        ("fsdp.version='2'", "'fsdp.version' is '2'; allowed: 1, 2, without quotes"),
        ("compile='true'", "'compile' is 'true'; allowed: true, false, auto, without quotes"),
        ("fsdp.version=true", "'fsdp.version' is True; allowed: 1, 2"),
        ("loggers.wandb.entity=us", "key 'loggers.wandb.project' is missing"),
    ],
)
def test_a_key_or_a_type_that_is_none_is_one_line_with_the_key(override: str, message: str) -> None:
    assert_mistake(override, message)


def test_a_value_is_not_taken_for_a_key() -> None:
    assert mistake("precision=lr") == "'precision' is 'lr'; allowed: fp32, amp_bf16"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("run_name: tiny\n", "run_name"),
        ("max_duration: 100ba\n", "max_duration"),
        ("data: {remote: shards, mask_split: [0.8, 0.1, 0.1]}\n", "data"),
        ("remote: shards, ", "data.remote"),
        ("lr: 1.0e-3, ", "optimizer.lr"),
        ("warmup: 10, ", "schedule.warmup"),
    ],
)
def test_a_required_key_left_out_is_named(line: str, key: str) -> None:
    assert line in MINIMAL
    assert mistake(text=MINIMAL.replace(line, "")) == f"key '{key}' is missing"


def test_an_unknown_key_of_the_file_is_named() -> None:
    assert mistake(text=MINIMAL + "model_size: 8m\n").startswith("unknown key 'model_size'")
