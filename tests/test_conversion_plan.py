"""conversion/plan.py: which file is to blame, and the memory planning takes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esm2_composer.conversion import plan as conversion_plan
from esm2_composer.conversion.destinations import OtherSplit
from esm2_composer.conversion.layouts import Fasta, Flat
from esm2_composer.conversion.plan import make_plan
from esm2_composer.conversion.records import Report
from esm2_composer.errors import UserError


def test_the_damaged_file_of_a_folder_is_named(tmp_path: Path) -> None:
    folder, ids = tmp_path / "flat", [f"m{number}" for number in range(20_000)]
    folder.mkdir()
    for name in "ab":
        columns = {"ur50_id": ids, "ur90_id": ids, "sequence": ["MK"] * len(ids)}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    layout = Flat(folder)
    with (folder / "b.parquet").open("r+b") as file:
        file.seek(200)
        file.write(bytes(4000))
    with pytest.raises(UserError, match=r"/flat: damaged \(.*/flat/b\.parquet"):
        make_plan(layout, tmp_path, None, 1, Report())


def fasta(folder: Path) -> Fasta:
    (folder / "f").write_text(">a\nMK\n>b\nMK\n")
    layout = Fasta([folder / "f"])
    layout.stage(folder, Report(), lambda read: None)
    return layout


@pytest.mark.parametrize("content", [b"PAR1garbagePAR1", b""])
def test_the_other_splits_damage_is_told_as_its_own(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cluster_ids.parquet").write_bytes(content)
    other = OtherSplit(tmp_path / "cluster_ids.parquet", "")
    with pytest.raises(UserError, match=r"/cluster_ids\.parquet: damaged"):
        make_plan(fasta(tmp_path), tmp_path, other, 1, Report())


def test_many_workers_do_not_make_planning_take_all_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, settings = conversion_plan._open_database, []

    def watched(folder: Path, threads: int):
        database = opened(folder, threads)
        names = ", ".join(f"current_setting('{name}')" for name in ("threads", "memory_limit"))
        settings.extend(database.execute(f"SELECT {names}").fetchall())
        return database

    monkeypatch.setattr(conversion_plan, "_open_database", watched)
    make_plan(fasta(tmp_path), tmp_path, None, 64, Report())
    assert settings == [(8, "3.0 GiB")]
