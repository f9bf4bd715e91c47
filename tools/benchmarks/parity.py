"""How far this project's logits and gradients are from transformers' and fair-esm's, on the same random weights
and the same sequences of very unequal lengths, with masks and every letter: fp32, on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import esm
import torch
import torch.nn.functional as F
from transformers import EsmConfig, EsmForMaskedLM

from esm2_composer import alphabet
from esm2_composer.command import in_range
from esm2_composer.model import ESM2, SIZES, ESM2Config
from esm2_composer.weights.hugging_face import hugging_face_config
from esm2_composer.weights.names import foreign_keys

LENGTHS = [3, 17, 330, 64, 1024]
# References compute these with padding: the longest alone, or their attention would take four times the memory.
GROUPS = [(0, 4), (4, 5)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=["8m", "35m", "150m"], help="650m takes 14 GB"
    )
    parser.add_argument(
        "--layers", type=in_range(int, 1), help="at most so many of a model's, at its full width, to fit memory"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for size in args.sizes:
        layers = min(args.layers or SIZES[size].num_layers, SIZES[size].num_layers)
        config = replace(SIZES[size], num_layers=layers)
        for name, make_reference in {"transformers": hugging_face, "fair-esm": fair_esm}.items():
            print(f"{size} beside {name}", file=sys.stderr)
            found = compare(random_model(config), make_reference)
            rows.append({"size": size, "layers": layers, "reference": name, **found})
            print(rows[-1], file=sys.stderr, flush=True)  # the next may take an hour
            gc.collect()
    return {"lengths": LENGTHS, "torch": torch.__version__, "rows": rows}


def compare(model: ESM2, make_reference: Callable[[ESM2], torch.nn.Module]) -> dict[str, Any]:
    """The largest differences: of logits, absolute; of a parameter's gradient, relative to its norm."""
    reference = make_reference(model)
    tokens, cu_seqlens = random_batch(LENGTHS)
    positions = torch.arange(0, len(tokens), 3)
    targets = tokens.clamp(max=31)

    with torch.no_grad():
        logits = model(tokens, cu_seqlens)
    F.cross_entropy(model(tokens, cu_seqlens, positions=positions), targets[positions], reduction="sum").backward()
    starts, parts = [0, *itertools.accumulate(LENGTHS)], []
    for first, last in GROUPS:
        here = slice(starts[first], starts[last])
        expected = reference_logits(reference, tokens[here], LENGTHS[first:last])
        chosen = positions[(positions >= here.start) & (positions < here.stop)]
        F.cross_entropy(expected[chosen - here.start], targets[chosen], reduction="sum").backward()
        parts.append(expected.detach())
    expected = torch.cat(parts)
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    errors = {}
    for name, keys in foreign_keys(model.config.num_layers, fair=make_reference is fair_esm):
        if name.startswith("contact_head"):  # no part of masked-language-model training
            assert model.get_parameter(name).grad is None
            continue
        for ours, key in zip(model.get_parameter(name).grad.chunk(len(keys)), keys, strict=True):
            errors[key] = ((ours - gradients[key]).norm() / gradients[key].norm()).item()
    worst = max(errors, key=lambda key: math.inf if math.isnan(errors[key]) else errors[key])
    return {
        "logits_std": expected.std().item(),  # logits of some size, or the comparison is meaningless
        "logit_error": (logits - expected).abs().max().item(),
        "gradient_error": errors[worst],
        "worst_gradient": worst,
    }


def random_model(config: ESM2Config) -> ESM2:
    """A model far from its initialisation, so that biases, norms and attention matter."""
    torch.manual_seed(0)
    model = ESM2(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.64 * config.hidden_size**-0.5)
    return model


def random_batch(lengths: list[int], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (T,) with <cls>, <eos>, every letter, and masks in all but the first sequence; cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for i, length in enumerate(lengths):
        inner = torch.randint(4, 29, (length - 2,), generator=generator)  # the 20, X, B, U, Z, O
        if i:
            inner[torch.rand(length - 2, generator=generator) < 0.3 / (i + 1)] = alphabet.MASK
        sequences.append(F.pad(F.pad(inner, (1, 0), value=alphabet.CLS), (0, 1), value=alphabet.EOS))
    return torch.cat(sequences), torch.tensor([0, *lengths]).cumsum(0).int()


def hugging_face(model: ESM2) -> EsmForMaskedLM:
    reference = EsmForMaskedLM(EsmConfig(**hugging_face_config(model.config)))
    copy_weights(model, reference, fair=False)
    return reference


def fair_esm(model: ESM2) -> torch.nn.Module:
    c = model.config
    letters = esm.data.Alphabet.from_architecture("ESM-1b")
    reference = esm.model.esm2.ESM2(c.num_layers, c.hidden_size, c.num_heads, letters, token_dropout=True)
    copy_weights(model, reference, fair=True)
    return reference


def copy_weights(model: ESM2, reference: torch.nn.Module, fair: bool) -> None:
    ours, theirs = model.state_dict(), reference.state_dict()
    with torch.no_grad():
        for name, keys in foreign_keys(model.config.num_layers, fair):
            for key, part in zip(keys, ours[name].chunk(len(keys)), strict=True):
                theirs[key].copy_(part)


def reference_logits(reference: torch.nn.Module, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The reference's logits of the flat batch (T, 33), computed with padding."""
    batch = torch.nn.utils.rnn.pad_sequence(tokens.split(lengths), batch_first=True, padding_value=alphabet.PAD)
    if isinstance(reference, EsmForMaskedLM):
        out = reference(batch, attention_mask=(batch != alphabet.PAD).long()).logits
    else:
        out = reference(batch)["logits"]
    return torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])


def table(result: dict[str, Any]) -> str:
    lengths = ", ".join(map(str, result["lengths"]))
    lines = [
        f"random weights, fp32, sequences of {lengths} tokens; torch {result['torch']}; largest differences",
        f"{'size':>5} {'layers':>6} {'reference':14} {'logits':>8} {'gradients, relative':>20}",
    ]
    lines += [
        f"{row['size']:>5} {row['layers']:6} {row['reference']:14} {row['logit_error']:8.1e} "
        f"{row['gradient_error']:20.1e}  ({row['worst_gradient']})"
        for row in result["rows"]
    ]
    return "\n".join(lines)
