"""parts.py: what a part that holds too much says. tests/test_conversion.py has what parts are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from raw_data import write_layout

from esm2_composer.conversion import parts
from esm2_composer.conversion.layouts import BioNeMo
from esm2_composer.conversion.parts import Options, PartBuilder
from esm2_composer.conversion.plan import make_plan
from esm2_composer.conversion.proteins import Sequences
from esm2_composer.conversion.records import Report
from esm2_composer.errors import UserError


@pytest.mark.parametrize("clusters", [[["a", "giant"]], [["a"], ["giant"]]], ids=["in a cluster", "alone"])
def test_a_member_too_large_for_a_sample_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clusters: list[list[str]]
) -> None:
    """No limit to the members of a cluster would help."""
    monkeypatch.setattr(parts, "MAX_CLUSTER_BYTES", 2**20)
    clusters_path, proteins = write_layout(tmp_path, {"ur90_id": clusters}, {"a": "M", "giant": "M" * (2**20 + 1)})
    plan = make_plan(BioNeMo(clusters_path, proteins), tmp_path, None, 1, Report())
    builder = PartBuilder(plan.path, tmp_path, Options(), rows_are_clusters=True)
    (tmp_path / "shards").mkdir()
    with pytest.raises(UserError, match=r"^member giant has more than 1 MiB of residues, .*; take it out"):
        builder.build(0, Sequences(proteins).look_up)
