"""One lock for all that torch keeps once per process.

torch.export, the seed, the default dtype, filters of warnings and a few switches belong to the process, not to a
thread.
"""

from __future__ import annotations

import functools
import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TextIO, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

LOCK = threading.RLock()
"""Held while state of the process differs from what the caller set. Re-entrant, and the only lock of the package."""


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Let no other thread run a function of this kind at the same time."""

    @functools.wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with LOCK:
            return function(*args, **kwargs)

    return locked


def in_this_thread(replacement: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is `replacement` in the thread that calls here, and `otherwise` in all others."""
    here = threading.get_ident()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (replacement if threading.get_ident() == here else otherwise)(*args, **kwargs)

    return chosen


class _Held(io.StringIO):
    """Holds what one thread writes; what others write goes on to the stream behind."""

    def __init__(self, behind: TextIO) -> None:
        super().__init__()
        self._behind, self._thread = behind, threading.get_ident()

    def write(self, text: str, /) -> int:
        return super().write(text) if threading.get_ident() == self._thread else self._behind.write(text)


@contextmanager
def stderr_held() -> Iterator[io.StringIO]:
    """Hold back what this thread writes to stderr inside."""
    with LOCK:
        before = sys.stderr
        sys.stderr = held = _Held(before)
        try:
            yield held
        finally:
            sys.stderr = before


@contextmanager
def unlogged(name: str) -> Iterator[None]:
    """Keep a logger quiet inside: torch logs what an op raises, and the error says the same."""
    logger, nothing = logging.getLogger(name), lambda record: False
    with LOCK:
        logger.addFilter(nothing)
        try:
            yield
        finally:
            logger.removeFilter(nothing)
