"""What a recipe will ask of GPUs and of time, by arithmetic: before anything is paid for.

Counted, not assumed: parameters and operations of the model, bytes of weights, optimizer state and of what the
backward pass needs of a token. Assumed, and told with every result: the mean protein, the share of the peak that
the GPUs reach (MFU), link speeds, what a host takes to launch a layer, and what a step costs besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from esm2_composer.alphabet import VOCAB_SIZE
from esm2_composer.model import count_parameters
from esm2_composer.recipe.architecture import architecture, skeleton
from esm2_composer.recipe.gpus import GPU, NODE
from esm2_composer.recipe.schema import FSDPSection, Recipe

# A cautious share of the peak: small heads leave most of a tensor core idle, small layers wait to be launched.
MFU = {16: 0.15, 24: 0.20, 32: 0.28}  # by head size
MFU_OTHERWISE = 0.40
LINK_SHARE = 0.7  # of a link's speed that collectives reach
HOP = 5e-6  # seconds of a collective's ring from one GPU to the next
# Seconds in which a host launches a layer's kernels, forward and backward, on few tokens as on many, and what FSDP
# adds for each layer and for each of its units (docs/performance.md).
LAUNCHING, FSDP_OF_A_LAYER, FSDP_OF_A_UNIT = 1.6e-3, 0.6e-3, 2.1e-3
STEP_OVERHEAD = 0.03  # seconds between two steps, cautiously: 0.013 on an H200's host (docs/performance.md)
RESERVED = 4e9  # bytes a GPU holds besides: context, communication buffers, fragmentation

# UniRef50, cropped to 1,024 tokens: the mean, and the mean length that a token sees (of 10,000 sequences).
MEAN_TOKENS, ATTENDED = 319, 456

# Bytes that a layer in Triton keeps of a token for the backward pass, in units of the hidden size, by what is
# recomputed, with an fp32 residual stream and with FSDP's bf16 one; what a layer in torch keeps besides: q and k
# before they are rotated, or both inputs instead of their sum; and bytes of a token outside the layers. Peaks on
# an H200 meet those of Triton where nothing is recomputed (docs/performance.md); others were not measured on GPUs.
KEPT = {False: 36.5, "selective": 24.5, True: 4}
KEPT_BF16 = {False: 32.5, "selective": 20.5, True: 2}
KEPT_IN_TORCH = {False: 4, "selective": 4, True: 2}
OUTSIDE = 18


@dataclass(frozen=True)
class Estimate:
    gpus: int
    parameters: int
    real_tokens: int  # a step, over all GPUs
    flops: float  # a step, over all GPUs
    state_bytes: float  # a GPU's weights, gradients and optimizer state
    unsharded_bytes: float  # a GPU's gathered or cast copies of weights and gradients
    activation_bytes: float  # of a microbatch, as far as its share of a step fills it
    compute_seconds: float  # a step
    communication_seconds: float  # a step; hidden behind computing as far as that lasts
    launching_seconds: float  # a step, on the host, meanwhile
    step_seconds: float
    updates: int

    @property
    def memory(self) -> float:
        return self.state_bytes + self.unsharded_bytes + self.activation_bytes + RESERVED

    @property
    def checkpoint_bytes(self) -> float:
        """fp32 weights and AdamW's two moments; divided among the ranks where checkpoints are sharded."""
        return 12 * self.parameters

    @property
    def days(self) -> float:
        return self.updates * self.step_seconds / 86400


def usual_mfu(recipe: Recipe) -> float:
    return MFU.get(architecture(recipe.model).head_size, MFU_OTHERWISE)


