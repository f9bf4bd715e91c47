"""ranks.py: what rank zero does, and fails of, is the same on every rank."""

import pickle

import pytest

from esm2_composer.conversion import Interrupted
from esm2_composer.errors import StoreAway, UserError
from esm2_composer.ranks import on_rank_zero


@pytest.mark.parametrize("error", [UserError("mine"), StoreAway("theirs"), Interrupted("full; kept")])
def test_what_rank_zero_fails_of_every_rank_fails_of(error, monkeypatch):
    def fail() -> None:
        raise error

    def send(outcome: list) -> None:
        sent.extend(pickle.loads(pickle.dumps(outcome)))

    def receive(outcome: list) -> None:
        outcome[:] = sent

    sent: list = []
    monkeypatch.setattr("composer.utils.dist.broadcast_object_list", send)
    with pytest.raises(type(error), match=str(error)):
        on_rank_zero(fail)
    monkeypatch.setattr("composer.utils.dist.get_global_rank", lambda: 1)
    monkeypatch.setattr("composer.utils.dist.broadcast_object_list", receive)
    with pytest.raises(type(error), match=str(error)):
        on_rank_zero(lambda: pytest.fail("this is rank 1"))
