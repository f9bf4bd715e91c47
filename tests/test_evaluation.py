"""Scores follow their definitions, equal those of transformers, and do not depend on format or ranks; what cannot
be scored is refused."""

import json
import math
import re
import shutil
from pathlib import Path

import evaluate as tool
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from benchmarks.parity import hugging_face, random_model
from conftest import ROOT, composer, python
from streaming import MDSWriter
from test_model import CONFIGS
from test_weights import save_fair_esm
from torch.nn.utils.rnn import pad_sequence
from transformers import EsmForMaskedLM

from esm2_composer import alphabet
from esm2_composer.data.draw import ClusterDraw
from esm2_composer.data.loaders import evaluation_loader
from esm2_composer.data.masking import MaskingRule
from esm2_composer.data.mds import COLUMNS
from esm2_composer.data.pool import pack
from esm2_composer.errors import UserError
from esm2_composer.evaluation import LENGTH_BINS, LENGTH_EDGES, evaluate
from esm2_composer.model import ESM2, ESM2Config


def microbatch(lengths: list[int], seed: int) -> dict:
    generator = np.random.default_rng(seed)
    tokens = generator.choice(alphabet.AMINO_ACIDS, sum(lengths))
    inputs, labels = MaskingRule().apply(tokens, generator.random(len(tokens)))
    return pack(inputs, labels, np.array(lengths, np.int32))


def test_scores_are_means_over_all_selected_tokens_whatever_the_microbatches():
    torch.manual_seed(0)
    net = ESM2(ESM2Config(1, 32, 2, 64))
    batches = [microbatch([300, 20], 1), microbatch([64, 65, 7], 2)]
    scores = evaluate(net, batches, torch.device("cpu"))
    rows = []  # loss, hit, and the groups that the position counts in
    with torch.no_grad():
        for batch in batches:
            logits = net(batch["tokens"], batch["cu_seqlens"])[batch["positions"]]
            for row, position, target in zip(
                logits.double(), batch["positions"].tolist(), batch["targets"].tolist(), strict=True
            ):
                (sequence,) = [b for b, start in enumerate(batch["cu_seqlens"].tolist()) if start <= position][-1:]
                length = int(batch["cu_seqlens"].diff()[sequence])
                bin = "2-64" if length <= 64 else "65-128" if length <= 128 else "257-512"
                shown = "at_mask" if batch["tokens"][position] == alphabet.MASK else "at_residue"
                groups = {"all", bin, shown, alphabet.TOKENS[target]}
                rows.append((-row.log_softmax(-1)[target].item(), bool(row.argmax() == target), groups))
    found = {"all": scores, **{key: scores[key] for key in ("at_mask", "at_residue")}}
    found |= scores["by_length"] | scores["by_residue"]
    assert found.keys() == set.union(*(groups for *_, groups in rows))
    for group, score in found.items():
        losses, hits = zip(*((loss, hit) for loss, hit, groups in rows if group in groups), strict=True)
        assert score["selected_tokens"] == len(losses)
        assert score["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert score["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
        assert score["accuracy"] == pytest.approx(np.mean(hits))
    assert scores["sequences"] == 5


def test_length_bins_join_without_a_gap():
    assert LENGTH_BINS == ("2-64", "65-128", "129-256", "257-512", "513-1024", "1025-")
    assert len(LENGTH_BINS) == len(LENGTH_EDGES)


def test_groups_without_a_position_are_left_out():
    net = ESM2(ESM2Config(1, 32, 2, 64))
    tokens = np.full(10, 5, np.uint8)
    labels = np.full(10, alphabet.PAD, np.uint8)
    none = pack(tokens, labels, np.array([10], np.int32))
    with pytest.raises(UserError, match="none of 1 sequences has a selected position"):
        evaluate(net, [none], torch.device("cpu"))
    labels[3] = 5  # and is shown
    scores = evaluate(net, [pack(tokens, labels, np.array([10], np.int32))], torch.device("cpu"))
    assert "at_mask" not in scores
    assert scores["at_residue"]["selected_tokens"] == 1
    table = tool.report(scores | {"replacement": "amino_acids", "seed": 17, "max_length": 1024})
    assert "that show a residue" in table
    assert "that show <mask>" not in table


@pytest.mark.parametrize(("value", "loss"), [(math.nan, "nan"), (1e6, r"\d+")])
def test_a_loss_without_a_perplexity_is_refused(value, loss):
    torch.manual_seed(0)
    net = ESM2(ESM2Config(1, 32, 2, 64))
    with torch.no_grad():
        net.head.norm.weight.fill_(value)
    with pytest.raises(UserError, match=f"the loss is {loss}.*, which has no perplexity"):
        evaluate(net, [microbatch([300, 20], 1)], torch.device("cpu"))


# ---- the command


@pytest.fixture(scope="module")
def model() -> ESM2:
    return random_model(CONFIGS[16])


@pytest.fixture(scope="module")
def checkpoints(model, tmp_path_factory) -> dict[str, Path]:
    """The same weights in every format."""
    folder = tmp_path_factory.mktemp("checkpoints")
    hugging_face(model).save_pretrained(folder / "hugging_face")
    save_fair_esm(model, folder / "fair_esm.pt", "encoder.sentence_encoder.")
    state = {"state": {"model": {f"net.{name}": tensor for name, tensor in model.state_dict().items()}}}
    torch.save(state, folder / "composer.pt")
    dcp.save(state, checkpoint_id=folder / "sharded", no_dist=True)
    names = ("hugging_face", "fair_esm.pt", "composer.pt", "sharded")
    return {name: folder / name for name in names}


def scores(call, *arguments) -> dict:
    code, out, err = call(tool.main, *arguments, "--json")
    assert code == 0, err
    assert len(out.splitlines()) == 1
    return json.loads(out)


@pytest.mark.parametrize("replacement", ["amino_acids", "all_tokens"])
def test_the_loss_is_that_of_transformers_on_the_same_masked_tokens(shards, checkpoints, call, replacement):
    found = scores(
        call, checkpoints["hugging_face"], "--data", shards, "--replacement", replacement, "--max-length", "500"
    )
    draw = ClusterDraw(17, 500, 1, MaskingRule(replacement=replacement))
    reference = EsmForMaskedLM.from_pretrained(checkpoints["hugging_face"]).eval()
    losses = at_mask = 0.0
    selected = hidden = 0
    for batch in evaluation_loader(draw, None, f"{shards}/valid", 4, 0):
        lengths = batch["lengths"].tolist()
        rows = (list(batch[key].long().split(lengths)) for key in ("tokens", "labels"))
        inputs, labels = (pad_sequence(each, batch_first=True, padding_value=alphabet.PAD) for each in rows)
        real = torch.arange(inputs.shape[1]) < batch["lengths"][:, None]  # one of the 33 ids is <pad>
        with torch.no_grad():
            logits = reference(inputs, attention_mask=real.long()).logits
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=alphabet.PAD, reduction="none"
        ).double()
        losses += each.sum().item()
        at_mask += each[inputs.flatten() == alphabet.MASK].sum().item()
        selected += int((labels != alphabet.PAD).sum())
        hidden += int((inputs == alphabet.MASK).sum())
    assert found["selected_tokens"] == selected
    assert found["loss"] == pytest.approx(losses / selected, rel=1e-5)
    assert found["at_mask"]["selected_tokens"] == hidden
    assert found["at_mask"]["loss"] == pytest.approx(at_mask / hidden, rel=1e-5)
    assert found["replacement"] == replacement


