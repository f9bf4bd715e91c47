"""Every recipe builds the model it names; the published sizes start on a CPU with small overrides."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, composer, python
from plot_convergence import read_scalars

from esm2_composer.config import load_recipe
from esm2_composer.model import SIZES
from esm2_composer.runner import build_model, cluster_draw

RECIPES = sorted(path.stem for path in (ROOT / "yamls").glob("*.yaml"))


def load(name: str, shards: Path):
    return load_recipe(str(ROOT / f"yamls/{name}.yaml"), [f"data.remote={shards}"])


def test_there_is_a_recipe_for_every_size():
    assert {*SIZES, "demo", "continue"} == set(RECIPES)


@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_builds_the_size_it_is_named_after(size, shards):
    with torch.device("meta"):
        model = build_model(load(size, shards).model)
    assert model.config == SIZES[size]


@pytest.mark.parametrize("size", ["8m", "650m", "3b"])
def test_the_published_settings(size, shards):
    recipe = load(size, shards)
    assert recipe.global_train_batch_size == 2048
    assert recipe.updates == 500_000
    assert dataclasses.astuple(recipe.optimizer) == (4e-4, (0.9, 0.98), 1e-8, 0.01, 1.0)
    assert recipe.schedule.warmup == (20_000 if size == "3b" else 2_000)
    assert (recipe.schedule.decay_fraction, recipe.schedule.floor) == (0.9, 0.1)
    assert recipe.eval_interval == ("2500ba" if size == "3b" else "10000ba")
    draw = cluster_draw(recipe)
    assert (draw.max_length, draw.masking.fraction, draw.masking.split) == (1024, 0.15, (0.8, 0.1, 0.1))


def test_the_recipe_that_continues_begins_where_the_published_schedule_ended(shards):
    recipe, published = load("continue", shards), load("8m", shards)
    assert recipe.model.init_from
    assert recipe.optimizer.lr == pytest.approx(published.optimizer.lr * published.schedule.floor)
    assert cluster_draw(recipe) == cluster_draw(published)


def start(recipe: str, shards: Path, folder: Path, *overrides: str, ranks: int = 1):
    """A few updates of a recipe, its model and batch made small."""
    small = (
        *("model.size=null", "model.num_layers=2", "model.hidden_size=64", "model.num_heads=4"),
        *("model.ffn_hidden_size=128", "global_train_batch_size=8", "data.max_length=128", "data.num_workers=1"),
        *("max_duration=4ba", "schedule.warmup=2", "eval_interval=4ba", "save_interval=2ba"),
    )
    result = composer(
        *("-n", str(ranks), ROOT / "train.py", ROOT / f"yamls/{recipe}.yaml", f"data.remote={shards}"),
        *(*small, *overrides),
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("size", ["8m", "650m"])
def test_a_recipe_starts_on_a_cpu_and_says_what_it_leaves_out(size, shards, tmp_path):
    result = start(size, shards, tmp_path)
    assert "training in fp32 instead of amp_bf16" in result.stderr
    assert ("training unsharded" in result.stderr) == (size == "650m")
    assert len(read_scalars(tmp_path / f"runs/esm2_{size}/tensorboard", "loss/train/total")) == 4


def test_the_3b_recipe_trains_sharded_resumes_on_one_rank_and_is_evaluated(shards, tmp_path):
    start("3b", shards, tmp_path, "fsdp.version=2", ranks=2)
    checkpoint = tmp_path / "runs/esm2_3b/checkpoints/latest-rank0.pt"
    assert len(list(checkpoint.glob("__*_0.distcp"))) == 2
    start("3b", shards, tmp_path, "fsdp.version=2", "max_duration=6ba", "eval_interval=6ba")
    events = tmp_path / "runs/esm2_3b/tensorboard"
    assert sorted(read_scalars(events, "loss/train/total")) == list(range(6))
    scored = python(
        *(ROOT / "tools/evaluate.py", checkpoint, "--data", shards, "--max-length", "128", "--json"), cwd=tmp_path
    )
    assert scored.returncode == 0, scored.stderr
    logged = read_scalars(events, "metrics/valid/perplexity")
    perplexity = json.loads(scored.stdout.splitlines()[-1])["perplexity"]
    assert perplexity == pytest.approx(logged[6], rel=1e-5)
