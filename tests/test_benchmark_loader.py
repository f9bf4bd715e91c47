"""benchmark.py loader: what it says follows from what it measured."""

import pytest
from test_benchmark import measure


def test_loader() -> None:
    found = measure("loader", "--clusters", "2048", "--rounds", "1", "--workers", "1", "--ranks", "8")
    ours, theirs = (found["tokens_per_second"][name] for name in ("esm2_composer", "transformers"))
    assert found["ratio"] == pytest.approx(ours / theirs)
    assert all(each >= 0 for each in found["microseconds_per_sequence"].values())
    (loader,) = found["workers"]
    assert loader["tokens_per_second"] > 0
    (ranks,) = found["ranks"]
    assert 1 <= ranks["slowest_over_mean"] <= ranks["slowest_over_mean_at_worst"] < 1.01
    assert ranks["slowest_over_mean_before"] > 1.02
