"""A run that branches off another one, by `load_path`, goes on with its data, its moments and its clock."""

import shutil

import pytest
from conftest import SHARDED, Run, command, composer, python
from outcomes import assert_same_weights, assert_user_error, final_weights, losses, scalars
from test_saving import from_and_to_store, store  # noqa: F401, of which the second is a fixture

BRANCH_POINT = 8  # updates, of which an epoch has six
LEAF = f"ep1-ba{BRANCH_POINT}-rank0.pt"


def after(values: dict[int, float]) -> dict[int, float]:
    return {step: value for step, value in values.items() if step >= BRANCH_POINT}


def test_a_branch_that_changes_nothing_ends_as_the_run_itself(shards, finished, tmp_path):
    checkpoint = finished / "runs/demo/checkpoints" / LEAF
    result = python(*command(shards, f"load_path={checkpoint}"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"branching off {checkpoint}, update 8 of 14" in result.stderr
    assert losses(tmp_path) == after(losses(finished))
    assert_same_weights(final_weights(tmp_path), final_weights(finished))


@pytest.mark.slow
def test_a_branch_has_the_rates_of_its_recipe_and_goes_on_from_its_own_checkpoints(shards, finished, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(finished / "runs/demo/checkpoints", source)
    arguments = command(shards, f"load_path={source}/{LEAF}", "optimizer.lr=1.5e-3", "schedule.floor=0.5")
    with Run(*arguments, cwd=tmp_path, launcher=False) as run:
        run.wait_for("update 11/")
        run.kill()
    shutil.rmtree(source)
    again = python(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on from runs/demo/checkpoints/ep1-ba10-rank0.pt" in again.stderr
    branch, whole = losses(tmp_path), after(losses(finished))
    assert list(branch) == list(whole)
    assert branch[BRANCH_POINT] == whole[BRANCH_POINT], "the same weights, clusters and masks"
    assert all(branch[step] != whole[step] for step in whole if step > BRANCH_POINT)
    rates = scalars(tmp_path, "lr-AdamW/group0")
    progress = {done: (done + 1 - 3) / (0.9 * (14 - 3)) for done in range(9, 14)}  # of its decay
    assert {done: rates[done] for done in progress} == pytest.approx(
        {done: 1.5e-3 * max(0.5, 1 - 0.5 * share) for done, share in progress.items()}
    )
    other = python(*command(shards, f"load_path={source}/ep1-ba10-rank0.pt"), cwd=tmp_path)
    assert_user_error(other, "load_path was", "optimizer.lr was 0.0015, is 0.003")


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_a_sharded_run_in_a_store_is_branched_off_with_another_rate(version, shards, store, tmp_path):  # noqa: F811
    script, key = SHARDED[version]
    sharded = (key, "fsdp.state_dict_type=sharded", "save_num_checkpoints_to_keep=9")
    arguments = from_and_to_store(shards, store, tmp_path, *sharded, script=script)
    run = composer("-n", "2", *arguments, cwd=tmp_path, **store.environment)
    assert run.returncode == 0, run.stderr
    whole, rates = after(losses(tmp_path)), scalars(tmp_path, "lr-AdamW/group1")
    shutil.rmtree(tmp_path / "runs")
    checkpoint = f"s3://bucket/run/ep1-ba{BRANCH_POINT}"
    changed = (f"load_path={checkpoint}", "save_folder=s3://bucket/branch", "optimizer.lr=1.5e-3")
    branch = composer("-n", "2", *arguments, *changed, cwd=tmp_path, **store.environment)
    assert branch.returncode == 0, branch.stderr
    assert f"branching off {checkpoint}, update 8 of 14" in branch.stderr
    halved = scalars(tmp_path, "lr-AdamW/group1")
    assert {done: halved[done] for done in range(9, 14)} == pytest.approx(
        {done: rates[done] / 2 for done in range(9, 14)}
    )
    assert losses(tmp_path)[BRANCH_POINT] == pytest.approx(whole[BRANCH_POINT], rel=1e-6)
    assert losses(tmp_path)[13] != pytest.approx(whole[13], rel=1e-6)
