"""tools/benchmarks/startup.py: it launches as a run does, from the start and in mid-epoch."""

from __future__ import annotations

import argparse

import pytest
from benchmarks import startup


@pytest.mark.slow
def test_loader_processes_share_their_imports_as_those_of_a_run_do() -> None:
    parser = argparse.ArgumentParser()
    startup.add_arguments(parser)
    result = startup.measure(parser.parse_args(["--clusters", "70000", "--ranks", "2", "--workers", "1"]))
    assert list(result["launches"]) == ["from the start", "resumed in mid-epoch"]
    for row in result["launches"].values():
        assert 0 < row["seconds"] < row["seconds_with_imports"]
        assert 0 < row["imports_mib"] < row["all_processes_mib"] < 1.5 * row["imports_mib"]
        assert 0 < row["shared_memory_mib"] < 50
    assert len(startup.table(result).splitlines()) == 4