def estimate_run(
    recipe: Recipe, gpus: int, gpu: GPU, mfu: float, mean_tokens: int = MEAN_TOKENS, attended: int = ATTENDED
) -> Estimate:
    """What a run of this recipe takes on so many GPUs, whether it fits them or not.

    Lengths are at most `data.max_length`: the mean, in tokens, and that of the sequence which a token sees.
    """
    mean_tokens, attended = (min(length, recipe.data.max_length) for length in (mean_tokens, attended))
    config = architecture(recipe.model)
    model = skeleton(config)
    parameters = count_parameters(model)
    # What is gathered and summed at once: FSDP's units, or gradients of about a layer by DDP.
    units = [m for m in model.modules() if model.fsdp_wrap_fn(m)] if recipe.fsdp is not None else model.layers
    tokens = recipe.global_train_batch_size * mean_tokens
    per_sequence = model.flops([attended], 0) * mean_tokens / attended  # every token sees `attended` others
    predicted = round(recipe.data.mask_fraction * tokens)
    head = model.flops([], predicted)
    flops = recipe.global_train_batch_size * per_sequence + head
    recomputing = recipe.fsdp is not None and recipe.fsdp.activation_checkpointing
    in_triton = recipe.model.attention == "triton" or (
        recipe.model.attention == "auto" and not (gpu.spills and config.head_size > 64)
    )
    # The layers' forward pass again, but for each one's last product (in torch, with it), and not the head's; MFU
    # does not count it. Norms and GELU alone, some 1 % of a 15B's time, are not counted.
    d, f = config.hidden_size, config.ffn_hidden_size
    last_products = 2 * d * f * ((config.num_layers - 1) * tokens + predicted)
    of_head = 2 * d * (d + VOCAB_SIZE) * predicted
    repeated = flops / 3 - (last_products if in_triton else 0) - of_head if recomputing is True else 0

    bf16_stream = recipe.fsdp is not None and recipe.fsdp.mixed_precision == "DEFAULT"
    kept = KEPT_BF16 if bf16_stream else KEPT
    if not in_triton:
        kept = {what: size + KEPT_IN_TORCH[what] for what, size in kept.items()}
    held = config.num_layers * kept[recomputing] + kept[False] - kept[recomputing]  # and what one computes anew
    activations = recipe.device_microbatch_tokens * config.hidden_size * (held + OUTSIDE)
    share = min(1.0, tokens / gpus / recipe.device_microbatch_tokens)  # of a microbatch that a GPU's tokens fill
    rounds = max(1, math.ceil(tokens / gpus / recipe.device_microbatch_tokens))
    compute = (flops + repeated) / gpus / (mfu * gpu.flops)
    shards, state, unsharded = _memory(recipe.fsdp, parameters, count_parameters(units[0]), gpus)
    communication = _communication(recipe.fsdp, parameters, len(units), gpus, shards, rounds, gpu)
    a_round = config.num_layers * LAUNCHING * (4 / 3 if recomputing is True else 1)
    if recipe.fsdp is not None:
        a_round += config.num_layers * FSDP_OF_A_LAYER + len(units) * FSDP_OF_A_UNIT
    launching = rounds * a_round
    return Estimate(
        gpus=gpus,
        parameters=parameters,
        real_tokens=tokens,
        flops=flops,
        state_bytes=state,
        unsharded_bytes=unsharded,
        activation_bytes=activations * share,
        compute_seconds=compute,
        communication_seconds=communication,
        launching_seconds=launching,
        step_seconds=max(compute, communication, launching) + STEP_OVERHEAD,
        updates=recipe.updates,
    )


def _memory(fsdp: FSDPSection | None, parameters: int, unit: int, gpus: int) -> tuple[int, float, float]:
    """(GPUs a copy is sharded over, bytes of the shard's state, bytes of what lies there unsharded)."""
    if fsdp is None:
        # fp32 weights, gradients and two moments; bf16 casts, and DDP's buckets for gradients
        return 1, 16 * parameters, (2 + (4 if gpus > 1 else 0)) * parameters
    replicas = fsdp.data_parallel_replicate_degree
    shards = fsdp.data_parallel_shard_degree
    if shards == -1:
        shards = gpus // (replicas or 1)
    two_units = 2 * unit * (2 + 4)  # the next one is gathered in bf16 while one computes; fp32 gradients
    # bf16, kept for the backward pass; a GPU by itself casts its weights again
    whole = 2 * parameters if fsdp.sharding_strategy == "SHARD_GRAD_OP" and shards > 1 else 0
    return shards, 16 * parameters / shards, whole + two_units


