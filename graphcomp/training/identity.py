"""What a function does, as a digest: the same in each process, another where the code is another."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

PLAIN = (type(None), bool, int, float, complex, str, bytes)
DEPTH = 4
"""Levels of functions, one inside the other, that are looked into."""


def code_digest(function: Any) -> str:
    """Return a digest of a callable: bytecode, constants, defaults, arguments of partials, functions in closures.

    Line numbers and file names do not count. Nor do values in closures and attributes of objects: a loss may count its
    calls there, and a run has to go on all the same.
    """
    digest = hashlib.sha256()
    for text in _parts(function, DEPTH):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _parts(value: Any, depth: int) -> Iterator[str]:
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, PLAIN):
        yield repr(value)
    elif isinstance(value, CodeType):
        yield from (value.co_code.hex(), *value.co_names)
        for constant in value.co_consts:
            yield from _parts(constant, depth)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _parts(part, depth)
    elif depth > 0:
        for part in _inside(value):
            yield from _parts(part, depth - 1)


def _inside(value: Any) -> list[Any]:
    """What a callable calls."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_set(cell)]
        called = [cell for cell in cells if isinstance(cell, (FunctionType, MethodType, functools.partial))]
        keywords = sorted((value.__kwdefaults__ or {}).items())
        return [value.__code__, value.__defaults__, keywords, *called]
    if isinstance(value, MethodType):
        return [value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, sorted(value.keywords.items())]
    return [getattr(type(value), name, None) for name in ("__call__", "forward")]


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a variable that was not assigned yet
        return False
    return True
