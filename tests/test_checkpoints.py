"""Both kinds of folder list whole checkpoints only; the newest and the best are kept; another run is refused."""

import errno
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import boto3
import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT
from moto.server import ThreadedMotoServer

from esm2_composer import checkpoints, patience
from esm2_composer.checkpoints import (
    DIVERGED,
    LATEST,
    RECIPE,
    Folder,
    Index,
    LocalFolder,
    ask,
    best,
    check_shared,
    find_checkpoint,
    naming_damage,
    open_folder,
    superseded,
    take_over,
)
from esm2_composer.config import Recipe, load_recipe, to_yaml
from esm2_composer.errors import Passing, StoreAway, UserError
from esm2_composer.saving import CheckpointSaver


@pytest.fixture(scope="module")
def store():
    """A bucket on a loopback S3 endpoint, told to boto3 by the environment."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=settings["S3_ENDPOINT_URL"]).create_bucket(Bucket="bucket")
        yield
    server.stop()


@pytest.fixture(params=["local", "s3"])
def folder(request, store, tmp_path) -> Folder:
    folder = open_folder(str(tmp_path / "run") if request.param == "local" else f"s3://bucket/{tmp_path.name}/run")
    folder.make()
    return folder


def stage(tmp_path: Path, name: str) -> Path:
    """A checkpoint as it is before it is moved to its place."""
    staged = tmp_path / "staged" / name
    if name.endswith(".pt"):
        staged.parent.mkdir(exist_ok=True)
        torch.save({"state": torch.ones(100)}, staged)
    else:
        staged.mkdir(parents=True)
        for part in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
            (staged / part).write_bytes(part.encode())
    return staged


def save(folder: Folder, tmp_path: Path, name: str, whole: bool = True) -> None:
    staged = stage(tmp_path, name)
    for rank in (0, 1):
        folder.send(staged, name, rank)
    if whole:
        folder.commit(staged, name)


@pytest.mark.parametrize("end", ["-rank0.pt", ""])
def test_checkpoints_are_listed_by_their_updates_and_removed_alone(folder, tmp_path, end):
    for update in (10, 9, 100, 1):
        save(folder, tmp_path, f"ep0-ba{update}{end}")
    assert folder.names() == [f"ep0-ba{update}{end}" for update in (1, 9, 10, 100)]
    folder.remove(f"ep0-ba1{end}")
    assert folder.names() == [f"ep0-ba{update}{end}" for update in (9, 10, 100)]


def test_a_sharded_checkpoint_is_there_when_the_last_part_is(folder, tmp_path):
    save(folder, tmp_path, "ep0-ba10")
    save(folder, tmp_path, "ep0-ba20", whole=False)
    assert folder.names() == ["ep0-ba10"]
    folder.clear()  # the next start does
    assert not any("ba20" in name for name in listing(folder))


def listing(folder: Folder) -> list[str]:
    return os.listdir(folder.path) if isinstance(folder, LocalFolder) else folder._keys("")


def test_a_checkpoint_cut_short_in_a_copy_is_none(tmp_path):
    folder = LocalFolder(str(tmp_path))
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    (tmp_path / "ep0-ba20-rank0.pt").write_bytes((tmp_path / "ep0-ba10-rank0.pt").read_bytes()[:-100])
    assert folder.names() == ["ep0-ba10-rank0.pt"]


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


def test_the_link_leads_to_the_newest_and_never_to_a_diverged_state(tmp_path):
    folder = LocalFolder(str(tmp_path))
    for name in ("ep0-ba10-rank0.pt", "ep0-ba20-rank0.pt"):
        save(folder, tmp_path, name)
    folder.commit(stage(tmp_path, "ep0-ba30-rank0.pt"), "diverged-ep0-ba30-rank0.pt")
    assert (tmp_path / LATEST).readlink() == Path("ep0-ba20-rank0.pt")
    assert folder.names()[-1] == "ep0-ba20-rank0.pt"


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
    CheckpointSaver(again, interval=10, keep_newest=1, keep_best=0, resumes=False)
    assert not left.parent.exists()


@pytest.mark.parametrize("taken", ["link", "open to others", "theirs"])
def test_a_place_for_uploads_that_others_can_write_to_is_refused(store, tmp_path, monkeypatch, taken):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = open_folder("s3://bucket/run")
    private = folder.staging().parent
    assert private.stat().st_mode & 0o077 == 0
    assert folder.staging().parent == private, "at the next start, too"
    if taken == "link":
        private.rename(tmp_path / "elsewhere")
        private.symlink_to(tmp_path / "elsewhere")
    elif taken == "open to others":
        private.chmod(0o770)
    else:
        me = os.getuid()
        private.rename(str(private).replace(f"-{me}-", f"-{me + 1}-"))
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(UserError, match="is no folder that only you can write to"):
        folder.staging()


def test_the_newest_before_an_update_is_told_or_none_if_the_store_is_away(folder, tmp_path, monkeypatch):
    for update in (10, 20, 30):
        save(folder, tmp_path, f"ep0-ba{update}-rank0.pt")
    saver = CheckpointSaver(folder, interval=10, keep_newest=1, keep_best=0, resumes=False)
    assert saver.newest_before(29) == folder.location("ep0-ba20-rank0.pt")
    assert saver.newest_before(9) is None

    def away() -> None:
        raise StoreAway("no route to host")

    monkeypatch.setattr(folder, "names", away)
    monkeypatch.setattr("esm2_composer.patience.WAITS", (0,))
    assert saver.newest_before(29) is None


HOLDER = """
import os, sys, time
from esm2_composer.checkpoints import LocalFolder
LocalFolder(sys.argv[1]).lock()
if os.fork():
    print(flush=True)
