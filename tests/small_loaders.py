"""Loaders of few small clusters."""

from torch.utils.data import DataLoader

from esm2_composer.data.draw import ClusterDraw
from esm2_composer.data.masking import MaskingRule

BATCH = 8
DRAW = ClusterDraw(seed=5, max_length=24, min_length=8, masking=MaskingRule())


def contents(loader: DataLoader) -> list[bytes]:
    return [batch["tokens"].numpy().tobytes() + batch["labels"].numpy().tobytes() for batch in loader]
