"""A run told to leave, by whatever signal, to whom and when: it saves, leaves with code 75 and goes on.

The launcher kills what has not left 30 seconds after SIGTERM, and then its own code is another: 75 tells that all
ranks left in time.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT, Run, command, python
from outcomes import losses

from esm2_composer import preemption
from esm2_composer.callbacks import Preemption
from esm2_composer.data import loaders
from esm2_composer.data.draw import ClusterDraw
from esm2_composer.data.masking import MaskingRule


@pytest.fixture(scope="module")
def long_validation(tmp_path_factory) -> Path:
    """96 training clusters, and validation clusters for a second or two."""
    folder = tmp_path_factory.mktemp("long_validation")
    clusters = ("--clusters", "96", "--valid-clusters", "400")
    assert python(ROOT / "tools/sample_data.py", folder / "raw", *clusters).returncode == 0
    for split, sequences in (("train", "train.db"), ("valid", "validation.db")):
        inputs = (
            "--clusters",
            folder / "raw" / f"{split}_clusters.parquet",
            "--sequences",
            folder / "raw" / sequences,
        )
        converted = python(ROOT / "tools/convert.py", *inputs, "--out", folder / "shards", "--split", split)
        assert converted.returncode == 0, converted.stderr
    return folder / "shards"


@pytest.fixture(scope="module")
def undisturbed(long_validation, tmp_path_factory) -> dict[int, float]:
    """The losses of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = python(*command(long_validation), cwd=folder)
    assert result.returncode == 0, result.stderr
    return losses(folder)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs/demo/checkpoints").glob("ep*"))


def index(folder: Path) -> dict:
    return json.loads((folder / "runs/demo/checkpoints/checkpoints.json").read_text())


def loader_workers(run: Run) -> list[psutil.Process]:
    children = [child for rank in run.ranks() for child in rank.children()]
    return [child for child in children if "train.py" in " ".join(child.cmdline())]


def tell_in_evaluation(run: Run, line: str, tell: Callable[[], None]) -> None:
    """Tell a run to leave while it is in the evaluation after `line`: without its workers that does not end."""
    run.wait_for(line)
    workers = loader_workers(run)
    for worker in workers:
        worker.suspend()
    time.sleep(1)  # it takes what they have made
    tell()
    time.sleep(3)  # all ranks are told
    for worker in workers:
        worker.resume()


def catches(rank: psutil.Process, number: signal.Signals) -> bool:
    status = Path(f"/proc/{rank.pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


SIGNALS = [("launcher", signal.SIGTERM), ("last rank", signal.SIGTERM), ("last rank", signal.SIGUSR1)]


def send(number: signal.Signals, run: Run, receiver: str) -> None:
    (run.launcher if receiver == "launcher" else run.ranks()[-1]).send_signal(number)


NO_SAVES = "save_interval=100ba"  # but what a signal brings about


def test_sigusr1_to_one_of_two_ranks_makes_both_save_and_leave(shards, tmp_path):
    with Run("-n", "2", *command(shards, NO_SAVES), cwd=tmp_path) as run:
        run.wait_for("update 3/")
        run.ranks()[1].send_signal(signal.SIGUSR1)
        code, _ = run.end()
    assert code == 75, "".join(run.lines)
    (saved,) = checkpoints(tmp_path)
    assert 3 <= int(saved.split("-")[1].removeprefix("ba")) < 14


@pytest.mark.slow
def test_sigterm_to_every_process_makes_a_run_save_and_leave(shards, tmp_path):
    """As a machine that shuts down, and some schedulers, send it."""
    with Run("-n", "1", *command(shards, NO_SAVES, "data.num_workers=2"), cwd=tmp_path) as run:
        run.wait_for("update 3/")
        workers, (rank,) = loader_workers(run), run.ranks()
        assert len(workers) >= 2
        for process in (*workers, rank, run.launcher):
            process.send_signal(signal.SIGTERM)
        code, _ = run.end()
    assert code == 75, "".join(run.lines)
    assert len(checkpoints(tmp_path)) == 1


def test_loader_workers_obey_their_rank_alone():
    ready = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=wait_as_a_worker, args=(ready[1],))
    worker.start()
    assert ready[0].recv() == worker.pid
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


