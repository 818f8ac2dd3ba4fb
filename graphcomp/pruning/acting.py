"""Weights that act: what a layer multiplies with, where that is computed from parameters (masks, weight norm, …).

A parameter that something is computed of says little: a mask may hold its rows at zero, a norm divides by its length.
So scores are of what the ops read. A parameter that is read as it is acts itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.coupling.axis import Factor, coordinates, normal
from graphcomp.coupling.groups import ChannelGroup, Member, consumed_dims
from graphcomp.coupling.propagate import Coupling, is_real
from graphcomp.ir.graph import fetch, tensor_values
from graphcomp.ops import registry
from graphcomp.ops.answers import keeps_zeros

TensorOf = Callable[[str], Tensor]
"""The tensor of a name of the graph."""


@dataclass(frozen=True, eq=False)
class Acting:
    """A value that is computed from parameters alone, and read by an op beside the model's activations.

    Attributes:
        node: the value.
        sources: names of the tensors that the value is computed from.
        members: each dim in which units lie, by the factor of the units, as a member of the group would be.
    """

    node: fx.Node
    sources: frozenset[str]
    members: tuple[tuple[Factor, Member], ...]

    def value(self, tensor: TensorOf) -> Tensor:
        """Compute the value. What it is quantized to does not count: the floats say how much a unit matters."""
        found: Tensor = _evaluate(self.node, tensor, {})
        return found.detach().float()


def acting_weights(coupling: Coupling) -> dict[str, Acting]:
    """Return the weights that act and are no parameters, by the names of their members.

    A value whose size follows from the model's inputs (a table that is expanded to the batch) is no weight.
    """
    found: dict[str, Acting] = {}
    computed: set[fx.Node] = set()
    sized: set[fx.Node] = set()
    for node in coupling.graph.nodes:
        if node.op == "placeholder" or not sized.isdisjoint(node.all_input_nodes):
            sized.add(node)
    for node, sources in coupling.sources.items():
        if node in sized:
            continue
        if _computes(coupling, node) or any(operand in computed for operand in node.all_input_nodes):
            computed.add(node)
        readers = [user for user in node.users if user in coupling.calls and user not in coupling.sources]
        if node in computed and readers and _is_weight(coupling, node, sources):
            name = f"<{node.name}>"  # which no parameter is called
            found[name] = Acting(node, sources, _members(coupling, node, name, readers))
    return found


def _computes(coupling: Coupling, node: fx.Node) -> bool:
    """Whether the elements of the result are others than those of the operands, not only in another order."""
    call = coupling.calls.get(node)
    if call is None or keeps_zeros(node) or not node.all_input_nodes:
        return False
    rule = registry.find(call.node.target)  # type: ignore[arg-type]
    return bool(call.contracted) or (rule is not None and registry.is_elementwise(rule))


def _is_weight(coupling: Coupling, node: fx.Node, sources: Collection[str]) -> bool:
    """Whether the value holds real numbers, and a parameter is among its sources."""
    return (
        not coupling.parameters.isdisjoint(sources)
        and bool(coupling.axes.get(node))
        and is_real(tensor_values(node)[0])
    )


def _members(
    coupling: Coupling, node: fx.Node, name: str, readers: Sequence[fx.Node]
) -> tuple[tuple[Factor, Member], ...]:
    axes = coupling.axes[node][0]
    consumed = {dim for reader in readers for dim in consumed_dims(coupling, reader, axes)}
    shape = tuple(int(n) for n in tensor_values(node)[0].shape)
    members = []
    for dim, axis in enumerate(axes):
        rows: dict[Factor, list[Tensor]] = {}
        for factor, row in coordinates(axis):
            rows.setdefault(factor, []).append(row)
        for factor, found in rows.items():
            member = Member(name, dim, normal(axis), torch.stack(found), dim in consumed, True, shape)
            members.append((factor, member))
    return tuple(members)


def with_acting(groups: Sequence[ChannelGroup], acting: Mapping[str, Acting]) -> dict[ChannelGroup, ChannelGroup]:
    """Return for each group the group, or a copy whose members are the weights that act in place of what they are
    computed from."""
    found = {}
    for group in groups:
        own = [
            (weight, member)
            for weight in acting.values()
            for factor, member in weight.members
            if factor is group.factor
        ]
        replaced = {name for weight, _ in own for name in weight.sources}
        members = [member for member in group.members if member.name not in replaced]
        members += [member for _, member in own]
        found[group] = replace(group, members=tuple(members)) if own else group
    return found


def _evaluate(node: fx.Node, tensor: TensorOf, known: dict[fx.Node, Any]) -> Any:
    """Compute a value of the graph that depends on tensors of the graph alone."""
    if node in known:
        return known[node]
    if node.op == "get_attr":
        return tensor(str(node.target))

    def inside(operand: fx.Node) -> Any:
        return _evaluate(operand, tensor, known)

    args, kwargs = fx.map_arg(node.args, inside), fx.map_arg(node.kwargs, inside)
    if node.op == "call_module":  # a quantizer
        known[node] = args[0]
    else:
        assert callable(node.target)
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)
    return known[node]


def tensors_of(module: nn.Module) -> TensorOf:
    """Return a function from names to the tensors of a graph module."""

    def tensor(name: str) -> Tensor:
        found: Tensor = fetch(module, name)
        return found.detach()

    return tensor
