"""Errors of which users need to see only one line, and exit codes: a mistake of theirs, 2; what another start may
fix, such as an unreachable store, 1. Everything else is a bug in this package, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import re
import signal
import sys
from collections.abc import Iterator

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


def tell(line: object) -> None:
    """Print a line to standard error, if possible: a full disk under a log must not end a run."""
    line = re.sub(r"(?<=://)[^/@\s:]*:[^/\s]+@", "", str(line))  # a password in an address, which botocore repeats
    with contextlib.suppress(OSError):
        if sys.stderr:  # None if it was closed at the start
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts a recipe's key before what is wrong with its value; also turns a ValueError into a UserError."""
    try:
        yield
    except (UserError, ValueError) as error:
        raise UserError(f"{key}: {error}") from error
