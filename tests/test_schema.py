"""recipe/schema.py: every key has its range, and is never empty text."""

from __future__ import annotations

import pytest
from test_config import assert_mistake, folder  # noqa: F401


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            'loggers.wandb={project: p, group: "a\\0"}',
            "'loggers.wandb.group' is 'a\\x00'; leave out what cannot be",
        ),
        (
            "callbacks.best_checkpoints=2147483648",
            "'callbacks.best_checkpoints' is 2147483648; it must be at most",
        ),
        ("data.mask_split=[1.2, -0.1, -0.1]", "'data.mask_split[0]' is 1.2; it must be at most 1"),
        ("data.mask_fraction=1.01", "'data.mask_fraction' is 1.01; it must be at most 1"),
        ("run_name=''", "'run_name' is empty"),
        ("loggers.wandb.project=''", "'loggers.wandb.project' is empty"),
        ("loggers.wandb={project: p, tags: [a, '']}", "'loggers.wandb.tags[1]' is empty"),
        ('run_name="a\\nb"', "'run_name' is 'a\\nb'; leave out what cannot be printed"),
        ('save_folder="a\\0b"', "'save_folder' is 'a\\x00b'; leave out"),
        ('tensorboard_folder="a\\0b"', "'tensorboard_folder' is 'a\\x00b'; leave out"),
        ('data.local="a\\0b"', "'data.local' is 'a\\x00b'; leave out"),
        ('data.remote="a\\0b"', "'data.remote' is 'a\\x00b'; leave out"),
        ("save_folder=''", "'save_folder' is empty"),
        ("data.local=' '", "'data.local' is empty"),
        ("data.max_length=2147483648", "'data.max_length' is 2147483648; it must be at most 2147483647"),
        ("device_microbatch_tokens=9999999999", "'device_microbatch_tokens' is 9999999999; it must be at most"),
        ("data.mask_fraction=0", "'data.mask_fraction' is 0.0; it must be above 0"),
        ("data.min_length=0", "'data.min_length' is 0; it must be at least 1"),
        ("data.max_length=7", "'data.max_length' is 7; it must be at least 8"),
        ("data.num_workers=-1", "'data.num_workers' is -1; it must be at least 0"),
        ("data.num_workers=1025", "'data.num_workers' is 1025; it must be at most 1024"),
        ("schedule.warmup=-1", "'schedule.warmup' is -1; it must be at least 0"),
        ("schedule.decay_fraction=0", "'schedule.decay_fraction' is 0.0; it must be above 0"),
        ("schedule.floor=1.1", "'schedule.floor' is 1.1; it must be at most 1"),
        ("optimizer.lr=0", "'optimizer.lr' is 0.0; it must be above 0"),
        ("optimizer.clip_norm=-1", "'optimizer.clip_norm' is -1.0; it must be above 0"),
        ("global_train_batch_size=0", "'global_train_batch_size' is 0; it must be at least 1"),
        ("global_train_batch_size=2147483648", "'global_train_batch_size' is 2147483648; it must be at most"),
        ("schedule.updates=2147483648", "'schedule.updates' is 2147483648; it must be at most 2147483647"),
        ("schedule.updates=0", "'schedule.updates' is 0; it must be at least 1"),
        ("save_num_checkpoints_to_keep=0", "'save_num_checkpoints_to_keep' is 0; it must be at least 1"),
        ("seed=-1", "'seed' is -1; it must be at least 0"),
        ("seed=2147483648", "'seed' is 2147483648; it must be at most 2147483647"),
        ("optimizer.eps=0", "'optimizer.eps' is 0.0; it must be above 0"),
        ("optimizer.weight_decay=-0.1", "'optimizer.weight_decay' is -0.1; it must be at least 0"),
        ("callbacks.best_checkpoints=-1", "'callbacks.best_checkpoints' is -1; it must be at least 0"),
        ("save_num_checkpoints_to_keep=2147483648", "'save_num_checkpoints_to_keep' is 2147483648; it must be"),
        ("callbacks.max_loss_rise=0", "'callbacks.max_loss_rise' is 0.0; it must be above 0"),
        ("tensorboard_folder=''", "'tensorboard_folder' is empty"),
        ("optimizer.betas=[1.0, 0.98]", "'optimizer.betas[0]' is 1.0; it must be below 1"),
        ("optimizer.betas=[0.9, -0.1]", "'optimizer.betas[1]' is -0.1; it must be at least 0"),
        ("schedule.floor=-0.1", "'schedule.floor' is -0.1; it must be at least 0"),
        ("model.num_layers=0", "'model.num_layers' is 0; it must be at least 1"),
    ],
)
def test_a_value_out_of_its_range_is_one_line_with_the_key(override: str, message: str) -> None:
    assert_mistake(override, message)
