"""Every recipe builds the model it names; the published sizes start on a CPU with small overrides."""

import dataclasses
import json
import os
import re
import subprocess
import warnings
from pathlib import Path

import boto3
import evaluate
import pytest
import torch
import torch.distributed.checkpoint as dcp
from benchmarks.parity import random_model
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from conftest import COPIES, ROOT, SHARDED, Run, composer, python
from outcomes import assert_user_error, read_scalars
from plot_convergence import PUBLISHED

from esm2_composer.data.draw import ClusterDraw
from esm2_composer.data.loaders import canonical_nodes
from esm2_composer.data.masking import MaskingRule
from esm2_composer.data.splits import SPLITS
from esm2_composer.distributed.fsdp import fsdp_options
from esm2_composer.errors import UserError
from esm2_composer.loggers import LOSS
from esm2_composer.model import SIZES, ESM2Config, rotary_frequencies
from esm2_composer.recipe.architecture import build_model
from esm2_composer.recipe.config import load_recipe
from esm2_composer.runner import cluster_draw, compiles

RECIPES = sorted(path.stem for path in (ROOT / "yamls").glob("*.yaml"))


def load(name: str, shards: Path):
    return load_recipe(str(ROOT / f"yamls/{name}.yaml"), [f"data.remote={shards}"], data_is_here=False)


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


def test_clusters_are_drawn_as_the_recipe_says():
    lengths = ("data.max_length=500", "data.min_length=9")
    masks = ("data.mask_fraction=0.3", "data.mask_split=[0.5, 0.3, 0.2]", "data.replacement=all_tokens")
    recipe = load_recipe(str(ROOT / "yamls/8m.yaml"), ["seed=3", *lengths, *masks], data_is_here=False)
    assert cluster_draw(recipe) == ClusterDraw(
        3, 500, 9, MaskingRule(0.3, (0.5, 0.3, 0.2), replacement="all_tokens")
    )


def test_the_recipe_that_continues_begins_where_the_published_schedule_ended(shards):
    recipe, published = load("continue", shards), load("8m", shards)
    assert recipe.model.init_from
    assert recipe.optimizer.lr == pytest.approx(published.optimizer.lr * published.schedule.floor)
    assert cluster_draw(recipe) == cluster_draw(published)


@pytest.mark.parametrize("size", SIZES)
def test_published_runs_keep_their_best_and_lay_out_the_schedule_for_all_updates(size, shards):
    recipe = load(size, shards)
    assert recipe.callbacks.best_checkpoints == 10
    assert recipe.schedule.updates == recipe.updates
    assert (recipe.fsdp is None) == (size in ("8m", "35m", "150m"))
    assert recipe.fsdp is None or recipe.fsdp.state_dict_type == "sharded"


