"""A run goes on from its newest checkpoint; the newest and the best are kept; another run is refused."""

import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from save_folders import listing, save, stage

from esm2_composer import retry
from esm2_composer.checkpoints.folders import open_folder
from esm2_composer.checkpoints.index import Index
from esm2_composer.checkpoints.local import LocalFolder
from esm2_composer.checkpoints.names import DIVERGED
from esm2_composer.checkpoints.resume import (
    RECIPE,
    Origin,
    check_resumed,
    check_shared,
    check_undamaged,
    find_branch_point,
    find_checkpoint,
    take_over,
)
from esm2_composer.checkpoints.saving import CheckpointSaver
from esm2_composer.errors import StoreUnavailable, UserError
from esm2_composer.recipe.config import load_recipe, to_yaml
from esm2_composer.recipe.schema import Recipe


@pytest.mark.filterwarnings("ignore")  # torch: it says that there is a single process
def test_a_sharded_checkpoint_without_a_part_is_not_resumed_from(recipe, tmp_path):
    folder = LocalFolder(str(tmp_path))
    take_over(folder, True, recipe, False)
    for name in ("ep0-ba10", "ep0-ba20", "ep0-ba30"):
        tensors = {f"{i}": torch.ones(100 + i) for i in range(9)}
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder.location(name), thread_count=3), no_dist=True)
    assert folder.names() == ["ep0-ba10", "ep0-ba20", "ep0-ba30"]
    for name in ("ep0-ba20", "ep0-ba30"):
        sorted(Path(folder.location(name)).glob("*.distcp"))[-1].unlink()
    assert find_checkpoint(folder, True, recipe, True) == "ep0-ba10"


def test_a_run_that_diverged_is_not_gone_on_with_unless_that_is_wanted(folder, recipe, tmp_path):
    take_over(folder, True, recipe, False)
    save(folder, tmp_path, "ep0-ba20-rank0.pt")
    state = stage(tmp_path, "ep0-ba30-rank0.pt")
    folder.commit(state, f"{DIVERGED}ep0-ba30-rank0.pt")
    with pytest.raises(
        UserError, match=f"diverged at update 30;.* remove {DIVERGED}ep0-ba30-rank0.pt to go on from"
    ):
        find_checkpoint(folder, True, recipe, False)
    save(folder, tmp_path, "ep0-ba40-rank0.pt")
    folder.write(f"{DIVERGED}epochs.txt", "notes")  # somebody's own
    assert find_checkpoint(folder, True, recipe, False) == "ep0-ba40-rank0.pt"


def test_what_a_killed_run_staged_is_cleared_at_the_next_start(folder):
    left = folder.staging() / "ep0-ba10-rank0.pt"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of it")
    again = open_folder(str(folder))
    assert again.staging() == folder.staging()
    assert open_folder(f"{folder}2").staging() != folder.staging()
    CheckpointSaver(again, interval=10, keep_newest=1, keep_best=0)
    assert not left.parent.exists()


def test_a_rank_that_cannot_write_is_found_before_ranks_save_together(tmp_path, monkeypatch):
    """Or the others would wait for it in torch's collectives."""
    monkeypatch.setattr("esm2_composer.checkpoints.saving.hand_on_all", lambda _: None)
    monkeypatch.setattr("esm2_composer.checkpoints.saving.save_checkpoint", lambda *_: pytest.fail("it has begun"))
    saver = CheckpointSaver(LocalFolder(str(tmp_path / "run")), interval=10, keep_newest=1, keep_best=0)
    (tmp_path / "run").touch()  # nothing can be made in it
    clock = SimpleNamespace(batch=SimpleNamespace(value=10), epoch=SimpleNamespace(value=0))
    assert not saver.save(SimpleNamespace(timestamp=clock, fsdp_sharded_state_dict_enabled=True), waits=())


