"""tools/benchmarks/startup.py: it launches as a run does, from the start and in mid-epoch."""

from __future__ import annotations

import argparse
import time

import pytest
from benchmarks import startup

from esm2_composer.errors import UserError


def fail_on_one(rank: int, **_: object) -> None:
    if rank == 1:
        raise UserError("no room")
    time.sleep(300)


def test_a_rank_that_fails_is_told_and_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(startup, "first_batch", fail_on_one)
    parser = argparse.ArgumentParser()
    startup.add_arguments(parser)
    with pytest.raises(UserError, match="no room"):
        startup.measure(parser.parse_args(["--clusters", "2048", "--ranks", "2"]))


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
