"""Which op of a prepared module no gradient passes through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.ir.graph import source_line
from graphcomp.ir.run_nodes import compute_node, run_tapped
from graphcomp.torch_compat import pytree
from graphcomp.training.prepared import Prepared


def without_gradient(ready: Prepared) -> str:
    """Return the first op without a gradient, and the user's source line; "" where each op has one.

    The graph runs on the example inputs, and the backward of each op alone.
    """
    try:
        run_tapped(ready, ready.session.plan.captured.inputs.flat(), compute=_with_backward, gradients=True)
    except _NoGradient as found:
        return str(found)
    except RuntimeError:  # the graph does not run so: an op that writes into what it reads, say
        return ""
    return ""


class _NoGradient(Exception):
    """An op has no gradient."""


def _with_backward(module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a node, and its backward."""
    if node.op != "call_function":
        return compute_node(module, node, args, kwargs)
    read: list[Tensor] = []

    def alone(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            return leaf
        read.append(leaf.detach().requires_grad_())
        return read[-1]

    args, kwargs = pytree.tree_map(alone, (args, kwargs))
    value = compute_node(module, node, args, kwargs)
    results = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if read and results:
        try:
            if not any(result.requires_grad for result in results):
                raise RuntimeError("the results have no gradient")
            torch.autograd.grad([r.sum() for r in results if r.requires_grad], read, allow_unused=True)
        except RuntimeError as error:
            raise _NoGradient(f"{node.target} {source_line(node)}".rstrip()) from error
    return pytree.tree_map(lambda leaf: leaf.detach().requires_grad_() if _learns(leaf) else leaf, value)


def _learns(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad
