"""The whole path through the real commands: train, evaluate, export; kill and relaunch; ranks; mistakes."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import evaluate
import export_hf
import plot_convergence
import pytest
import torch
from composer.core import Callback
from composer.utils import dist
from conftest import ROOT, Run, cluster, command, composer, python
from outcomes import assert_same_weights, assert_user_error, final_weights, losses, scalars
from streaming import MDSWriter
from transformers import AutoModelForMaskedLM

from esm2_composer import runner
from esm2_composer.data.mds import COLUMNS
from esm2_composer.distributed.collectives import end_process_group
from esm2_composer.distributed.fsdp import DivideByRanks
from esm2_composer.errors import TransientError, UserError
from esm2_composer.loggers import PERPLEXITY
from esm2_composer.recipe.config import load_recipe
from esm2_composer.recipe.estimate import estimate_run
from esm2_composer.recipe.gpus import GPUS
from esm2_composer.recipe.schema import DataSection
from esm2_composer.runner import Done, build_trainer, digests_of_all_nodes

DIMENSIONS = ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size")


def test_training_logs_loss_perplexity_and_real_tokens(finished):
    def read(tag: str) -> dict[int, float]:
        return scalars(finished, tag)

    assert sorted(losses(finished)) == list(range(14))
    assert sorted(read(PERPLEXITY)) == [0, 7, 14]
    for tag in ("throughput/tokens_per_sec", "time/token", "time/sample", "time/remaining_estimate"):
        assert read(tag), tag
    operations, tokens = (read(f"throughput/device/{each}_per_sec")[14] for each in ("flops", "tokens"))
    products = 6 * (4 * 32**2 + 2 * 32 * 64)  # a token's, in the layer's matrices; attention takes as much at 128
    assert 1 < operations / tokens / products < 2.1
    assert read("load/balance") == {10: 1.0}, "one rank has it all"
    assert 0.5 < read("load/fill")[10] <= 1
    assert 0 < read("gradient_norm")[10] < 100
    assert read("metrics/train/perplexity")[10] == pytest.approx(math.exp(losses(finished)[9]))
    assert 0 < read("metrics/train/masked_accuracy")[10] < 0.5
    assert len(list((finished / "runs/demo/tensorboard").rglob("events.*"))) == 1
    logged = plot_convergence.read_run(finished / "runs/demo/tensorboard")
    assert logged.name == "demo"
    assert logged.settings["data.max_length"] == 128
    rate = read("lr-AdamW/group0")
    # with t updates done, the rate of the next: no update has rate zero, none the rate of another
    assert [rate[t] for t in (1, 2, 3)] == pytest.approx([3e-3 * 2 / 3, 3e-3, 3e-3 * (1 - 0.9 / 9.9)])


def test_checkpoints_are_as_large_as_planned(shards, finished, tmp_path):
    _, recipe, *overrides = command(shards)
    path = finished / "runs/demo/checkpoints/latest-rank0.pt"
    planned = estimate_run(load_recipe(recipe, overrides), 1, GPUS["h100"], 0.4).checkpoint_bytes
    assert 0 < path.stat().st_size - planned < 200_000  # what else a run keeps


@pytest.mark.slow
def test_a_relaunch_of_a_finished_run_exits_0_and_trains_nothing(shards, finished):
    before = losses(finished)
    result = python(*command(shards), cwd=finished)
    assert result.returncode == 0, result.stderr
    assert "is done" in result.stdout
    assert losses(finished) == before


def test_a_run_killed_in_mid_epoch_ends_as_one_that_was_not(shards, finished, tmp_path):
    with subprocess.Popen(
        [sys.executable, *command(shards)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        for line in process.stderr:  # 96 clusters are six updates of 16: kill within the second epoch
            if line.startswith("update 9/"):
                os.killpg(process.pid, signal.SIGKILL)
                break
    assert max(losses(tmp_path), default=0) < 13
    again = python(*command(shards), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert_same_weights(final_weights(tmp_path), final_weights(finished))
    resumed, whole = losses(tmp_path), losses(finished)
    after = [step for step in whole if step >= 8]
    assert {step: resumed[step] for step in after} == {step: whole[step] for step in after}


def test_sigterm_saves_and_exits_75_and_a_relaunch_goes_on(shards, finished, tmp_path):
    with Run(*command(shards, "save_interval=100ba"), cwd=tmp_path) as run:
        run.wait_for("update 3/")
        run.launcher.terminate()
        code, _ = run.end()
    assert code == 75, "".join(run.lines)
    assert (tmp_path / "runs/demo/checkpoints/latest-rank0.pt").exists()
    again = python(*command(shards, "save_interval=100ba"), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path) == losses(finished)
    lines = again.stderr.splitlines()
    assert "training clusters: 96, 6 updates an epoch; validation clusters: " in next(
        line for line in lines if line.startswith("demo: ")
    )
    folder = "runs/demo/checkpoints"
    assert any(re.fullmatch(rf"going on from {folder}/ep.-ba\d-rank0.pt, update \d of 14", line) for line in lines)
    lowest = min(scalars(tmp_path, PERPLEXITY).items(), key=lambda told: told[1])
    told = f"validation perplexity was lowest after update {lowest[0]}, {lowest[1]:.3f}"
    assert lines[-1] == f"demo is done: checkpoints are in {folder}; {told}"


def test_two_ranks_train_the_same_model_as_one(shards, finished, tmp_path):
    result = composer(
        "-n", "2", *command(shards, "device_microbatch_tokens=512", "data.min_length=2"), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert (
        result.stderr.count("data.min_length 2: 0 clusters have no member that long, and show those they have")
        == 1
    )
    assert 0.9 < scalars(tmp_path, "load/balance")[10] <= 1
    assert len(list((tmp_path / "runs/demo/tensorboard").rglob("events.*"))) == 1
    assert losses(tmp_path) == pytest.approx(losses(finished), rel=1e-5)
    assert scalars(tmp_path, PERPLEXITY) == pytest.approx(scalars(finished, PERPLEXITY), rel=1e-4)


def test_a_finished_run_is_no_other_recipes(shards, finished, monkeypatch):
    monkeypatch.chdir(finished)
    _, recipe, *overrides = command(shards, "model.num_layers=2", "optimizer.lr=1")
    with pytest.raises(UserError, match=r"model\.num_layers was 1, is 2; optimizer\.lr was 0\.003, is 1\.0"):
        build_trainer(load_recipe(recipe, overrides))
    assert len(losses(finished)) == 14


def test_a_finished_run_is_done_before_ranks_meet(shards, finished, monkeypatch):
    """Of whom some may have left, if the node of one failed at the end."""
    monkeypatch.chdir(finished)
    monkeypatch.setattr(runner, "take_over", lambda *_: pytest.fail("they have met"))
    _, recipe, *overrides = command(shards)
    with pytest.raises(Done, match="is done: 14 updates, nothing left to train"):
        build_trainer(load_recipe(recipe, overrides))


@pytest.mark.slow
def test_a_run_is_logged_to_wandb_without_a_network(shards, tmp_path):
    result = python(
        *command(shards, "loggers.wandb.project=test", "max_duration=4ba"), cwd=tmp_path, WANDB_MODE="offline"
    )
    assert result.returncode == 0, result.stderr
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"loss/train/total" in log.read_bytes()


@pytest.mark.slow
def test_compiled_training_follows_eager_training(shards, finished, tmp_path):
    result = python(*command(shards, "compile=true"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == pytest.approx(losses(finished), rel=1e-4)


def test_evaluate_gives_the_perplexity_that_training_logged(shards, finished, call):
    checkpoint = finished / "runs/demo/checkpoints/latest-rank0.pt"
    code, out, err = call(evaluate.main, checkpoint, "--data", shards, "--max-length", "128", "--json")
    assert code == 0, err
    scored = json.loads(out)
    assert scored["perplexity"] == pytest.approx(scalars(finished, PERPLEXITY)[14], rel=1e-5)
    assert scored["sequences"] == 10


def test_the_export_is_the_trained_model_and_scores_the_same(shards, finished, tmp_path, call):
    checkpoint = finished / "runs/demo/checkpoints/latest-rank0.pt"
    code, out, err = call(export_hf.main, checkpoint, tmp_path / "hf")
    assert code == 0, err
    assert "AutoModelForMaskedLM.from_pretrained" in out
    exported = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").state_dict()
    trained = torch.load(checkpoint, weights_only=False)["state"]["model"]
    assert torch.equal(exported["lm_head.dense.weight"], trained["net.head.dense.weight"])
    assert torch.equal(exported["lm_head.decoder.weight"], trained["net.embed.weight"])
    assert not any(tensor.isnan().any() for tensor in exported.values())
    one, other = (call(evaluate.main, path, "--data", shards, "--json") for path in (checkpoint, tmp_path / "hf"))
    assert one[:2] == other[:2]


@pytest.mark.slow
def test_training_goes_on_from_weights_named_in_the_recipe(shards, finished, tmp_path):
    checkpoint = finished / "runs/demo/checkpoints/latest-rank0.pt"
    from_scratch = [o for o in command(shards) if not o.startswith("model.")]
    overrides = [f"model.{name}=null" for name in DIMENSIONS]
    overrides += [f"model.init_from={checkpoint}", "max_duration=1ba", "schedule.warmup=0", "eval_interval=1ba"]
    result = python(*from_scratch, *overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert scalars(tmp_path, PERPLEXITY)[0] == pytest.approx(scalars(finished, PERPLEXITY)[14], rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimiser.lr=1"], ["optimiser", "did you mean 'optimizer'"]),
        (["data.remote=/nowhere"], ["/nowhere", "no such folder"]),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(shards, tmp_path, overrides, words):
    assert_user_error(python(*command(shards, *overrides), cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_a_command_without_a_recipe_or_with_a_place_among_the_ranks_that_is_none_is_told(shards, tmp_path):
    assert_user_error(python(ROOT / "train.py", cwd=tmp_path), "error: give a recipe, such as yamls/8m.yaml")
    for name, number in [("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "x"), ("RANK", "-1")]:
        result = python(*command(shards), "--dry-run", cwd=tmp_path, **{name: number})
        assert_user_error(result, f"the environment variable {name} is '{number}'; it must be a number from")


def test_the_launcher_passes_the_line_and_the_exit_code_on(shards, tmp_path):
    result = composer("-n", "2", *command(shards, "optimiser.lr=1"), cwd=tmp_path)
    assert_user_error(result, "unknown key 'optimiser'")


@pytest.mark.slow
def test_a_damaged_shard_that_one_of_two_ranks_reads_is_one_line_and_exit_code_2(shards, tmp_path):
    shutil.copytree(shards / "valid", tmp_path / "many/valid")
    out = str(tmp_path / "many/train")
    with MDSWriter(out=out, columns=COLUMNS, compression="zstd", hashes=["xxh64"], size_limit=200) as writer:
        for i in range(96):
            writer.write(cluster(b"MKTAYIAKQR" * 4, name=f"UniRef50_{i}"))
    damaged = tmp_path / "many/train/shard.00003.mds.zstd"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    result = composer("-n", "2", *command(tmp_path / "many"), cwd=tmp_path)
    assert_user_error(result, f"{damaged}: damaged")


NO_ROOM = """
import runpy, sys, torch
from esm2_composer.task import MaskedLanguageModel

