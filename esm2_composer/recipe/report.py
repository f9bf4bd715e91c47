"""An estimate in words: what tools/plan.py and a dry run print."""

from __future__ import annotations

from dataclasses import asdict

from esm2_composer.errors import UserError
from esm2_composer.recipe.config import to_yaml
from esm2_composer.recipe.estimate import (
    RESERVED,
    STEP_OVERHEAD,
    Estimate,
    estimate_run,
    faster,
    fitting_microbatch,
    remedy,
    takes_more,
    useful_gpus,
    usual_mfu,
)
from esm2_composer.recipe.gpus import GPUS, NODE
from esm2_composer.recipe.schema import Recipe, batches


def report(recipe: Recipe, gpus: int, gpu_name: str, mfu: float | None = None) -> tuple[str, dict]:
    """An estimate for people, and the same as plain data."""
    gpu = GPUS[gpu_name]
    _check_gpus(recipe, gpus)
    mfu = mfu or usual_mfu(recipe)
    estimate = estimate_run(recipe, gpus, gpu, mfu)
    change, useful = remedy(recipe, estimate, gpu), useful_gpus(recipe, gpu, mfu)
    quicker = faster(recipe, estimate, gpu, mfu)
    fitting = fitting_microbatch(recipe, estimate, gpu)
    hours = estimate.days * 24 * gpus
    kept = recipe.save_num_checkpoints_to_keep + recipe.callbacks.best_checkpoints
    between = batches(recipe.save_interval)
    mean = estimate.real_tokens // recipe.global_train_batch_size
    meanwhile = {"network": estimate.communication_seconds, "host": estimate.launching_seconds}
    slowest = max(meanwhile, key=meanwhile.__getitem__)
    waits = f" (it waits for the {slowest})" if meanwhile[slowest] > estimate.compute_seconds else ""
    rows = {
        "assuming": f"{mfu:.0%} MFU, {mean} tokens a protein; a GPU sends {gpu.node_link / 1e9:.0f} GB/s "
        f"within a node of {NODE}, {gpu.network / 1e9:.0f} GB/s to others",
        "parameters": f"{estimate.parameters:,}",
        "tokens a step": f"{estimate.real_tokens:,} real ones, {estimate.real_tokens // gpus:,} a GPU",
        "memory a GPU": f"{_memory_text(estimate)} of {gpu.memory / 1e9:.0f}: "
        + (f"does NOT fit; change: {change}" if change else "fits"),
        "microbatch": f"{recipe.device_microbatch_tokens:,} tokens; memory holds {fitting:,}",
        "a step": f"{estimate.step_seconds:.3f} s: computing {estimate.compute_seconds:.3f}, "
        f"meanwhile communicating {estimate.communication_seconds:.3f} "
        f"and launching {estimate.launching_seconds:.3f}{waits}; besides {STEP_OVERHEAD}",
        "speed": f"{estimate.real_tokens / estimate.step_seconds / gpus:,.0f} real tokens a second and GPU",
        "whole recipe": f"{estimate.days:.2f} days, {hours:,.0f} GPU-hours for {estimate.updates:,} updates",
        "checkpoints": f"{_gigabytes(estimate.checkpoint_bytes)} each, every {between:,} updates "
        f"({between * estimate.step_seconds / 60:.1f} minutes); {kept} kept, "
        f"{_gigabytes(kept * estimate.checkpoint_bytes)}",
        "more GPUs": f"help up to about {useful}: twice as many would be less than 1.5 times as fast"
        if takes_more(recipe)
        else f"are not taken: the recipe's fsdp.data_parallel degrees make {gpus}",
    }
    if quicker:
        rows["faster"] = f"{quicker[0]}: {quicker[1].step_seconds:.3f} s a step, {_memory_text(quicker[1])}"
    text = "\n".join([f"{recipe.run_name} on {gpus} x {gpu_name}", *(f"  {k:<15}{v}" for k, v in rows.items())])
    data = {**asdict(estimate), "gpu": gpu_name, "mfu": mfu}
    data |= {"memory_bytes": estimate.memory, "fits": change is None, "change": change}
    data |= {"faster": quicker and quicker[0]}
    data |= {"days": estimate.days, "gpu_hours": hours, "useful_gpus": useful, "fitting_microbatch": fitting}
    data |= {"checkpoint_bytes": estimate.checkpoint_bytes, "checkpoints_kept": kept}
    return text, data


def _check_gpus(recipe: Recipe, gpus: int) -> None:
    """Raise a UserError if so many cannot share the batch, or are not what the data_parallel degrees make."""
    batch = recipe.global_train_batch_size
    if batch % gpus:
        fewer = next(n for n in range(min(gpus, batch), 0, -1) if batch % n == 0)
        raise UserError(f"{gpus} GPUs cannot share global_train_batch_size {batch} equally; {fewer} can")
    if recipe.fsdp is not None:
        recipe.fsdp.check_degrees(gpus)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.{0 if size > 1e11 else 1 if size > 1e9 else 2}f} GB"


def _memory_text(estimate: Estimate) -> str:
    parts = {
        "state": estimate.state_bytes,
        "copies": estimate.unsharded_bytes,
        "activations": estimate.activation_bytes,
        "reserved": RESERVED,
    }
    return (
        f"{estimate.memory / 1e9:.1f} GB ({', '.join(f'{name} {size / 1e9:.1f}' for name, size in parts.items())})"
    )


def describe(recipe: Recipe, ranks: int) -> str:
    """What `--dry-run` prints: the resolved recipe, its parameters, tokens a step and memory on so many GPUs, or
    on those that its data_parallel degrees make at least."""
    ranks = max(ranks, recipe.fsdp.fewest_ranks if recipe.fsdp else 1)
    _check_gpus(recipe, ranks)
    estimate = estimate_run(recipe, ranks, GPUS["h100"], usual_mfu(recipe))
    sequences = recipe.global_train_batch_size
    return (
        f"{to_yaml(recipe)}\n"
        f"parameters: {estimate.parameters:,}\n"
        f"tokens a step: at most {sequences * recipe.data.max_length:,}, in {sequences:,} sequences; "
        f"of UniRef50 about {estimate.real_tokens:,}\n"
        f"memory a GPU, of {ranks}: about {_memory_text(estimate)}"
    )
