"""Inputs of other lengths than the example inputs: what a graph computes of them, and along which dims it may.

A graph holds what the model computed from lengths as constants. Where the graph and the model agree on an input that is
twice as long along one dim, the graph does not depend on that length.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.capture import Captured
from graphcomp.capture.record import named_tensors
from graphcomp.ir.inputs import copies
from graphcomp.ir.module import RESIZED, CapturedModule, tensor_leaves
from graphcomp.ir.preserve import eval_copy
from graphcomp.numerics.compare import relative_error, tolerance_of
from graphcomp.torch_compat import pytree

log = logging.getLogger(__name__)

OPEN = "graphcomp_open_lengths"
"""Key in the meta of a graph: input -> dims along which other lengths than the example's were checked."""

Dims = Mapping[str, Sequence[int]]


def open_lengths(captured: Captured) -> dict[str, tuple[int, ...]]:
    """Return the dims, by input, along which the captured graph agrees with the model on twice the length."""
    tensors = (
        *captured.original.parameters(),
        *captured.original.buffers(),
        *tensor_leaves((captured.inputs.args, captured.inputs.kwargs)),
    )
    if any(tensor.is_meta for tensor in tensors):
        return {}
    graph, inputs = captured.module, captured.inputs.copies()
    return {
        name: tuple(dim for dim in dims if _agree(captured, with_twice(graph, inputs, name, dim)))
        for name, dims in fixed_lengths(graph, pytree.tree_leaves(inputs)).items()
    }


def _agree(captured: Captured, inputs: Any) -> bool:
    try:
        expected = outputs(captured.original, *inputs, resized=True)
        found = outputs(captured.module, *inputs, resized=True)
    except Exception as error:  # of the user's code, and of ops that other lengths do not fit
        log.debug("other lengths do not run: %s", error)
        return False
    return bool(expected) and relative_error(expected, found) <= tolerance_of(expected)


def fixed_lengths(graph: fx.GraphModule, leaves: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """Return the dims, other than the batch, of floating inputs of three dims and more that capture fixed, by input."""
    found = {}
    for place, leaf in zip(graph.graph.find_nodes(op="placeholder"), leaves, strict=False):
        held = place.meta.get("val")
        if isinstance(leaf, Tensor) and isinstance(held, Tensor) and leaf.is_floating_point() and leaf.dim() > 2:
            fixed = (dim for dim in range(1, leaf.dim()) if leaf.shape[dim] > 1 and type(held.shape[dim]) is int)
            found[input_name(place)] = tuple(fixed)
    return {name: dims for name, dims in found.items() if dims}


def input_name(place: fx.Node) -> str:
    """The name of an input in the model's forward; fx numbers names that Python has itself, as "input"."""
    return str(place.target)


def with_twice(graph: fx.GraphModule, inputs: Any, name: str, dim: int) -> Any:
    """Return nested inputs with one dim of one input twice as long."""
    leaves, spec = pytree.tree_flatten(inputs)
    places = graph.graph.find_nodes(op="placeholder")
    longer = [
        torch.cat([leaf, leaf], dim) if input_name(place) == name else leaf
        for place, leaf in zip(places, leaves, strict=True)
    ]
    return pytree.tree_unflatten(longer, spec)


def outputs(module: nn.Module, args: Any, kwargs: Mapping[str, Any], *, resized: bool = False) -> list[Tensor]:
    """Return the tensors that a copy of `module` in eval mode computes.

    Args:
        module: not modified.
        args, kwargs: not modified.
        resized: inputs have other lengths than the example inputs, which a graph need not warn of.
    """
    args, given = copies((args, dict(kwargs)))
    with eval_copy(module, real=True) as copied, torch.no_grad():
        if resized and isinstance(copied, CapturedModule):
            copied.meta = {**copied.meta, RESIZED: True}
        return [tensor for _, tensor in named_tensors(copied(*args, **given), "")]
