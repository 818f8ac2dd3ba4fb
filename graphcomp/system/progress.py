"""A progress line on the terminal; nothing where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

WIDTH = 24
PAUSE = 0.2
"""Seconds between two lines of `advance`."""


class Progress:
    """One line that is rewritten in place: how far, what is being done, seconds so far.

    Args:
        total: number of steps.
        enabled: False keeps it silent on a terminal too.
        stream: where to write; stderr by default.
    """

    def __init__(self, total: int, enabled: bool = True, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.total = total
        self.shown = enabled and self.stream.isatty()
        self.done = 0
        self.start = time.monotonic()
        self.first: tuple[int, float] | None = None  # steps done, and when, at the first `advance`
        self.written = 0.0

    def step(self, text: str) -> None:
        """Say what begins now."""
        if self.shown:
            self._write(f"{text} ({time.monotonic() - self.start:.0f} s)")
        self.done = min(self.done + 1, self.total)

    def advance(self, text: Callable[[], str]) -> None:
        """One of many quick steps is done. `text` is asked for only when it is shown, with the time that is left."""
        self.done = min(self.done + 1, self.total)
        now = time.monotonic()
        if self.shown and now - self.written >= PAUSE:
            self.first = self.first or (self.done, now)
            done, since = self.first
            left = f"{(now - since) / (self.done - done) * (self.total - self.done):.0f}" if self.done > done else "?"
            self._write(f"{text()}, {left} s left")
            self.written = now

    def _write(self, text: str) -> None:
        filled = WIDTH * self.done // self.total
        bar = "#" * filled + "-" * (WIDTH - filled)
        self.stream.write(f"\r\x1b[K[{bar}] {text}")
        self.stream.flush()

    def close(self) -> None:
        """Wipe the line."""
        if self.shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


@contextmanager
def progress(total: int, enabled: bool = True, stream: TextIO | None = None) -> Iterator[Progress]:
    """A Progress that is wiped at the end, whatever happens."""
    bar = Progress(total, enabled, stream)
    try:
        yield bar
    finally:
        bar.close()