def test_the_table_in_the_readme_is_that_of_the_recipes_and_of_the_published_curves(shards):
    row = r"^\| `(\w+)\.yaml` \| (\d+), (\d+), (\d+) \| (\S+), (\S+) \| (.*) \| (\S+).* \|$"
    rows = re.findall(row, (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [size for size, *_ in rows] == list(SIZES)
    sharding = {"SHARD_GRAD_OP": "gradients, optimizer", "FULL_SHARD": "full"}
    for size, layers, width, heads, rate, warmup, sharded, perplexity in rows:
        recipe, model = load(size, shards), SIZES[size]
        assert (int(layers), int(width), int(heads)) == (model.num_layers, model.hidden_size, model.num_heads)
        assert (float(rate), int(warmup.replace(",", ""))) == (recipe.optimizer.lr, recipe.schedule.warmup)
        recomputing = {False: "", "selective": ", recomputing norms and GELU"}
        expected = (
            sharding[recipe.fsdp.sharding_strategy] + recomputing[recipe.fsdp.activation_checkpointing]
            if recipe.fsdp
            else "none (DDP)"
        )
        assert sharded == expected
        assert perplexity == (f"{PUBLISHED[size][500_000]:.2f}" if size in PUBLISHED else "\N{EN DASH}")


def explained(text: str) -> list[str]:
    """The keys of a recipe that have a comment: at their line, above it, or at the section they are in."""
    return re.findall(r"^ *(\w+):.*#", text, re.MULTILINE)


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_explained_once(name):
    text = (ROOT / f"yamls/{name}.yaml").read_text()
    keys = explained(text)
    assert len(keys) == len(set(keys))
    bare = set(re.findall(r"^ *(\w+):(?=.)(?!.*#)(?! *$)", text, re.MULTILINE))
    assert bare <= {"num_heads", "ffn_hidden_size"}, "told with num_layers and hidden_size"


def test_layers_are_compiled_where_the_recipe_says(monkeypatch):
    assert [compiles(setting, on_gpu) for setting in (True, False) for on_gpu in (True, False)] == [
        True,
        True,
        False,
        False,
    ]
    for lack in (None, "a C compiler"):
        monkeypatch.setattr("esm2_composer.runner.missing_for_triton", lambda lack=lack: lack)
        assert [compiles("auto", on_gpu) for on_gpu in (True, False)] == [lack is None, False]


@pytest.mark.parametrize("name", RECIPES)
def test_the_order_of_an_epoch_is_laid_out_as_the_recipe_tells(name, shards):
    (told,) = re.findall(r"over (\d+) canonical nodes", (ROOT / f"yamls/{name}.yaml").read_text())
    assert canonical_nodes(load(name, shards).global_train_batch_size, ranks=1) == int(told)


@pytest.mark.parametrize("size", ["650m", "3b", "15b"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("overrides", [(), ("data_parallel_shard_degree=8", "data_parallel_replicate_degree=-1")])
def test_composer_takes_every_sharding_setting(size, version, overrides):
    """Composer's own configurations swallow unknown keys in silence."""
    if version == 2 and overrides:
        pytest.skip("FSDP version 2 has no replicas")
    path = str(ROOT / f"yamls/{size}.yaml")
    keys = (f"version={version}", *overrides)
    recipe = load_recipe(path, [f"fsdp.{key}" for key in keys], data_is_here=False)
    options = fsdp_options(recipe.fsdp)
    config = FSDPConfig if version == 1 else FSDP2Config
    assert options.keys() <= {field.name for field in dataclasses.fields(config)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2 Config/APIs are experimental")
        built = config(**options)
    assert all(getattr(built, key) == value for key, value in options.items())
    assert built.mixed_precision == "DEFAULT"


@pytest.mark.parametrize(
    ("copies", "shards", "right", "wrong"),
    [
        ("null", -1, (1, 2, 7), ()),
        (1, -1, (1, 2, 7), ()),
        (-1, 8, (8, 64), (4, 12)),
        (8, -1, (16, 24, 64), (1, 4, 8, 12)),  # on 8 each copy would train by itself
        (2, 4, (8,), (4, 16)),
        ("null", 8, (8,), (1, 16)),
    ],
)
def test_degrees_that_do_not_make_the_ranks_are_refused(copies, shards, right, wrong):
    degrees = [f"fsdp.data_parallel_shard_degree={shards}", f"fsdp.data_parallel_replicate_degree={copies}"]
    recipe = load_recipe(str(ROOT / "yamls/3b.yaml"), degrees, data_is_here=False)
    assert recipe.fsdp.fewest_ranks == right[0]
    for ranks in right:
        recipe.fsdp.check_degrees(ranks)
    for ranks in wrong:
        with pytest.raises(
            UserError, match=f"data_parallel_shard_degree {shards} does not make the {ranks} ranks"
        ):
            recipe.fsdp.check_degrees(ranks)


def test_a_dry_run_tells_the_recipe_and_what_it_asks_for(tmp_path_factory, tmp_path):
    recipe, data = ROOT / "yamls/650m.yaml", tmp_path_factory.mktemp("data")
    for split in ("train", "valid"):
        (data / split).mkdir()
        (data / split / "index.json").write_text('{"shards": [{"samples": 2048}]}')
    result = python(ROOT / "train.py", recipe, "--dry-run", f"data.remote={data}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "parameters: 651,043,254" in result.stdout
    assert "at most 2,097,152, in 2,048 sequences" in result.stdout
    assert "memory a GPU, of 1: about" in result.stdout
    (tmp_path / "told.yaml").write_text(result.stdout.partition("\n\n")[0])
    assert load_recipe(str(tmp_path / "told.yaml")) == load("650m", data)
    wrong = python(ROOT / "train.py", recipe, "data.remote=/nowhere", "--dry-run", cwd=tmp_path)
    assert wrong.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["told.yaml"]


@pytest.mark.slow  # in this process: test_checks.py
def test_a_dry_run_looks_at_shards_in_a_store(store, tmp_path):
    command = (ROOT / "train.py", ROOT / "yamls/650m.yaml", "--dry-run", f"data.local={tmp_path / 'cache'}")
    result = python(*command, "data.remote=s3://bucket/proteins", cwd=tmp_path)
    assert_user_error(result, "s3://bucket/proteins/train: cannot be opened as MDS shards")
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    for split in SPLITS:
        client.put_object(
            Bucket="bucket", Key=f"proteins/{split}/index.json", Body=b'{"shards": [{"samples": 2048}]}'
        )
    result = python(*command, "data.remote=s3://bucket/proteins", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())


DIMENSIONS = ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size")
SMALL = (
    *("model.size=null", "model.num_layers=2", "model.hidden_size=64", "model.num_heads=4"),
    *("model.ffn_hidden_size=128", "global_train_batch_size=8", "data.max_length=128", "data.num_workers=1"),
    *("max_duration=4ba", "schedule.warmup=2", "eval_interval=4ba", "save_interval=2ba"),
)


def start(
    recipe: str, shards: Path, folder: Path, *overrides: str, ranks: int = 1, script: str = "train.py"
) -> subprocess.CompletedProcess:
    """A few updates of a recipe, its model and batch made small."""
    command = (ROOT / script, ROOT / f"yamls/{recipe}.yaml", f"data.remote={shards}", *SMALL, *overrides)
    result = python(*command, cwd=folder) if ranks == 1 else composer("-n", str(ranks), *command, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_starts_on_a_cpu_and_says_what_it_leaves_out(size, shards, tmp_path):
    result = start(size, shards, tmp_path, f"fp8={'true' if size == '650m' else 'false'}")
    assert result.stderr.count("attention on cpu: cpu\n") == 1
    assert "training in fp32 instead of amp_bf16" in result.stderr
    assert ("training without fp8" in result.stderr) == (size == "650m")
    assert ("training unsharded" in result.stderr) == (size in ("650m", "3b", "15b"))
    assert len(read_scalars(tmp_path / f"runs/esm2_{size}/tensorboard", LOSS)) == 4


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_3b_recipe_trains_sharded_resumes_on_one_rank_and_is_evaluated(version, shards, tmp_path, call):
    script, key = SHARDED[version]
    start("3b", shards, tmp_path, key, "precision=fp32", ranks=2, script=script)
    checkpoint = tmp_path / "runs/esm2_3b/checkpoints/latest-rank0.pt"
    assert len(list(checkpoint.glob("__*_0.distcp"))) == 2
    longer = ("max_duration=6ba", "eval_interval=6ba")
    start("3b", shards, tmp_path, key, "precision=fp32", *longer, script=script)
    events = tmp_path / "runs/esm2_3b/tensorboard"
    assert sorted(read_scalars(events, LOSS)) == list(range(6))
    code, out, err = call(evaluate.main, checkpoint, "--data", shards, "--max-length", "128", "--json")
    assert code == 0, err
    logged = read_scalars(events, "metrics/valid/perplexity")
    perplexity = json.loads(out)["perplexity"]
    assert perplexity == pytest.approx(logged[6], rel=1e-5)


@pytest.mark.parametrize(
    ("size", "ranks", "others", "overrides"),
    [
        ("650m", 4, 2, (*COPIES, "compile=true")),
        ("650m", 2, 1, ("fsdp.state_dict_type=full",)),
        ("3b", 4, 1, ()),
        ("15b", 4, 2, COPIES),
        ("15b", 2, 4, ("compile=true",)),
    ],
)
@pytest.mark.slow
def test_a_recipe_trains_and_resumes_as_on_gpus(size, ranks, others, overrides, shards, tmp_path):
    """In bf16, sharded and copied by FSDP version 1, on 2 to 4 ranks; beside one rank in fp32."""
    script, _ = SHARDED[1]
    longer = ("max_duration=6ba", "eval_interval=6ba")
    start(size, shards, tmp_path, *overrides, ranks=ranks, script=script)
    resumed = start(size, shards, tmp_path, *overrides, *longer, ranks=others, script=script)
    assert "update 4 of 6" in resumed.stderr
    start(size, shards, tmp_path, *longer, "run_name=one")
    losses, exact = (
        read_scalars(tmp_path / "runs" / name / "tensorboard", LOSS) for name in (f"esm2_{size}", "one")
    )
    assert losses.keys() == exact.keys() == set(range(6))
    assert losses != pytest.approx(exact, rel=1e-5), "not in bf16"
    assert "training unsharded" not in resumed.stderr
    assert losses == pytest.approx(exact, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "ranks", "copies"), [(1, 2, ()), (1, 4, COPIES), (2, 2, ())])
@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
def test_the_15b_recipe_has_its_weights_on_one_rank(version, ranks, copies, shards, tmp_path, given):
    """And so begins where one rank alone does. Given ones bring frequencies of rotation, as published ones do."""
    script, key = SHARDED[version]
    weights = ()
    if given:
        model = random_model(ESM2Config(num_layers=2, hidden_size=64, num_heads=4, ffn_hidden_size=128))
        model.rotary_bits.copy_((0.5 * rotary_frequencies(16)).view(torch.int32))
        state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
        dcp.save({"state": {"model": state}}, checkpoint_id=tmp_path / "ep0-ba1", no_dist=True)
        weights = (f"model.init_from={tmp_path}/ep0-ba1", *(f"model.{name}=null" for name in DIMENSIONS))
    found = []
    for name, number, layout in (("one", 1, ()), ("many", ranks, copies)):
        (tmp_path / name).mkdir()
        sharded = (key, "precision=fp32", *weights, *layout)
        start("15b", shards, tmp_path / name, *sharded, ranks=number, script=script)
        found.append(read_scalars(tmp_path / name / "runs/esm2_15b/tensorboard", "metrics/valid/perplexity"))
    one, many = found
    assert many[0] == pytest.approx(one[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_a_sharded_run_killed_on_two_ranks_goes_on_with_two_and_with_one(version, shards, tmp_path):
    script, key = SHARDED[version]
    sharded = (key, "precision=fp32", "save_interval=1ba", "eval_interval=400ba")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    arguments = (ROOT / script, ROOT / "yamls/3b.yaml", f"data.remote={shards}", *SMALL, *sharded)
    folder = killed / "runs/esm2_3b/checkpoints"
    with Run("-n", "2", *arguments, "max_duration=400ba", cwd=killed) as run:
        run.wait_until(lambda: any("ba7" in path.name for path in folder.glob("ep*")))
        run.kill()
    last = max(int(path.parent.name.split("-ba")[1]) for path in folder.glob("ep*/.metadata"))
    for ranks in (2, 1):
        last += 2
        start("3b", shards, killed, *sharded, f"max_duration={last}ba", ranks=ranks, script=script)
        assert (folder / "latest-rank0.pt").resolve().name.endswith(f"-ba{last}")
    done = start("3b", shards, killed, *sharded, f"max_duration={last}ba", ranks=2, script=script)
    assert "is done" in done.stdout
    start("3b", shards, whole, *sharded, f"max_duration={last}ba", script=script)
    losses, expected = (read_scalars(path / "runs/esm2_3b/tensorboard", LOSS) for path in (killed, whole))
    assert sorted(expected) == list(range(last))
    assert losses == pytest.approx(expected, rel=1e-4)
