"""progress.py: people see how far a command is, with a terminal and without."""

from __future__ import annotations

import contextlib
import re
import sys
import time

import pytest

from esm2_composer.progress import Progress


def test_a_line_now_and_then_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("train")
    clock = iter([0, 20, 30, 40, 60, 80])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    for done in (0, 500, 1000, 2000, 4000):
        progress("clusters", done, 10_000)
    assert capfd.readouterr().err.splitlines() == [
        "train: 500 of 10,000 clusters, 25 a second, 6 min left",
        "train: 2,000 of 10,000 clusters, 50 a second, 3 min left",
        "train: 4,000 of 10,000 clusters, 67 a second, 2 min left",
    ]


def test_a_bar_with_rate_and_time_left_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress("valid")
    for done in (100, 600, 1000):
        time.sleep(0.15)  # the bar is drawn no more often than ten times a second
        progress("clusters", done, 1000)
    progress.close()
    bar = capfd.readouterr().err
    assert re.search(r"valid:  60%.*600/1.00k \[00:00<00:00, [\d.]+k? clusters/s\]", bar)
    assert bar.endswith("\n")


def test_a_full_disk_under_the_log_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        progress = Progress("train")
        clock = iter([0, 20])
        monkeypatch.setattr("time.monotonic", lambda: next(clock))
        for done in (0, 500):
            progress("clusters", done, 10_000)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