time.sleep(30)
"""


def test_a_folder_in_use_is_waited_for_and_then_refused(tmp_path, monkeypatch, capsys):
    """By its owner, not by a worker that it has forked, and that outlives it."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as holder:
        (worker,) = holder.stdout.readline() and psutil.Process(holder.pid).children()
        in_use = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}; "
        monkeypatch.setattr(checkpoints, "LOCK_SECONDS", 0)
        with pytest.raises(Passing, match=in_use):
            LocalFolder(str(tmp_path)).lock()
        monkeypatch.setattr(checkpoints, "LOCK_SECONDS", 10)
        threading.Timer(2, holder.kill).start()
        LocalFolder(str(tmp_path)).lock()
        assert worker.is_running()
        worker.kill()
    assert f"{in_use}waiting for its end, 10 s at most" in capsys.readouterr().err
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o666, "others of a group may go on with the run"


def test_a_file_system_without_locks_is_gone_on_with(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(checkpoints.fcntl, "lockf", none)
    LocalFolder(str(tmp_path)).lock()


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


def test_what_tells_whether_a_folder_is_shared_is_cleared(tmp_path):
    (tmp_path / ".seen-0f").touch()
    LocalFolder(str(tmp_path)).clear()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_worth_another_start(tmp_path, monkeypatch):
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    folder = LocalFolder(str(tmp_path))
    with pytest.raises(Passing, match=r"cannot be written \(No space left on device\)"):
        ask(folder, lambda: folder.write(RECIPE, "a: 1"))
    assert not list(tmp_path.iterdir())


def test_what_a_run_saved_while_it_ended_is_gone_on_from(folder, recipe, tmp_path, monkeypatch):
    assert find_checkpoint(folder, True, recipe, False) is None
    monkeypatch.setattr(folder, "lock", lambda: save(folder, tmp_path, "ep0-ba10-rank0.pt"))
    folder.write(RECIPE, to_yaml(recipe))
    assert take_over(folder, True, recipe, False) == "ep0-ba10-rank0.pt"


def test_small_files_are_read_back(folder):
    assert folder.read("a.json") is None
    folder.write("a.json", "ä")
    assert folder.read("a.json") == "ä"


def test_the_index_is_read_back(folder):
    Index("digest", {7: 2.5, 14: 2.25}).write(folder, ["ep0-ba14"])
    assert Index.read(folder) == Index("digest", {7: 2.5, 14: 2.25})


NAMES = [f"ep0-ba{update}-rank0.pt" for update in (10, 20, 30, 40, 50)]
LOSSES = {10: 2.0, 20: 3.0, 30: 1.0, 40: 4.0}


def test_the_best_are_those_of_lowest_loss():
    assert best(NAMES, LOSSES, 2) == [NAMES[2], NAMES[0]]
    assert best(NAMES, LOSSES, 0) == []


@pytest.mark.parametrize(
    ("newest", "best_kept", "gone"),
    [(1, 0, (10, 20, 30, 40)), (2, 1, (10, 20)), (1, 2, (20, 40)), (5, 0, ()), (1, 10, ())],
)
def test_the_newest_is_never_superseded(newest, best_kept, gone):
    assert superseded(NAMES, LOSSES, newest, best_kept) == [f"ep0-ba{update}-rank0.pt" for update in gone]


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


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"validation_loss": {"x": 1}}', '{"validation_loss": {"1": null}}']
)
def test_an_index_that_is_damaged_is_named(folder, content):
    folder.write("checkpoints.json", content)
    with pytest.raises(UserError, match=r"checkpoints\.json is damaged; remove it"):
        Index.read(folder)


