"""Ops that ask a tensor for a length, a dtype or a number: no index of it is touched."""

from __future__ import annotations

import torch

from graphcomp.coupling.axis import Axes
from graphcomp.ops.create import overloads
from graphcomp.ops.registry import rule

aten = torch.ops.aten


@rule(
    *overloads(
        aten.sym_size, aten.sym_stride, aten.sym_numel, aten.sym_storage_offset, aten.sym_constrain_range,
        aten.sym_constrain_range_for_size, aten._assert_scalar, aten._assert_async, aten.item,
        aten._local_scalar_dense, aten.is_nonzero,
    )
)  # fmt: skip
def look() -> None:
    """No tensor comes out, and what is asked is a length or one number."""


@rule(aten.type_as.default, aten.to.other)
def like(self: Axes) -> Axes:
    """The other operand gives its dtype and device only."""
    return self
