"""A command's worker processes: they end with it, however it ends, and leave Ctrl-C to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


class Workers(ProcessPoolExecutor):
    """As a context manager, it ends what still runs when an error leaves it, instead of waiting."""

    def __init__(self, count: int, start: Callable[..., None] | None = None, *arguments: Any) -> None:
        """`start`, with the arguments, is called in each process before anything else."""
        context = multiprocessing.get_context("spawn")  # a fork would hold locks, and copy the memory
        super().__init__(count, context, _start, (start, arguments))

    def submit(self, *work: Any, **options: Any) -> Future:
        # A terminal sends Ctrl-C to all processes; those started now will ignore it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(*work, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def stop(self) -> None:
        """End what is running, and all the rest."""
        for process in list((self._processes or {}).values()):
            process.kill()
        self.shutdown(cancel_futures=True)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.stop() if error else self.shutdown()


def _start(start: Callable[..., None] | None, arguments: tuple) -> None:
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    if start:
        start(*arguments)
