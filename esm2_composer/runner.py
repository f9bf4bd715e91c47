"""From a recipe to a Composer Trainer: the one place where all parts meet."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import warnings
from pathlib import Path

import torch
from composer import Evaluator, Trainer
from composer.callbacks import LRMonitor, MemoryMonitor, RuntimeEstimator, SpeedMonitor
from composer.core import Callback
from composer.utils import dist, get_device

from esm2_composer.attention import select_attention
from esm2_composer.callbacks import GradientClipping, GradientRelease, Preemption, TokenMonitor
from esm2_composer.checkpoints.folders import open_folder
from esm2_composer.checkpoints.index import Index
from esm2_composer.checkpoints.names import updates
from esm2_composer.checkpoints.resume import (
    Origin,
    check_resumed,
    check_shared,
    check_undamaged,
    find_branch_point,
    find_checkpoint,
    take_over,
)
from esm2_composer.checkpoints.saving import CheckpointSaver
from esm2_composer.data.checks import check_places_of_workers, check_shards, count_short_clusters, make_cache
from esm2_composer.data.draw import ClusterDraw
from esm2_composer.data.loaders import canonical_nodes, evaluation_loader, train_loader
from esm2_composer.data.masking import MaskingRule
from esm2_composer.data.pool import data_spec
from esm2_composer.data.splits import SPLITS
from esm2_composer.distributed.collectives import on_rank_zero, say
from esm2_composer.distributed.fsdp import DivideByRanks, means_are_sums, parallelism_of
from esm2_composer.divergence import Divergence
from esm2_composer.errors import TransientError, UserError, naming
from esm2_composer.fp8 import use_fp8
from esm2_composer.kernels.checks import missing_for_triton
from esm2_composer.loggers import TrainingProgress, build_loggers, check_wandb
from esm2_composer.model import count_parameters
from esm2_composer.optim import build_adamw, build_schedule, restore_settings, settings
from esm2_composer.preemption import kill_workers_at_exit, obey_rank_alone
from esm2_composer.recipe.architecture import build_model
from esm2_composer.recipe.config import flatten
from esm2_composer.recipe.gpus import GPUS
from esm2_composer.recipe.schema import DataSection, Recipe, batches
from esm2_composer.task import MaskedLanguageModel


class Done(Exception):
    """A run has been trained to its end, and evaluated."""

    def __init__(self, recipe: Recipe, updates: int) -> None:
        super().__init__(f"{recipe.run_name} is done: {updates} updates, nothing left to train")


def build_trainer(recipe: Recipe) -> tuple[Trainer, CheckpointSaver]:
    """The Trainer of a checked recipe, ready to `fit()`; resumed already, if there is something to resume.

    Raises:
        UserError: what the recipe names is not available on this machine, or its save folder holds another run.
        Done: nothing is left to train. Raised before ranks connect, since other nodes' ranks may have exited.
    """
    _show_log()
    # Composer's is to be expected where a run resumes at an epoch's end; instead of torch's, we print a line.
    warnings.filterwarnings("ignore", "No batches were trained for global rank")
    warnings.filterwarnings("ignore", "This DataLoader will create")
    device = get_device(None)
    on_gpu = device.name == "gpu"

    # Checks that each rank can make by itself, before ranks connect and before anything is fetched.
    canonical_nodes(recipe.global_train_batch_size, dist.get_world_size())
    parallelism = parallelism_of(recipe.fsdp, on_gpu)
    sharded = parallelism is not None and recipe.fsdp.state_dict_type == "sharded"
    folder = open_folder(recipe.save_folder)
    folder.staging()  # or it is refused
    checkpoint = find_checkpoint(folder, recipe.autoresume, recipe, sharded)
    done = updates(checkpoint) if checkpoint else 0
    if done >= recipe.updates and done in Index.read(folder).losses:
        raise Done(recipe, done)
    branches = recipe.load_path is not None and checkpoint is None
    branch_point = find_branch_point(recipe, sharded) if branches else None
    torch.manual_seed(recipe.seed)  # the same on every rank: sharded ranks need the same initial weights
    receives_weights = parallelism is not None and recipe.fsdp.sync_module_states and dist.get_global_rank() > 0
    net = build_model(recipe.model, weights=not receives_weights)
    with naming("model.attention"):
        c, precision = net.config, _precision(recipe.precision, on_gpu)
        computed = {"amp_bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        device_type = "cuda" if on_gpu else "cpu"
        attention = select_attention(c.attention, device_type, computed, c.num_heads, c.head_size)
    parameters = count_parameters(net)
    if recipe.fp8 and on_gpu:
        use_fp8(net)
    elif recipe.fp8:
        say("no GPU here: training without fp8")
    check_places_of_workers(recipe.data)
    make_cache(recipe.data)
    if recipe.loggers.wandb is not None:
        check_wandb()

    if not dist.is_initialized():
        dist.initialize_dist(device, timeout=1800)  # before any dataset: Streaming asks which rank it is
    check_same_attention(attention.name)
    checkpoint = on_rank_zero(lambda: take_over(folder, recipe.autoresume, recipe, sharded))
    check_shared(folder)
    origin = Origin(folder, checkpoint) if checkpoint else branch_point
    if origin is not None:
        check_undamaged(origin)
    saver = CheckpointSaver(
        folder,
        interval=batches(recipe.save_interval),
        keep_newest=recipe.save_num_checkpoints_to_keep,
        keep_best=recipe.callbacks.best_checkpoints,
        # Without a checkpoint, an index there belongs to another run, perhaps with other data and rates.
        index=origin and on_rank_zero(lambda: Index.of(origin)),
    )
    if compiles(recipe.compile, on_gpu):
        net.compile_layers()
    if parallelism is not None and recipe.fsdp.activation_checkpointing:
        net.recompute(recipe.fsdp.activation_checkpointing)
    model = MaskedLanguageModel(net)
    o = recipe.optimizer
    optimizer = build_adamw(net, o.lr, o.betas, o.eps, o.weight_decay)
    schedule = build_schedule(optimizer, **dataclasses.asdict(recipe.schedule))
    of_recipe = settings(optimizer)

    on_rank_zero(lambda: check_shards(recipe.data, recipe.global_train_batch_size))
    draw = cluster_draw(recipe)
    batch, workers = recipe.global_train_batch_size, recipe.data.num_workers
    train = train_loader(draw, *recipe.data.split("train"), batch, workers, recipe.data.cache_limit)
    valid = evaluation_loader(draw, *recipe.data.split("valid"), batch, min(workers, 1))  # it stays, mostly idle
    processes, cores = workers * dist.get_local_world_size(), len(os.sched_getaffinity(0))
    if processes > cores:
        say(f"data.num_workers {workers}: {processes} loader processes at work at a time, on {cores} cores")
    train.worker_init_fn = valid.worker_init_fn = obey_rank_alone
    kill_workers_at_exit()
    saver.pin_data(digests_of_all_nodes(recipe.data))

    if recipe.data.min_length > 1 and not dist.get_global_rank():
        say(_short_clusters(recipe.data))

    sharded_on_cpu = recipe.fsdp is not None and recipe.fsdp.version == 2 and not on_gpu
    correction = [DivideByRanks()] if sharded_on_cpu and means_are_sums() else []

    trainer = Trainer(
        model=model,
        optimizers=optimizer,
        schedulers=schedule,
        step_schedulers_every_batch=True,
        algorithms=correction,
        spin_dataloaders=False,  # would read, and perhaps fetch, a validation batch; Streaming knows where it was
        train_dataloader=data_spec(train, recipe.device_microbatch_tokens, c.hidden_size),
        accumulate_train_batch_on_tokens=True,
        eval_dataloader=Evaluator(
            label="valid",
            dataloader=data_spec(valid, recipe.device_microbatch_tokens, c.hidden_size),
            metric_names=list(model.get_metrics()),
            device_eval_microbatch_size=1,  # the pool cuts batches, by tokens
        ),
        max_duration=recipe.max_duration,
        eval_interval=recipe.eval_interval,
        precision=precision,
        parallelism_config=parallelism,
        seed=recipe.seed,
        run_name=recipe.run_name,
        load_path=origin and str(origin),
        load_strict_model_weights=True,
        load_progress_bar=False,
        callbacks=[
            saver,
            TrainingProgress(recipe.updates, interval=max(1, min(100, recipe.updates // 20))),
            *build_callbacks(recipe, model, on_gpu),
        ],
        loggers=build_loggers(recipe),
        progress_bar=False,
    )
    if parallelism is not None and recipe.fsdp.sync_module_states:
        dist.broadcast(net.rotary_bits, src=0)  # of replicas, FSDP gives buffers to the first only
    shown, validated = train.dataset.num_samples, valid.dataset.clusters.num_samples
    say(
        f"{recipe.run_name}: {parameters:,} parameters; ranks: {dist.get_world_size()}; "
        f"training clusters: {shown:,}, {shown // batch:,} updates an epoch; validation clusters: {validated:,}"
    )
    if origin is not None:
        check_resumed(trainer.state, origin)
        restore_settings(*trainer.state.optimizers, *trainer.state.schedulers, of_recipe)
        how = "branching off" if origin.is_branch_point else "going on from"
        say(f"{how} {origin}, update {origin.update} of {recipe.updates:,}")
    # So that the logs show the conditions.
    trainer.logger.log_hyperparameters(flatten(dataclasses.asdict(recipe)))
    return trainer, saver


def check_same_attention(name: str) -> None:
    """Raise a TransientError, on every rank, unless all ranks use the same kernel: one that fell back to a slower
    one, say because a shared folder failed, would slow every update."""
    names = dist.all_gather_object(name)
    other = next((rank for rank, each in enumerate(names) if each != names[0]), None)
    if other is not None:
        raise TransientError(
            f"rank 0 would compute attention by '{names[0]}', rank {other} by '{names[other]}'; the log of one "
            "tells why it cannot do as the other. Start again, or set model.attention for all"
        )


def build_callbacks(recipe: Recipe, model: MaskedLanguageModel, on_gpu: bool) -> list[Callback]:
    """What a run does at every update besides the step, except saving and reporting."""
    return [
        SpeedMonitor(window_size=10, gpu_flops_available=_peak_flops() if on_gpu else None),
        LRMonitor(),
        RuntimeEstimator(),
        *([MemoryMonitor()] if on_gpu else []),
        GradientClipping(recipe.optimizer.clip_norm),
        GradientRelease(),
        TokenMonitor(model, recipe.device_microbatch_tokens),
        Divergence(recipe.callbacks.max_loss_rise),  # this and the next may end the run
        Preemption(),
    ]


def _peak_flops() -> float | None:
    """For MFU: the peak of GPUs that Composer does not know."""
    return GPUS["b200"].flops if "B200" in torch.cuda.get_device_name() else None


def digests_of_all_nodes(data: DataSection) -> dict[str, str]:
    """SHA-256 of each split's index.json, which holds the hashes of its shards; checked to be equal on all nodes.

    Raises:
        UserError: another node's cache holds other shards.
    """
    indices = {split: Path(data.split(split)[1], "index.json").read_bytes() for split in SPLITS}
    digests = {split: hashlib.sha256(index).hexdigest() for split, index in indices.items()}
    if any(others != digests for others in dist.all_gather_object(digests)):
        raise UserError(
            f"data.local {data.local} holds other shards on some nodes than on others; empty it where they are old"
        )
    return digests


def _short_clusters(data: DataSection) -> str:
    remote, local = data.split("train")
    count = count_short_clusters(remote or local, data.min_length)
    return (
        f"data.min_length {data.min_length}: {'an unknown number of' if count is None else f'{count:,}'} clusters "
        "have no member that long, and show those they have"
    )


def cluster_draw(recipe: Recipe) -> ClusterDraw:
    """How this recipe draws member, window and mask of a cluster."""
    d = recipe.data
    masking = MaskingRule(d.mask_fraction, d.mask_split, d.replacement)
    return ClusterDraw(recipe.seed, d.max_length, d.min_length, masking)


def _precision(precision: str, on_gpu: bool) -> str:
    if on_gpu or precision == "fp32":
        return precision
    say(f"no GPU here: training in fp32 instead of {precision}")
    return "fp32"


def compiles(setting: bool | str, on_gpu: bool) -> bool:
    """What the recipe's `compile` means here. `auto` never fails a run for lack of a C compiler."""
    return (on_gpu and missing_for_triton() is None) if setting == "auto" else setting


def _show_log() -> None:
    """Show what the package logs, such as the kernel in use, from the first rank; from other ranks only
    warnings."""
    log = logging.getLogger("esm2_composer")
    if not log.handlers:
        log.setLevel(logging.WARNING if dist.get_global_rank() else logging.INFO)
        log.addHandler(logging.StreamHandler())