def loss(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved ...")

MaskedLanguageModel.loss = loss
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_gpu_without_room_is_one_line_that_names_the_key_and_exit_code_2(shards, tmp_path, ranks):
    script = tmp_path / "no_room.py"
    script.write_text(NO_ROOM)
    train = script, *command(shards)
    result = python(*train, cwd=tmp_path) if ranks == 1 else composer("-n", "2", *train, cwd=tmp_path)
    told = "a GPU has no room; set device_microbatch_tokens below 2048"
    assert_user_error(result, told, "(CUDA out of memory. Tried to allocate 2.00 GiB.)")


@pytest.fixture
def given_to_trainer(shards, tmp_path, monkeypatch):
    """What `build_trainer` gives to Composer's Trainer, for overrides of the recipe."""

    class Told(Exception):
        pass

    def tell(**arguments):
        raise Told(arguments)

    monkeypatch.setattr(runner, "Trainer", tell)
    monkeypatch.setattr(runner, "Preemption", Callback)  # it would take this process's signals
    monkeypatch.setenv("FSDP_VERSION", "none")  # is given back, too
    monkeypatch.chdir(tmp_path)

    def arguments(*overrides):
        _, recipe, *overrides = command(shards, *overrides)
        try:
            with pytest.raises(Told) as told:
                build_trainer(load_recipe(recipe, overrides))
        finally:
            end_process_group()
        return told.value.args[0]

    return arguments


@pytest.mark.parametrize(
    ("sharding", "sums", "corrections"),
    [("fsdp.version=2", True, [DivideByRanks]), ("fsdp.version=2", False, []), ("fsdp=null", True, [])],
)
def test_sharded_gradients_that_come_as_sums_are_divided(
    given_to_trainer, monkeypatch, sharding, sums, corrections
):
    """Whether the trainer is told to: what comes of it is in test_fsdp.py and test_global_batch.py."""
    monkeypatch.setattr(runner, "means_are_sums", lambda: sums)
    assert [type(each) for each in given_to_trainer(sharding)["algorithms"]] == corrections


@pytest.mark.parametrize(
    ("version", "wanted", "recomputed"),
    [
        (2, "true", True),
        (2, "selective", "selective"),
        (2, "false", False),
        (1, "true", False),  # version 1 shards nothing here
    ],
)
def test_layers_are_recomputed_where_the_recipe_says(given_to_trainer, version, wanted, recomputed):
    """What comes of it is in test_kernels_layer.py."""
    given = given_to_trainer(f"fsdp.version={version}", f"fsdp.activation_checkpointing={wanted}")
    assert {layer.recomputes for layer in given["model"].net.layers} == {recomputed}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.attention=flash", "precision=amp_bf16"],
            "'flash' is not available on cpu.* available here: auto, cpu",
        ),
        (
            ["save_folder=taken/checkpoints"],
            "'save_folder' is taken/checkpoints; it must be a folder",
        ),
        (["data.local=/proc/cache"], r"^data\.local /proc/cache cannot be made \("),
        (["model.num_layers=1001"], "^model: num_layers must be at most 1000, not 1001$"),
        (
            ["model.init_from=nowhere.pt", *(f"model.{name}=null" for name in DIMENSIONS)],
            r"^model\.init_from: nowhere\.pt: no such file",
        ),
    ],
)
def test_what_this_machine_cannot_run_is_told_before_ranks_meet(shards, tmp_path, monkeypatch, overrides, message):
    (tmp_path / "taken").write_text("mine")
    monkeypatch.chdir(tmp_path)
    _, recipe, *overrides = command(shards, *overrides)
    with pytest.raises(UserError, match=message):
        build_trainer(load_recipe(recipe, overrides))
    assert not torch.distributed.is_initialized()


