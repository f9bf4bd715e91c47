"""launcher.py: ranks that no launcher made are told in one line."""

import pytest

from esm2_composer.distributed.launcher import LEAST, check_environment
from esm2_composer.errors import UserError

WHOLE = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1", "NODE_RANK": "1"}
WHOLE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("place", [{}, {name: str(least) for name, least in LEAST.items()}, WHOLE])
def test_one_rank_and_a_launchers_are_places(monkeypatch, place):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    check_environment()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'; it must be a number from 1 up"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a number from 1 up"),
        ({"RANK": "-1"}, "RANK is '-1'; it must be a number from 0 up"),
        ({"RANK": "\u0663"}, "RANK is '\u0663'; it must be a number from 0 up"),
        ({"RANK": "1"}, "RANK is 1, of WORLD_SIZE 1; unset it, or start with a launcher"),
        ({**WHOLE, "RANK": "4"}, "RANK is 4, of WORLD_SIZE 4; unset it"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1, of LOCAL_WORLD_SIZE 1; unset it"),
        ({"NODE_RANK": "1"}, "NODE_RANK is 1, of WORLD_SIZE 1; unset it"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is set, but not RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_",
        ),
        (
            {name: WHOLE[name] for name in WHOLE if name != "MASTER_ADDR"},
            "WORLD_SIZE is set, but not MASTER_ADDR;",
        ),
    ],
)
def test_what_is_no_place_is_one_line(monkeypatch, changes, message):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as told:
        check_environment()
    assert str(told.value).startswith(f"the environment variable {message}")


def test_a_process_that_joins_no_others_may_know_how_many_there_would_be(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    check_environment(joins=False)
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(UserError, match="WORLD_SIZE is 'x'"):
        check_environment(joins=False)
