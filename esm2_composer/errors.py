"""What a user's mistake looks like: one line on stderr and exit code 2, never a traceback. Ctrl-C likewise, 130.

What another start may fix, such as an unreachable store, is one line too, with code 1. Everything else is a bug in
this package and keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: run me again
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_NOT_READ = 128 + signal.SIGPIPE

# Errnos that mean the given path is wrong, whatever the operation.
REFUSED = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
FULL = (errno.ENOSPC, errno.EDQUOT)
# Also a user's mistake where a path was given: it is not there, or its file system cannot do this.
MISTAKEN = (*REFUSED, errno.ENOENT, errno.EEXIST, errno.ELOOP, errno.EROFS, errno.EINVAL, errno.EILSEQ)
MISTAKEN += (errno.EFBIG, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENODEV, errno.ENXIO, errno.ENOLCK)

MAX_LINE = 1000  # characters


class ReportedError(Exception):
    """An error of which users need to see only its message, one line."""

    def __init__(self, message: object) -> None:
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        own = str(message).rpartition(f"{kind}: ")[2]  # a DataLoader worker's comes in a traceback
        line = " ".join(own.split())  # a cause may bring line breaks of its own, and what a damaged file holds
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        if len(line) > MAX_LINE:  # of a quoted value; what is wrong and how to fix it stand around it
            line = f"{line[: MAX_LINE // 2]} ... {line[5 - MAX_LINE // 2 :]}"
        super().__init__(line)


class UserError(ReportedError):
    """A mistake the user can fix: what is wrong, where, and how to fix it."""


class ReadError(UserError):
    """A file cannot be read now: a disk or a network fails, or another process holds a lock. It need not be
    damaged."""


class TransientError(ReportedError):
    """Neither the user's mistake nor ours: a disk, a network or a store failed, and another start may work."""


class StoreUnavailable(TransientError):
    """A store does not answer."""


def system_error(message: str, error: OSError) -> ReportedError:
    """For a path that was given: a UserError if it is at fault, a TransientError if a disk or a network is."""
    return UserError(message) if error.errno in (None, *MISTAKEN) else TransientError(message)


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


def tell(line: object) -> None:
    """Print a line to standard error, if possible: a full disk under a log must not end a run."""
    line = re.sub(r"(?<=://)[^/@\s:]*:[^/\s]+@", "", str(line))  # a password in an address, which botocore repeats
    with contextlib.suppress(OSError):
        if sys.stderr:  # None if it was closed at the start
            print(line, file=sys.stderr, flush=True)


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raise a UserError for an empty value: mostly an unset shell variable."""
    for before, argument in pairwise(arguments):
        if not argument.strip() or re.fullmatch(r"--[^=]+=\s*", argument):
            raise UserError(f"what follows {argument.strip() or before} is empty")


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts a recipe's key before what is wrong with its value; also turns a ValueError into a UserError."""
    try:
        yield
    except (UserError, ValueError) as error:
        raise UserError(f"{key}: {error}") from error


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command line's `main` and leave the process with its exit code (0 for None)."""
    try:
        refuse_empty(sys.argv)
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
