"""Two nodes, as far as namespaces of the kernel make them: each has its own network and /dev/shm, and its name
is that of a loopback address there, as Debian has it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

ADDRESSES = "10.9.0.1", "10.9.0.2"
INTERFACES = "eth1", "eth2"

# Joins them by a virtual cable, tells the processes that hold their namespaces, and ends these with its own input.
HOLD = f"""
trap 'kill $one $two' EXIT
hold() {{
    mount -t tmpfs tmpfs /dev/shm
    printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$(uname -n)" > /dev/shm/hosts
    mount --bind /dev/shm/hosts /etc/hosts
    exec sleep infinity
}}
export -f hold
unshare --net --mount bash -ec hold & one=$!
unshare --net --mount bash -ec hold & two=$!
until [ "$(cat /proc/$one/comm /proc/$two/comm | tr -d '\\n')" = sleepsleep ]; do
    kill -0 $one; kill -0 $two
    sleep 0.01
done
ip link add {INTERFACES[0]} netns $one type veth peer name {INTERFACES[1]} netns $two
nsenter --net --target $one ip address add {ADDRESSES[0]}/24 dev {INTERFACES[0]}
nsenter --net --target $two ip address add {ADDRESSES[1]}/24 dev {INTERFACES[1]}
for node in $one $two; do nsenter --net --target $node ip link set group default up; done
echo $one $two
read || true
"""


@contextlib.contextmanager
def two_nodes() -> Iterator[Callable[[int], list[str]]]:
    """What runs a command on one of them, in the current folder; skips where namespaces cannot be had."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("unshare, nsenter or ip is not here")
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "bash", "-ec", HOLD]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True) as holder:
        processes = holder.stdout.readline().split()
        if not processes:
            pytest.skip(f"namespaces cannot be had here: {holder.stderr.read()}")
        enter = ("nsenter", "--user", "--preserve-credentials", "--net", "--mount", "--wd=.", "--target")
        yield lambda node: [*enter, processes[node]]
        holder.stdin.close()
