"""Sockets between ranks: where gloo listens, and how many are allowed."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from ipaddress import ip_address

import psutil

from esm2_composer.errors import UserError

LOOPBACK = "127.0.0.1"
THIS_MACHINE = ("localhost", "localhost.localdomain", "ip6-localhost", "::1")  # and 127.*


def be_reachable() -> None:
    """Have gloo listen where other nodes' ranks can reach it, by the environment variable GLOO_SOCKET_IFNAME.

    By default gloo listens on the address that this machine's hostname resolves to. If that is loopback, as in
    many /etc/hosts, ranks of two nodes try to connect for half an hour and fail.

    Raises:
        UserError: the route to the other nodes is not found either.
    """
    host = os.environ.get("MASTER_ADDR", "localhost")
    if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
        return
    if host in THIS_MACHINE or host.startswith("127.") or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if not _is_loopback(_own_address()):
        return
    address = _address_towards(host)
    if _is_loopback(address):
        raise UserError(
            f"the name of this machine, {socket.gethostname()}, has a loopback address here, where other nodes do "
            "not reach it; set GLOO_SOCKET_IFNAME to the network interface between nodes (`ip -brief address`)"
        )
    for interface, addresses in psutil.net_if_addrs().items():
        if address in (each.address for each in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = interface


def open_many_files() -> None:
    """Raise the limit of open files as far as allowed: gloo holds a socket for each rank in each of four
    groups."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # the kernel may allow fewer by now
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _own_address() -> str:
    """Where gloo would listen: on the first usable address of this machine's hostname."""
    for *kind, place in _addresses(socket.gethostname(), 0, socket.SOCK_STREAM):
        with contextlib.suppress(OSError), socket.socket(*kind) as probe:
            probe.bind(place)
            return place[0]
    return LOOPBACK


def _address_towards(host: str) -> str:
    """This machine's address on the route to a host, to which nothing is sent; loopback if there is no route."""
    for *kind, place in _addresses(host, 9, socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(*kind) as probe:
            probe.connect(place)
            return probe.getsockname()[0]
    return LOOPBACK


def _addresses(host: str, port: int, kind: int) -> list[tuple]:
    """(family, kind, protocol, address), none for an unknown host."""
    try:
        found = socket.getaddrinfo(host, port, type=kind)
    except (OSError, UnicodeError):  # the second for an invalid name
        return []
    return [(family, kind, protocol, address) for family, kind, protocol, _, address in found]


def _is_loopback(address: str) -> bool:
    return ip_address(address.partition("%")[0]).is_loopback  # IPv6's may name an interface, after "%"
