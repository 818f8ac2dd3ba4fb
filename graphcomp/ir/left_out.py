"""A graph called without labels: an input that the model may be called without, and that only losses are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from graphcomp.ir.calling import argument_names, is_constant
from graphcomp.ir.run_nodes import compute_node
from graphcomp.torch_compat import codegen_of, pytree


def run_without(module: fx.GraphModule, bound: Mapping[str, Any]) -> tuple[Any] | None:
    """Run a graph without the inputs that a call leaves out; each loss that is made of them is None.

    Args:
        module: called with nested inputs, as the model.
        bound: the inputs that are given, by name.

    Returns:
        (what the model returns,); None where the model has no default for what is left out, or more than scalars
        depends on it: then the call is not complete.
    """
    graph = module.graph
    places = dict(_places(graph))
    parameters: Mapping[str, Any] = getattr(codegen_of(graph), "parameters", {})
    missing = [name for name, own in places.items() if name not in bound and not all(map(is_constant, own))]
    if not missing or any(parameters.get(name, ...) is not None for name in missing):
        return None
    lost = {place for name in missing for place in places[name]}
    for node in graph.nodes:
        if any(operand in lost for operand in node.all_input_nodes) and node.op != "output":
            lost.add(node)
    leaves, spec = pytree.tree_flatten(graph.output_node().args[0])
    gone = [leaf for leaf in leaves if leaf in lost]
    if len(gone) == len(leaves) or not all(_is_scalar(leaf) for leaf in gone):
        return None
    values = {node: node.meta.get("val") for own in places.values() for node in own if is_constant(node)}
    for name in bound:
        values |= zip(places[name], pytree.tree_leaves(bound[name]), strict=True)
    _compute(module, [leaf for leaf in leaves if isinstance(leaf, fx.Node) and leaf not in lost], values)
    flat = [values.get(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    return (codegen_of(graph).process_outputs(pytree.tree_unflatten(flat, spec)),)


def _places(graph: fx.Graph) -> Iterator[tuple[str, list[fx.Node]]]:
    """Yield the name of each argument with the placeholders of its leaves."""
    places = iter(graph.find_nodes(op="placeholder"))
    positional, keywords = codegen_of(graph).pytree_info.in_spec.children()
    for name, spec in zip(argument_names(graph), (*positional.children(), *keywords.children()), strict=True):
        yield name, [next(places) for _ in range(spec.num_leaves)]


def _is_scalar(leaf: Any) -> bool:
    held = leaf.meta.get("val")
    return isinstance(held, Tensor) and held.dim() == 0


def _compute(module: fx.GraphModule, wanted: Sequence[fx.Node], values: dict[fx.Node, Any]) -> None:
    """Add to `values` the value of each node in `wanted`, and drop values that no more node reads."""
    needed, waiting = set(wanted), list(wanted)
    while waiting:
        more = [node for node in waiting.pop().all_input_nodes if node not in needed]
        needed.update(more)
        waiting += more
    left = {node: sum(user in needed for user in node.users) for node in needed}
    for node in module.graph.nodes:
        if node not in needed or node in values:
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: values[operand])
        values[node] = compute_node(module, node, args, kwargs)
        for operand in node.all_input_nodes:
            left[operand] -= 1
            if not left[operand] and operand not in wanted:
                del values[operand]
