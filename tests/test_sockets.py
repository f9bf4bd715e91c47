"""sockets.py: ranks of several nodes can reach each other, and open as many sockets as they need."""

import os
import socket
import subprocess
import sys

import pytest
from nodes import ADDRESSES, INTERFACES, two_nodes
from test_launcher import WHOLE

from esm2_composer.distributed.sockets import be_reachable
from esm2_composer.errors import UserError

INTERFACE = "GLOO_SOCKET_IFNAME"


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in (*WHOLE, INTERFACE):
        monkeypatch.delenv(name, raising=False)


def test_a_rank_may_open_as_many_files_as_it_can_be_given():
    code = "import resource as r; from esm2_composer.distributed.launcher import run_on_ranks"
    code += "; print(run_on_ranks(lambda: r.getrlimit(r.RLIMIT_NOFILE)))"
    told = subprocess.run(
        ["bash", "-c", f"ulimit -S -n 256 && ulimit -H -n 2000 && exec '{sys.executable}' -c '{code}'"],
        capture_output=True,
        text=True,
    )
    assert told.stdout == "(2000, 2000)\n", told.stderr


TELL = f"""
import os
from esm2_composer.distributed.sockets import be_reachable
be_reachable()
print(os.environ["{INTERFACE}"])
"""


def test_nodes_whose_names_do_not_lead_to_them_meet_on_the_network_between_them():
    environment = {**os.environ, **WHOLE, "MASTER_ADDR": ADDRESSES[0]}
    with two_nodes() as inside:
        for node in range(2):
            command = [*inside(node), sys.executable, "-c", TELL]
            told = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert told.stdout.strip() == INTERFACES[node], told.stderr


@pytest.fixture
def a_name(monkeypatch):
    """Gives this machine's name an address, one that it has."""

    def give(address):
        names = {"node1": [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]}
        monkeypatch.setattr(socket, "getaddrinfo", lambda name, *_, **__: names.get(name, []))

    for name, value in {**WHOLE, "MASTER_ADDR": "node0.invalid"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    return give


def test_a_node_that_finds_no_way_to_the_others_is_told_to_name_one(a_name):
    a_name("127.0.1.1")
    with pytest.raises(UserError, match=r"this machine, node1, has a loopback address .* set GLOO_SOCKET_"):
        be_reachable()


@pytest.mark.parametrize(
    ("address", "environment"),
    [
        ("0.0.0.0", {}),  # any of this machine's that is no loopback's
        ("127.0.1.1", {INTERFACE: "eth7"}),
        ("127.0.1.1", {"MASTER_ADDR": "127.0.0.1"}),
        ("127.0.1.1", {"MASTER_ADDR": "localhost"}),
        ("127.0.1.1", {"MASTER_ADDR": "::1"}),
        ("127.0.1.1", {"LOCAL_WORLD_SIZE": "4"}),
    ],
)
def test_gloo_is_told_nothing_where_it_is_reached_or_need_not_be(monkeypatch, a_name, address, environment):
    a_name(address)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    be_reachable()
    assert os.environ.get(INTERFACE) == environment.get(INTERFACE)
