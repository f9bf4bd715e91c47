"""Files on local disks are whole, or not there; outputs take no other's place."""

import errno
from pathlib import Path

import pytest

from esm2_composer.errors import TransientError, UserError
from esm2_composer.files import appearing_whole, refuse_existing, write_durably


def test_a_file_is_never_seen_half_written(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        write_durably(tmp_path / "file", "no bytes")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("left", [None, "file", "folder"])
@pytest.mark.parametrize("made", ["file", "folder"])
def test_an_output_appears_whole_whatever_a_killed_command_left(tmp_path: Path, left: str, made: str) -> None:
    out, make = tmp_path / "new/out", {"file": Path.touch, "folder": Path.mkdir}
    if left:
        out.parent.mkdir()
        make[left](out.parent / ".out.partial")
    with appearing_whole(out) as partial:
        make[made](partial)
        assert not out.exists()
    assert list(out.parent.iterdir()) == [out]
    assert out.is_dir() == (made == "folder")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "disk full"), TransientError),
        (OSError(errno.EACCES, "not yours"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_output_that_fails_leaves_nothing(tmp_path: Path, error: BaseException, told: type) -> None:
    def write() -> None:
        with appearing_whole(tmp_path / "out") as partial:
            partial.mkdir()
            (partial / "file").touch()
            raise error

    with pytest.raises(told):
        write()
    assert list(tmp_path.iterdir()) == []


def test_two_commands_do_not_write_one_output(tmp_path: Path) -> None:
    with appearing_whole(tmp_path / "out") as partial:
        partial.touch()
        with (
            pytest.raises(UserError, match="out: another command is writing it"),
            appearing_whole(tmp_path / "out"),
        ):
            raise AssertionError
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_output_that_another_command_has_made_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("theirs")
    with pytest.raises(UserError, match="out exists already"), appearing_whole(tmp_path / "out"):
        raise AssertionError
    assert (tmp_path / "out").read_text() == "theirs"


def test_an_output_in_a_store_is_refused_where_only_files_are_written():
    with pytest.raises(UserError, match="s3:/bucket/out: write to a local disk, and copy"):
        refuse_existing(Path("s3://bucket/out"))
