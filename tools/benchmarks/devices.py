"""What a benchmark measures on."""

from __future__ import annotations

import argparse

import torch


def add_device_argument(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--device; by default a GPU if there is one."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=_present, choices=("cpu", "cuda"), default=default or best, help="(%(default)s)"
    )


def _present(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("no GPU here")
    return device
