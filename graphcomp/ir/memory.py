"""Which nodes of a graph share memory, and which memory is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.ir.graph import bind, value
from graphcomp.ir.preserve import written_arguments
from graphcomp.ir.shapes import run_shapes
from graphcomp.torch_compat import OpOverload, is_batchedtensor, pytree, schema_of, storage_key

aten = torch.ops.aten

PASSED_ON: frozenset[Any] = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
    }
)
"""Ops that return the operand itself where they are not in training mode; fake tensors say otherwise."""


class Memory:
    """The pieces of memory that the values of a graph live in.

    Attributes:
        sharing: piece of memory -> the nodes whose values live there, in the order of the graph.
    """

    def __init__(self, graph: fx.Graph, values: Mapping[fx.Node, Any] | None = None) -> None:
        """Read off the storages of `values`, fake tensors by node; of those that the nodes carry, where not given."""
        self._values = values
        self._same: dict[int, int] = {}
        self.sharing: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.target in PASSED_ON and not bind(node)["train"]:
                self._join(node, node.args[0])
            for key in self.of(node):
                self.sharing.setdefault(key, []).append(node)

    def of(self, node: fx.Node) -> list[int]:
        """Return the pieces of memory that the value of `node` lives in."""
        found = value(node) if self._values is None else self._values.get(node)
        return [self._same.get(key, key) for key in _storages(found)]

    def _join(self, node: fx.Node, operand: Any) -> None:
        for own, theirs in zip(self.of(node), self.of(operand), strict=False):
            if own != theirs:
                self._same[own] = theirs


def writers(graph: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Return each node whose value an op writes into, under this name or another, with (the last) such op."""
    ops = [node for node in graph.graph.nodes if is_writing(node)]
    if not ops:
        return {}
    memory = Memory(graph.graph, run_shapes(graph))
    written = {key: op for op in ops for operand in _written(op) for key in memory.of(operand)}
    return {node: op for key, op in written.items() for node in memory.sharing[key] if node is not op}


def is_writing(node: fx.Node) -> bool:
    """Return whether the op of `node` writes into one of its operands; `detach_` only says where gradients end."""
    is_mutable = isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable
    return is_mutable and node.target is not aten.detach_.default


def _written(node: fx.Node) -> Iterator[fx.Node]:
    assert isinstance(node.target, OpOverload)
    bound = bind(node)
    for found in pytree.tree_leaves([bound.get(name) for name in written_arguments(node.target)]):
        if isinstance(found, fx.Node):
            yield found


def _storages(found: Any) -> Iterator[int]:
    """Yield a key for each piece of memory that tensors live in; one in torch.vmap has no memory of its own."""
    for leaf in pytree.tree_leaves(found):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not is_batchedtensor(leaf):
            yield storage_key(leaf.untyped_storage())