@pytest.mark.parametrize("sharded", [False, True])
def test_why_torch_cannot_write_a_checkpoint_is_told(tmp_path, monkeypatch, capsys, sharded):
    def fail(*_: object) -> None:
        (tmp_path / ".saving").mkdir(exist_ok=True)
        cause = RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 85760 vs 85648")
        raise dcp.CheckpointException("write", {0: (cause, None)}) if sharded else cause

    monkeypatch.setattr("esm2_composer.checkpoints.saving.hand_on_all", lambda _: None)
    monkeypatch.setattr("esm2_composer.checkpoints.saving.save_checkpoint", fail)
    saver = CheckpointSaver(LocalFolder(str(tmp_path)), interval=10, keep_newest=1, keep_best=0)
    clock = SimpleNamespace(batch=SimpleNamespace(value=10), epoch=SimpleNamespace(value=0))
    assert not saver.save(SimpleNamespace(timestamp=clock, fsdp_sharded_state_dict_enabled=sharded), waits=())
    said = capsys.readouterr().err
    assert re.search(rf"not saved: OSError: cannot be written; [\d,]+ bytes are free in {tmp_path}; leaving", said)


def test_metrics_are_handed_on_before_an_evaluation_or_a_checkpoint_counts(tmp_path, monkeypatch):
    """What a killed run saved, the next start does not make again."""
    folder, order = LocalFolder(str(tmp_path)), []
    saver = CheckpointSaver(folder, interval=10, keep_newest=1, keep_best=0)
    monkeypatch.setattr("esm2_composer.checkpoints.saving.hand_on_all", lambda _: order.append("metrics"))
    monkeypatch.setattr(saver, "_tidy", lambda: order.append("index"))
    monkeypatch.setattr(saver, "_try_to_save", lambda *_: order.append("checkpoint"))
    clock = SimpleNamespace(batch=SimpleNamespace(value=10), epoch=SimpleNamespace(value=0))
    state = SimpleNamespace(
        timestamp=clock, eval_metric_values={"loss": 2.0}, fsdp_sharded_state_dict_enabled=False
    )
    saver.eval_end(state, None)
    assert order == ["metrics", "index"]
    saver.save(state)
    assert order[2:] == ["metrics", "checkpoint", "index"]


def test_the_newest_before_an_update_is_told_or_none_if_the_store_is_away(folder, tmp_path, monkeypatch):
    for update in (10, 20, 30):
        save(folder, tmp_path, f"ep0-ba{update}-rank0.pt")
    saver = CheckpointSaver(folder, interval=10, keep_newest=1, keep_best=0)
    assert saver.newest_before(29) == folder.location("ep0-ba20-rank0.pt")
    assert saver.newest_before(9) is None

    def away() -> None:
        raise StoreUnavailable("no route to host")

    monkeypatch.setattr(folder, "names", away)
    monkeypatch.setattr("esm2_composer.retry.WAITS", (0,))
    assert saver.newest_before(29) is None


def test_a_folder_is_shared_if_every_node_sees_what_rank_zero_writes(folder, monkeypatch):
    """Even a node that believes what it once did not see not to be there, as those of NFS do."""
    read, unseen = type(folder).read, {RECIPE}
    monkeypatch.setattr(folder, "read", lambda name: None if name in unseen else read(folder, name))
    before = sorted(listing(folder))
    check_shared(folder)
    assert sorted(listing(folder)) == before
    monkeypatch.setattr(folder, "read", lambda _: None)
    with pytest.raises(UserError, match="is not the same on all nodes"):
        check_shared(folder)


def test_what_a_run_saved_while_it_ended_is_gone_on_from(folder, recipe, tmp_path, monkeypatch):
    assert find_checkpoint(folder, True, recipe, False) is None
    monkeypatch.setattr(folder, "lock", lambda: save(folder, tmp_path, "ep0-ba10-rank0.pt"))
    folder.write(RECIPE, to_yaml(recipe))
    assert take_over(folder, True, recipe, False) == "ep0-ba10-rank0.pt"


# Whether to resume


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return load("seed=17", folder=tmp_path)


def load(*overrides: str, folder: Path) -> Recipe:
    path = Path(__file__).parents[1] / "yamls/8m.yaml"
    return load_recipe(str(path), [f"save_folder={folder}/run", *overrides], data_is_here=False)


def test_a_new_run_leaves_its_recipe(folder, recipe):
    assert find_checkpoint(folder, True, recipe, False) is None
    assert folder.read(RECIPE) is None, "to look changes nothing"
    take_over(folder, True, recipe, False)
    assert "hidden_size" in folder.read(RECIPE)


