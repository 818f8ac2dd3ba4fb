"""Lengths of dims: plain ints, or sympy expressions where a dim is dynamic (batch, sequence)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import sympy
import torch

Size: TypeAlias = Any
"""int, or a sympy.Expr for a symbolic length."""


def size_of(length: int | torch.SymInt | sympy.Expr) -> Size:
    """`length` as an int where it is one, else as its sympy expression."""
    if isinstance(length, torch.SymInt):
        length = length.node.expr
    if isinstance(length, sympy.Expr) and length.is_Integer:
        return int(length)
    return length


def divide(total: Size, part: Size) -> Size | None:
    """total / part where that is whole for every value of the symbols, else None."""
    if isinstance(total, int) and isinstance(part, int):
        return total // part if part and total % part == 0 else None
    quotient = sympy.sympify(total) / part
    if quotient.as_numer_denom()[1] != 1:
        return None
    return size_of(quotient)


def multiply(sizes: Iterable[Size]) -> Size:
    """The product of `sizes`; 1 of none."""
    result: Size = 1
    for n in sizes:
        result = result * n
    return size_of(result)


def add(sizes: Iterable[Size]) -> Size:
    """The sum of `sizes`; 0 of none."""
    result: Size = 0
    for n in sizes:
        result = result + n
    return size_of(result)
