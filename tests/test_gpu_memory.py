"""gpu_memory.py: PyTorch extends what it has allocated; too little room on a GPU is one line, with what to do."""

import os
import subprocess
import sys

import pytest
import torch

from esm2_composer.command import run_command
from esm2_composer.errors import UserError
from esm2_composer.gpu_memory import naming_lack

ALLOCATION = "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(
    ("theirs", "found"),
    [
        ({}, "expandable_segments:True"),
        ({ALLOCATION: "max_split_size_mb:512"}, "max_split_size_mb:512"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, None),  # torch would take ours, and not this
    ],
)
def test_memory_on_gpus_grows_unless_the_user_has_it_otherwise(monkeypatch, theirs, found):
    for name in (ALLOCATION, "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # to be given back
        monkeypatch.delenv(name)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=r"^0$"):
        run_command(lambda: 0)
    assert os.environ.get(ALLOCATION) == found


ALLOCATE = """
import torch
from esm2_composer.command import run_command

def main() -> None:
    torch.ones(1, device="cuda")
    print(torch.cuda.memory_snapshot()[0]["is_expandable"])

run_command(main)
"""


@pytest.mark.gpu
def test_on_a_gpu_memory_grows(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for name in (ALLOCATION, "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


FULL = (  # as torch 2.7 tells it
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is "
    "free. Of the allocated memory 76.50 GiB is allocated by PyTorch, and 1.02 GiB is reserved by PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting ..."
)


def test_a_gpu_without_room_is_told_with_the_remedy():
    with pytest.raises(UserError) as told, naming_lack("take less"):
        raise torch.OutOfMemoryError(FULL)
    line = str(told.value)
    assert line.startswith("a GPU has no room; take less (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    assert line.endswith("1.02 GiB is reserved by PyTorch but unallocated.)")


def test_another_error_is_left_as_it_is():
    with pytest.raises(RuntimeError, match="mine"), naming_lack("take less"):
        raise RuntimeError("mine")


@pytest.mark.gpu
def test_on_a_gpu_too_little_room_is_told_with_the_remedy():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    told = r"^a GPU has no room; take less \(CUDA out of memory\. .*\)$"
    with pytest.raises(UserError, match=told), naming_lack("take less"):
        torch.empty(2**45, device="cuda")
