"""How far a command has got: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from esm2_composer.errors import tell

SECONDS_BETWEEN_LINES = 15

# Told a stage ("sequences read", "clusters"), how much is done, and the total (0: not known).
OnProgress = Callable[[str, int, int], None]


class Progress:
    """Shows what is done, the rate, and the time left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stage, self._bar = "", None
        self._start = self._said = time.monotonic()
        self._before = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` (0 if unknown) of what `stage` names, which begins with its first call."""
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._stage, self._before = stage, done
            self._start = self._said = now
            if sys.stderr.isatty():
                self._bar = tqdm(
                    desc=self._name, unit=f" {stage}", total=total or None, initial=done, unit_scale=True
                )
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            rate = (done - self._before) / (now - self._start)
            text = f"{self._name}: {done:,}{f' of {total:,}' if total else ''} {stage}, {rate:,.0f} a second"
            if total and rate:
                text += f", {(total - done) / rate / 60:.0f} min left"
            tell(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
