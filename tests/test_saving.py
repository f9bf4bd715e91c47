"""Checkpoints of real runs: on S3, on a full disk, under a store that fails, through kills and divergence."""

import json
import random
import resource
import shutil
import threading
import time
from pathlib import Path

import boto3
import psutil
import pytest
import torch
from conftest import COPIES, SHARDED, Run, command, composer, python
from moto.server import DomainDispatcherApplication, create_backend_app
from outcomes import assert_same_weights, assert_user_error, final_weights, losses
from werkzeug.serving import make_server

from esm2_composer.checkpoints.saving import WAITS_LEAVING
from esm2_composer.errors import EXIT_FAILURE
from esm2_composer.model import ESM2
from esm2_composer.preemption import GRACE


class Store:
    """A bucket on a loopback S3 endpoint, which can be told to answer 500 to uploads."""

    def __init__(self) -> None:
        self.failing = False
        self.refused = 0
        application = DomainDispatcherApplication(create_backend_app)

        def answer(environ, start_response):
            if self.failing and environ["REQUEST_METHOD"] in ("PUT", "POST"):
                self.refused += 1
                start_response("500 Internal Server Error", [])
                return [b""]
            return application(environ, start_response)

        self._server = make_server("127.0.0.1", 0, answer, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=self.environment["S3_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket="bucket")

    def keys(self, prefix: str = "") -> list[str]:
        entries = self.client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", ())
        return [entry["Key"].removeprefix(prefix) for entry in entries]

    def upload(self, folder: Path, prefix: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.client.upload_file(str(path), "bucket", f"{prefix}/{path.relative_to(folder)}")

    def close(self) -> None:
        for key in self.keys():  # all servers of a process share their buckets
            self.client.delete_object(Bucket="bucket", Key=key)
        self._server.shutdown()


@pytest.fixture
def store():
    store = Store()
    yield store
    store.close()


def test_the_newest_and_the_best_are_kept_across_restarts(shards, tmp_path):
    arguments = command(shards, "eval_interval=1ba", "callbacks.best_checkpoints=3", "optimizer.lr=0.1")
    with Run(*arguments, cwd=tmp_path, launcher=False) as run:
        run.wait_for("update 6/14: loss")
        run.kill()
    again = python(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    folder = tmp_path / "runs/demo/checkpoints"
    index = json.loads((folder / "checkpoints.json").read_text())
    scored = {int(update): loss for update, loss in index["validation_loss"].items()}
    assert sorted(scored) == list(range(15))
    best = sorted((update for update in scored if update), key=scored.get)[:3]
    assert [int(name.split("-")[1].removeprefix("ba")) for name in index["best"]] == best
    kept = {int(path.name.split("-")[1].removeprefix("ba")) for path in folder.glob("ep*")}
    assert kept == {13, 14, *best}


def from_and_to_store(shards: Path, store: Store, folder: Path, *overrides: str, **options: str) -> list[str]:
    store.upload(shards, "shards")
    return [
        *(argument for argument in command(shards, **options) if not argument.startswith("data.remote")),
        *("data.remote=s3://bucket/shards", f"data.local={folder}/cache", "save_folder=s3://bucket/run"),
        *overrides,
    ]


def weights_in_store(store: Store, folder: Path) -> dict[str, torch.Tensor]:
    store.client.download_file("bucket", "run/ep2-ba14-rank0.pt", str(folder / "final.pt"))
    return ESM2.from_pretrained(folder / "final.pt").state_dict()


@pytest.mark.slow
def test_a_run_from_and_to_a_store_killed_and_told_to_leave_ends_as_one_that_was_not(
    shards, finished, store, tmp_path
):
    arguments = from_and_to_store(shards, store, tmp_path)
    with Run(*arguments, cwd=tmp_path, **store.environment) as run:
        run.wait_for("update 5/")
        run.kill()
    with Run(*arguments, cwd=tmp_path, **store.environment) as run:
        run.wait_for("update 9/")
        run.launcher.terminate()
        code, seconds = run.end()
    print(f"1 rank, s3: code {code} in {seconds:.1f} s")
    assert code == 75, "".join(run.lines)
    assert not any("14" in key for key in store.keys("run/"))
    again = python(*arguments, cwd=tmp_path, **store.environment)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path) == losses(finished)
    assert_same_weights(weights_in_store(store, tmp_path), final_weights(finished))
    assert set(store.keys("run/")) == {
        *("recipe.yaml", "checkpoints.json", "ep1-ba12-rank0.pt", "ep2-ba14-rank0.pt"),
    }
    done = python(*arguments, cwd=tmp_path, **store.environment)
    assert done.returncode == 0
    assert "is done" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("version", "ranks", "copies"), [(1, 2, ()), (1, 4, COPIES), (2, 2, ())])
def test_a_sharded_run_in_a_store_goes_on_with_fewer_ranks(
    version, ranks, copies, shards, finished, store, tmp_path
):
    script, key = SHARDED[version]
    sharded = (key, *copies, "fsdp.state_dict_type=sharded")
    arguments = from_and_to_store(shards, store, tmp_path, *sharded, script=script)
    with Run("-n", str(ranks), *arguments, cwd=tmp_path, **store.environment) as run:
        run.wait_for("update 5/")
        run.launcher.terminate()
        code, seconds = run.end()
    print(f"{ranks} ranks, s3: code {code} in {seconds:.1f} s")
    assert code == 75, "".join(run.lines)
    again = composer("-n", str(ranks // 2), *arguments, cwd=tmp_path, **store.environment)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path) == pytest.approx(losses(finished), rel=1e-4)
    kept = {key.split("/")[0] for key in store.keys("run/")}
    assert kept == {"recipe.yaml", "checkpoints.json", "ep1-ba12", "ep2-ba14"}


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["trying again", "leaving it to the next one"])
def test_a_store_that_fails_costs_a_checkpoint_at_most(shards, store, tmp_path, outcome):
    arguments = command(
        shards, "save_folder=s3://bucket/run", "save_interval=4ba", "max_duration=100ba", "eval_interval=100ba"
    )
    with Run(*arguments, cwd=tmp_path, launcher=False, **store.environment) as run:
        run.wait_for("update 20/")
        store.failing = True
        run.wait_until(lambda: any(outcome in line for line in run.lines))
        assert [key for key in store.keys("run/") if key.startswith("ep")], "the checkpoint before stays"
        store.failing = False
        code, _ = run.end()
    assert code == 0, "".join(run.lines)
    assert store.refused
    assert "ep16-ba100-rank0.pt" in store.keys("run/")


@pytest.mark.slow
def test_a_second_launch_in_the_folder_of_a_run_is_refused_and_goes_on_once_that_is_dead(shards, tmp_path):
    arguments = command(shards, "max_duration=100000ba", "eval_interval=100000ba")
    with Run(*arguments, cwd=tmp_path) as run:
        run.wait_for("update 100/")
        second = python(*arguments, cwd=tmp_path)
        (rank,) = run.ranks()
        assert (second.returncode, "Traceback" in second.stderr) == (EXIT_FAILURE, False)
        assert f"error: save_folder runs/demo/checkpoints is in use by process {rank.pid} on " in second.stderr
        run.launcher.kill()  # of which its rank learns, saves and leaves
        with Run(*arguments, cwd=tmp_path, launcher=False) as third:
            third.wait_for("update ")


@pytest.mark.slow
def test_a_full_disk_is_told_and_does_not_lose_the_checkpoint_before(shards, tmp_path):
    arguments = command(shards, "save_interval=20ba", "max_duration=100ba", "eval_interval=100ba")
    with Run(*arguments, cwd=tmp_path) as run:
        run.wait_for("update 20/")
        folder = tmp_path / "runs/demo/checkpoints"
        run.wait_until(lambda: list(folder.glob("ep*")))
        (rank,) = run.ranks()
        rank.rlimit(psutil.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))  # files that grow no further
        run.wait_until(lambda: any("TensorBoard's events cannot" in line for line in run.lines))
        rank.rlimit(psutil.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))  # a checkpoint is larger
        run.wait_until(lambda: any("not saved: OSError" in line for line in run.lines))
        assert list(folder.glob("ep*")), "the checkpoint before stays"
        rank.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        code, _ = run.end()
    assert code == 0, "".join(run.lines)
    assert "trying again" in "".join(run.lines)
    assert (folder / "latest-rank0.pt").resolve().name == "ep16-ba100-rank0.pt"


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_a_full_disk_does_not_end_a_sharded_run(version, shards, tmp_path):
    script, key = SHARDED[version]
    overrides = (key, "fsdp.state_dict_type=sharded", "model.hidden_size=64", "save_interval=20ba")
    arguments = command(shards, *overrides, "max_duration=100ba", "eval_interval=100ba", script=script)
    with Run("-n", "2", *arguments, cwd=tmp_path) as run:
        folder = tmp_path / "runs/demo/checkpoints"
        run.wait_until(lambda: list(folder.glob("ep*")))
        last = run.ranks()[1]
        last.rlimit(psutil.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))  # its part is larger
        run.wait_until(lambda: any("not saved: " in line for line in run.lines))
        assert list(folder.glob("ep*")), "the checkpoint before stays"
        last.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        code, _ = run.end()
    assert code == 0, "".join(run.lines)
    (line, *_) = (line for line in run.lines if "not saved: " in line)
    assert "File too large; trying again in 2 s" in line
    assert (folder / "latest-rank0.pt").resolve().name == "ep16-ba100"


