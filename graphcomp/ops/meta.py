"""Ops that ask a tensor for a length, a dtype or a number: no index of it is touched."""

from __future__ import annotations

import torch

from graphcomp.coupling.axis import Axes
from graphcomp.ops.create import overloads
from graphcomp.ops.facts import Float, in_float, product
from graphcomp.ops.registry import op, refuse

aten = torch.ops.aten


@op(
    *overloads(
        aten.sym_size, aten.sym_stride, aten.sym_numel, aten.sym_storage_offset, aten.sym_constrain_range,
        aten.sym_constrain_range_for_size, aten._assert_scalar, aten._assert_async, aten.item,
        aten._local_scalar_dense, aten.is_nonzero,
    ),
    facts=in_float("returns no tensor"),
)  # fmt: skip
def look() -> None:
    """No tensor comes out, and what is asked is a length or one number."""


@op(aten.type_as.default, aten.to.other, facts=in_float("returns another dtype"))
def like(self: Axes) -> Axes:
    """The other operand gives its dtype and device only."""
    return self


refuse(
    *overloads(
        aten.convolution_backward, aten.max_pool2d_with_indices_backward, aten.avg_pool2d_backward,
        aten._adaptive_avg_pool2d_backward, aten.embedding_dense_backward, aten.native_layer_norm_backward,
        aten.native_group_norm_backward,
    ),
    why="a gradient: no forward has it", facts=product(Float("a gradient: no forward has it")),
)  # fmt: skip
refuse(aten.resize_.default, why="changes an operand's memory")
refuse(
    aten._pdist_forward.default,
    why="distances between all rows of one operand",
    facts=product(Float("distances between all rows of one operand")),
)
refuse(aten.sym_is_contiguous.default, why="asks for the layout in memory, which a cut changes")
