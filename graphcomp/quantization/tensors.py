"""Tensors of a graph that a pass replaces or adds: who reads them, and under which name a new one stands."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from graphcomp.ir.graph import attributes, bind, set_argument, value
from graphcomp.torch_compat import buffer_table, parameter_table


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


def read_by_others(readers: dict[str, list[fx.Node]], attribute: fx.Node, reader: fx.Node) -> bool:
    """Whether any node but `reader` uses the tensor that the get_attr node `attribute` reads."""
    nodes = readers.get(str(attribute.target), [attribute])
    return any(user is not reader for node in nodes for user in node.users)


def add_tensor(module: fx.GraphModule, name: str, tensor: Tensor, like: fx.Node) -> fx.Node:
    """Register a tensor and read it at the insertion point.

    Args:
        name: of a parameter where `tensor` is one, else of a buffer; a number is added where it is taken. Modules on
            the way are made where there are none.
        like: a node whose fake tensors the new one's belongs with.

    Returns:
        The get_attr node.
    """
    owner_name, _, last = name.rpartition(".")
    owner: nn.Module = module
    for part in owner_name.split(".") if owner_name else ():
        if not isinstance(getattr(owner, part, None), nn.Module):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    free, k = last, 0
    while getattr(owner, free, None) is not None:
        free, k = f"{last}_{k + 1}", k + 1
    parameter_table(owner).pop(free, None)  # a bias that is None stands there by name
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(free, tensor)
    else:
        owner.register_buffer(free, tensor)
    node = module.graph.get_attr(f"{owner_name}.{free}".lstrip("."))
    node.meta["val"] = _fake(tensor, like)
    return node


def replace_argument(
    module: fx.GraphModule,
    node: fx.Node,
    argument: str,
    parameter: nn.Parameter,
    name: str,
    readers: dict[str, list[fx.Node]],
) -> None:
    """Give `node` another parameter: in the place of the one it reads, or as a new one.

    Args:
        name: of a new one, made where `node` reads none yet, one that others read too, or what other nodes compute.
        readers: see `attribute_readers`.
    """
    old = bind(node)[argument]
    if isinstance(old, fx.Node) and old.op == "get_attr" and not read_by_others(readers, old, node):
        put(module, str(old.target), parameter)
        return
    with module.graph.inserting_before(node):
        fresh = add_tensor(module, name, parameter, node)
    set_argument(node, argument, fresh)
    if isinstance(old, fx.Node) and old.op == "get_attr" and not old.users:
        module.graph.erase_node(old)


def put(module: fx.GraphModule, name: str, parameter: nn.Parameter) -> None:
    """`parameter` under `name`, where a parameter, a buffer or a constant stands; that one is not written to."""
    owner_name, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    buffer_table(owner).pop(last, None)
    setattr(owner, last, parameter)


def _fake(tensor: Tensor, like: fx.Node) -> Any:
    mode = getattr(value(like), "fake_mode", None)
    return mode.from_tensor(tensor, static_shapes=True) if mode else tensor
