"""docs/continue.md: its very commands, from a FASTA file to an exported model and its embeddings."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, follow, python
from outcomes import read_scalars
from test_docs import commands
from transformers import AutoModelForMaskedLM, EsmConfig, EsmForMaskedLM

from esm2_composer.conversion.fasta import read_fasta
from esm2_composer.model import ESM2Config
from esm2_composer.weights.hugging_face import hugging_face_config

COMMANDS = [command for command in commands(ROOT / "docs/continue.md") if command != "apt install mmseqs2"]
FROM_FASTA = [command for command in COMMANDS if "convert.py --fasta" in command]
# What makes the walk-through short: fewer updates and smaller batches, and a model that has all to learn.
SHORT = "max_duration=30ba eval_interval=30ba global_train_batch_size=16 schedule.warmup=3 optimizer.lr=0.003"


@pytest.fixture
def folder(real_data, checkout) -> Path:
    """Where a user stands: the project, a FASTA file, and weights that transformers wrote, where the hub's
    would be looked for first."""
    shutil.copy(real_data / "tiny/fasta/members.fasta", checkout / "proteins.fasta")
    torch.manual_seed(0)
    config = EsmConfig(**hugging_face_config(ESM2Config(2, 64, 4, 128)))
    EsmForMaskedLM(config).save_pretrained(checkout / "facebook/esm2_t6_8M_UR50D")
    return checkout


def perplexity(printed: str) -> float:
    return float(re.search(r"(?:perplexity|all selected positions)\s+([\d.]+)", printed)[1])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mmseqs"), reason="no mmseqs on PATH")
def test_the_walk_through(folder):
    commands = [command for command in COMMANDS if command not in FROM_FASTA]
    assert len(commands) == 8
    printed = [follow(folder, f"{command} {SHORT}" if "train.py" in command else command) for command in commands]
    before, after = (
        perplexity(text) for command, text in zip(commands, printed, strict=True) if "evaluate" in command
    )
    assert after < 0.8 * before
    logged = read_scalars(folder / "runs/continue/tensorboard", "metrics/valid/perplexity")
    assert logged[0] == pytest.approx(before, rel=1e-4)
    assert logged[30] == pytest.approx(after, rel=1e-4)
    model = AutoModelForMaskedLM.from_pretrained(folder / "my_esm2")
    assert model.config.hidden_size == 64
    names = [name for name, _ in read_fasta(folder / "proteins.fasta")]
    assert pq.read_table(folder / "embeddings.parquet")["id"].to_pylist() == names


def test_clusters_and_a_split_of_ones_own(folder, real_data):
    if "--fasta" not in python(ROOT / "tools/convert.py", "--help").stdout:
        pytest.skip("tools/convert.py does not read FASTA")
    tiny = real_data / "tiny/fasta"
    held_out = set((tiny / "valid_ids.txt").read_text().replace("UniRef50_", "UniRef90_").split())
    pairs = [line.split("\t") for line in (tiny / "cluster.tsv").read_text().splitlines()]
    proteins = {name: residues.decode() for name, residues in read_fasta(folder / "proteins.fasta")}
    train = [(representative, name) for representative, name in pairs if representative not in held_out]
    (folder / "clusters.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in train))
    for split, names in (("train", [name for _, name in train]), ("valid", sorted(held_out))):
        text = "".join(f">{name}\n{proteins[name]}\n" for name in names)
        (folder / f"{split}.fasta").write_text(text)
    assert len(FROM_FASTA) == 2
    for command in FROM_FASTA:
        follow(folder, command)
    for split, clusters, members in (("train", 312, 461), ("valid", 40, 40)):
        conversion = json.loads((folder / "data/mine" / split / "conversion.json").read_text())
        assert conversion["clusters_written"] == clusters
        assert conversion["members_written"] == members
