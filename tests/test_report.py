"""What the plan and a dry run print: the estimate's figures, what would be faster, and one line for a mistake."""

import json

import pytest
from conftest import ROOT, python
from test_estimate import recipe

from esm2_composer.errors import UserError
from esm2_composer.model import ESM2, ESM2Config, count_parameters
from esm2_composer.recipe.gpus import GPUS
from esm2_composer.recipe.report import describe, report


def test_gpus_that_cannot_share_the_batch_are_refused():
    with pytest.raises(UserError, match="3 GPUs cannot share"):
        report(recipe("8m"), 3, "h100")


HALVES = ("fsdp.data_parallel_replicate_degree=8", "fsdp.data_parallel_shard_degree=-1")


def test_useful_gpus_are_what_the_degrees_allow():
    text, plan = report(recipe("3b", *HALVES), 64, "h100")
    assert plan["useful_gpus"] % 8 == 0
    assert "help up to about" in text
    text, plan = report(recipe("3b", HALVES[0], "fsdp.data_parallel_shard_degree=8"), 64, "h100")
    assert plan["useful_gpus"] == 64
    assert "degrees make 64" in text


@pytest.mark.parametrize("degrees", [HALVES, ["fsdp.data_parallel_shard_degree=8"]])
def test_gpus_that_the_degrees_do_not_make_are_refused_as_in_training(degrees):
    with pytest.raises(UserError, match="does not make the 4 ranks"):
        report(recipe("3b", *degrees), 4, "h100")


def test_a_dry_run_on_one_rank_tells_of_those_that_the_degrees_make():
    assert "memory a GPU, of 16:" in describe(recipe("3b", *HALVES), 1)
    assert "memory a GPU, of 32:" in describe(recipe("3b", *HALVES), 32)
    assert "memory a GPU, of 1:" in describe(recipe("8m"), 1)
    with pytest.raises(UserError, match="3 GPUs cannot share global_train_batch_size 2048 equally; 2 can"):
        describe(recipe("8m"), 3)
    with pytest.raises(UserError, match="data_parallel_shard_degree 3 does not make the 8 ranks"):
        describe(recipe("3b", "fsdp.data_parallel_shard_degree=3"), 8)


def test_weights_to_go_on_from_are_not_read(tmp_path):
    model = ESM2(ESM2Config(num_layers=2, hidden_size=32, num_heads=2, ffn_hidden_size=64))
    model.save_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    _, data = report(recipe("8m", "model.size=null", f"model.init_from={tmp_path}"), 4, "h100")
    assert data["parameters"] == count_parameters(model)


@pytest.mark.parametrize("tell", [describe, lambda recipe, ranks: report(recipe, ranks, "h100")])
def test_weights_that_are_not_there_are_told_with_their_key(tell):
    with pytest.raises(UserError, match=r"^model\.init_from: nowhere\.pt: no such file"):
        tell(recipe("8m", "model.size=null", "model.init_from=nowhere.pt"), 1)


def test_checkpoints_are_told_of():
    """That they are so large, test_train.py looks at."""
    at_most = recipe("3b", "save_num_checkpoints_to_keep=2", "callbacks.best_checkpoints=4", "save_interval=100ba")
    text, plan = report(at_most, 64, "h100")
    assert (plan["checkpoints_kept"], plan["checkpoint_bytes"]) == (6, 12 * plan["parameters"])
    assert "34.1 GB each, every 100 updates (0.8 minutes); 6 kept, 204 GB" in text


@pytest.mark.parametrize("gpu", GPUS)
def test_each_gpu_can_be_planned_for(gpu):
    text, plan = report(recipe("650m"), 64, gpu)
    assert f"on 64 x {gpu}" in text
    assert f" of {GPUS[gpu].memory / 1e9:.0f}: fits" in text
    assert plan["compute_seconds"] == pytest.approx(
        report(recipe("650m"), 64, "h100")[1]["compute_seconds"] * GPUS["h100"].flops / GPUS[gpu].flops
    )


def test_the_command_needs_neither_data_nor_gpus(tmp_path):
    result = python(ROOT / "tools/plan.py", ROOT / "yamls/3b.yaml", "--gpus", "128", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout.splitlines()[-1])
    assert plan["parameters"] == 2_839_005_634
    assert plan["real_tokens"] / 128 == pytest.approx(5_000, rel=0.05)
    assert plan["fits"] is True


@pytest.mark.parametrize("mfu", ["1e-320", "1.01"])
def test_a_share_of_the_peak_that_is_none_is_refused(mfu):
    result = python(ROOT / "tools/plan.py", ROOT / "yamls/8m.yaml", "--gpus", "8", "--mfu", mfu)
    assert result.returncode == 2
    assert result.stderr == f"error: argument --mfu: {mfu}; it must be at least 0.001 and at most 1; see --help\n"


@pytest.mark.parametrize(
    ("size", "gpus", "change"),
    [
        ("15b", 64, None),  # what is recomputed there takes less than 5 %
        ("650m", 128, "fsdp=null"),  # launching its kernels under FSDP takes longer than computing
        ("650m", 64, None),
        ("650m", 8, None),
        ("3b", 128, None),
        ("15b", 512, "fsdp.sharding_strategy=SHARD_GRAD_OP"),  # one gather less of each layer
        ("8m", 32, None),
    ],
)
def test_a_faster_way_to_spread_the_model_is_told_where_it_fits(size, gpus, change):
    text, data = report(recipe(size), gpus, "h100")
    assert data["faster"] == change
    assert ("  faster " in text) == (change is not None)
    if change is not None:
        _, changed = report(recipe(size, change), gpus, "h100")
        assert changed["step_seconds"] < 0.95 * data["step_seconds"]
        assert changed["memory_bytes"] < 0.9 * GPUS["h100"].memory
        assert f"{change}: {changed['step_seconds']:.3f} s a step" in text


@pytest.mark.parametrize(
    ("gpus", "change"),
    [(8, None), (64, "selective"), (128, "false")],  # as much as fits, in a microbatch of 16,384 tokens
)
def test_to_recompute_less_is_told_of_where_it_fits(gpus, change):
    whole = recipe("15b", "fsdp.activation_checkpointing=true", "device_microbatch_tokens=16384")
    _, data = report(whole, gpus, "h100")
    assert data["faster"] == (change and f"fsdp.activation_checkpointing={change}")
