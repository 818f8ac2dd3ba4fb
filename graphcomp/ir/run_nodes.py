"""Run a graph node by node: on several batches at once, or those nodes that depend on no input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.ir.graph import fetch
from graphcomp.ir.preserve import own_inputs, writes


class Lockstep:
    """The values of a graph's nodes for several batches, computed in the order of the graph and dropped after use.

    Args:
        module: the graph.
        batches: flat inputs of each batch, in the order of the placeholders.
    """

    def __init__(self, module: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> None:
        self.module = module
        self.writes = writes(module)
        self.inputs = [iter(own_inputs(module, batch)) for batch in batches]
        self.values: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self.last_user: dict[fx.Node, fx.Node] = {}
        for node in module.graph.nodes:
            for operand in node.all_input_nodes:
                self.last_user[operand] = node

    def arguments(self, node: fx.Node) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What `node` is called with, per batch."""
        for values in self.values:
            yield fx.map_arg((node.args, node.kwargs), values.__getitem__)

    def of(self, node: fx.Node) -> list[Any]:
        """What `node` computed, per batch; there until its last user has run."""
        return [values[node] for values in self.values]

    @torch.no_grad()
    def step(self, node: fx.Node) -> None:
        """Compute `node`."""
        if node.op == "output":
            return
        for values, inputs, (args, kwargs) in zip(self.values, self.inputs, list(self.arguments(node)), strict=True):
            is_input = node.op == "placeholder"
            found = next(inputs) if is_input else _compute(self.module, node, args, kwargs)
            # what an op may write into is each batch's own
            values[node] = found.clone() if self.writes and node.op == "get_attr" else found

    def drop(self, node: fx.Node) -> None:
        """Forget the operands that `node` was the last to read, and `node` itself where nothing reads it."""
        for operand in node.all_input_nodes:
            if self.last_user.get(operand) is node:  # a node that was added on the way has none
                for values in self.values:
                    values.pop(operand, None)
        if node not in self.last_user:
            for values in self.values:
                values.pop(node, None)


class Constants:
    """What the constant nodes of a graph compute, each once."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.values: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def of(self, node: fx.Node) -> Tensor:
        """The value of a node that depends on parameters, buffers and numbers only."""
        if node not in self.values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
            self.values[node] = _compute(self.module, node, args, kwargs)
        found: Tensor = self.values[node]
        return found


def _compute(module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "get_attr":
        return fetch(module, str(node.target))
    if node.op == "call_module":
        return module.get_submodule(str(node.target))(*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