@pytest.mark.slow
def test_a_run_told_to_leave_that_cannot_save_does_not_say_it_has(shards, tmp_path):
    arguments = command(shards, "save_interval=1000ba", "max_duration=1000ba", "eval_interval=1000ba")
    with Run(*arguments, cwd=tmp_path, launcher=False) as run:
        run.wait_for("update 50/")
        run.launcher.rlimit(psutil.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))  # files that grow no further
        run.launcher.terminate()
        code, _ = run.end()
    assert code == EXIT_FAILURE, "".join(run.lines)
    assert "error: told to leave, and what was trained" in "".join(run.lines)
    assert not list((tmp_path / "runs/demo/checkpoints").glob("ep*"))


def test_a_save_is_given_up_before_the_rank_has_to_leave():
    assert sum(WAITS_LEAVING) < GRACE - 5


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["train", "valid"])
def test_a_checkpoint_of_other_data_is_refused(shards, finished, tmp_path, changed):
    other = tmp_path / "shards"
    for split in ("train", "valid"):
        (other / split).mkdir(parents=True)
        for path in (shards / split).iterdir():
            (other / split / path.name).write_bytes(path.read_bytes())
    index = other / changed / "index.json"
    index.write_text(index.read_text() + " ")
    result = python(*command(other, "max_duration=16ba", "schedule.updates=14"), cwd=finished)
    assert_user_error(result, f"data.remote has other {changed} shards than this run was trained on")


