"""Stopping when told to, without losing work: SIGTERM, SIGUSR1, the early warning of batch systems, and SIGHUP,
the end of the terminal (which `nohup` makes us ignore).

One signal to any rank, or a SIGTERM to the launcher, makes the whole run exit with code 75 (`callbacks.Preemption`
makes the ranks agree; `train.py` saves):

- before the first update nothing is lost: a rank tells the others of its node, and exits at once (until this
  module is imported, the signal kills it);
- in training the ranks agree, after an update or an evaluation batch, to stop, save and exit together;
- even if something hangs, a rank exits `GRACE` seconds after a SIGTERM. The launcher would kill it soon after, and
  checkpoints exist whole or not at all. After the other two signals it exits then only if it still waits for
  training data: a step, an evaluation and a save may take as long as they need. (The end of a terminal also ends
  the launcher, which brings a SIGTERM.)

Ctrl-C is none of these: an interrupted run exits with 130, although the launcher turns it into a SIGTERM.

Python calls a signal's handler between two instructions of its main thread, which may be waiting in a collective
for another rank. So a separate thread waits for signals; the interpreter writes their numbers to its pipe.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import select
import signal
import stat
import sys
import threading
import time

from esm2_composer.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_TERMINATED, tell

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
GRACE = 22.0  # Composer's launcher kills its ranks 30 seconds after their SIGTERM

received = threading.Event()
waiting_for_data = threading.Event()
in_training = threading.Event()  # from then on there is something to save
_noticed = threading.Event()
_interrupted = threading.Event()
_watching = threading.Event()


def watch_signals() -> None:
    """Start watching: before slow imports, and again after Composer's, which takes over SIGTERM."""
    if not _watching.is_set():
        _watching.set()
        _open_pipe()
    # Only now, or a signal in between would be lost; until here it ends the process.
    for number in SIGNALS:
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):  # by nohup
            signal.signal(number, lambda *_: None)  # without a handler nothing is written to the pipe


def _open_pipe() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    atexit.register(_leave_if_told_before_training)
    os.register_at_fork(after_in_child=_forget)
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: the launcher's death is a SIGTERM to us


def ignore_signals() -> None:
    """The exit code is settled: the launcher, terminating the slower ranks, must not change it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def let_rank_zero_leave_first() -> None:
    """For an error raised on every rank: the launcher terminates the remaining ranks and returns the lowest rank's
    code, so rank 0 must exit first."""
    ignore_signals()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(3)


def obey_rank_alone(worker: int) -> None:
    """For loader workers: a signal to all processes of a job must not end them before their rank.

    The rank would then fail, and save nothing. It ends them itself, by SIGTERM.
    """
    os.setpgrp()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank and os.getppid() == rank:
        pass  # once the rank is gone, anyone's will do
    os._exit(0)


def kill_workers_at_exit() -> None:
    """Kill workers that hang and do not notice their rank's SIGTERM: multiprocessing would wait for them."""
    import multiprocessing.util  # noqa: F401  it registers its own exit, which is to come after ours

    atexit.register(_kill_workers)


def _kill_workers() -> None:
    import multiprocessing

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch has a handler, for which this would be an error
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join(1)
        worker.kill()


def _watch(reader: int) -> None:
    while True:
        numbers = os.read(reader, 64)
        if any(number in SIGNALS for number in numbers):
            _noticed.set()
        if signal.SIGTERM in numbers and not in_training.is_set() and select.select([reader], [], [], 0.1)[0]:
            numbers += os.read(reader, 64)  # Ctrl-C, which the launcher has turned into this, can come after it
        if signal.SIGINT in numbers:
            _interrupted.set()
        if _interrupted.is_set() and signal.SIGTERM in numbers and not in_training.is_set():
            os._exit(EXIT_INTERRUPTED)  # Ctrl-C, which the launcher turns into a SIGTERM
        told_or_interrupted = received.is_set() or _interrupted.is_set()
        if signal.SIGTERM in numbers and not told_or_interrupted and _a_rank_is_missing():
            # Had it exited because of a signal, it would have sent us SIGUSR1 before. The launcher never does.
            while select.select([reader], [], [], 0)[0]:
                numbers += os.read(reader, 64)
            if signal.SIGUSR1 not in numbers:
                os._exit(EXIT_TERMINATED)  # it has failed, and the launcher cleans up
        for number in numbers:
            if number in SIGNALS:
                _on_signal(number)


def _on_signal(number: int) -> None:
    if number == signal.SIGHUP:
        _write_to_files_only()
    others = [] if received.is_set() else _other_ranks()
    received.set()
    for pid in others:
        with contextlib.suppress(ProcessLookupError):  # it has just gone
            os.kill(pid, signal.SIGUSR1)
            os.kill(pid, number)
    if not in_training.is_set():
        time.sleep(2 if others else 0)  # no rank may lose another in a collective before it has been told why
        _leave("told to leave before the first update; there is nothing to save")
    timer = threading.Timer(GRACE, _time_is_up, [signal.Signals(number)])
    timer.daemon = True
    timer.start()


def _write_to_files_only() -> None:
    """Writing to a terminal that is gone, or to a `tee` that went with it, would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if not stat.S_ISREG(os.fstat(stream).st_mode):
            os.dup2(nowhere, stream)


def _time_is_up(after: signal.Signals) -> None:
    if after == signal.SIGTERM or waiting_for_data.is_set():
        _leave(f"not done {GRACE:.0f} s after {after.name}; leaving as it is")


def _a_rank_is_missing() -> bool:
    return len(_other_ranks()) < int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1


def _other_ranks() -> list[int]:
    """This node's other ranks: the launcher's other children with the same command, except loader workers.

    If the launcher is a container's first process, a dead rank's workers become its children.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1:
        return []
    return [pid for pid in _same_command(os.getppid()) if pid != os.getpid() and not _is_worker(pid)]


def _is_worker(pid: int) -> bool:
    """Whether it blocks SIGTERM, as `obey_rank_alone` has it do."""
    try:
        with open(f"/proc/{pid}/status") as status:
            blocked = next(int(line.split()[1], 16) for line in status if line.startswith("SigBlk:"))
    except OSError:  # it has just gone
        return True
    return bool(blocked >> (signal.SIGTERM - 1) & 1)


def _same_command(parent: int) -> list[int]:
    """The children of a process that run our command."""
    import psutil  # not before signals are watched

    mine, found = psutil.Process().cmdline(), []
    try:
        children = psutil.Process(parent).children()
    except psutil.Error:
        return []
    for process in children:
        try:
            if process.cmdline() == mine:
                found.append(process.pid)
        except psutil.Error:  # it has just gone
            continue
    return found


def _leave(line: str) -> None:
    tell(line)
    if in_training.is_set():
        for worker in _same_command(os.getpid()):  # one that hangs would keep the shards' shared memory from the
            with contextlib.suppress(ProcessLookupError):  # next start
                os.kill(worker, signal.SIGKILL)
    os._exit(EXIT_INTERRUPTED if _interrupted.is_set() else EXIT_PREEMPTED)


def _leave_if_told_before_training() -> None:
    """Composer's handler may have been faster than our thread, and only the thread knows the exit code."""
    time.sleep(0.05)  # to let the thread run
    if _noticed.is_set() and not in_training.is_set():
        time.sleep(10)  # by then it has ended this process


def _forget() -> None:
    """A forked process is not a rank."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
