"""What a marker says and vouches for counts only while both are whole."""

from pathlib import Path

import pytest

from esm2_composer.conversion.markers import read_marker, write_marker


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    (tmp_path / "part").write_bytes(b"residues")
    write_marker(tmp_path / "done", {"clusters": 3}, tmp_path / "part")
    return tmp_path / "done"


def test_a_marker_says_what_was_written(marker: Path) -> None:
    assert read_marker(marker)["clusters"] == 3


def test_no_marker_says_nothing(tmp_path: Path) -> None:
    assert read_marker(tmp_path / "done") is None


def test_a_marker_with_any_bit_flipped_or_cut_anywhere_says_nothing(marker: Path) -> None:
    whole = marker.read_bytes()
    for at in range(len(whole)):
        marker.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert read_marker(marker) is None, at
        marker.write_bytes(whole[:at])
        assert read_marker(marker) is None, at


@pytest.mark.parametrize("damage", [Path.unlink, lambda part: part.write_bytes(b"residuet")])
def test_a_marker_does_not_vouch_for_a_file_that_is_another_or_gone(marker: Path, damage) -> None:
    damage(marker.with_name("part"))
    assert read_marker(marker) is None
