"""What all commands have in common: how arguments are checked, and how errors and signals become exit codes."""

from __future__ import annotations

import argparse
import math
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

from esm2_composer.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_NOT_READ,
    EXIT_USER_ERROR,
    REFUSED,
    TransientError,
    UserError,
    tell,
)
from esm2_composer.gpu_memory import let_it_grow


class ArgumentParser(argparse.ArgumentParser):
    """argparse's; a mistake in the arguments is a UserError, and so is an abbreviated option: commands look for
    some in sys.argv before they parse it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def in_range(kind: type[int] | type[float], least: float, most: float = math.inf) -> Callable[[str], Any]:
    """An argument's `type`: an int or a float from `least` to `most`."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not least <= value <= most:  # NaN is neither
            limits = f"at least {least}" + (f" and at most {most}" if most < math.inf else "")
            raise argparse.ArgumentTypeError(f"{value}; it must be {limits}")
        return value

    parse.__name__ = kind.__name__  # by which argparse tells of what is no number at all
    return parse


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raise a UserError for an empty value: mostly an unset shell variable."""
    for before, argument in pairwise(arguments):
        if not argument.strip() or re.fullmatch(r"--[^=]+=\s*", argument):
            raise UserError(f"what follows {argument.strip() or before} is empty")


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command line's `main` and leave the process with its exit code (0 for None)."""
    try:
        refuse_empty(sys.argv)
        let_it_grow()
        code = main()
    except UserError as error:
        tell(f"error: {error}")
        code = EXIT_USER_ERROR
    except TransientError as error:
        tell(f"error: {error}")
        code = EXIT_FAILURE
    except RuntimeError as error:
        lost = re.match(r"DataLoader worker \(.*\) (is killed by signal: [\w ]+|exited unexpectedly)", str(error))
        if not lost:
            raise
        tell(
            f"error: {lost[0]}; if for lack of memory, or of room in /dev/shm, give the node more of it, "
            "or the run fewer data.num_workers"
        )
        code = EXIT_FAILURE
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            code = EXIT_NOT_READ
        elif error.filename is None or error.errno not in REFUSED:
            raise
        else:
            tell(f"error: {error.filename}: {error.strerror}")
            code = EXIT_USER_ERROR
    except KeyboardInterrupt as stop:
        code = _interrupted(*stop.args)
    except SystemExit as stop:  # of argparse; importing Composer makes Ctrl-C one, too
        code = _interrupted() if stop.code == EXIT_INTERRUPTED else stop.code
    sys.exit(_flush(code))


def _flush(code: int | None) -> int | None:
    """Write out what was printed, or drop it: Python, failing to at exit, would make the code 120.

    Returns:
        `code`, or that of a failure if it was none and not all is on standard output.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # one that was closed at the start is None
        try:
            stream.flush()
        except OSError as error:
            _discard(stream.fileno())
            if stream is sys.stdout and not code:
                code = EXIT_NOT_READ
                if not isinstance(error, BrokenPipeError):
                    tell(f"error: standard output cannot be written ({error.strerror})")
                    code = EXIT_FAILURE
    return code


def _reader_has_left() -> bool:
    """Whether nobody reads standard output any more, as after `head`."""
    stdout = 1
    pipe = select.poll()
    pipe.register(stdout, 0)
    gone = any(events & select.POLLERR for _, events in pipe.poll(0))
    if gone:
        _discard(stdout)
    return gone


def _discard(descriptor: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _interrupted(*what_becomes_of_the_work: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from now on, Ctrl-C waits for nothing
    tell("; ".join(["interrupted", *what_becomes_of_the_work]))
    return EXIT_INTERRUPTED
