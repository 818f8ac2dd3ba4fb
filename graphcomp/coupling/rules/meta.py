"""Ops that look at lengths, dtypes or single numbers and leave every index where it is."""

from __future__ import annotations

import torch

from graphcomp.coupling.rules.create import overloads
from graphcomp.coupling.table import rule

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
