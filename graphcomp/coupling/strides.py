"""Where a value stands in memory: lengths that the steps (strides) of a view are products of."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import Tensor, fx

from graphcomp.coupling.axis import Axis
from graphcomp.coupling.propagate import Coupling
from graphcomp.coupling.size import multiply, size_of
from graphcomp.ir.graph import is_op, value
from graphcomp.torch_compat import schema_of


def axes_in_strides(coupling: Coupling, node: fx.Node) -> Iterator[Axis]:
    """Yield the axes that strides and offset of a view are sums of multiples of.

    A view that leaves indices out keeps the strides of what the view is part of: one row of that is a step. Where
    every part of a row is a multiple of n, strides and offset are.

    Args:
        node: of one tensor.
    """
    while (source := _viewed(node)) is not None:
        whole = value(source)
        if source in coupling.axes and isinstance(whole, Tensor) and _leaves_out(node, whole):
            axes = coupling.axes[source][0]
            beside = [d for d, step in enumerate(whole.stride()) if size_of(step) == 1 and size_of(whole.shape[d]) != 1]
            yield from (axes[d] for d in beside)
        node = source


def _viewed(node: fx.Node) -> fx.Node | None:
    """Return the value whose memory a node reads; None where the node has memory of its own."""
    if node.target is operator.getitem:
        source = node.args[0]
        return _viewed(source) if isinstance(source, fx.Node) else None
    if not is_op(node) or not node.all_input_nodes:
        return None
    results = schema_of(node.target).returns
    operand = node.all_input_nodes[0]
    is_view = any(result.alias_info is not None for result in results)
    same = not isinstance(value(node), Tensor) or value(node).dtype == value(operand).dtype
    return operand if is_view and same else None


def _leaves_out(node: fx.Node, whole: Tensor) -> bool:
    part: Tensor = value(node)
    return bool(multiply(map(size_of, part.shape)) != multiply(map(size_of, whole.shape)))
