"""A recipe's `model` section -> the network it asks for, with weights or without."""

from __future__ import annotations

import functools
from dataclasses import asdict

import torch

from esm2_composer.errors import naming
from esm2_composer.model import ESM2, SIZES, ESM2Config
from esm2_composer.recipe.schema import ModelSection
from esm2_composer.weights.pretrained import read_config


@functools.cache  # a hub may have to be asked
def architecture(model: ModelSection) -> ESM2Config:
    """What a recipe's `model` section asks for; initial weights are not read."""
    if model.init_from is not None:
        with naming("model.init_from"):
            return read_config(model.init_from, model.attention)
    dimensions = model.dimensions if model.size is None else asdict(SIZES[model.size])
    with naming("model"):
        return ESM2Config(**{**dimensions, "attention": model.attention})


def build_model(section: ModelSection, weights: bool = True) -> ESM2:
    """The network a recipe's `model` section asks for; without weights, one on the meta device."""
    if not weights:
        with torch.device("meta"):
            return ESM2(architecture(section))
    if section.init_from is not None:
        with naming("model.init_from"):
            return ESM2.from_pretrained(section.init_from, attention=section.attention)
    return ESM2(architecture(section))


@functools.cache
def skeleton(config: ESM2Config) -> ESM2:
    """The model without memory for its weights, for counting."""
    with torch.device("meta"):
        return ESM2(config)