def test_every_format_of_the_same_weights_scores_the_same_every_time(shards, checkpoints, call):
    first, *others = (scores(call, path, "--data", shards) for path in checkpoints.values())
    assert others == [first] * 3


def test_shards_may_come_through_a_cache(shards, checkpoints, tmp_path, call):
    there = scores(call, checkpoints["composer.pt"], "--data", shards, "--floors")
    here = scores(call, checkpoints["composer.pt"], "--data", shards, "--local", tmp_path / "cache", "--floors")
    assert here == there
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["train", "valid"]


def test_many_ranks_give_the_scores_of_one(shards, checkpoints, call):
    one = scores(call, checkpoints["composer.pt"], "--data", shards, "--floors")
    arguments = (checkpoints["composer.pt"], "--data", shards, "--floors", "--json")
    result = composer("-n", "2", ROOT / "tools/evaluate.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert sum(line.startswith("all selected positions") for line in result.stderr.splitlines()) == 1
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("{"))  # the launcher adds its own
    one, two = flat(one), flat(json.loads(line))
    assert two.keys() == one.keys()
    for key, value in one.items():
        assert two[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), key


def flat(values: dict, prefix: str = "") -> dict:
    """{"by_length/2-64/loss": ..., ...}"""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_the_table_shows_what_the_json_holds(shards, checkpoints, call):
    code, out, err = call(tool.main, checkpoints["composer.pt"], "--data", shards, "--floors")
    assert code == 0, err
    assert "perplexity" not in err
    found = scores(call, checkpoints["composer.pt"], "--data", shards, "--floors")
    rows = {line[:36].strip(): line[36:].split() for line in out.splitlines()}
    for name, score in {"all selected positions": found, "that show <mask>": found["at_mask"]}.items():
        assert rows[name][:1] == [f"{score['perplexity']:.4f}"]
    for name, score in {**found["by_length"], **found["by_residue"]}.items():
        assert rows[name] == [
            *(f"{score['perplexity']:.4f}", f"{score['loss']:.5f}", f"{score['accuracy']:.4f}"),
            f"{score['selected_tokens']:,}",
        ]
    assert rows["unigram, where <mask> shows"] == [f"{found['floors']['unigram']:.4f}"]
    assert rows["copier, at all selected positions"] == [f"{found['floors']['copier']:.4f}"]


