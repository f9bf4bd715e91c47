"""tools/benchmarks/convert.py: it converts what it makes, and shows every measurement."""

from __future__ import annotations

import argparse

from benchmarks import convert


def test_every_size_and_number_of_workers_is_measured() -> None:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    result = convert.measure(parser.parse_args(["--clusters", "300", "--workers", "1"]))
    (row,) = result["rows"]
    assert (row["clusters"], row["workers"]) == (300, 1)
    assert 2 < row["members"] / row["clusters"] < 4
    assert 250 < row["residues"] / row["members"] < 450
    assert 0.5 < row["bytes_per_residue"] < 0.7
    assert min(row["clusters_per_second"], row["clusters_per_cpu_second"], row["parent_mib"]) > 1
    assert len(convert.table(result).splitlines()) == 3


def test_a_huge_cluster_is_among_them_and_its_draw_is_timed() -> None:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    result = convert.measure(parser.parse_args(["--clusters", "50", "--workers", "1", "--huge", "5000"]))
    (row,) = result["rows"]
    assert 5000 < row["members"] < 6000
    assert 0 < row["draw_ms"] < row["draw_huge_ms"]
    assert "to draw from, the huge one" in convert.table(result)
