"""The GPUs that runs are planned for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Peak dense bf16 operations a second; memory, bytes; bytes a second that a GPU sends to others in its node,
    and that it sends to other nodes, with a network port for each GPU; and whether Triton has too few registers
    there for heads of more than 64, so that torch computes the layers (see `attention`)."""

    flops: float
    memory: float
    node_link: float
    network: float
    spills: bool = False


GPUS = {
    "a100": GPU(312e12, 80e9, 300e9, 25e9, spills=True),
    "h100": GPU(989e12, 80e9, 450e9, 50e9),
    "h200": GPU(989e12, 141e9, 450e9, 50e9),
    "b200": GPU(2250e12, 180e9, 900e9, 50e9),
}
NODE = 8  # GPUs in a node


def gpu_named(device_name: str) -> GPU | None:
    """The GPU that CUDA's name of a device, such as "NVIDIA H100 80GB HBM3", tells of; None if it is not here."""
    return next((gpu for name, gpu in GPUS.items() if name in device_name.lower()), None)