def test_progress_is_said_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    assert list(tool.progress(iter("abcd"), 4)) == list("abcd")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["evaluate: 2 of 4 batches", "evaluate: 4 of 4 batches"]


def half(folder: Path, checkpoint: Path) -> Path:
    content = checkpoint.read_bytes()
    (folder / "half.pt").write_bytes(content[: len(content) // 2])
    return folder / "half.pt"


def without_a_file(folder: Path, checkpoint: Path) -> Path:
    shutil.copytree(checkpoint, folder / "sharded")
    next((folder / "sharded").glob("*.distcp")).unlink()
    return folder / "sharded"


def unfinished(folder: Path, checkpoint: Path) -> Path:
    """As a save leaves it that was killed: the table of contents comes last."""
    shutil.copytree(checkpoint, folder / "sharded")
    (folder / "sharded/.metadata").unlink()
    return folder / "sharded"


def other_alphabet(folder: Path, checkpoint: Path) -> Path:
    content = torch.load(checkpoint)
    model = content["state"]["model"]
    model["net.embed.weight"] = torch.nn.functional.pad(model["net.embed.weight"], (0, 0, 0, 31))
    torch.save(content, folder / "64.pt")
    return folder / "64.pt"


def other_vocabulary(folder: Path, checkpoint: Path) -> Path:
    shutil.copytree(checkpoint, folder / "other")
    tokens = list(alphabet.TOKENS)
    tokens[4], tokens[5] = tokens[5], tokens[4]
    (folder / "other/vocab.txt").write_text("\n".join(tokens))
    return folder / "other"


@pytest.mark.parametrize(
    ("damage", "checkpoint", "words"),
    [
        (half, "composer.pt", ["half.pt", "cannot be read as weights"]),
        (half, "fair_esm.pt", ["half.pt", "cannot be read as weights"]),
        (without_a_file, "sharded", ["sharded", "damaged, something is missing"]),
        (unfinished, "sharded", ["sharded", "neither a Hugging Face folder"]),
        (other_alphabet, "composer.pt", ["embed.weight", "(64, 64)", "not (33, 64)"]),
        (other_vocabulary, "hugging_face", ["vocab.txt", "ESM-2"]),
    ],
)
def test_a_checkpoint_that_is_damaged_or_does_not_fit_is_refused(
    shards, checkpoints, tmp_path, call, damage, checkpoint, words
):
    code, out, err = call(tool.main, damage(tmp_path, checkpoints[checkpoint]), "--data", shards, "--json")
    assert_user_error(code, out, err, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "/nowhere"], ["/nowhere", "no such folder"]),
        (["--data", "n" * 300], ["nnn"]),
        (["--data", __file__], ["test_evaluation.py", "no valid shards"]),
        (["--data", "SHARDS", "--local", f"{__file__}/x"], ["test_evaluation.py"]),
        (["--data", "SHARDS", "--local", "n" * 300], ["nnn"]),
        (["--data", "SHARDS", "--split", "test"], ["no test shards"]),
        (["--data", "s3://bucket/x"], ["needs --local"]),
        (["--data", "SHARDS", "--max-length", "4"], ["--max-length: 4", "at least 8"]),
        (["--data", "SHARDS", "--microbatch-tokens", "512"], ["--microbatch-tokens 512", "1024"]),
        (["--data", "SHARDS", "--seed", "-1"], ["--seed: -1"]),
        (["--data", "SHARDS", "--seed", "2147483648"], ["--seed: 2147483648", "at most 2147483647"]),
        (["--data", "SHARDS", "--max-length", "2147483648"], ["--max-length: 2147483648", "at most 2147483647"]),
        (
            ["--data", "SHARDS", "--microbatch-tokens", "2147483648"],
            ["--microbatch-tokens: 2147483648", "at most"],
        ),
        (["--data", "SHARDS", "--local", "s3://bucket/x"], ["--local is s3://bucket/x; it must be a folder"]),
        (["--data", "SHARDS", "--local", "SHARDS"], ["--local is", "where the shards themselves lie"]),
        (["--data", "SHARDS", "--split", ".."], ["--split ..", "the name of a folder"]),
        (["--data", "SHARDS", "--split", "train/../valid"], ["--split train/../valid", "the name of a folder"]),
        (["--data", "SHARDS", "--split", ""], ["what follows --split is empty"]),
    ],
)
def test_wrong_arguments_are_refused(shards, checkpoints, call, arguments, words):
    arguments = [str(shards) if argument == "SHARDS" else argument for argument in arguments]
    assert_user_error(*call(tool.main, checkpoints["composer.pt"], *arguments), *words)


