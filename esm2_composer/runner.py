"""From a recipe to a Composer Trainer: the one place where all parts meet."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from composer import Evaluator, Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor
from composer.core import Callback
from composer.loggers import LoggerDestination, TensorboardLogger
from composer.utils import dist, get_device

from esm2_composer.attention import select_attention
from esm2_composer.callbacks import Preemption, ProgressBar, ProgressLines, Wandb
from esm2_composer.checkpoints import prepare_save_folder
from esm2_composer.config import FSDPSection, ModelSection, Recipe
from esm2_composer.data import ClusterDraw, evaluation_loader, train_loader
from esm2_composer.errors import UserError
from esm2_composer.gradients import DivideByRanks, means_are_sums
from esm2_composer.masking import MaskingRule
from esm2_composer.model import ESM2, SIZES, ESM2Config
from esm2_composer.optim import build_adamw, build_schedule
from esm2_composer.pool import data_spec
from esm2_composer.task import MaskedLanguageModel


def build_trainer(recipe: Recipe) -> Trainer:
    """The Trainer of a checked recipe, ready to `fit()`; resumed already, if there is something to resume.

    Raises:
        UserError: what the recipe names cannot be had on this machine.
    """
    device = get_device(None)
    on_gpu = device.name == "gpu"
    if not dist.is_initialized():
        dist.initialize_dist(device, timeout=1800)  # before any dataset: Streaming asks which rank it is

    if "://" not in recipe.save_folder:
        if not dist.get_local_rank():
            prepare_save_folder(Path(recipe.save_folder), recipe.autoresume)
        dist.barrier()

    torch.manual_seed(recipe.seed)  # the same on every rank: sharded ranks must agree on the weights
    net = build_model(recipe.model)
    try:
        select_attention(net.config.attention, "cuda" if on_gpu else "cpu")
    except ValueError as error:
        raise UserError(f"model.attention: {error}") from error
    if recipe.compile:
        net.compile_layers()
    model = MaskedLanguageModel(net)
    o = recipe.optimizer
    optimizer = build_adamw(net, o.lr, o.betas, o.eps, o.weight_decay)
    schedule = build_schedule(optimizer, updates=recipe.updates, **dataclasses.asdict(recipe.schedule))

    draw = cluster_draw(recipe)
    batch, workers = recipe.global_train_batch_size, recipe.data.num_workers
    train = train_loader(draw, *recipe.data.split("train"), batch, workers)
    valid = evaluation_loader(draw, *recipe.data.split("valid"), batch, workers)

    sharded_on_cpu = recipe.fsdp is not None and recipe.fsdp.version == 2 and not on_gpu
    correction = [DivideByRanks()] if sharded_on_cpu and means_are_sums() else []

    on_terminal = sys.stderr.isatty()
    callbacks: list[Callback] = [SpeedMonitor(window_size=10), LRMonitor(), Preemption()]
    if on_gpu:
        callbacks.append(MemoryMonitor())
    loggers = _loggers(recipe)
    if on_terminal:
        warnings.filterwarnings("ignore", "Specifying the ProgressBarLogger")  # ours differs on purpose
        loggers.append(ProgressBar())
    else:
        callbacks.append(ProgressLines(recipe.updates, interval=max(1, min(100, recipe.updates // 20))))

    trainer = Trainer(
        model=model,
        optimizers=optimizer,
        schedulers=schedule,
        step_schedulers_every_batch=True,
        algorithms=[*correction, GradientClipping("norm", recipe.optimizer.clip_norm)],
        train_dataloader=data_spec(train, recipe.device_microbatch_tokens),
        accumulate_train_batch_on_tokens=True,
        eval_dataloader=Evaluator(
            label="valid",
            dataloader=data_spec(valid, recipe.device_microbatch_tokens),
            metric_names=list(model.get_metrics()),
            device_eval_microbatch_size=1,  # the pool cuts batches, by tokens
        ),
        max_duration=recipe.max_duration,
        eval_interval=recipe.eval_interval,
        precision=_precision(recipe.precision, on_gpu),
        parallelism_config=_parallelism(recipe.fsdp, on_gpu),
        seed=recipe.seed,
        run_name=recipe.run_name,
        save_folder=recipe.save_folder,
        save_interval=recipe.save_interval,
        save_num_checkpoints_to_keep=recipe.save_num_checkpoints_to_keep,
        save_overwrite=True,  # a step saved just before a crash is saved again after it
        autoresume=recipe.autoresume,
        callbacks=callbacks,
        loggers=loggers,
        progress_bar=False,
        dist_timeout=1800,
    )
    trainer.logger.log_hyperparameters(_flat(dataclasses.asdict(recipe)))  # who reads the logs sees the conditions
    return trainer


def build_model(section: ModelSection) -> ESM2:
    """The network a recipe's `model` section asks for."""
    try:
        if section.init_from is not None:
            return ESM2.from_pretrained(section.init_from, attention=section.attention)
        dimensions = section.dimensions if section.size is None else dataclasses.asdict(SIZES[section.size])
        return ESM2(ESM2Config(**{**dimensions, "attention": section.attention}))
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def cluster_draw(recipe: Recipe) -> ClusterDraw:
    """How this recipe draws member, window and mask of a cluster."""
    d = recipe.data
    masking = MaskingRule(d.mask_fraction, d.mask_split, all_tokens=d.replacement == "all_tokens")
    return ClusterDraw(recipe.seed, d.max_length, d.min_length, masking)


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's values by full key, as overrides name them: {"data.replacement": "amino_acids", ...}."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        values |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


def _precision(precision: str, on_gpu: bool) -> str:
    if on_gpu or precision == "fp32":
        return precision
    _say(f"no GPU here: training in fp32 instead of {precision}")
    return "fp32"


def _parallelism(fsdp: FSDPSection | None, on_gpu: bool) -> dict[str, Any] | None:
    if fsdp is None:
        return None
    if fsdp.version == 1 and not on_gpu:
        _say("no GPU here: training unsharded, since FSDP version 1 needs GPUs (fsdp.version=2 does not)")
        return None
    os.environ["FSDP_VERSION"] = str(fsdp.version)  # Composer's only switch
    options = {key: value for key, value in dataclasses.asdict(fsdp).items() if key != "version"}
    if fsdp.version == 1:
        options["activation_checkpointing_reentrant"] = False  # the reentrant form is torch's old one
    return {"fsdp": options}


def _loggers(recipe: Recipe) -> list[LoggerDestination]:
    loggers: list[LoggerDestination] = []
    if recipe.tensorboard_folder is not None:
        loggers.append(TensorboardLogger(log_dir=recipe.tensorboard_folder, flush_interval=10))
    if recipe.loggers.wandb is not None:
        loggers.append(Wandb(**dataclasses.asdict(recipe.loggers.wandb)))
    return loggers


def _say(line: str) -> None:
    if not dist.get_global_rank():
        print(line, file=sys.stderr, flush=True)
