"""The learning-rate schedule at the published points, and which parameters are decayed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from esm2_composer.model import ESM2, ESM2Config
from esm2_composer.optim import build_adamw, build_schedule, rate_factor, restore_settings, settings

PEAK = 4e-4
SHORT = dict(warmup=2_000, updates=500_000, decay_fraction=0.9, floor=0.1)
LONG = {**SHORT, "warmup": 20_000}
TINY = dict(warmup=3, updates=13, decay_fraction=0.5, floor=0.2)
TINY_FACTORS = [1 / 3, 2 / 3, 1, 0.84, 0.68, 0.52, 0.36, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]


# The schedule


@pytest.mark.parametrize(
    ("schedule", "update", "rate"),
    [
        (SHORT, 1, 2e-7),
        (SHORT, 1_000, 2.0e-4),
        (SHORT, 2_000, 4.0e-4),
        (SHORT, 100_000, 3.21285e-4),
        (SHORT, 250_000, 2.00803e-4),
        (SHORT, 450_000, 4.0161e-5),
        (LONG, 1_000, 2.0e-5),
        (LONG, 20_000, 4.0e-4),
        (LONG, 100_000, 3.33333e-4),
        (LONG, 250_000, 2.08333e-4),
        (LONG, 450_000, 4.1667e-5),
    ],
)
def test_published_points(schedule: dict[str, Any], update: int, rate: float) -> None:
    assert PEAK * rate_factor(update, **schedule) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize(("schedule", "first_held"), [(SHORT, 450_200), (LONG, 452_000)])
def test_the_floor_is_reached_when_the_decay_ends_and_held(schedule: dict[str, Any], first_held: int) -> None:
    assert rate_factor(first_held - 1, **schedule) > 0.1
    assert rate_factor(first_held, **schedule) == 0.1
    assert rate_factor(first_held + 1, **schedule) == 0.1
    assert PEAK * rate_factor(500_000, **schedule) == 4.0e-5


def test_the_peak_is_reached_once() -> None:
    before, peak, after = (rate_factor(update, **SHORT) for update in (1_999, 2_000, 2_001))
    assert before < peak == 1.0 > after


def test_without_warmup_the_decay_starts_at_once() -> None:
    factors = [rate_factor(update, 0, 100, decay_fraction=0.9, floor=0.1) for update in range(1, 101)]
    assert factors[:2] == pytest.approx([0.99, 0.98])
    assert factors[88] > 0.1
    assert factors[89:] == pytest.approx([0.1] * 11)


def test_decay_fraction_and_floor_can_be_chosen() -> None:
    assert [rate_factor(update, **TINY) for update in range(1, 14)] == pytest.approx(TINY_FACTORS)


def small_optimizer() -> torch.optim.Optimizer:
    return build_adamw(torch.nn.Linear(2, 2), lr=0.5, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)


def rates(optimizer: torch.optim.Optimizer, schedule: LRScheduler, updates: int) -> list[float]:
    """The rate that each of the next updates is made with, as a factor of the peak of 0.5."""
    found = []
    for _ in range(updates):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        found.append(rate / 0.5)
        optimizer.step()
        schedule.step()
    return found


def test_update_k_is_made_with_factor_k_the_first_one_included() -> None:
    optimizer = small_optimizer()
    assert rates(optimizer, build_schedule(optimizer, **TINY), 13) == pytest.approx(TINY_FACTORS)


def test_a_resumed_schedule_goes_on() -> None:
    first = small_optimizer()
    schedule = build_schedule(first, **TINY)
    rates(first, schedule, 5)
    saved = copy.deepcopy((first.state_dict(), schedule.state_dict()))
    second = small_optimizer()
    resumed = build_schedule(second, **TINY)
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert rates(second, resumed, 8) == pytest.approx(TINY_FACTORS[5:])


# The optimizer


@pytest.fixture(scope="module")
def model() -> ESM2:
    return ESM2(ESM2Config(num_layers=2, hidden_size=32, num_heads=2, ffn_hidden_size=64))


def decays(model: ESM2) -> dict[str, list[float]]:
    """Of each parameter, the decay of every group it is in."""
    optimizer = build_adamw(model, lr=1e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.3)
    return {
        name: [g["weight_decay"] for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
        for name, parameter in model.named_parameters()
    }


def test_every_trainable_parameter_is_optimized_once_and_the_contact_head_never(model: ESM2) -> None:
    groups = {name: len(found) for name, found in decays(model).items()}
    assert {name for name, count in groups.items() if count == 0} == {"contact_head.weight", "contact_head.bias"}
    assert set(groups.values()) == {0, 1}


def test_biases_and_layer_norms_are_not_decayed_and_all_else_is(model: ESM2) -> None:
    found = {name: values[0] for name, values in decays(model).items() if values}
    exempt = {name for name in found if name.endswith("bias") or "norm" in name}
    assert {name for name, decay in found.items() if decay == 0.0} == exempt
    assert {found[name] for name in found.keys() - exempt} == {0.3}
    assert found["embed.weight"] == 0.3
    assert found["head.bias"] == found["groups.0.0.attention_norm.weight"] == 0.0


def test_the_settings_reach_every_group(model: ESM2) -> None:
    optimizer = build_adamw(model, lr=1e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.3)
    assert {(g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups} == {(1e-3, (0.8, 0.95), 1e-7)}


# Going on with other settings


def test_settings_of_the_recipe_replace_those_of_a_checkpoint_and_moments_stay() -> None:
    def built(lr: float, betas: tuple[float, float], weight_decay: float, **schedule: Any) -> Any:
        torch.manual_seed(0)
        model = ESM2(ESM2Config(1, 32, 2, 64))
        optimizer = build_adamw(model, lr, betas, 1e-8, weight_decay)
        return model, optimizer, build_schedule(optimizer, **{**TINY, **schedule})

    model, saved, clock = built(1e-3, (0.9, 0.98), 0.0)
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        saved.step()
        clock.step()
    _, optimizer, schedule = built(4e-3, (0.8, 0.95), 0.2, floor=0.5)
    groups = settings(optimizer)
    optimizer.load_state_dict(saved.state_dict())
    schedule.load_state_dict(clock.state_dict())
    restore_settings(optimizer, schedule, groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.95)] * 2
    for done in range(5, 13):
        rate = 4e-3 * rate_factor(done + 1, **{**TINY, "floor": 0.5})
        assert [group["lr"] for group in optimizer.param_groups] == [rate] * 2
        assert schedule.get_last_lr() == [rate] * 2 or done == 5
        optimizer.step()
        schedule.step()
    moments = [state["exp_avg"] for state in saved.state_dict()["state"].values()]
    assert moments
    assert all(state["step"] == 5 for state in saved.state.values())


def test_settings_of_the_same_recipe_change_nothing() -> None:
    model = ESM2(ESM2Config(1, 32, 2, 64))
    optimizer = build_adamw(model, 1e-3, (0.9, 0.98), 1e-8, 0.01)
    schedule = build_schedule(optimizer, **TINY)
    groups = settings(optimizer)
    for _ in range(7):
        optimizer.step()
        schedule.step()
    before = settings(optimizer), copy.deepcopy(schedule.state_dict())
    restore_settings(optimizer, schedule, groups)
    assert (settings(optimizer), schedule.state_dict()) == before