def test_ranks_that_cannot_share_a_batch_are_told_before_they_meet(shards, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    _, recipe, *overrides = command(shards)
    with pytest.raises(UserError, match="global_train_batch_size 16 is not a multiple of the 3 ranks"):
        build_trainer(load_recipe(recipe, overrides))


def test_ranks_that_the_degrees_do_not_make_are_told_before_they_meet(shards, tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "16")
    monkeypatch.setattr(runner, "get_device", lambda _: SimpleNamespace(name="gpu"))
    monkeypatch.chdir(tmp_path)
    _, recipe, *overrides = command(shards, "fsdp.version=1", "fsdp.data_parallel_shard_degree=8")
    with pytest.raises(UserError, match="data_parallel_shard_degree 8 does not make the 16 ranks"):
        build_trainer(load_recipe(recipe, overrides))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["triton", "triton", "torch"], "rank 0 would compute attention by 'triton', rank 2 by 'torch';"),
        (["torch", "triton", "triton"], "rank 0 would compute attention by 'torch', rank 1 by 'triton';"),
        (["torch", "torch", "torch"], None),
    ],
)
def test_ranks_that_would_compute_attention_by_other_kernels_are_told(monkeypatch, names, told):
    monkeypatch.setattr(runner.dist, "all_gather_object", lambda name: names)
    with pytest.raises(TransientError, match=told) if told else contextlib.nullcontext():
        runner.check_same_attention(names[1])