def test_the_newest_checkpoint_is_found_by_a_recipe_that_trains_the_same(folder, recipe, tmp_path):
    take_over(folder, True, recipe, False)
    for update in (9, 10):
        save(folder, tmp_path, f"ep0-ba{update}-rank0.pt")
    free = (
        *("run_name=x", "max_duration=7000ba", "eval_interval=1ba", "device_microbatch_tokens=2048"),
        *("save_interval=5ba", "save_num_checkpoints_to_keep=1", "precision=fp32", "compile=true"),
        *("model.attention=cpu", "data.remote=/b", "data.local=/c", "data.cache_limit=9gb"),
        *("data.num_workers=0", "tensorboard_folder=null", "loggers.wandb.project=p"),
        "callbacks.best_checkpoints=1",
    )
    assert find_checkpoint(folder, True, load(*free, folder=tmp_path), False) == "ep0-ba10-rank0.pt"


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("model.size=35m", "model.size was 8m, is 35m"),
        ("seed=3", "seed was 17, is 3"),
        ("optimizer.lr=1e-3", "optimizer.lr was 0.0004, is 0.001"),
        ("schedule.updates=10000", "schedule.updates was 500000, is 10000"),
        ("global_train_batch_size=1024", "global_train_batch_size was 2048, is 1024"),
        ("data.mask_split=[0.7,0.2,0.1]", "data.mask_split was [0.8, 0.1, 0.1], is [0.7, 0.2, 0.1]"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(folder, recipe, tmp_path, override, difference):
    take_over(folder, True, recipe, False)
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    before = folder.read(RECIPE)
    with pytest.raises(UserError) as caught:
        find_checkpoint(folder, True, load(override, folder=tmp_path), False)
    assert f"another recipe: {difference}; set that back" in str(caught.value)
    assert str(caught.value).endswith(", or take another save_folder")
    assert folder.read(RECIPE) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "recipe.yaml is damaged; put back the recipe of this run"),
        ("a: [", "recipe.yaml is damaged"),
        ("- 1", "recipe.yaml is damaged"),
        ("global_train_batch_size: 2048\nseed: 17\n", "model.size was not set, is 8m"),  # cut short
    ],
)
def test_a_recipe_that_is_damaged_is_no_other_recipes(folder, recipe, tmp_path, content, message):
    take_over(folder, True, recipe, False)
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    folder.write(RECIPE, content)
    with pytest.raises(UserError, match=message):
        find_checkpoint(folder, True, recipe, False)
    assert folder.read(RECIPE) == content


def test_a_recipe_that_is_no_text_is_damaged(recipe, tmp_path):
    folder = LocalFolder(str(tmp_path))
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    (tmp_path / RECIPE).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"recipe\.yaml is damaged"):
        find_checkpoint(folder, True, recipe, False)


def test_a_checkpoint_that_is_damaged_inside_is_named(tmp_path):
    folder = LocalFolder(str(tmp_path))
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    check_undamaged(Origin(folder, "ep0-ba10-rank0.pt"))
    path = tmp_path / "ep0-ba10-rank0.pt"
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(4).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert folder.names() == [path.name]  # to list them does not read them
    with pytest.raises(UserError, match=r"ba10-rank0\.pt is damaged; remove it, to go on from the one before"):
        check_undamaged(Origin(folder, path.name))
    with pytest.raises(UserError, match=r"ba10-rank0\.pt is damaged; set load_path to another"):
        check_undamaged(Origin(folder, path.name, is_branch_point=True))


@pytest.mark.parametrize(
    ("update", "moments", "scheduled", "complaint"),
    [
        (4, 1, 4, "ep0-ba10 is of update 4; remove it, or give it the name it had"),
        (0, 1, 0, "ep0-ba10 is of update 0"),  # as without its clock
        (10, 0, 10, "ep0-ba10 is damaged; remove it"),
        (10, 1, 0, "ep0-ba10 is damaged; remove it"),
    ],
)
def test_what_lacks_a_part_of_a_run_is_not_gone_on_from(tmp_path, update, moments, scheduled, complaint):
    def loaded(update: int, moments: int, scheduled: int) -> SimpleNamespace:
        clock = SimpleNamespace(batch=SimpleNamespace(value=update))
        optimizer, schedule = SimpleNamespace(state=[1] * moments), SimpleNamespace(last_epoch=scheduled)
        return SimpleNamespace(timestamp=clock, optimizers=(optimizer,), schedulers=[schedule])

    folder = LocalFolder(str(tmp_path))
    check_resumed(loaded(10, 1, 10), Origin(folder, "ep0-ba10"))
    with pytest.raises(UserError, match=complaint):
        check_resumed(loaded(update, moments, scheduled), Origin(folder, "ep0-ba10"))


