"""Consumers of a graph: ops that multiply what they read with a weight, and which tensors hold weight and intercept."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.graph import attribute_readers, bind, fetch
from graphcomp.ir.module import keeps_statistics
from graphcomp.ops.answers import compute_of, move_of
from graphcomp.ops.facts import Fused, Routed
from graphcomp.ops.registry import facts_of

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Consumer:
    """An op with a weight that a parameter holds, as it is or with its elements moved.

    Attributes:
        node: the op.
        name: of the parameter, without ".weight"; of a part of one, with the name of the op.
        data, weight: arguments of the op; of an einsum "0" and "1".
        attribute: the get_attr node of the parameter.
        moves: the ops from there to the weight, in the order of the graph.
        index: shaped like the weight: which element of the parameter, flat, each element is.
        bias: name of the tensor that takes an intercept; "" where none does.
        sign: of the intercept in that tensor: -1 where it is the running mean of a batch norm behind the op.
    """

    node: fx.Node
    name: str
    data: str
    weight: str
    attribute: fx.Node
    moves: tuple[fx.Node, ...]
    index: Tensor
    bias: str = ""
    sign: int = 1

    @property
    def tensor(self) -> str:
        """Name of the parameter."""
        return str(self.attribute.target)


def operands(node: fx.Node) -> dict[str, fx.Node]:
    """Return the two operands of a product by argument; of an einsum by number; nothing for another op."""
    if node.op != "call_function":
        return {}
    if is_routed(node):
        return dict(list(bind(node).items())[:2])
    compute = compute_of(node)
    if compute is not None:
        arguments = bind(node)
        found = {name: arguments[name] for name in dict.fromkeys((*compute.data, compute.weight))}
        return found if all(isinstance(operand, fx.Node) for operand in found.values()) else {}
    if node.target is not aten.einsum.default:
        return {}
    return {str(k): tensor for k, tensor in enumerate(bind(node)["tensors"])}


def _multiplied(node: fx.Node) -> list[fx.Node]:
    """Return what an op multiplies; attention adds a mask."""
    if not isinstance(facts_of(node.target).integer, Fused):
        return node.all_input_nodes
    return [n for n in list(bind(node).values())[:3] if isinstance(n, fx.Node)]


def is_routed(node: fx.Node) -> bool:
    """Return whether an op multiplies each row with the matrix that the row is sent to."""
    return isinstance(facts_of(node.target).integer, Routed)


def ends_of(node: fx.Node) -> fx.Node | None:
    """Return where the rows of each matrix end, of an op that is routed; None where a batch of matrices does it."""
    found = list(bind(node).values())[2]
    return found if isinstance(found, fx.Node) else None


def multiplies(node: fx.Node) -> bool:
    """Return whether the op sums products of operands."""
    return node.op == "call_function" and facts_of(node.target).sums == "products"


class Consumers:
    """The consumers of a graph.

    Args:
        module: the graph.
        sources: value -> parameters that it is made of, of values that depend on nothing else.
        held: names of tensors that must stay as they are, as the rest of a larger model reads them.

    Attributes:
        at: op -> consumer.
        left: op with a weight that cannot be solved -> why.
        together: consumer -> all that read the same elements of one parameter, in the order of the graph.
    """

    def __init__(
        self, module: fx.GraphModule, sources: Mapping[fx.Node, frozenset[str]], held: Collection[str] = ()
    ) -> None:
        self.module, self.sources, self.held = module, sources, held
        self.readers = attribute_readers(module)
        self.at: dict[fx.Node, Consumer] = {}
        self.left: dict[fx.Node, str] = {}
        self.together: dict[Consumer, tuple[Consumer, ...]] = {}
        for node in module.graph.nodes:
            found = self._consumer(node)
            if isinstance(found, Consumer):
                self.at[node] = found
            elif found:
                self.left[node] = found
        self._tie()

    def name(self, node: fx.Node) -> str:
        """Return the name of the parameter that an op reads first, without ".weight"; else that of the op."""
        made_of = [self.sources.get(n, frozenset()) for n in node.all_input_nodes]
        names = sorted(name for found in made_of for name in found if not name.endswith("bias"))
        return names[0].removesuffix(".weight") if names else node.name

    def _consumer(self, node: fx.Node) -> Consumer | str:
        """Return the consumer that an op is, or why its weight cannot be solved; "" for an op without a weight."""
        if not multiplies(node):
            return ""
        found = operands(node)
        constant = [name for name, operand in found.items() if operand in self.sources]
        if not found or len(found) != 2:
            weighted = node not in self.sources and any(self._holds_parameters(n) for n in _multiplied(node))
            return f"there is no closed form for {node.target}" if weighted else ""
        if len(constant) != 1:
            return ""
        (weight,) = constant
        (data,) = (name for name in found if name != weight)
        if (chain := moved_parameter(found[weight])) is None:
            return "its weight is computed of a parameter"
        attribute, moves = chain
        if str(attribute.target) in self.held:
            return "the rest of the model reads its weight"
        shape = fetch(self.module, str(attribute.target)).shape
        index = run_moves(torch.arange(shape.numel()).reshape(shape), moves)
        name = str(attribute.target).removesuffix(".weight")
        return Consumer(node, name, data, weight, attribute, moves, index, *self._intercept(node))

    def _holds_parameters(self, node: fx.Node) -> bool:
        """Return whether a value is made of parameters alone; a mask is a constant, and no weight."""
        return any(isinstance(fetch(self.module, name), nn.Parameter) for name in self.sources.get(node, ()))

    def _tie(self) -> None:
        """Find consumers that read the same elements, and leave those whose parameter is read in another way, too."""
        of_tensor: dict[int, list[Consumer]] = {}
        for consumer in list(self.at.values()):
            of_tensor.setdefault(id(fetch(self.module, consumer.tensor)), []).append(consumer)
        for found in of_tensor.values():
            if not all(_same_elements(c, found[0]) for c in found):  # parts of one parameter
                found[:] = [replace(c, name=f"{c.name} ({c.node.name})") for c in found]
                self.at |= {c.node: c for c in found}
            others = [node for node in self._readers_of(found[0].tensor) if node not in self.at]
            for consumer in found:
                same = tuple(c for c in found if _same_elements(c, consumer))
                some = [c.node for c in found if c not in same and bool(torch.isin(c.index, consumer.index).any())]
                kinds = [
                    c.node for c in same if c.node.target is not consumer.node.target or c.weight != consumer.weight
                ]
                if read := [*others, *some, *kinds]:
                    self.left[consumer.node] = f"its weight is read by {read[0].name}, too"
                    del self.at[consumer.node]
                else:
                    self.together[consumer] = same

    def _readers_of(self, tensor: str) -> Iterator[fx.Node]:
        """Yield the ops that read a parameter, behind ops that move its elements."""
        waiting = [user for node in self.readers[tensor] for user in node.users]
        while waiting:
            node = waiting.pop()
            if _is_move(node) and node in self.sources:
                waiting += node.users
            else:
                yield node

    def _intercept(self, node: fx.Node) -> tuple[str, int]:
        """Return the tensor that can hold an intercept of the op's result, and its sign there."""
        compute = compute_of(node)
        bias = bind(node).get(compute.bias) if compute is not None and compute.bias else None
        if isinstance(bias, fx.Node):
            flat = self._alone(bias) and fetch(self.module, str(bias.target)).dim() == 1
            return (str(bias.target), 1) if flat else ("", 1)
        norm = next(iter(node.users))
        if compute is None or not compute.convolution or len(node.users) != 1 or not is_evaluated_norm(norm):
            return "", 1
        mean = bind(norm)["running_mean"]
        return (str(mean.target), -1) if self._alone(mean) else ("", 1)

    def _alone(self, attribute: fx.Node) -> bool:
        """Return whether a tensor is read in one place."""
        name = str(attribute.target)
        return (
            attribute.op == "get_attr"
            and len(self.readers[name]) == len(attribute.users) == 1
            and name not in self.held
        )


def _same_elements(a: Consumer, b: Consumer) -> bool:
    return a.index.shape == b.index.shape and bool((a.index == b.index).all())


def is_evaluated_norm(node: fx.Node) -> bool:
    """Return whether an op is a batch norm that uses its running statistics."""
    return node.target is aten.batch_norm.default and keeps_statistics(node) and not bind(node)["training"]


def _is_move(node: fx.Node) -> bool:
    move = move_of(node) if node.op == "call_function" else None
    return move is not None and not move.pools and not move.pads


def moved_parameter(weight: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """Return the parameter behind a weight and the ops between; None where these do more than move elements."""
    moves: list[fx.Node] = []
    while weight.op != "get_attr":
        if not _is_move(weight) or len(weight.all_input_nodes) != 1:
            return None
        moves.insert(0, weight)
        (weight,) = weight.all_input_nodes
    return weight, tuple(moves)


def run_moves(tensor: Tensor, moves: Sequence[fx.Node]) -> Tensor:
    """Return what ops that move elements make of a tensor."""
    for node in moves:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _, moved=tensor: moved)  # type: ignore[misc]
        tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return tensor
