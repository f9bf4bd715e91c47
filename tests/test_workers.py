"""workers.py: Ctrl-C does not reach the processes, and an error ends them whatever they do."""

import multiprocessing
import os
import signal
import time

import pytest

from esm2_composer.workers import Workers


@pytest.fixture
def pythons_own_handler():
    """Importing Composer, as other tests do, sets another."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pythons_own_handler")
def test_a_worker_never_hears_of_ctrl_c_and_the_command_still_does():
    with Workers(1) as pool:
        worker = pool.submit(os.getpid).result()
        os.kill(worker, signal.SIGINT)
        assert pool.submit(os.getpid).result() == worker
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_error_does_not_wait_for_what_runs():
    def fail() -> None:
        with Workers(2) as pool:
            pool.submit(os.getpid).result()
            for _ in range(9):
                pool.submit(time.sleep, 3600)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()


def test_only_its_own_processes_are_ended():
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(3600,), daemon=True)
    other.start()
    with Workers(1) as pool:
        pool.submit(time.sleep, 3600)
        pool.stop()
    assert other.is_alive()


def test_each_process_is_prepared():
    with Workers(1, os.umask, 0o123) as pool:
        assert pool.submit(os.umask, 0).result() == 0o123
