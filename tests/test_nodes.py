"""A run on two nodes, of which one is told to leave, then lost."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COPIES, SHARDED, Run, command, python
from nodes import ADDRESSES, two_nodes
from outcomes import losses

from esm2_composer.errors import EXIT_PREEMPTED, EXIT_TERMINATED

LENGTH = ("max_duration=150ba", "eval_interval=150ba", "save_interval=10ba", "precision=fp32")


@pytest.fixture
def start(shards: Path, tmp_path: Path) -> Iterator[Callable]:
    """Two nodes of two ranks, each with a launcher, temporary files and a cache of its own.

    The model is sharded in each, and each has a copy.
    """
    script, version = SHARDED[1]
    # Shorter than tmp_path's, for sockets; the same at every start, as it should be.
    temporary = [tempfile.mkdtemp(prefix=f"node{node}-") for node in range(2)]

    @contextlib.contextmanager
    def start() -> Iterator[list[Run]]:
        meeting = {"WORLD_SIZE": "4", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500"}
        with contextlib.ExitStack() as stack:
            runs = []
            for node in range(2):
                folder = tmp_path / f"node{node}"
                folder.mkdir(exist_ok=True)
                arguments = command(
                    shards,
                    *LENGTH,
                    *(version, *COPIES, "fsdp.state_dict_type=sharded"),
                    *(f"data.local={folder}/cache", f"save_folder={tmp_path}/checkpoints"),
                    script=script,
                )
                place = {**meeting, "NODE_RANK": str(node), "TMPDIR": temporary[node]}
                run = Run("--nproc", "2", *arguments, cwd=folder, inside=inside(node), **place)
                runs.append(stack.enter_context(run))
            yield runs

    with two_nodes() as inside:
        yield start
    for folder in temporary:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_run_whose_node_is_told_to_leave_and_then_lost_ends_as_one_rank_alone(start, shards, tmp_path):
    with start() as nodes:
        nodes[0].wait_for("update 21/")
        nodes[1].launcher.terminate()
        assert [node.end()[0] for node in nodes] == [EXIT_PREEMPTED] * 2, "".join(nodes[0].lines)
    with start() as nodes:
        nodes[0].wait_for("update 70/")
        nodes[1].kill()
        code, seconds = nodes[0].end()
        print(f"the other node's code: {code}, {seconds:.0f} s after it was lost")
        # Rank 0's, which is 143 where rank 1 has failed first, and the launcher has ended rank 0.
        assert code in (1, EXIT_TERMINATED), "".join(nodes[0].lines)
    with start() as nodes:
        assert [node.end()[0] for node in nodes] == [0, 0], "".join(nodes[0].lines)
        assert any(line.startswith("going on from") for line in nodes[0].lines)
    alone = python(*command(shards, *LENGTH), cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert sorted(losses(tmp_path)) == list(range(150))
    assert losses(tmp_path / "node0") == pytest.approx(losses(tmp_path), rel=1e-4)