def test_too_few_clusters_are_one_line_and_exit_code_2(shards, tmp_path, monkeypatch):
    arguments = command(shards, "global_train_batch_size=97")
    for also in ((), ("--dry-run",)):
        result = python(*arguments, *also, cwd=tmp_path)
        assert_user_error(result, "96 clusters", "fewer than one global_train_batch_size")
    _, recipe, *overrides = arguments
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="96 clusters"):  # as in a store, which is asked later
        build_trainer(load_recipe(recipe, overrides, data_is_here=False))


@pytest.mark.slow  # in this process: test_checks.py
def test_a_cache_of_other_shards_is_refused(shards, tmp_path):
    (tmp_path / "cache/valid").mkdir(parents=True)
    (tmp_path / "cache/valid/index.json").write_text((shards / "valid/index.json").read_text() + " ")
    result = python(*command(shards, "data.local=cache"), cwd=tmp_path)
    assert_user_error(result, f"data.local cache holds other valid shards than data.remote {shards};")


def test_nodes_whose_caches_hold_different_shards_are_told(shards, tmp_path, monkeypatch):
    shutil.copytree(shards, tmp_path / "other")
    index = tmp_path / "other/valid/index.json"
    index.write_text(index.read_text() + " ")
    here, there = DataSection("s3://b/x", str(shards)), DataSection("s3://b/x", str(tmp_path / "other"))
    seen = []
    monkeypatch.setattr(dist, "all_gather_object", lambda digests: seen.append(digests) or seen)
    first = digests_of_all_nodes(here)
    assert digests_of_all_nodes(here) == first
    with pytest.raises(UserError, match="holds other shards on some nodes than on others"):
        digests_of_all_nodes(there)


@pytest.mark.parametrize("checkpoint", ["nothing.pt", "folder"])
def test_evaluating_what_is_no_checkpoint_is_refused(shards, tmp_path, call, checkpoint):
    (tmp_path / "folder").mkdir()
    code, _, err = call(evaluate.main, tmp_path / checkpoint, "--data", shards)
    assert code == 2
    assert checkpoint in err


def test_plotting_a_folder_without_events_is_refused(tmp_path, call):
    code, _, err = call(plot_convergence.main, tmp_path, "--out", tmp_path / "figure.png")
    assert code == 2
    assert "no TensorBoard events" in err
    assert not (tmp_path / "figure.png").exists()
