"""What commands import is left out of garbage collection, which goes on for all else."""

import contextlib
import gc

import pytest

from esm2_composer.imports import slow_imports


@pytest.mark.parametrize("failure", [None, ImportError])
def test_garbage_is_not_looked_for_meanwhile_nor_later_in_what_was_imported(monkeypatch, failure):
    calls = []
    for name in ("disable", "freeze", "enable"):
        monkeypatch.setattr(gc, name, lambda name=name: calls.append(name))
    with contextlib.suppress(ImportError), slow_imports():
        assert calls == ["disable"]
        if failure:
            raise failure
    assert calls == ["disable", "freeze", "enable"]