def test_an_index_that_is_no_text_is_named(tmp_path):
    (tmp_path / "checkpoints.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"checkpoints\.json is damaged; remove it"):
        Index.read(LocalFolder(str(tmp_path)))


def test_a_checkpoint_that_is_damaged_inside_is_named_when_it_cannot_be_loaded(tmp_path):
    folder = LocalFolder(str(tmp_path))
    save(folder, tmp_path, "ep0-ba10-rank0.pt")
    path = tmp_path / "ep0-ba10-rank0.pt"
    with pytest.raises(ZeroDivisionError), naming_damage(folder, path.name):
        raise ZeroDivisionError  # of something else
    content = bytearray(path.read_bytes())
    at = content.index(torch.ones(4).numpy().tobytes())
    content[at : at + 100] = bytes(100)
    path.write_bytes(content)
    assert folder.names() == [path.name]  # to list them does not read them
    with (
        pytest.raises(UserError, match=r"ep0-ba10-rank0\.pt is damaged; remove it, to go on from the one before"),
        naming_damage(folder, path.name),
    ):
        raise RuntimeError("PytorchStreamReader failed")


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
    with pytest.raises(UserError, match=r"resume them with fsdp\.state_dict_type=sharded"):
        find_checkpoint(folder, True, recipe, False)
    without_gpu = load("fsdp.state_dict_type=sharded", folder=tmp_path)
    with pytest.raises(UserError, match="holds sharded checkpoints, to be resumed on GPUs: none is seen here"):
        find_checkpoint(folder, True, without_gpu, False)


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
        monkeypatch.setattr(patience.time, "sleep", lambda _: None)
        with pytest.raises(StoreAway, match="s3://bucket/run cannot be reached"):
            find_checkpoint(open_folder("s3://bucket/run"), True, recipe, False)
        assert capsys.readouterr().err.count("trying again in") == len(patience.WAITS)
        with pytest.raises(StoreAway, match="s3://bucket/run cannot be reached"):
            Index.read(open_folder("s3://bucket/run"))


def test_a_bucket_that_is_not_there_is_refused(store, recipe):
    with pytest.raises(UserError, match="s3://nowhere/run cannot be read and written"):
        find_checkpoint(open_folder("s3://nowhere/run"), True, recipe, False)
