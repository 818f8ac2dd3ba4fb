"""The floats that classes, flags and other outputs are computed from that prove nothing, noted while a module runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from graphcomp.numerics.compare import is_whole, relative_error, why_silent
from graphcomp.torch_compat import OpOverload, TorchDispatchMode, pytree

aten = torch.ops.aten

STEPS = frozenset(
    {aten.round, aten.floor, aten.ceil, aten.trunc, aten.sign, aten.sgn, aten.heaviside, aten.floor_divide}
)
"""Ops whose result jumps where the operand moves by rounding: the operand is what has to be compared."""


def jumps(op: Any) -> bool:
    """Return whether `op` is one of STEPS."""
    return isinstance(op, OpOverload) and op.overloadpacket in STEPS


class Provenance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows of each tensor that proves nothing (see `why_silent`, STEPS), or holds whole numbers alone, the nearest
    floats that it was computed from.

    Parameters, buffers and inputs are no such floats: they are equal in any two models that are compared.
    """

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        given = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
        self._before: Any = WeakIdKeyDictionary()
        for tensor in (*module.parameters(), *module.buffers(), *given):
            self._before[tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        silent = made if jumps(func) else [t for t in made if why_silent(t) or is_whole(t)]
        if silent:
            operands = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            before = list({id(t): t for operand in operands for t in self.before(operand)}.values())
            for tensor in silent:
                self._before[tensor] = before
        return result

    def before(self, tensor: Tensor) -> list[Tensor]:
        """Return the floats that `tensor` was computed from: itself where it proves something."""
        known: list[Tensor] | None = self._before.get(tensor)
        if known is None:
            known = [] if why_silent(tensor) or is_whole(tensor) else [tensor]
        return known


def compare_before(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Return the largest relative error of the floats before two outputs; NaN where they cannot be compared."""
    if not wanted or [(t.shape, t.dtype) for t in wanted] != [(t.shape, t.dtype) for t in got]:
        return math.nan
    return max(relative_error(a, b) for a, b in zip(wanted, got, strict=True))


def heard(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Provenance]:
    """Run `module`; return what it returns, and where that comes from."""
    with torch.no_grad(), Provenance(module, (args, kwargs)) as provenance:
        return module(*args, **kwargs), provenance
