"""The host's time that FSDP adds per layer, forward and backward, by the number of layers that it shards together.

A narrow model on one short sequence, so that a host does little else; one rank of several, which exchange nothing
(torch's fake process group). The model without FSDP is subtracted. Network, and GPU, are not measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.devices import add_device_argument
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore

from esm2_composer import model
from esm2_composer.command import in_range
from esm2_composer.model import ESM2, ESM2Config

LAYERS, TOKENS, WARMUP = 24, 8, 5
STRATEGIES = ("SHARD_GRAD_OP", "FULL_SHARD")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_argument(parser, default="cpu")
    parser.add_argument("--ranks", type=in_range(int, 2), default=64, help="(%(default)s)")
    parser.add_argument(
        "--together", type=in_range(int, 1, LAYERS), nargs="+", default=[1, 2, 3, 4, 6], help="layers (1 2 3 4 6)"
    )
    parser.add_argument("--steps", type=in_range(int, 1), default=40, help="of each that count (%(default)s)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.ranks)
    cases = [
        (version, strategy, together)
        for version in (1, 2)
        for strategy in STRATEGIES
        for together in args.together
    ]
    units, steps = {}, {}
    for case in (None, *cases):
        units[case], steps[case] = make_step(args.device, *(case or ()))
    seconds: dict[Any, list[float]] = {case: [] for case in steps}
    for _ in range(WARMUP + args.steps):
        for case, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[case].append(time.perf_counter() - start)
            if args.device == "cuda":
                torch.cuda.synchronize()
    medians = {case: statistics.median(each[WARMUP:]) / LAYERS for case, each in seconds.items()}
    dist.destroy_process_group()
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "ranks": args.ranks,
        "steps": args.steps,
        "seconds_of_a_layer": medians[None],
        "by_sharding": [
            {
                "version": version,
                "strategy": strategy,
                "layers_together": together,
                "units": units[version, strategy, together],
                "seconds_besides": medians[version, strategy, together] - medians[None],
            }
            for version, strategy, together in cases
        ],
    }


def make_step(
    device: str, version: int | None = None, strategy: str = "", together: int = 1
) -> tuple[int, Callable[[], None]]:
    """How many units a model's layers are, and its forward and backward pass, sharded as recipes shard it, or
    unsharded."""
    model.LAYERS_OF_A_GROUP = together
    net = ESM2(ESM2Config(LAYERS, 32, 1, 64)).to(device)
    sharded: torch.nn.Module = net
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # a CPU computes long in bf16
    if version == 1:
        sharded = FullyShardedDataParallel(
            net,
            sharding_strategy=ShardingStrategy[strategy],
            auto_wrap_policy=CustomPolicy(net.fsdp_wrap_fn),
            mixed_precision=MixedPrecision(dtype, torch.float32, dtype),
            device_id=torch.device(device),
            use_orig_params=True,
        )
    elif version == 2:
        mesh, policy = (
            init_device_mesh(device, (dist.get_world_size(),)),
            MixedPrecisionPolicy(dtype, torch.float32),
        )
        for module in (*net.groups, net):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=strategy == "FULL_SHARD")
    tokens = torch.full((TOKENS,), 5, device=device)
    ends = torch.tensor([0, TOKENS], dtype=torch.int32, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = sharded(tokens, ends, TOKENS).float().sum()
        loss.backward()
        for parameter in sharded.parameters():
            parameter.grad = None

    return sum(net.fsdp_wrap_fn(module) for module in net.modules()), step


def table(result: dict[str, Any]) -> str:
    together = sorted({row["layers_together"] for row in result["by_sharding"]})
    lines = [
        f"{result['device']}, torch {result['torch']}, one of {result['ranks']} ranks: {result['steps']} steps, "
        f"{1000 * result['seconds_of_a_layer']:.2f} ms of a layer without FSDP, and with it, in ms besides",
        f"{'layers sharded together':30}" + "".join(f"{n:8}" for n in together),
    ]
    for version in (1, 2):
        for strategy in STRATEGIES:
            rows = [r for r in result["by_sharding"] if (r["version"], r["strategy"]) == (version, strategy)]
            cells = "".join(f"{1000 * row['seconds_besides']:8.2f}" for row in rows)
            lines.append(f"{f'version {version}, {strategy}':30}{cells}")
    return "\n".join(lines)
