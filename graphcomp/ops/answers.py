"""Questions about a node of a graph, answered from the facts of the op that the node calls."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, TypeVar

from torch import fx

from graphcomp.ops.facts import Clip, Compute, Fill, Fused, Integer, Lookup, Move, Rescale
from graphcomp.ops.registry import facts_of

I = TypeVar("I", bound=Integer)  # noqa: E741


def _of_kind(node: fx.Node, kind: type[I]) -> I | None:
    found = facts_of(node.target).integer
    return found if isinstance(found, kind) else None


def compute_of(node: fx.Node) -> Compute | None:
    """Return how the op multiplies and sums on integers."""
    return _of_kind(node, Compute)


def operands_of(node: fx.Node) -> Compute:
    """Return `compute_of` of a node that is known to compute."""
    found = compute_of(node)
    assert found is not None, f"{node.target} is no compute op"
    return found


def is_convolution(node: fx.Node) -> bool:
    """Return whether the op is a convolution with an integer form, transposed or not."""
    found = compute_of(node)
    return found is not None and found.convolution


def move_of(node: fx.Node) -> Move | None:
    """Return how the op moves elements of one operand."""
    return _of_kind(node, Move)


def clip_of(node: fx.Node) -> Clip | None:
    """Return how the op clips."""
    return _of_kind(node, Clip)


def lookup_of(node: fx.Node) -> Lookup | None:
    """Return how the op looks up rows of a table that can be quantized."""
    return _of_kind(node, Lookup)


def rescales(node: fx.Node) -> bool:
    """Return whether the op has an integer kernel that rescales."""
    return _of_kind(node, Rescale) is not None


def is_fill(node: fx.Node) -> bool:
    """Return whether the op puts a constant in the place of elements."""
    return _of_kind(node, Fill) is not None


def is_fused(node: fx.Node) -> bool:
    """Return whether the op is attention in one op."""
    return _of_kind(node, Fused) is not None


def masked_form(op: object) -> Callable[..., Any] | None:
    """Return the form of an op that takes statistics in which masked units never existed; None where zeros do."""
    found = facts_of(op).masked
    return found if callable(found) else None


def keeps_zeros(node: fx.Node) -> bool:
    """Return whether the op only moves the elements of its one operand, in the same units."""
    return bool(facts_of(node.target).keeps_zeros)


def parameter_behind(node: fx.Node, parameters: Container[str]) -> str:
    """The one of `parameters` whose elements `node` holds, in whatever order, quantized or not: its zeros are zeros
    still. "" where there is none."""
    while node.op != "get_attr":
        if (node.op != "call_module" and not keeps_zeros(node)) or len(node.all_input_nodes) != 1:
            return ""
        (node,) = node.all_input_nodes
    return str(node.target) if str(node.target) in parameters else ""