def test_a_rank_without_its_launcher_is_refused(shards, checkpoints):
    command = (ROOT / "tools/evaluate.py", checkpoints["composer.pt"], "--data", shards)
    result = python(*command, WORLD_SIZE="x")
    assert_user_error(result.returncode, result.stdout, result.stderr, "WORLD_SIZE is 'x'")


@pytest.mark.parametrize("options", [(), ("--floors",)])
def test_a_cache_of_other_shards_is_refused(shards, checkpoints, tmp_path, call, options):
    split = "train" if options else "valid"  # what the floors alone read
    (tmp_path / split).mkdir()
    (tmp_path / split / "index.json").write_text((shards / split / "index.json").read_text() + " ")
    arguments = ("--data", shards, "--local", tmp_path, *options)
    assert_user_error(*call(tool.main, checkpoints["composer.pt"], *arguments), f"holds other {split} shards")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [Path("/nowhere"), None])
def test_a_mistake_on_many_ranks_ends_with_its_code(shards, checkpoints, tmp_path, checkpoint):
    """Told by each rank before they meet (no such weights), or after (no such shards)."""
    if checkpoint is None:
        (tmp_path / "valid").mkdir()
        (tmp_path / "valid/index.json").write_text("{}")
        checkpoint, shards = checkpoints["composer.pt"], tmp_path
    result = composer("-n", "2", ROOT / "tools/evaluate.py", checkpoint, "--data", shards)
    assert result.returncode == 2, result.stderr
    assert "error: " in result.stderr


def write_shards(folder: Path, *residues: bytes) -> None:
    with MDSWriter(out=str(folder / "valid"), columns=COLUMNS) as writer:
        for number, each in enumerate(residues):
            writer.write({"cluster_id": f"{number}", "lengths": np.array([len(each)], np.int32), "residues": each})


@pytest.mark.slow
def test_a_mistake_that_one_of_two_ranks_meets_ends_with_its_code(checkpoints, tmp_path):
    write_shards(tmp_path, *[b"MKTAYIAKQ"] * 9, b"mktayiakq")
    result = composer("-n", "2", ROOT / "tools/evaluate.py", checkpoints["composer.pt"], "--data", tmp_path)
    assert result.returncode == 2, result.stderr
    assert "error: " in result.stderr
    assert "not of ESM-2's alphabet" in result.stderr


def test_shards_with_other_letters_are_refused(checkpoints, tmp_path, call):
    write_shards(tmp_path, b"mktayiakq")
    assert_user_error(*call(tool.main, checkpoints["composer.pt"], "--data", tmp_path), "not of ESM-2's alphabet")


def test_an_unknown_token_that_a_mask_put_there_is_none_of_the_data():
    tokens = torch.tensor([alphabet.CLS, alphabet.UNK, 7, alphabet.EOS], dtype=torch.uint8)
    replaced = {"tokens": tokens, "labels": torch.tensor([alphabet.PAD, 5, alphabet.PAD, alphabet.PAD])}
    assert list(tool.checked([replaced], "data")) == [replaced]
    with pytest.raises(UserError, match="alphabet"):
        list(tool.checked([{**replaced, "labels": torch.full((4,), alphabet.PAD)}], "data"))


def assert_user_error(code: int, out: str, err: str, *words: str) -> None:
    assert code == 2
    assert out == ""
    (line,) = (line for line in err.splitlines() if not re.match(r"\s*$|evaluate:", line))
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
