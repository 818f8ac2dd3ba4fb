"""Tensors of a graph that a pass replaces or adds: who reads them, and under which name a new one stands."""

from __future__ import annotations

from torch import fx, nn

from graphcomp.ir.graph import bind, set_argument
from graphcomp.ir.rewrite import before
from graphcomp.torch_compat import buffer_table


def read_by_others(readers: dict[str, list[fx.Node]], attribute: fx.Node, reader: fx.Node) -> bool:
    """Whether any node but `reader` uses the tensor that the get_attr node `attribute` reads."""
    nodes = readers.get(str(attribute.target), [attribute])
    return any(user is not reader for node in nodes for user in node.users)


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
    set_argument(node, argument, before(node).tensor(module, name, parameter))
    if isinstance(old, fx.Node) and old.op == "get_attr" and not old.users:
        module.graph.erase_node(old)


def put(module: fx.GraphModule, name: str, parameter: nn.Parameter) -> None:
    """`parameter` under `name`, where a parameter, a buffer or a constant stands; that one is not written to."""
    owner_name, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    buffer_table(owner).pop(last, None)
    setattr(owner, last, parameter)
