"""README.md: its very commands, from raw files to embeddings."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, follow
from plot_convergence import read_run
from test_docs import commands
from transformers import AutoModelForMaskedLM

# What makes a published recipe a run of seconds.
SHORT = (
    "data.remote=data/uniref50 data.num_workers=1 data.max_length=128 device_microbatch_tokens=2048 "
    "global_train_batch_size=16 max_duration=4ba schedule.warmup=1 eval_interval=2ba save_interval=2ba "
    "model.size=null model.num_layers=1 model.hidden_size=32 model.num_heads=2 model.ffn_hidden_size=64"
)


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_its_order(
    checkout: Path, raw: Path, shards: Path, finished: Path
) -> None:
    """On files of the names it gives, and after `make demo`; with other models, and less data and updates."""
    for source in raw.iterdir():
        (checkout / source.name).symlink_to(source)
    (checkout / "data/demo").mkdir(parents=True)
    (checkout / "data/demo/shards").symlink_to(shards)
    shutil.copytree(finished / "runs/demo", checkout / "runs/demo")
    (checkout / "proteins.fasta").write_text(">a\nMKTAYIAKQR\n>b\nMSDKPDLSE\n")
    first, *rest = commands(ROOT / "README.md")
    for command in [*rest[:2], first, *rest[2:]]:  # the first is for when shards are there
        follow(checkout, f"{command} {SHORT}" if re.match("composer .*train.py", command) else command)
    for made in ("runs/esm2_8m/checkpoints", "runs/esm2_650m/checkpoints", "runs/demo2/checkpoints", "curve.png"):
        assert (checkout / made).exists()
    assert read_run(checkout / "runs/esm2_650m").curve.keys() == {0, 2, 4}
    assert AutoModelForMaskedLM.from_pretrained(checkout / "my_esm2").config.hidden_size == 32
    assert pq.read_table(checkout / "embeddings.parquet")["id"].to_pylist() == ["a", "b"]
