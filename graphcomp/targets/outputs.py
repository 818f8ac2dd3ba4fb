"""What a file returns: the tensors among a model's outputs, each of its own, by the names that the model gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphcomp.ir.calling import calling_convention
from graphcomp.ir.graph import clone
from graphcomp.ir.module import leaf_names
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import before
from graphcomp.torch_compat import codegen_of, pytree


@dataclass(frozen=True)
class OwnOutputs(GraphPass):
    """Let a graph return its tensor outputs alone, each a tensor of its own; see `own_names`.

    Numbers, words and sizes among the outputs are left out. An output that is an input, or that is returned twice, is
    copied, so that the input keeps its name.
    """

    name: ClassVar[str] = "return tensors of their own"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return a new module that shares the tensors of `module`."""
        copied, _ = clone(module)
        output = copied.graph.output_node()
        seen: set[fx.Node] = set()
        owned = []
        for node in filter(_is_tensor, pytree.tree_leaves(output.args[0])):
            copy = before(output, like=node)
            owned.append(copy(torch.ops.aten.clone.default, node) if node.op == "placeholder" or node in seen else node)
            seen.add(node)
        output.args = (tuple(owned),)
        info = getattr(codegen_of(copied.graph), "pytree_info", None)
        if info is not None:
            flat = pytree.tree_structure(tuple(range(len(owned))))
            copied.graph.set_codegen(calling_convention(info.orig_args, info.in_spec, flat))
        copied.recompile()
        return copied


def own_names(graph: fx.GraphModule, names: Sequence[str] | None = None) -> list[str]:
    """Return the names of a graph's tensor outputs in a file: "logits", "hidden_states.0".

    Args:
        graph: before `OwnOutputs`.
        names: one for each tensor output, where the graph does not know their names.
    """
    output = graph.graph.output_node()
    results = pytree.tree_leaves(output.args[0])
    tensors = [result for result in results if _is_tensor(result)]
    if names is None or len(names) != len(tensors):
        info = getattr(codegen_of(graph.graph), "pytree_info", None)
        spec = pytree.tree_structure(output.args[0]) if info is None else info.out_spec
        every = ["output"] if spec.is_leaf() else leaf_names(spec)
        names = [name for name, result in zip(every, results, strict=True) if result in tensors]
    return file_names(graph, names)


def _is_tensor(result: Any) -> bool:
    """Whether an output is a tensor; a node that was put in by hand says nothing else."""
    return isinstance(result, fx.Node) and isinstance(result.meta.get("val", torch.empty(0)), Tensor)


def file_names(graph: fx.GraphModule, names: Sequence[str]) -> list[str]:
    """Return names of outputs for a file: none begins with a digit, or is an input's."""
    read = {place.name for place in graph.graph.find_nodes(op="placeholder")}
    return [f"output_{name}" if name[:1].isdigit() or name in read else name for name in names]
