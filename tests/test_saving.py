"""Checkpoints of real runs: on S3, on a full disk, under a store that fails, through kills and divergence."""

import json
import random
import resource
import threading
import time
from pathlib import Path

import boto3
import psutil
import pytest
import torch
from conftest import Run, composer
from moto.server import DomainDispatcherApplication, create_backend_app
from test_train import assert_user_error, command, final_weights, losses
from werkzeug.serving import make_server

from esm2_composer.model import ESM2


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
        self._server.shutdown()


@pytest.fixture
def store():
    store = Store()
    yield store
    store.close()


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    """The working folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    result = composer(*command(shards), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_newest_and_the_best_are_kept_across_restarts(shards, tmp_path):
    arguments = command(shards, "eval_interval=1ba", "callbacks.best_checkpoints=3", "optimizer.lr=0.1")
    with Run(*arguments, cwd=tmp_path) as run:
        run.wait_for("update 6/14: loss")
        run.kill()
    again = composer(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    folder = tmp_path / "runs/demo/checkpoints"
    index = json.loads((folder / "checkpoints.json").read_text())
    scored = {int(update): loss for update, loss in index["validation_loss"].items()}
    assert sorted(scored) == list(range(15))
    best = sorted((update for update in scored if update), key=scored.get)[:3]
    assert [int(name.split("-")[1].removeprefix("ba")) for name in index["best"]] == best
    kept = {int(path.name.split("-")[1].removeprefix("ba")) for path in folder.glob("ep*")}
    assert kept == {13, 14, *best}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_from_and_to_a_store_goes_on_where_it_was_told_to_leave(shards, finished, store, tmp_path, ranks):
    """With two ranks sharded, and resumed on one."""
    store.upload(shards, "shards")
    arguments = [
        *(argument for argument in command(shards) if not argument.startswith("data.remote")),
        *("data.remote=s3://bucket/shards", f"data.local={tmp_path}/cache", "save_folder=s3://bucket/run"),
        *(["fsdp.version=2", "fsdp.state_dict_type=sharded"] if ranks == 2 else []),
    ]
    with Run("-n", str(ranks), *arguments, cwd=tmp_path, **store.environment) as run:
        run.wait_for("update 5/")
        run.launcher.terminate()
        code, seconds = run.end()
    print(f"{ranks} ranks, s3: code {code} in {seconds:.1f} s")
    assert code == 75, "".join(run.lines)
    assert not any("14" in key for key in store.keys("run/"))
    again = composer(*arguments, cwd=tmp_path, **store.environment)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path) == pytest.approx(losses(finished), rel=0 if ranks == 1 else 1e-3)
    kept = {key.split("/")[0] for key in store.keys("run/")}
    end = "-rank0.pt" if ranks == 1 else ""
    assert kept == {"recipe.yaml", "checkpoints.json", f"ep1-ba12{end}", f"ep2-ba14{end}"}
    if ranks == 1:
        store.client.download_file("bucket", "run/ep2-ba14-rank0.pt", str(tmp_path / "final.pt"))
        assert_same_weights(ESM2.from_pretrained(tmp_path / "final.pt").state_dict(), final_weights(finished))
    done = composer(*arguments, cwd=tmp_path, **store.environment)
    assert done.returncode == 0
    assert "is done" in done.stdout


@pytest.mark.slow
def test_a_store_that_fails_for_a_while_costs_nothing(shards, store, tmp_path):
    arguments = command(
        shards, "save_folder=s3://bucket/run", "save_interval=4ba", "max_duration=100ba", "eval_interval=100ba"
    )
    with Run(*arguments, cwd=tmp_path, **store.environment) as run:
        run.wait_for("update 20/")
        store.failing = True
        run.wait_until(lambda: any("trying again" in line for line in run.lines))
        assert [key for key in store.keys("run/") if key.startswith("ep")], "the checkpoint before stays"
        store.failing = False
        code, _ = run.end()
    assert code == 0, "".join(run.lines)
    assert store.refused
    assert "ep16-ba100-rank0.pt" in store.keys("run/")


@pytest.mark.slow
def test_a_store_that_fails_for_long_costs_a_checkpoint_and_not_the_run(shards, store, tmp_path):
    arguments = command(
        shards, "save_folder=s3://bucket/run", "save_interval=4ba", "max_duration=100ba", "eval_interval=100ba"
    )
    with Run(*arguments, cwd=tmp_path, **store.environment) as run:
        run.wait_for("update 20/")
        store.failing = True
        run.wait_until(lambda: any("leaving it to the next one" in line for line in run.lines))
        store.failing = False
        code, _ = run.end()
    assert code == 0, "".join(run.lines)
    assert "ep16-ba100-rank0.pt" in store.keys("run/")


@pytest.mark.slow
def test_a_full_disk_is_told_and_does_not_lose_the_checkpoint_before(shards, tmp_path):
    with Run(
        *command(
            shards, "save_interval=4ba", "max_duration=100ba", "eval_interval=100ba", "tensorboard_folder=null"
        ),
        cwd=tmp_path,
    ) as run:
        run.wait_for("update 20/")
        folder = tmp_path / "runs/demo/checkpoints"
        run.wait_until(lambda: list(folder.glob("ep*")))
        (rank,) = run.ranks()
        rank.rlimit(psutil.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))  # a file that grows no further
        run.wait_until(lambda: any("trying again" in line for line in run.lines))
        assert list(folder.glob("ep*")), "the checkpoint before stays"
        rank.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        code, _ = run.end()
    assert code == 0, "".join(run.lines)
    assert "not saved: OSError" in "".join(run.lines)
    assert (folder / "latest-rank0.pt").resolve().name == "ep16-ba100-rank0.pt"


@pytest.mark.slow
def test_a_checkpoint_of_other_data_is_refused(shards, finished, tmp_path):
    other = tmp_path / "shards"
    for split in ("train", "valid"):
        (other / split).mkdir(parents=True)
        for path in (shards / split).iterdir():
            (other / split / path.name).write_bytes(path.read_bytes())
    index = other / "train/index.json"
    index.write_text(index.read_text() + " ")
    result = composer(*command(other), cwd=finished)
    assert_user_error(result, "on other training shards")


@pytest.mark.slow
def test_a_run_that_diverges_is_stopped_and_told_how_to_go_on(shards, tmp_path):
    settings = ("optimizer.lr=3", "save_interval=10ba", "save_num_checkpoints_to_keep=20")
    arguments = [a for a in command(shards, *settings) if "max_duration" not in a]
    result = composer(*arguments, "max_duration=400ba", "schedule.warmup=200", cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: update"))
    assert "optimizer.lr=1.5" in line
    folder = tmp_path / "runs/demo/checkpoints"
    (diverged,) = folder.glob("diverged-*")
    checkpoint = line.rpartition("model.init_from=")[2]
    assert (tmp_path / checkpoint).is_file()
    assert int(checkpoint.split("-ba")[1].split("-")[0]) < int(diverged.name.split("-ba")[1].split("-")[0]) - 19
    again = [*arguments, "max_duration=4ba", "schedule.warmup=2", *line.rpartition(": ")[2].split()]
    assert composer(*again, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_twenty_random_kills_end_in_the_same_weights_as_none(shards, tmp_path):
    def arguments() -> list[str]:
        larger = ("model.hidden_size=128", "model.ffn_hidden_size=512")  # checkpoints that take a while to write
        return command(shards, *larger, "max_duration=60ba", "save_interval=1ba", "eval_interval=20ba")

    (tmp_path / "none").mkdir()
    (tmp_path / "killed").mkdir()
    assert composer(*arguments(), cwd=tmp_path / "none").returncode == 0
    chance = random.Random(17)
    staging = tmp_path / "killed/runs/demo/checkpoints/.saving"
    writing = 0
    for kill in range(20):
        with Run(*arguments(), cwd=tmp_path / "killed") as run:
            if kill % 4 == 3:  # anywhere in start-up
                run.wait_until(run.ranks)
                time.sleep(chance.uniform(0, 20))
            else:
                run.wait_until(lambda run=run: any(": loss" in line for line in run.lines))
                time.sleep(chance.uniform(0, 0.3))
                if kill % 4:  # while a checkpoint is being written
                    run.wait_until(lambda: staging.exists() and any(staging.iterdir()))
            run.kill()
            writing += staging.exists() and any(staging.iterdir())
        assert not any("Traceback" in line for line in run.lines), "".join(run.lines)
    last = composer(*arguments(), cwd=tmp_path / "killed")
    assert last.returncode == 0, last.stderr
    print(f"{writing} of 20 kills came while a checkpoint was being written")
    assert writing
    assert_same_weights(final_weights(tmp_path / "killed"), final_weights(tmp_path / "none"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "none")
