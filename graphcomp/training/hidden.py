"""Outputs of modules by name while a model runs: by hooks, and inside captured graphs off the nodes that made them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from graphcomp.errors import PlanError
from graphcomp.ir.graph import module_paths
from graphcomp.ir.module import CapturedModule, by_placeholder, tensor_leaves
from graphcomp.ir.run_nodes import Run
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.training.prepared import Prepared


@contextmanager
def hearing(model: nn.Module, names: Collection[str], whose: str) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that holds the output of each module of a name once the model has run inside.

    A module that runs several times counts with its last call, one that returns several tensors with the first.

    Args:
        model: may be a captured graph, or hold such graphs, whose modules have no calls of their own.
        names: of modules of `model`, as in `named_modules` of the model before it was captured.
        whose: of messages.

    Raises:
        PlanError: there is no module of a name, or a graph holds several values of one.
    """
    found: dict[str, Tensor] = {}
    in_graphs: dict[CapturedModule, dict[str, fx.Node]] = {}
    hooks = []
    for name in names:
        graph, path = _graph_around(model, name)
        if graph is None:
            module = dict(model.named_modules(remove_duplicate=False)).get(name)
            if module is None:
                raise _unknown(name, (n for n, _ in model.named_modules() if n), whose)
            hooks.append((module, _hook(found, name)))
        else:
            in_graphs.setdefault(graph, {})[name] = value_of(graph, path, name, whose)
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        for graph, nodes in in_graphs.items():
            vars(graph)[_place(graph)] = _tapped(graph, nodes, found)
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for graph in in_graphs:
            vars(graph).pop(_place(graph), None)


def _place(graph: CapturedModule) -> str:
    """Return the attribute that runs in place of the code of a graph: a prepared module keeps its forward."""
    return "tap" if isinstance(graph, Prepared) else "forward"


def value_of(graph: fx.GraphModule, path: str, name: str, whose: str) -> fx.Node:
    """Return the node whose value the module at `path` returns: the one that nodes outside of the module read.

    Raises:
        PlanError: no node is of such a module, or several of its values are read outside.
    """
    paths = {node: module_paths(node) for node in graph.graph.nodes if node.op not in ("get_attr", "placeholder")}
    inside = [node for node, own in paths.items() if path in own and node.op != "output"]
    if not inside:
        raise _unknown(name, dict.fromkeys(p for own in paths.values() for p in own if p), whose)
    outside = {n for n in inside if any(user not in inside for user in n.users) and _is_float(n)}
    # a fake-quantized value stands for the value itself
    read = dict.fromkeys(_quantized_by(graph, node) or node for node in inside if node in outside)
    if len(read) != 1:
        raise PlanError(
            f"the module {name!r} of {whose} has {len(read)} values that are read outside of it",
            at=", ".join(node.name for node in read)[:200],
            why="a hidden state is one tensor",
            fix="the name of a part of the module that returns the tensor",
        )
    (found,) = read
    return found


def _quantized_by(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return what a quantizer reads; None of other nodes."""
    if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), Quantizer):
        read: fx.Node = node.all_input_nodes[0]
        return read
    return None


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _graph_around(model: nn.Module, name: str) -> tuple[CapturedModule | None, str]:
    """Return the captured graph that a module's code went into, and the module's path there; None without one."""
    if isinstance(model, CapturedModule):
        return model, name
    parts = name.split(".")
    for k in range(1, len(parts)):
        inner = dict(model.named_modules(remove_duplicate=False)).get(".".join(parts[:k]))
        if isinstance(inner, CapturedModule):
            return inner, ".".join(parts[k:])
    return None, name


def _hook(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hear(module: nn.Module, given: Any, output: Any) -> None:
        leaves = [t for t in tensor_leaves(output) if t.is_floating_point()]
        if leaves:
            found[name] = leaves[0]

    return hear


def _tapped(graph: CapturedModule, nodes: dict[str, fx.Node], found: dict[str, Tensor]) -> Callable[..., Any]:
    """Return a forward of a graph that runs node by node, and tells the values of some."""

    def see(node: fx.Node, value: Any) -> None:
        found.update((name, value) for name, own in nodes.items() if own is node)

    def forward(*args: Any, **kwargs: Any) -> Any:
        pairs = by_placeholder(graph, args, kwargs)
        if not pairs:  # of another form than was captured: the graph's own forward says so
            return (
                graph.generated(*args, **kwargs) if isinstance(graph, Prepared) else type(graph).forward(graph, *args)
            )
        return graph.graph.process_outputs(Run(graph, [leaf for _, leaf in pairs]).finish(see))

    return forward


def _unknown(name: str, names: Iterable[str], whose: str) -> PlanError:
    known = list(names)
    near = difflib.get_close_matches(name, known, 1, 0.0)
    return PlanError(
        f"{whose} has no module {name!r}, whose output is compared",
        why=f"modules of it are {', '.join(known[:8])}{', …' * (len(known) > 8)}",
        fix=f"hidden=[{near[0]!r}]" if near else "hidden=()",
    )
