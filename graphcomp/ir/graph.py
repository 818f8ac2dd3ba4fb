"""Helpers over torch.fx: bind an op's arguments to its schema, read shapes, find the user's source line, verify."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.torch_compat import (
    OpOverload,
    buffer_table,
    module_table,
    parameter_table,
    schema_of,
)

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)(?:\n\s+(.*))?')

_TORCH = os.sep + os.path.join("site-packages", "torch") + os.sep


def is_op(node: fx.Node) -> bool:
    """Whether `node` calls an ATen (or custom) op, as opposed to getitem or arithmetic on lengths."""
    return node.op == "call_function" and isinstance(node.target, OpOverload)


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op node by the names of its schema, defaults filled in."""
    return bound(node.target, node.args, node.kwargs)


def bound(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `op` by the names of the schema, defaults filled in."""
    assert isinstance(op, OpOverload)
    found: dict[str, Any] = {}
    for k, argument in enumerate(schema_of(op).arguments):
        if argument.name in kwargs:
            found[argument.name] = kwargs[argument.name]
        elif not argument.kwarg_only and k < len(args):
            found[argument.name] = args[k]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give the op node's argument `name` (a name of its schema) a new value, positional or keyword as it stood."""
    assert isinstance(node.target, OpOverload)
    for k, argument in enumerate(schema_of(node.target).arguments):
        if argument.name == name and not argument.kwarg_only and k < len(node.args):
            node.update_arg(k, value)
            return
    node.update_kwarg(name, value)


def value(node: fx.Node) -> Any:
    """What the node computes, as fake tensors and symbolic ints."""
    return node.meta.get("val")


def tensor_values(node: fx.Node) -> list[Tensor]:
    """The (fake) tensors the node computes, in order; none for a node that yields numbers."""
    found = value(node)
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, (list, tuple)):
        return [v for v in found if isinstance(v, Tensor)]
    return []


def op_name(node: fx.Node) -> str:
    """The name of the op that the node calls: 'aten::relu'; of what is no op, its text."""
    return str(schema_of(node.target).name) if isinstance(node.target, OpOverload) else str(node.target)


def source_line(node: fx.Node) -> str:
    """Where in the user's code the node comes from: 'file.py:12, in forward -> x = self.fc(x)'; '' if unknown."""
    return frame_text(node.meta.get("stack_trace") or "")


def frame_text(trace: str) -> str:
    """The innermost frame outside torch of a trace as torch.fx writes it, in one line; '' if there is none."""
    frames = _FRAME.findall(trace)
    outside = [frame for frame in frames if _TORCH not in frame[0]] or frames
    if not outside:
        return ""
    file, line, function, text = outside[-1]
    place = f"{file.rsplit('/', 1)[-1]}:{line}, in {function}"
    return f"{place} -> {text.strip()}" if text else place


def module_path(node: fx.Node) -> str:
    """Name of the innermost user module whose forward made the node; '' for the root or where unknown."""
    return next(reversed(module_paths(node)), "")


def module_paths(node: fx.Node) -> list[str]:
    """Names of the user modules whose forwards made the node, from the outermost in; "" is the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [re.sub(r"@\d+$", "", path) for path, _ in stack.values()]
    return [path.removeprefix("L['self'].").removeprefix("L['self']") for path in paths]


def fetch(root: torch.nn.Module, target: str) -> Any:
    """The attribute of `root` that a get_attr node with `target` reads."""
    found: Any = root
    for part in target.split("."):
        found = getattr(found, part)
    return found


def replace_module(root: torch.nn.Module, old: torch.nn.Module, new: torch.nn.Module) -> torch.nn.Module:
    """Let `new` stand where `old` stands in `root`, under every name; return the root, which may be `new`."""
    for parent in list(root.modules()):
        for name, child in list(module_table(parent).items()):
            if child is old:
                module_table(parent)[name] = new
    return new if root is old else root


def assign(root: torch.nn.Module, target: str, tensor: Tensor) -> None:
    """Put `tensor` in place of the parameter, buffer or constant `target` of `root`."""
    owner_name, _, name = target.rpartition(".")
    owner = root.get_submodule(owner_name)
    if name in parameter_table(owner):
        assert isinstance(tensor, torch.nn.Parameter)
        parameter_table(owner)[name] = tensor
    elif name in buffer_table(owner):
        buffer_table(owner)[name] = tensor
    else:
        setattr(owner, name, tensor)


def all_tensors(module: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that `module` holds, under each of its names: read by the graph or not."""
    seen = set()
    for node, tensor in attributes(module):
        seen.add(str(node.target))
        yield str(node.target), tensor
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        if name not in seen:
            yield name, tensor


def attributes(module: fx.GraphModule) -> Iterator[tuple[fx.Node, Tensor]]:
    """Each get_attr node that reads a tensor, with the tensor."""
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = fetch(module, str(node.target))
        if isinstance(tensor, Tensor):
            yield node, tensor


def attribute_readers(module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """For each name that a get_attr node reads, all such nodes that read the same tensor, under any of its names.

    It goes by the tensors as they are now: a name keeps its entry when its tensor is replaced.
    """
    by_tensor: dict[int, list[fx.Node]] = {}
    readers: dict[str, list[fx.Node]] = {}
    for node, tensor in attributes(module):
        readers[str(node.target)] = by_tensor.setdefault(id(tensor), [])
        by_tensor[id(tensor)].append(node)
    return readers


def names_by_tensor(tensors: Iterable[tuple[str, Tensor]]) -> dict[int, list[str]]:
    """id(tensor) -> all names that the tensor stands under, in their order."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
    return names


def neighbourhood(node: fx.Node, radius: int = 5) -> str:
    """The nodes around `node` as text, for an error message."""
    nodes = list(node.graph.nodes)
    at = nodes.index(node)
    shown = nodes[max(0, at - radius) : at + radius + 1]
    return "\n".join(("  > " if n is node else "    ") + (n.format_node() or "output") for n in shown)


def clone(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of graph and module tree that shares the tensors, and which new node stands for which old one."""
    shared: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    shared |= {id(t): t for _, t in attributes(module)}
    copied = copy.deepcopy(module, shared)
    return copied, dict(zip(module.graph.nodes, copied.graph.nodes, strict=True))


def argument_at(arguments: dict[str, Any], key: str) -> Any:
    """The argument `key` of bound arguments; "tensors.2" is item 2 of a list argument."""
    name, _, item = key.partition(".")
    return arguments[name][int(item)] if item else arguments[name]


def set_argument_at(node: fx.Node, key: str, value: Any) -> None:
    """As `set_argument`, for a key that may name an item of a list argument."""
    name, _, item = key.partition(".")
    if not item:
        set_argument(node, name, value)
        return
    items = list(bind(node)[name])
    items[int(item)] = value
    set_argument(node, name, items)


def example_size(size: int | torch.SymInt) -> int:
    """A length as it was for the example inputs (of the capture, which doubles a batch of 1)."""
    return size.node.hint if isinstance(size, torch.SymInt) else size
