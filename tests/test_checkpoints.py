"""A save folder whose link to the newest checkpoint was lost is mended; another run's is not overwritten."""

from pathlib import Path

import pytest
import torch

from esm2_composer.checkpoints import LATEST, prepare_save_folder
from esm2_composer.errors import UserError


def save(folder: Path, name: str, whole: bool = True) -> None:
    torch.save({"state": torch.ones(100)}, folder / name)
    if not whole:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-100])


def save_sharded(folder: Path, name: str, whole: bool = True) -> None:
    (folder / name).mkdir()
    (folder / name / "__0_0.distcp").write_bytes(b"x")
    if whole:
        (folder / name / ".metadata").write_bytes(b"x")


@pytest.mark.parametrize("save_one", [save, save_sharded])
def test_a_lost_link_is_set_to_the_newest_whole_checkpoint(tmp_path, save_one):
    end = "-rank0.pt" if save_one is save else ""
    for updates in (90, 100):  # by number, not by name
        save_one(tmp_path, f"ep0-ba{updates}{end}")
    save_one(tmp_path, f"ep0-ba110{end}", whole=False)
    prepare_save_folder(tmp_path, resume=True)
    assert (tmp_path / LATEST).readlink() == Path(f"ep0-ba100{end}")


def test_a_dangling_link_is_replaced(tmp_path):
    save(tmp_path, "ep0-ba10-rank0.pt")
    (tmp_path / LATEST).symlink_to("ep0-ba20-rank0.pt")
    prepare_save_folder(tmp_path, resume=True)
    assert (tmp_path / LATEST).resolve() == (tmp_path / "ep0-ba10-rank0.pt").resolve()


def test_a_good_link_is_left_alone(tmp_path):
    save(tmp_path, "ep0-ba10-rank0.pt")
    save(tmp_path, "ep0-ba20-rank0.pt")
    (tmp_path / LATEST).symlink_to("ep0-ba10-rank0.pt")
    prepare_save_folder(tmp_path, resume=True)
    assert (tmp_path / LATEST).readlink() == Path("ep0-ba10-rank0.pt")


@pytest.mark.parametrize("resume", [True, False])
def test_a_new_folder_is_made_and_left_empty(tmp_path, resume):
    prepare_save_folder(tmp_path / "runs" / "new", resume)
    assert not list((tmp_path / "runs" / "new").iterdir())


def test_a_run_is_not_overwritten_by_one_that_does_not_resume_it(tmp_path):
    save(tmp_path, "ep0-ba10-rank0.pt")
    with pytest.raises(UserError, match="holds a run of 10 updates"):
        prepare_save_folder(tmp_path, resume=False)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        prepare_save_folder(tmp_path / "file" / "checkpoints", resume=True)
