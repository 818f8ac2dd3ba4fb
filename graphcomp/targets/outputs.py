"""What a file returns: the tensors among a model's outputs, each of its own, by the names that the model gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.ir.calling import calling_convention
from graphcomp.ir.graph import clone
from graphcomp.ir.module import leaf_names
from graphcomp.torch_compat import codegen_of, pytree


def with_own_outputs(graph: fx.GraphModule, names: Sequence[str] | None = None) -> tuple[fx.GraphModule, list[str]]:
    """Return a copy of a graph that returns its tensor outputs alone, and their names: "logits", "hidden_states.0".

    Numbers, words and sizes among the outputs are left out. An output that is an input, or that is returned twice, is
    copied, so that the input keeps its name.

    Args:
        graph: not modified.
        names: one for each tensor output, where the graph does not know their names.
    """
    copied, _ = clone(graph)
    output = copied.graph.output_node()
    results = pytree.tree_leaves(output.args[0])
    info = getattr(codegen_of(copied.graph), "pytree_info", None)
    spec = pytree.tree_structure(output.args[0]) if info is None else info.out_spec
    tensors = [result for result in results if _is_tensor(result)]
    if names is None or len(names) != len(tensors):
        every = ["output"] if spec.is_leaf() else leaf_names(spec)
        names = [name for name, result in zip(every, results, strict=True) if result in tensors]
    seen: set[fx.Node] = set()
    owned = []
    for node in tensors:
        owned.append(_copied(node, output) if node.op == "placeholder" or node in seen else node)
        seen.add(node)
    output.args = (tuple(owned),)
    if info is not None:
        flat = pytree.tree_structure(tuple(range(len(owned))))
        copied.graph.set_codegen(calling_convention(info.orig_args, info.in_spec, flat))
    copied.graph.lint()
    copied.recompile()
    return copied, file_names(copied, names)


def _is_tensor(result: Any) -> bool:
    """Whether an output is a tensor; a node that was put in by hand says nothing else."""
    return isinstance(result, fx.Node) and isinstance(result.meta.get("val", torch.empty(0)), Tensor)


def file_names(graph: fx.GraphModule, names: Sequence[str]) -> list[str]:
    """Return names of outputs for a file: none begins with a digit, or is an input's."""
    read = {place.name for place in graph.graph.find_nodes(op="placeholder")}
    return [f"output_{name}" if name[:1].isdigit() or name in read else name for name in names]


def _copied(node: fx.Node, before: fx.Node) -> fx.Node:
    with node.graph.inserting_before(before):
        found = node.graph.call_function(torch.ops.aten.clone.default, (node,))
    found.meta = dict(node.meta)
    return found