ORPHAN = """
import os, time
from esm2_composer import preemption
if not os.fork():
    preemption.obey_rank_alone(0)
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(1)
time.sleep(1)
"""


def test_a_worker_whose_rank_is_gone_ends_by_anybodys_sigterm():
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as rank:
        worker = psutil.Process(int(rank.stdout.readline()))
        rank.wait(20)
        worker.terminate()
        worker.wait(10)


# A launcher that gets the children of its dead ones, as the first process of a container does: one rank dies and
# leaves a loader worker behind, the other looks for it.
ADOPTS = """
import ctypes, os, signal, time
from esm2_composer import preemption
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
if not os.fork():
    if not os.fork():
        preemption.obey_rank_alone(0)
        time.sleep(20)
    time.sleep(0.5)
    os._exit(1)
os.wait()
if not os.fork():
    import psutil
    beside = psutil.Process(os.getppid()).children()
    found = len(beside) == 2 and preemption._a_rank_is_missing()
    for process in beside:
        if process.pid != os.getpid():
            process.kill()
    os._exit(0 if found else 1)
raise SystemExit(os.WEXITSTATUS(os.wait()[1]))
"""


def test_a_loader_worker_of_a_dead_rank_is_not_taken_for_it():
    assert python("-c", ADOPTS, cwd=ROOT, LOCAL_WORLD_SIZE="2").returncode == 0


HANGS = """
import multiprocessing, signal, time
from esm2_composer import preemption
def hang():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
preemption.kill_workers_at_exit()
multiprocessing.get_context("fork").Process(target=hang, daemon=True).start()
time.sleep(1)
"""


def test_a_worker_that_hangs_does_not_hold_its_rank():
    subprocess.run([sys.executable, "-c", HANGS], check=True, timeout=30)


def wait_as_a_worker(ready: multiprocessing.connection.Connection) -> None:
    preemption.obey_rank_alone(0)
    ready.send(os.getpgid(0))
    time.sleep(60)


