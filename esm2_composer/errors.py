"""What a user's mistake looks like: one line on stderr and exit code 2, never a traceback.

Everything that is not a `UserError` is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake the user can mend. The message, one line, says what is wrong, where, and how to mend it."""

    def __init__(self, message: str) -> None:
        own = message.rpartition(f"{__name__}.UserError: ")[2]  # a DataLoader worker's comes in a traceback
        super().__init__(" ".join(own.split()))  # a cause may bring line breaks of its own


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command line's `main` and leave the process with its exit code (0 for None)."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    sys.exit(code)
