"""The whole path through the real commands: train, evaluate, export; kill and relaunch; ranks; mistakes."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, composer, python
from plot_convergence import read_scalars
from transformers import AutoModelForMaskedLM

from esm2_composer.model import ESM2

LOSS = "loss/train/total"


def command(shards: Path, *overrides: str) -> list[str]:
    """demo.yaml shrunk to a model and a run of seconds."""
    return [
        str(ROOT / "train.py"),
        str(ROOT / "yamls/demo.yaml"),
        *(f"data.remote={shards}", "data.max_length=128", "device_microbatch_tokens=2048"),
        *("model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=64"),
        *("max_duration=14ba", "schedule.warmup=3", "eval_interval=7ba", "save_interval=2ba"),
        "callbacks.best_checkpoints=0",
        *overrides,
    ]


def losses(folder: Path) -> dict[int, float]:
    return read_scalars(folder / "runs/demo/tensorboard", LOSS)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    """The working folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    result = composer(*command(shards), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_training_logs_loss_perplexity_and_real_tokens(finished):
    events = finished / "runs/demo/tensorboard"
    assert sorted(losses(finished)) == list(range(14))
    assert sorted(read_scalars(events, "metrics/valid/perplexity")) == [0, 7, 14]
    for tag in ("throughput/tokens_per_sec", "time/token", "time/sample", "time/remaining_estimate"):
        assert read_scalars(events, tag), tag
    assert read_scalars(events, "load/balance") == {10: 1.0}, "one rank has it all"
    assert 0.5 < read_scalars(events, "load/fill")[10] <= 1
    assert 0 < read_scalars(events, "gradient_norm")[10] < 100
    assert read_scalars(events, "metrics/train/perplexity")[10] == pytest.approx(math.exp(losses(finished)[9]))
    assert 0 < read_scalars(events, "metrics/train/masked_accuracy")[10] < 0.5
    assert len(list((events / "demo").glob("events.*"))) == 1
    rate = read_scalars(events, "lr-AdamW/group0")
    # with t updates done, the rate of the next: no update has rate zero, none the rate of another
    assert [rate[t] for t in (1, 2, 3)] == pytest.approx([3e-3 * 2 / 3, 3e-3, 3e-3 * (1 - 0.9 / 9.9)])


def test_a_relaunch_of_a_finished_run_exits_0_and_trains_nothing(shards, finished):
    before = losses(finished)
    result = composer(*command(shards), cwd=finished)
    assert result.returncode == 0, result.stderr
    assert "is done" in result.stdout
    assert losses(finished) == before


def test_a_run_killed_in_mid_epoch_ends_as_one_that_was_not(shards, finished, tmp_path):
    with subprocess.Popen(
        [Path(sys.executable).with_name("composer"), *command(shards)],
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
    again = composer(*command(shards), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert final_weights(tmp_path).keys() == final_weights(finished).keys()
    for name, tensor in final_weights(finished).items():
        assert torch.equal(final_weights(tmp_path)[name], tensor), name
    resumed, whole = losses(tmp_path), losses(finished)
    after = [step for step in whole if step >= 8]
    assert {step: resumed[step] for step in after} == {step: whole[step] for step in after}


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return ESM2.from_pretrained(folder / "runs/demo/checkpoints/latest-rank0.pt").state_dict()


def test_sigterm_saves_and_exits_75_and_a_relaunch_goes_on(shards, finished, tmp_path):
    with subprocess.Popen(
        [Path(sys.executable).with_name("composer"), *command(shards, "save_interval=100ba")],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr:
            if line.startswith("update 3/"):
                process.terminate()
                break
        process.stderr.read()
    assert process.returncode == 75
    checkpoints = [p.name for p in (tmp_path / "runs/demo/checkpoints").iterdir()]
    assert "latest-rank0.pt" in checkpoints
    again = composer(*command(shards, "save_interval=100ba"), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path) == losses(finished)


def test_two_ranks_train_the_same_model_as_one(shards, finished, tmp_path):
    result = composer("-n", "2", *command(shards, "device_microbatch_tokens=512"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 0.9 < read_scalars(tmp_path / "runs/demo/tensorboard", "load/balance")[10] <= 1
    one, two = losses(finished), losses(tmp_path)
    assert one.keys() == two.keys()
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5)
    metric = "metrics/valid/perplexity"
    one, two = (read_scalars(f / "runs/demo/tensorboard", metric) for f in (finished, tmp_path))
    assert two == pytest.approx(one, rel=1e-4)


def test_a_finished_run_is_not_overwritten_without_autoresume(shards, finished):
    before = losses(finished)
    result = python(*command(shards, "autoresume=false"), cwd=finished)
    assert_user_error(result, "holds a run of 14 updates", "autoresume=true")
    assert losses(finished) == before


@pytest.mark.slow
def test_a_run_is_logged_to_wandb_without_a_network(shards, tmp_path):
    result = composer(
        *command(shards, "loggers.wandb.project=test", "max_duration=4ba"), cwd=tmp_path, WANDB_MODE="offline"
    )
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_compiled_training_follows_eager_training(shards, finished, tmp_path):
    result = composer(*command(shards, "compile=true"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path) == pytest.approx(losses(finished), rel=1e-4)


def test_evaluate_gives_the_perplexity_that_training_logged(shards, finished):
    result = python(
        *(ROOT / "tools/evaluate.py", finished / "runs/demo/checkpoints/latest-rank0.pt"),
        *("--data", shards, "--max-length", "128", "--json"),
    )
    assert result.returncode == 0, result.stderr
    scored = json.loads(result.stdout.splitlines()[-1])
    logged = read_scalars(finished / "runs/demo/tensorboard", "metrics/valid/perplexity")
    assert scored["perplexity"] == pytest.approx(logged[14], rel=1e-5)
    assert scored["sequences"] == 10


def test_the_export_is_the_trained_model_and_scores_the_same(shards, finished, tmp_path):
    checkpoint = finished / "runs/demo/checkpoints/latest-rank0.pt"
    result = python(ROOT / "tools/export_hf.py", checkpoint, tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    assert "AutoModelForMaskedLM.from_pretrained" in result.stdout
    exported = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").state_dict()
    trained = torch.load(checkpoint, weights_only=False)["state"]["model"]
    assert torch.equal(exported["lm_head.dense.weight"], trained["net.head.dense.weight"])
    assert torch.equal(exported["lm_head.decoder.weight"], trained["net.embed.weight"])
    assert not any(tensor.isnan().any() for tensor in exported.values())
    scores = [
        python(ROOT / "tools/evaluate.py", path, "--data", shards, "--json").stdout.splitlines()[-1]
        for path in (checkpoint, tmp_path / "hf")
    ]
    assert scores[0] == scores[1]
    again = python(ROOT / "tools/export_hf.py", checkpoint, tmp_path / "hf")
    assert_user_error(again, "exists already")


def test_training_goes_on_from_weights_named_in_the_recipe(shards, finished, tmp_path):
    checkpoint = finished / "runs/demo/checkpoints/latest-rank0.pt"
    dimensions = ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size")
    from_scratch = [o for o in command(shards) if not o.startswith("model.")]
    overrides = [f"model.{name}=null" for name in dimensions]
    overrides += [f"model.init_from={checkpoint}", "max_duration=4ba", "eval_interval=4ba"]
    result = composer(*from_scratch, *overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    metric = "metrics/valid/perplexity"
    before = read_scalars(finished / "runs/demo/tensorboard", metric)[14]
    assert read_scalars(tmp_path / "runs/demo/tensorboard", metric)[0] == pytest.approx(before, rel=1e-6)


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """One line that begins with "error:" and holds `words`; exit code 2; no traceback."""
    assert result.returncode == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert all(word in line for word in words), line
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimiser.lr=1"], ["optimiser", "did you mean 'optimizer'"]),
        (["data.remotes=x"], ["data.remotes", "did you mean 'remote'"]),
        (["model.size=9m"], ["model.size", "8m, 35m, 150m, 650m, 3b, 15b"]),
        (["data.remote=/nowhere"], ["/nowhere", "no train shards"]),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(shards, tmp_path, overrides, words):
    assert_user_error(python(*command(shards, *overrides), cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_the_launcher_passes_the_line_and_the_exit_code_on(shards, tmp_path):
    result = composer("-n", "2", *command(shards, "optimiser.lr=1"), cwd=tmp_path)
    assert_user_error(result, "unknown key 'optimiser'")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["global_train_batch_size=97"], ["96 clusters", "fewer than one global_train_batch_size"]),
        (["model.num_heads=3"], ["num_heads 3 does not divide"]),
        (["model.attention=flash"], ["'flash' is not available on cpu", "available here: auto, cpu"]),
    ],
)
def test_a_recipe_this_machine_cannot_run_is_one_line_and_exit_code_2(shards, tmp_path, overrides, words):
    assert_user_error(python(*command(shards, *overrides), cwd=tmp_path), *words)


@pytest.mark.parametrize("checkpoint", ["nothing.pt", "folder"])
def test_evaluating_what_is_no_checkpoint_is_one_line_and_exit_code_2(shards, tmp_path, checkpoint):
    (tmp_path / "folder").mkdir()
    result = python(ROOT / "tools/evaluate.py", tmp_path / checkpoint, "--data", shards)
    assert_user_error(result, checkpoint)


def test_plotting_a_folder_without_events_is_one_line_and_exit_code_2(tmp_path):
    result = python(ROOT / "tools/plot_convergence.py", tmp_path, "--out", tmp_path / "figure.png")
    assert_user_error(result, "no TensorBoard events")
    assert not (tmp_path / "figure.png").exists()
