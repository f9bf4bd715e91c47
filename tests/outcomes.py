"""What a run of demo.yaml left behind, and what a mistake looks like."""

import subprocess
from pathlib import Path

import torch
from plot_convergence import read_events

from esm2_composer.loggers import LOSS
from esm2_composer.model import ESM2


def read_scalars(folder: Path, tag: str) -> dict[int, float]:
    """The values of `tag` by step, of all event files below `folder`; where a step was done twice, the later."""
    points = [(event.step, event.wall_time, value.simple_value) for _, event, value in read_events(folder, tag)]
    return {step: value for step, _, value in sorted(points)}


def scalars(folder: Path, tag: str) -> dict[int, float]:
    return read_scalars(folder / "runs/demo/tensorboard", tag)


def losses(folder: Path) -> dict[int, float]:
    return scalars(folder, LOSS)


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return ESM2.from_pretrained(folder / "runs/demo/checkpoints/latest-rank0.pt").state_dict()


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal to the last bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """One line that begins with "error:" and holds `words`; exit code 2; no traceback."""
    assert result.returncode == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert all(word in line for word in words), line
    assert "Traceback" not in result.stderr