# Runs a command in a session of its own, as a terminal does, where Ctrl-C goes to all of it.
TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.setsid()
os.execv(sys.argv[1], sys.argv[1:])
"""
ON_TWO = [pytest.param("2", line, marks=pytest.mark.slow) for line in ("attention on", "update 3/")]


@pytest.mark.parametrize(("ranks", "line"), [("1", "attention on"), *ON_TWO])
def test_ctrl_c_is_no_preemption(shards, tmp_path, ranks, line):
    """The launcher, which gets it too, makes a SIGTERM of it."""
    terminal = (sys.executable, "-c", TERMINAL)
    with Run("-n", ranks, *command(shards), cwd=tmp_path, inside=terminal) as run:
        run.wait_for(line)
        os.killpg(run.launcher.pid, signal.SIGINT)
        code, _ = run.end()
    assert code == 130, "".join(run.lines)


@pytest.mark.slow
def test_sigterm_to_one_of_two_ranks_that_are_starting_makes_both_leave_at_once(shards, tmp_path):
    with Run("-n", "2", *command(shards), cwd=tmp_path) as run:
        run.wait_until(lambda: sum(catches(rank, signal.SIGTERM) for rank in run.ranks()) == 2)
        time.sleep(2)  # they import
        run.ranks()[1].terminate()
        code, _ = run.end()
    assert code == 75, "".join(run.lines)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("moment", ["step", "evaluation"])
@pytest.mark.parametrize(("receiver", "number"), SIGNALS)
def test_a_signal_in_training(long_validation, undisturbed, tmp_path, ranks, moment, receiver, number):
    arguments = command(long_validation, NO_SAVES)
    with Run("-n", str(ranks), *arguments, cwd=tmp_path) as run:
        if moment == "step":
            run.wait_for("update 3/")
            send(number, run, receiver)
        else:
            tell_in_evaluation(run, "update 7/14: loss", lambda: send(number, run, receiver))
        code, seconds = run.end()
    print(f"{ranks} ranks, {receiver}, {number.name}, {moment}: code {code} in {seconds:.1f} s")
    assert code == 75, "".join(run.lines)
    (saved,) = checkpoints(tmp_path)
    if moment == "evaluation":
        assert "ba7" in saved
        assert "7" not in index(tmp_path)["validation_loss"], "the evaluation was cut short"
    again = python(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert sorted(index(tmp_path)["validation_loss"], key=int) == ["0", "7", "14"]
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=0 if ranks == 1 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("receiver", "number"), SIGNALS)
@pytest.mark.parametrize("moment", ["watches signals", "imports torch", "opens shards"])
def test_a_signal_while_starting(long_validation, tmp_path, ranks, moment, receiver, number):
    def has_come(rank: psutil.Process) -> bool:
        if moment == "watches signals":
            return catches(rank, number)
        if moment == "imports torch":
            return "libtorch" in Path(f"/proc/{rank.pid}/maps").read_text()
        return (tmp_path / "runs/demo/checkpoints/recipe.yaml").exists()

    with Run("-n", str(ranks), *command(long_validation, NO_SAVES), cwd=tmp_path) as run:
        run.wait_until(lambda: sum(map(has_come, run.ranks())) == ranks)
        send(number, run, receiver)
        code, seconds = run.end()
    assert not any(line.startswith("update 1/") for line in run.lines)
    print(f"{ranks} ranks, {receiver}, {number.name}, which {moment}: code {code} in {seconds:.1f} s")
    assert code == 75, "".join(run.lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("receiver", "number", "goes_on"),
    [
        *((*case, True) for case in SIGNALS),
        ("launcher", signal.SIGTERM, False),
        ("last rank", signal.SIGUSR1, False),
    ],
)
def test_a_signal_while_data_do_not_come(shards, tmp_path, receiver, number, goes_on):
    arguments = command(shards, "save_interval=2ba", "max_duration=200ba", "eval_interval=200ba")
    with Run(*arguments, cwd=tmp_path) as run:
        run.wait_for("update 10/")
        workers = loader_workers(run)
        for worker in workers:
            worker.suspend()
        before: list[str] = []
        while before != checkpoints(tmp_path):  # it takes what they have made
            before = checkpoints(tmp_path)
            time.sleep(2)
        send(number, run, receiver)
        time.sleep(2)
        if goes_on:
            for worker in workers:
                worker.resume()
        code, seconds = run.end()
        _, alive = psutil.wait_procs(workers, timeout=30)  # stopped ones, which only the kernel can end
        assert not alive
    then = "then resumed" if goes_on else "for good"
    print(f"{receiver}, {number.name}, loader stopped, {then}: code {code} in {seconds + 2:.1f} s")
    assert code == 75, "".join(run.lines)
    assert (checkpoints(tmp_path) == before) == (not goes_on)
    assert python(*arguments, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_a_signal_in_the_evaluation_after_the_last_update_saves_that_once(long_validation, tmp_path):
    arguments = command(long_validation, NO_SAVES, "max_duration=12ba", "eval_interval=9ba")  # two whole epochs
    with Run(*arguments, cwd=tmp_path) as run:
        tell_in_evaluation(run, "update 12/12: loss", run.launcher.terminate)
        code, _ = run.end()
    assert code == 75, "".join(run.lines)
    assert checkpoints(tmp_path) == ["ep1-ba12-rank0.pt"]
    again = python(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "is done" in again.stdout
    assert sorted(index(tmp_path)["validation_loss"], key=int) == ["0", "9", "12"]


def test_a_rank_that_has_just_gone_is_not_waited_for(monkeypatch):
    told = []

    def kill(pid: int, number: int) -> None:
        if pid == 1:
            raise ProcessLookupError
        told.append((pid, number))

    monkeypatch.setattr(preemption, "received", threading.Event())
    monkeypatch.setattr(preemption, "in_training", SimpleNamespace(is_set=lambda: True))
    monkeypatch.setattr(preemption, "_other_ranks", lambda: [1, 2])
    monkeypatch.setattr(preemption.os, "kill", kill)
    monkeypatch.setattr(preemption.threading, "Timer", lambda *_: SimpleNamespace(start=lambda: None))
    preemption._on_signal(signal.SIGUSR1)
    assert told == [(2, signal.SIGUSR1)] * 2
    assert preemption.received.is_set()


SLOW_TO_DECIDE = """
import os, signal, sys, time
from esm2_composer import preemption

