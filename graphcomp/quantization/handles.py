"""Ops on weights of integers for code that torch traces: `torch.compile` and the transforms of `torch.func`.

    held_product    rows times a weight
    held_back       the gradient of a product by its rows
    held_rows       rows looked up in a weight
    held_floats     the floats of a weight

A graph that torch traces sees one tensor of a weight, its handle: () int64, a number that this process gave the weight.
An op finds the weight by its handle and computes as eager code does, so that a compiled model runs the same kernels on
the same memory, and a graph traced once serves all weights of a shape. A handle says nothing in another process.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphcomp.errors import PlanError

if TYPE_CHECKING:
    from graphcomp.quantization.quantized_tensor import QuantizedTensor

_KNOWN: weakref.WeakValueDictionary[int, QuantizedTensor] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


def handle_of(weight: QuantizedTensor) -> Tensor:
    """Return a new handle of a weight, () int64."""
    number = next(_NUMBERS)
    _KNOWN[number] = weight
    return torch.tensor(number)


def weight_of(handle: Tensor) -> QuantizedTensor:
    """Return the weight that a handle of this process stands for.

    Raises:
        PlanError: there is none: the graph was traced in another process, or its model is gone.
    """
    found = _KNOWN.get(int(handle))
    if found is None:
        raise PlanError(
            "a traced graph asks for a weight of integers that this process does not hold",
            why="torch.compile puts handles into its graphs, which say nothing in another process",
            fix="small.export(path) writes files; or load the model, and compile it again",
        )
    return found


_LIBRARY = torch.library.Library("graphcomp", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(schema: str, function: Any, shapes: Any) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"graphcomp::{name}", shapes, lib=_LIBRARY)
    return getattr(torch.ops.graphcomp, name).default


def _product(rows: Tensor, handle: Tensor, width: int, turned: bool) -> Tensor:
    weight = weight_of(handle)
    return weight.held.times(rows, turned, weight.operand)


def _back(gradient: Tensor, handle: Tensor, width: int, turned: bool) -> Tensor:
    floats = weight_of(handle).held.dequantize(gradient.dtype)
    return gradient @ (floats if turned else floats.t())


def _wide(rows: Tensor, handle: Tensor, width: int, turned: bool) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], width))


def _rows(ids: Tensor, handle: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return weight_of(handle).looked_up(ids).to(dtype)


def _floats(handle: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return weight_of(handle).held.dequantize(dtype)


held_product = _define("held_product(Tensor rows, Tensor handle, int width, bool turned) -> Tensor", _product, _wide)
"""Rows (…, i) times the weight of a handle, (…, width) in the dtype of the rows; the weight is (o, i) where turned."""

held_back = _define("held_back(Tensor gradient, Tensor handle, int width, bool turned) -> Tensor", _back, _wide)
"""Gradient (…, o) of a product, to that of its rows, (…, width)."""

held_rows = _define(
    "held_rows(Tensor ids, Tensor handle, int width, ScalarType dtype) -> Tensor",
    _rows,
    lambda ids, handle, width, dtype: ids.new_empty((*ids.shape, width), dtype=dtype),
)
"""Rows of the weight of a handle at `ids`, (…, width)."""

held_floats = _define(
    "held_floats(Tensor handle, int[] shape, ScalarType dtype) -> Tensor",
    _floats,
    lambda handle, shape, dtype: handle.new_empty(shape, dtype=dtype),
)
"""The floats of the weight of a handle."""


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
    rows, handle, _, turned = inputs
    ctx.save_for_backward(handle)
    ctx.width, ctx.turned = rows.shape[-1], turned


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    (handle,) = ctx.saved_tensors
    return held_back(gradient, handle, ctx.width, ctx.turned), None, None, None


torch.library.register_autograd("graphcomp::held_product", _gradient, setup_context=_save, lib=_LIBRARY)


def _each(op: Any) -> Any:
    """Return a rule of vmap that runs an op for each index of its first operand's dim: what one range for all elements
    of a tensor spans is one sample's."""

    def rule(info: Any, dims: Any, first: Tensor, *others: Any) -> tuple[Tensor, int]:
        return torch.stack([op(part, *others) for part in first.unbind(dims[0])]), 0

    return rule


for _op in (held_product, held_back, held_rows):
    torch.library.register_vmap(_op.name(), _each(_op), lib=_LIBRARY)