def test_another_duration_with_a_schedule_of_its_own_is_told_how_to_go_on(recipe, tmp_path):
    folder = LocalFolder(str(tmp_path))
    take_over(folder, True, recipe, False)
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    told = r"schedule\.updates was 500000, is 7000; set that back \(null makes .* max_duration: give it the number"
    with pytest.raises(UserError, match=told):
        find_checkpoint(folder, True, load("max_duration=7000ba", "schedule.updates=null", folder=tmp_path), False)


def test_a_run_is_not_overwritten_by_one_that_does_not_resume_it(folder, recipe, tmp_path):
    take_over(folder, True, recipe, False)
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    with pytest.raises(UserError, match="holds a run of 10 updates; set autoresume=true"):
        find_checkpoint(folder, False, recipe, False)


def test_full_and_sharded_checkpoints_are_told_apart(folder, recipe, tmp_path):
    take_over(folder, True, recipe, False)
    save(folder, tmp_path, "ep0-ba10")
    with pytest.raises(UserError, match="resume them with the fsdp section they were saved with"):
        find_checkpoint(folder, True, recipe, False)
    with pytest.raises(UserError, match=r"resume them with fsdp\.state_dict_type=sharded"):
        find_checkpoint(folder, True, load("fsdp.state_dict_type=full", folder=tmp_path), False)
    without_gpu = load("fsdp.state_dict_type=sharded", folder=tmp_path)
    with pytest.raises(UserError, match="holds sharded checkpoints, to be resumed on GPUs: none is seen here"):
        find_checkpoint(folder, True, without_gpu, False)


# Branching off


def branching(tmp_path: Path, name: str, *overrides: str, of: str = "run") -> Recipe:
    other = (f"save_folder={tmp_path}/branch", f"load_path={tmp_path}/{of}/{name}")
    return load(*other, *overrides, folder=tmp_path)


@pytest.fixture
def run(recipe, tmp_path) -> LocalFolder:
    """The save folder of a run of 20 updates."""
    folder = LocalFolder(recipe.save_folder)
    folder.make()
    take_over(folder, True, recipe, False)
    for update in (10, 20):
        save(folder, tmp_path, f"ep0-ba{update}-rank0.pt")
    return folder


def test_a_run_branches_off_any_checkpoint_with_other_rates_or_windows(run, tmp_path):
    others = (
        "optimizer.lr=1e-4",
        "schedule.warmup=5",
        "data.max_length=2048",
        "data.mask_fraction=0.2",
        "compile=true",
    )
    for name, update in (("ep0-ba10-rank0.pt", 10), ("ep0-ba20-rank0.pt", 20)):
        origin = find_branch_point(branching(tmp_path, name, *others), False)
        assert origin.update == update
        assert str(origin) == f"{run}/ep0-ba{update}-rank0.pt"


@pytest.mark.parametrize(
    ("name", "overrides", "complaint"),
    [
        ("ep0-ba30-rank0.pt", (), "ep0-ba30-rank0.pt is no whole checkpoint"),
        ("recipe.yaml", (), "recipe.yaml is no whole checkpoint"),
        ("latest-rank0.pt", (), "such as ep0-ba1000-rank0.pt; name the one that it leads to now"),
        ("", (), "run/ is no whole checkpoint"),
        (
            "ep0-ba10-rank0.pt",
            ("model.size=35m",),
            "model.size was 8m, is 35m; set that back, or take its weights",
        ),
        ("ep0-ba10-rank0.pt", ("seed=3",), "seed was 17, is 3"),
        ("ep0-ba10-rank0.pt", ("global_train_batch_size=1024",), "global_train_batch_size was 2048, is 1024"),
        ("ep0-ba20-rank0.pt", ("max_duration=20ba",), "has all updates that max_duration=20ba asks for"),
        ("ep0-ba10-rank0.pt", ("fsdp.state_dict_type=sharded", "fsdp.version=2"), "holds full checkpoints"),
    ],
)
def test_where_no_run_of_this_recipe_can_branch_off_is_refused(run, tmp_path, name, overrides, complaint):
    recipe = branching(tmp_path, name, *overrides)
    with pytest.raises(UserError, match=re.escape(complaint)) as caught:
        find_branch_point(recipe, recipe.fsdp is not None)
    assert str(caught.value).startswith("load_path: ")


