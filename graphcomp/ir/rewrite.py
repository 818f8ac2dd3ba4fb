"""Make nodes and tensors of a graph.

A node that a pass makes says what the node computes (`meta["val"]`), and has the source line and the module of the op
that the node stands for: errors, reports and later passes read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from graphcomp.ir.graph import tensor_values, value
from graphcomp.torch_compat import FakeTensor, FakeTensorMode, parameter_table

ORIGIN = ("stack_trace", "nn_module_stack")
"""Keys of `meta` that say where in the user's code a node comes from."""


@dataclass(frozen=True)
class Maker:
    """Makes nodes in front of a node, one behind the other.

    Attributes:
        point: the node.
        like: the op that the new nodes stand for. Of a tensor or an input, the first op that reads it.
    """

    point: fx.Node
    like: fx.Node

    def __call__(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a call of `target`. What the call computes is known where the values of its operands are."""
        with self.point.graph.inserting_before(self.point):
            node = self.point.graph.call_function(target, args, kwargs)
        known = all(value(operand) is not None for operand in node.all_input_nodes)
        return self._made(node, computed(node) if known else None)

    def submodule(self, name: str, *args: fx.Node, val: Any) -> fx.Node:
        """Return a call of a submodule, which computes `val`."""
        with self.point.graph.inserting_before(self.point):
            return self._made(self.point.graph.call_module(name, args), val)

    def tensor(self, module: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
        """Register a tensor in `module`, and return a node that reads the tensor.

        Args:
            name: of a parameter where `tensor` is one, else of a buffer; a number is added where the name is taken.
                Modules on the way are made where there are none.
        """
        with self.point.graph.inserting_before(self.point):
            node = self.point.graph.get_attr(_register(module, name, tensor))
        mode = _fake_mode(self.like)
        node.meta["val"] = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
        return node

    def _made(self, node: fx.Node, val: Any) -> fx.Node:
        node.meta = origin(self.like)
        if val is not None:
            node.meta["val"] = val
        return node


def before(node: fx.Node, like: fx.Node | None = None) -> Maker:
    """Make nodes in front of `node`, which stand for `like`; None: for `node`."""
    return Maker(node, like or node)


def after(node: fx.Node, like: fx.Node | None = None) -> Maker:
    """Make nodes behind `node`, which stand for `like`; None: for `node`."""
    return Maker(node.next, like or node)


def become(node: fx.Node, target: Any, *args: Any) -> None:
    """Let `node` call another op. The node keeps the name, by which costs know the op, and the users."""
    node.target, node.args, node.kwargs = target, args, {}
    node.meta["val"] = computed(node)


def redirect(users: Iterable[fx.Node], old: fx.Node, new: fx.Node) -> None:
    """Let `users` read `new` in place of `old`."""
    for user in users:
        user.replace_input_with(old, new)


def replace_node(old: fx.Node, new: fx.Node) -> None:
    """Let the users of `old` read `new`, and delete `old`."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def computed(node: fx.Node) -> Any:
    """Return what the call of a function computes from the values of the operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def origin(node: fx.Node) -> dict[str, Any]:
    """Return the entries of `meta` that say where the op `node` comes from, or the first op that reads `node`."""
    said = next((known for known in (node, *node.users) if known.meta.get("stack_trace")), node)
    return {key: said.meta[key] for key in ORIGIN if key in said.meta}


def _fake_mode(like: fx.Node) -> FakeTensorMode | None:
    """Return the mode of the graph's fake tensors; None where no node says what it computes."""
    for node in (like, *like.graph.nodes):
        fakes = [fake for fake in tensor_values(node) if isinstance(fake, FakeTensor)]
        if fakes:
            return fakes[0].fake_mode
    return None


def _register(module: nn.Module, name: str, tensor: Tensor) -> str:
    """Give `module` a parameter or a buffer; return the name."""
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
    return f"{owner_name}.{free}".lstrip(".")
