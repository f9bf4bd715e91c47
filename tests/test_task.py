"""task.py: a microbatch without a selected token trains and scores nothing, and breaks nothing."""

import numpy as np
import pytest
import torch

from esm2_composer import alphabet
from esm2_composer.data.pool import pack
from esm2_composer.model import ESM2, ESM2Config
from esm2_composer.task import MaskedLanguageModel


def test_a_microbatch_without_targets_has_no_gradient_and_leaves_metrics_as_they_are():
    torch.manual_seed(0)
    model = MaskedLanguageModel(ESM2(ESM2Config(1, 32, 2, 64)))
    tokens = np.full(10, 5, np.uint8)
    labels = np.full(10, alphabet.PAD, np.uint8)
    none = pack(tokens, labels, np.array([10], np.int32))
    labels[3] = 5
    one = pack(tokens, labels, np.array([10], np.int32))
    loss = model.loss(model(none), none)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.take_accuracy() == (0, 0)
    expected = model.loss(outputs := model(one).detach(), one)
    for name, metric in model.get_metrics().items():
        for batch, logits in ((none, model(none).detach()), (one, outputs), (none, model(none).detach())):
            model.update_metric(batch, logits, metric)
        if name == "loss":
            assert metric.compute() == pytest.approx(float(expected))
