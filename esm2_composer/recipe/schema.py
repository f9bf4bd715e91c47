"""The YAML schema: a recipe's keys, with their types, ranges and defaults.

A recipe's keys are the fields below; `strict` builds them, `config` checks combinations of them. Every key is
explained in the recipes, yamls/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from esm2_composer.errors import UserError

MAX_INT = 2**31 - 1  # token offsets are int32, and each rank adds its number to the seed

Count = Annotated[int, Ge(0), Le(MAX_INT)]
PositiveInt = Annotated[int, Ge(1), Le(MAX_INT)]
PositiveFloat = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
Beta = Annotated[float, Ge(0), Lt(1)]


def batches(duration: str) -> int:
    """The number of updates in a duration, 1000 for "1000ba"; 0 if it is not a duration."""
    match = re.fullmatch(r"([1-9]\d{0,8})ba", duration)
    return int(match[1]) if match else 0


@dataclass(frozen=True)
class ModelSection:
    """For `architecture.build_model`: a size, all dimensions, or weights; `attention` for `select_attention`."""

    size: Literal["8m", "35m", "150m", "650m", "3b", "15b"] | None = None
    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    ffn_hidden_size: PositiveInt | None = None
    attention: Literal["auto", "cpu", "triton", "torch", "flash"] = "auto"
    init_from: str | None = None

    @property
    def dimensions(self) -> dict[str, int | None]:
        names = ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class DataSection:
    """Where shards are and how they are read, for `loaders`; the rest for `ClusterDraw` and `MaskingRule`."""

    remote: str
    local: str | None = None
    cache_limit: str | None = None
    num_workers: Annotated[int, Ge(0), Le(1024)] = 4
    max_length: Annotated[int, Ge(8), Le(MAX_INT)] = 1024
    min_length: PositiveInt = 1
    mask_fraction: PositiveFraction = 0.15
    mask_split: tuple[Fraction, Fraction, Fraction] = (0.8, 0.1, 0.1)
    replacement: Literal["amino_acids", "all_tokens"] = "amino_acids"

    def split(self, name: str) -> tuple[str | None, str]:
        """(remote, local) of a split; remote is None where the shards are read in place."""
        remote = f"{self.remote.rstrip('/')}/{name}"
        return (None, remote) if self.local is None else (remote, f"{self.local}/{name}")


@dataclass(frozen=True)
class OptimizerSection:
    """For `optim.build_adamw`; `clip_norm` for `callbacks.GradientClipping`."""

    lr: PositiveFloat
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.01
    clip_norm: PositiveFloat = 1.0


@dataclass(frozen=True)
class ScheduleSection:
    """For `optim.build_schedule`."""

    warmup: Count
    decay_fraction: PositiveFraction = 0.9
    floor: Fraction = 0.1
    updates: PositiveInt | None = None  # max_duration's, once the recipe is loaded


@dataclass(frozen=True)
class FSDPSection:
    """Of version 1, which needs GPUs, passed to Composer as they are, except `activation_checkpointing`, which is
    the model's; of version 2, which runs anywhere, as `fsdp.fsdp_options` says."""

    version: Literal[1, 2] = 1
    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP"] = "FULL_SHARD"
    data_parallel_shard_degree: int = -1
    data_parallel_replicate_degree: int | None = None
    mixed_precision: Literal["DEFAULT", "FULL"] = "DEFAULT"
    activation_checkpointing: Literal[True, False, "selective"] = False
    sync_module_states: bool = False
    state_dict_type: Literal["full", "sharded"] = "full"

    @property
    def fewest_ranks(self) -> int:
        """The smallest number of ranks that the data_parallel degrees allow.

        A replica needs two ranks or more: with one, torch shards nothing and averages gradients only within the
        replica, so replicas would train apart.
        """
        copies, shards = self.data_parallel_replicate_degree or 1, self.data_parallel_shard_degree
        if shards == -1:
            return 2 * copies if copies > 1 else 1
        return max(copies, 1) * shards

    @property
    def takes_multiples(self) -> bool:
        return -1 in (self.data_parallel_replicate_degree, self.data_parallel_shard_degree)

    def check_degrees(self, ranks: int) -> None:
        """Raise a UserError if shards times replicas are not the number of ranks."""
        copies, shards = self.data_parallel_replicate_degree, self.data_parallel_shard_degree
        each = ranks // (copies or 1) if shards == -1 else shards  # of a copy
        number = ranks // each if copies == -1 else copies or 1
        if number * each != ranks or each == 1 < number:
            raise UserError(
                f"fsdp.data_parallel_replicate_degree {copies} times data_parallel_shard_degree {shards} does not "
                f"make the {ranks} ranks, two or more to a copy"
            )


@dataclass(frozen=True)
class WandbSection:
    """Passed to Composer's W&B logger."""

    project: str
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoggersSection:
    wandb: WandbSection | None = None


@dataclass(frozen=True)
class CallbacksSection:
    """For `CheckpointSaver` and `Divergence`."""

    best_checkpoints: Count = 0
    max_loss_rise: PositiveFloat | None = 0.5


@dataclass(frozen=True)
class Recipe:
    run_name: str
    max_duration: str
    eval_interval: str
    global_train_batch_size: PositiveInt
    device_microbatch_tokens: PositiveInt
    save_folder: str
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    seed: Count = 17
    save_interval: str = "1000ba"
    save_num_checkpoints_to_keep: PositiveInt = 3
    autoresume: bool = True
    load_path: str | None = None
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    compile: Literal[True, False, "auto"] = False
    fp8: bool = False
    tensorboard_folder: str | None = None
    fsdp: FSDPSection | None = None
    loggers: LoggersSection = field(default_factory=LoggersSection)
    callbacks: CallbacksSection = field(default_factory=CallbacksSection)

    @property
    def updates(self) -> int:
        """`max_duration` as a number of optimizer updates."""
        return batches(self.max_duration)