def test_a_branch_that_diverged_before_it_saved_may_branch_off_again(run, tmp_path):
    recipe = branching(tmp_path, "ep0-ba10-rank0.pt")
    branch = LocalFolder(recipe.save_folder)
    branch.make()
    branch.commit(stage(tmp_path, "ep0-ba30-rank0.pt"), f"{DIVERGED}ep0-ba30-rank0.pt")
    with pytest.raises(UserError, match=r"to go on from .*/run/ep0-ba10-rank0\.pt all the same"):
        find_checkpoint(branch, True, recipe, False)


def test_a_source_whose_recipe_is_no_text_is_damaged(run, tmp_path):
    (run.path / RECIPE).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"load_path: save_folder .*recipe\.yaml is damaged; put back"):
        find_branch_point(branching(tmp_path, "ep0-ba10-rank0.pt"), False)


def test_a_run_branches_off_its_own_recipe_only(run, recipe, tmp_path):
    (tmp_path / "copy").mkdir()
    save(LocalFolder(str(tmp_path / "copy")), tmp_path, "ep0-ba10-rank0.pt")
    with pytest.raises(UserError, match=r"but not the recipe\.yaml they were trained with; put it back"):
        find_branch_point(branching(tmp_path, "ep0-ba10-rank0.pt", of="copy"), False)


def test_a_branch_that_has_begun_keeps_to_where_it_branched_off(run, tmp_path):
    """To change `load_path` then would do nothing."""
    branch, recipe = LocalFolder(str(tmp_path / "branch")), branching(tmp_path, "ep0-ba20-rank0.pt")
    branch.make()
    take_over(branch, True, recipe, False)
    save(branch, tmp_path, "ep0-ba30-rank0.pt")
    assert find_checkpoint(branch, True, recipe, False) == "ep0-ba30-rank0.pt"
    for other in (branching(tmp_path, "ep0-ba10-rank0.pt"), branching(tmp_path, "", "load_path=null")):
        with pytest.raises(UserError, match=r"another recipe: load_path was .*ep0-ba20-rank0\.pt, is "):
            find_checkpoint(branch, True, other, False)


def test_a_recipe_of_an_earlier_version_is_not_another_for_its_lack_of_a_key(run, recipe):
    before = run.read(RECIPE)
    run.write(RECIPE, before.replace("load_path: null\n", ""))
    assert run.read(RECIPE) != before
    assert find_checkpoint(run, True, recipe, False) == "ep0-ba20-rank0.pt"


def test_checkpoints_of_nobody_knows_what_are_refused(folder, recipe, tmp_path):
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    with pytest.raises(UserError, match=f"but not the {RECIPE}"):
        find_checkpoint(folder, True, recipe, False)


def test_a_folder_that_cannot_be_made_or_written_is_refused(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        find_checkpoint(LocalFolder(str(tmp_path / "file" / "checkpoints")), True, recipe, False)
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not bind who runs tests as root
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
        find_checkpoint(LocalFolder(str(tmp_path)), True, recipe, False)


def test_a_store_that_is_away_is_waited_for_and_is_no_mistake(recipe, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "x")
        monkeypatch.setattr(retry.time, "sleep", lambda _: None)
        with pytest.raises(StoreUnavailable, match="s3://bucket/run cannot be reached"):
            find_checkpoint(open_folder("s3://bucket/run"), True, recipe, False)
        assert capsys.readouterr().err.count("trying again in") == len(retry.WAITS)
        with pytest.raises(StoreUnavailable, match="s3://bucket/run cannot be reached"):
            Index.read(open_folder("s3://bucket/run"))


def test_a_bucket_that_is_not_there_is_refused(store, recipe):
    with pytest.raises(UserError, match="s3://nowhere/run cannot be read and written"):
        find_checkpoint(open_folder("s3://nowhere/run"), True, recipe, False)