def _communication(
    fsdp: FSDPSection | None, parameters: int, units: int, gpus: int, shards: int, rounds: int, gpu: GPU
) -> float:
    """Seconds of a step's collectives, one after the other."""
    if gpus == 1:
        return 0.0
    if shards == 1:  # all gradients, once a step
        return _ring(8 * parameters, gpus, gpu) + 2 * units * gpus * HOP
    gathers = 1 if fsdp.sharding_strategy == "SHARD_GRAD_OP" else 2
    a_round = _ring((2 * gathers + 4) * parameters, shards, gpu) + (gathers + 1) * units * shards * HOP
    between = _ring(8 * parameters / shards, gpus // shards, gpu, across=True) if gpus > shards else 0
    return rounds * (a_round + between)


def _ring(volume: float, members: int, gpu: GPU, across: bool = False) -> float:
    """Seconds in which every member receives `volume` bytes, less its own part, from the others.

    Within a node over its links; between nodes over all network ports of a node at once, each GPU its own, so
    that a node receives the whole once.
    """
    if across:
        speed = gpu.network
    elif members <= NODE:
        speed = gpu.node_link
    else:
        speed = min(gpu.node_link, NODE * gpu.network)
    return volume * (members - 1) / members / (speed * LINK_SHARE)


def useful_gpus(recipe: Recipe, gpu: GPU, mfu: float) -> int:
    """The most GPUs worth using: twice as many would be less than 1.5 times as fast. At least what the recipe's
    data_parallel degrees make, and no more where they make just so many."""
    gpus = recipe.fsdp.fewest_ranks if recipe.fsdp else 1
    while takes_more(recipe) and recipe.global_train_batch_size % (2 * gpus) == 0:
        now, twice = (estimate_run(recipe, n, gpu, mfu).step_seconds for n in (gpus, 2 * gpus))
        if now / twice < 1.5:
            break
        gpus *= 2
    return gpus


def takes_more(recipe: Recipe) -> bool:
    return recipe.fsdp is None or recipe.fsdp.takes_multiples


def fitting_microbatch(recipe: Recipe, estimate: Estimate, gpu: GPU) -> int:
    """The largest `device_microbatch_tokens`, a multiple of 1,024, with which the run fits the GPU's memory."""
    tokens = min(recipe.device_microbatch_tokens, estimate.real_tokens / estimate.gpus)
    per_token = estimate.activation_bytes / tokens
    free = gpu.memory - (estimate.memory - estimate.activation_bytes)
    return max(0, int(free / per_token)) // 1024 * 1024


def remedy(recipe: Recipe, estimate: Estimate, gpu: GPU) -> str | None:
    """What to change where a run does not fit; None where it does."""
    if estimate.memory <= gpu.memory:
        return None
    fixed, fitting = estimate.memory - estimate.activation_bytes, fitting_microbatch(recipe, estimate, gpu)
    if fixed < 0.8 * gpu.memory and fitting >= recipe.data.max_length:
        return f"device_microbatch_tokens={fitting}"
    if recipe.fsdp is None:
        return "shard it: fsdp.sharding_strategy=SHARD_GRAD_OP, then FULL_SHARD"
    if recipe.fsdp.sharding_strategy != "FULL_SHARD":
        return "fsdp.sharding_strategy=FULL_SHARD"
    for what in ("selective", True):
        recomputing = replace(recipe, fsdp=replace(recipe.fsdp, activation_checkpointing=what))
        if estimate_run(recomputing, estimate.gpus, gpu, mfu=1).memory <= gpu.memory:
            return f"fsdp.activation_checkpointing={str(what).lower()}"
    smaller = f"device_microbatch_tokens={fitting}, or " if fitting >= recipe.data.max_length else ""
    return f"{smaller}more GPUs, or ones with more memory"


def faster(recipe: Recipe, estimate: Estimate, gpu: GPU, mfu: float) -> tuple[str, Estimate] | None:
    """A simpler way to spread the model that leaves a tenth of the memory free and makes a step at least 5 %
    shorter: the change, and its estimate; None if there is none."""
    if recipe.fsdp is None:
        return None
    found = []
    for change, fsdp in (
        ("fsdp.activation_checkpointing=false", replace(recipe.fsdp, activation_checkpointing=False)),
        ("fsdp.activation_checkpointing=selective", replace(recipe.fsdp, activation_checkpointing="selective")),
        ("fsdp.sharding_strategy=SHARD_GRAD_OP", replace(recipe.fsdp, sharding_strategy="SHARD_GRAD_OP")),
        ("fsdp=null", None),
    ):
        other = estimate_run(replace(recipe, fsdp=fsdp), estimate.gpus, gpu, mfu)
        if other.memory < 0.9 * gpu.memory and other.step_seconds < 0.95 * estimate.step_seconds:
            found.append((change, other))
    return min(found, key=lambda each: each[1].step_seconds, default=None)