def a_rank_is_missing():
    time.sleep(0.5)
    return {missing}

preemption._a_rank_is_missing = a_rank_is_missing
preemption.watch_signals()
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Composer's handler does
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""


@pytest.mark.parametrize(("missing", "code"), [(False, 75), (True, 143)])
def test_composers_handler_being_faster_does_not_change_the_exit_code(missing, code):
    result = python("-c", SLOW_TO_DECIDE.format(missing=missing), cwd=ROOT)
    assert result.returncode == code, result.stderr


@pytest.mark.parametrize(
    ("number", "waits", "leaves"),
    [(signal.SIGTERM, False, True), (signal.SIGUSR1, False, False), (signal.SIGUSR1, True, True)],
)
def test_time_is_up_after_sigterm_and_after_sigusr1_where_data_do_not_come(number, waits, leaves, monkeypatch):
    lines, events = [], [Preemption.before_dataloader, Preemption.after_dataloader, Preemption.before_dataloader]
    monkeypatch.setattr(preemption, "waiting_for_data", threading.Event())
    monkeypatch.setattr(preemption, "_leave", lines.append)
    for event in [*events, *([] if waits else [Preemption.epoch_end])]:
        event(None, None, None)
    preemption._time_is_up(number)
    assert lines == ([f"not done 22 s after {number.name}; leaving as it is"] if leaves else [])


@pytest.mark.slow
def test_ranks_do_not_outlive_their_launcher(shards, tmp_path):
    with Run("-n", "2", *command(shards, NO_SAVES), cwd=tmp_path) as run:
        run.wait_for("update 3/")
        ranks = run.ranks()
        run.launcher.send_signal(signal.SIGUSR1)  # of which it dies
        code, _ = run.end()
        assert code != 0
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive
    assert len(checkpoints(tmp_path)) == 1


ON_A_TERMINAL = """
import fcntl, os, signal, struct, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup leaves it ignored
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_terminal_that_is_closed_makes_ranks_save_and_leave(shards, tmp_path, ranks):
    arguments = command(shards, "max_duration=5000ba", "eval_interval=5000ba", "save_interval=5000ba")
    launcher = [str(Path(sys.executable).with_name("composer")), "-n", str(ranks), *arguments]
    terminal, inside = os.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), inside)
    started = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL, *launcher], **streams, cwd=tmp_path)
    os.close(inside)
    shown, deadline = b"", time.monotonic() + 300
    while not re.search(rb"[1-9]\d*/5000 ", shown):  # the bar
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], shown
        shown += os.read(terminal, 4096)
    family = psutil.Process(started.pid).children(recursive=True)
    os.close(terminal)
    assert started.wait(timeout=60) == -signal.SIGHUP
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert len(checkpoints(tmp_path)) == 1


def test_nohup_is_heeded():
    told = """
import os, signal
from esm2_composer import preemption
signal.signal(signal.SIGHUP, signal.SIG_IGN)
preemption.watch_signals()
os.kill(os.getpid(), signal.SIGHUP)
raise SystemExit(signal.getsignal(signal.SIGHUP) != signal.SIG_IGN or preemption.received.is_set())
"""
    assert python("-c", told, cwd=ROOT).returncode == 0


def test_a_rank_lost_while_shards_are_opened_is_no_mistake_of_the_user(monkeypatch):
    def lost(*_, **__):
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    monkeypatch.setattr(loaders, "ClusterDataset", lost)
    with pytest.raises(RuntimeError, match="closed by peer"):
        loaders.train_loader(ClusterDraw(17, 128, 1, MaskingRule()), None, "shards", 16, 0)


@pytest.mark.slow
def test_a_rank_that_fails_is_no_preemption(shards, tmp_path):
    with Run("-n", "2", *command(shards, NO_SAVES), cwd=tmp_path) as run:
        run.wait_for("update 3/")
        run.ranks()[1].kill()
        code, seconds = run.end()
    print(f"rank 1 killed: code {code} in {seconds:.1f} s")
    assert code not in (0, 75)
