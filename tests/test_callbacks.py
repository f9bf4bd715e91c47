"""What Composer's own loggers would do wrong on resuming."""

import pytest

from esm2_composer.callbacks import ProgressBar, Wandb


def test_the_progress_bar_leaves_nothing_in_a_checkpoint_and_takes_nothing_from_one():
    bar = ProgressBar()
    assert bar.state_dict() == {}
    bar.load_state_dict({"train_pbar": {"n": 3}})
    assert bar.train_pbar is None


def test_wandb_has_no_checkpoints_to_resume_from():
    with pytest.raises(FileNotFoundError, match="latest"):
        Wandb(project="none").download_file("latest-rank0.pt", "here")