@pytest.mark.slow
def test_a_checkpoint_damaged_inside_is_named_and_without_it_the_run_goes_on(shards, finished, tmp_path):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    saved = tmp_path / "runs/demo/checkpoints"
    (saved / "checkpoints.json").unlink()
    newest = saved / "ep2-ba14-rank0.pt"
    content = bytearray(newest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    newest.write_bytes(content)
    arguments = command(shards, "max_duration=16ba", "schedule.updates=14")
    refused = python(*arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert "ep2-ba14-rank0.pt is damaged; remove it, to go on from the one before" in refused.stderr
    assert "Traceback" not in refused.stderr
    newest.unlink()
    again = python(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "has lost its checkpoints.json" in again.stderr
    assert (saved / "ep2-ba16-rank0.pt").exists()


@pytest.mark.slow
def test_a_run_killed_before_it_saved_leaves_nothing_to_the_next(shards, tmp_path):
    """Neither its data, nor the loss before its first update."""
    folder = tmp_path / "runs/demo/checkpoints"
    folder.mkdir(parents=True)
    (folder / "checkpoints.json").write_text('{"train_shards": "others", "validation_loss": {"0": 1e-9}}')
    result = python(*command(shards, "max_duration=4ba"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    index = json.loads((folder / "checkpoints.json").read_text())
    assert index["train_shards"] != "others"
    assert index["validation_loss"]["0"] > 1


@pytest.mark.slow
def test_a_run_that_diverges_is_stopped_and_told_how_to_go_on(shards, tmp_path):
    settings = ("optimizer.lr=3", "save_interval=10ba", "save_num_checkpoints_to_keep=20")
    arguments = [a for a in command(shards, *settings) if "max_duration" not in a]
    result = python(*arguments, "max_duration=400ba", "schedule.warmup=200", cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: update"))
    assert "optimizer.lr=1.5" in line
    folder = tmp_path / "runs/demo/checkpoints"
    (diverged,) = folder.glob("diverged-*")
    checkpoint = line.rpartition("load_path=")[2]
    assert (tmp_path / checkpoint).is_file()
    before, stopped = (int(name.split("-ba")[1].split("-")[0]) for name in (checkpoint, diverged.name))
    assert before < stopped - 19
    same = python(*arguments, "max_duration=400ba", "schedule.warmup=200", cwd=tmp_path)
    assert_user_error(same, "holds a run that diverged at update")
    short = ("schedule.updates=400", f"max_duration={before + 4}ba", "schedule.warmup=200")
    again = python(*arguments, *short, *line.rpartition(": ")[2].split(), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"branching off {checkpoint}, update {before} of {before + 4}" in again.stderr


@pytest.mark.slow
def test_twenty_random_kills_end_in_the_same_weights_as_none(shards, tmp_path):
    def arguments() -> list[str]:
        larger = ("model.hidden_size=128", "model.ffn_hidden_size=512")  # checkpoints that take a while to write
        return command(shards, *larger, "max_duration=200ba", "save_interval=1ba", "eval_interval=50ba")

    (tmp_path / "none").mkdir()
    (tmp_path / "killed").mkdir()
    assert python(*arguments(), cwd=tmp_path / "none").returncode == 0
    chance = random.Random(17)
    folder = tmp_path / "killed/runs/demo/checkpoints"
    staging = folder / ".saving"

    def saved() -> int:
        return max((int(path.name.split("-")[1].removeprefix("ba")) for path in folder.glob("ep*")), default=0)

    writing = 0
    for kill in range(20):
        with Run(*arguments(), cwd=tmp_path / "killed", launcher=False) as run:
            before = saved()
            if kill % 4 == 3:  # anywhere in start-up
                moment = time.monotonic() + chance.uniform(0, 20)
                run.wait_until(lambda end=moment, first=before: time.monotonic() > end or saved() > first)
            else:
                enough = before + chance.randint(1, 4)
                run.wait_until(lambda enough=enough: saved() >= enough)
                if kill % 4:  # while a checkpoint is being written
                    run.wait_until(lambda: staging.exists() and any(staging.iterdir()))
            run.kill()
            writing += staging.exists() and any(staging.iterdir())
        assert not any("Traceback" in line for line in run.lines), "".join(run.lines)
    last = python(*arguments(), cwd=tmp_path / "killed")
    assert last.returncode == 0, last.stderr
    print(f"{writing} of 20 kills came while a checkpoint was being written")
    assert writing
    assert_same_weights(final_weights(tmp_path / "killed"), final_weights(tmp_path / "none"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("damage", ["cut", "other bytes"])
def test_a_sharded_checkpoint_damaged_inside_is_named_and_without_it_the_run_goes_on(
    version, damage, shards, tmp_path
):
    script, key = SHARDED[version]
    sharded = (key, "fsdp.state_dict_type=sharded", "schedule.updates=8", "eval_interval=8ba")
    arguments = ("-n", "2", *command(shards, *sharded, "save_interval=4ba", "max_duration=8ba", script=script))
    assert composer(*arguments, cwd=tmp_path).returncode == 0
    newest = tmp_path / "runs/demo/checkpoints/ep1-ba8"
    part = newest / "__1_0.distcp"
    content = part.read_bytes()
    middle = len(content) // 2
    rest = bytes(3000) + content[middle + 3000 :] if damage == "other bytes" else b""
    part.write_bytes(content[:middle] + rest)
    longer = (*arguments, "max_duration=10ba")
    refused = composer(*longer, cwd=tmp_path)
    assert_user_error(refused, "ep1-ba8 is damaged; remove it, to go on from the one before")
    shutil.rmtree(newest)
    again = composer(*longer, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (newest.parent / "ep1-ba10").exists()
