"""checkpoints.json is read back, or named as damaged; the newest and the best checkpoints are kept."""

import json

import pytest

from esm2_composer.checkpoints.index import Index, best, superseded
from esm2_composer.checkpoints.local import LocalFolder
from esm2_composer.errors import UserError


@pytest.mark.parametrize("shards", [{}, {"train": "one"}, {"train": "one", "valid": "another"}])
def test_the_index_is_read_back(folder, shards):
    """Of earlier versions, it knows the training shards only."""
    Index(shards, {7: 2.5, 14: 2.25}).write(folder, ["ep0-ba14"])
    assert Index.read(folder) == Index(shards, {7: 2.5, 14: 2.25})
    assert json.loads(folder.read("checkpoints.json")).get("train_shards") == shards.get("train")


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


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '{"validation_loss": {"x": 1}}',
        '{"validation_loss": {"1": null}}',
        '{"validation_loss": {"1": NaN}}',
    ],
)
def test_an_index_that_is_damaged_is_named(folder, content):
    folder.write("checkpoints.json", content)
    with pytest.raises(UserError, match=r"checkpoints\.json is damaged; remove it"):
        Index.read(folder)


def test_an_index_that_is_no_text_is_named(tmp_path):
    (tmp_path / "checkpoints.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"checkpoints\.json is damaged; remove it"):
        Index.read(LocalFolder(str(tmp_path)))
