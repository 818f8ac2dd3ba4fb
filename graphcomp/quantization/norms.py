"""Values whose channels a norm scales, and the layers that read them: where factors of channels can be folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.ir.graph import attribute_readers, bind, bound, fetch, is_op, module_path, value
from graphcomp.ir.run_nodes import compute_node
from graphcomp.ops.answers import compute_of, keeps_zeros, move_of, operands_of
from graphcomp.ops.registry import facts_of
from graphcomp.pruning.consumers import moved_parameter
from graphcomp.quantization.fold import folded_nodes
from graphcomp.quantization.placement import channels_of, constants, layer_name
from graphcomp.quantization.setting import Held
from graphcomp.quantization.spec import QuantConfig, QuantSpec, matches
from graphcomp.quantization.tensors import read_by_others

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Maker:
    """What scales a value per channel: a norm with a weight, or a product with one number per channel.

    Attributes:
        at: the node whose value has the channels.
        dim: the dim of the channels, from 0.
        scaled: the node that reads the scale; `at`, but for a sum of a product and one number per channel.
        scale: the argument of `scaled`.
        shift: the argument of `at` that holds one number per channel, which is added; "" without one.
    """

    at: fx.Node
    dim: int
    scaled: fx.Node
    scale: str
    shift: str = ""

    @property
    def channels(self) -> int:
        """How many channels the value has."""
        return int(value(self.at).shape[self.dim])


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads channels of a norm, behind ops that move them or not.

    Attributes:
        node: the op.
        data: the argument that is read.
        dim: the dim of the channels in this argument.
        weight: the argument of the weight, and its dim of inputs.
        held: the parameter of the weight, that nothing else reads.
        bias: the argument that takes a shift; "" where none does.
    """

    node: fx.Node
    data: str
    dim: int
    weight: tuple[str, int]
    held: Held
    bias: str

    @property
    def read(self) -> fx.Node:
        """The node that is read."""
        found: fx.Node = bind(self.node)[self.data]
        return found


@dataclass(frozen=True, eq=False)
class Norm:
    """A maker, and the layers that read it.

    Attributes:
        readers: all layers that read the value.
        moves: ops between, in the order of the graph.
        others: whether something else reads the value, or what moves it.
    """

    maker: Maker
    readers: tuple[Reader, ...]
    moves: tuple[fx.Node, ...]
    others: bool

    @property
    def shifts(self) -> bool:
        """Whether norm and layers have a bias."""
        return bool(self.maker.shift) and all(reader.bias for reader in self.readers)


def find_norms(module: fx.GraphModule, config: QuantConfig, ignore: Sequence[str]) -> tuple[list[Norm], dict[str, str]]:
    """Return the norms whose channels may be evened out, and those that may not, with the reason."""
    constant, readers = constants(module.graph), attribute_readers(module)
    found: list[Norm] = []
    left: dict[str, str] = {}
    folded = folded_nodes(module.graph)
    for node in module.graph.nodes:
        maker = None if node in folded else _maker(node, constant)
        norm = None if maker is None else _norm(module, maker, config, ignore, constant, readers)
        if isinstance(norm, Norm):
            found.append(norm)
        elif norm:
            left[node.name] = norm
    return found, left


def _maker(node: fx.Node, constant: set[fx.Node]) -> Maker | None:
    """Return how a node scales its channels, if it does."""
    if not is_op(node) or node in constant or not isinstance(value(node), Tensor):
        return None
    arguments, rank = bind(node), value(node).dim()
    if facts_of(node.target).norm:
        shape = arguments.get("normalized_shape")
        dim = rank - 1 if shape is not None else 1
        if (shape is not None and len(shape) != 1) or arguments.get("training") or rank <= dim:
            return None
        scale, shift = (name if _along(arguments.get(name), node, dim, constant) else "" for name in ("weight", "bias"))
        return Maker(node, dim, node, "weight", shift) if scale else None
    if node.target is aten.mul.Tensor:
        for name in ("self", "other"):
            dim = _dim_of(arguments[name], node, constant)
            if dim is not None and not _only_added(node, dim, constant):
                return Maker(node, dim, node, name)
    if node.target is aten.add.Tensor and arguments["alpha"] == 1:
        for name, other in (("self", "other"), ("other", "self")):
            dim, product = _dim_of(arguments[name], node, constant), arguments[other]
            if dim is None or not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor:
                continue
            for scale in ("self", "other"):
                if _dim_of(bind(product)[scale], product, constant) == dim and len(product.users) == 1:
                    return Maker(node, dim, product, scale, name)
    return None


def _only_added(node: fx.Node, dim: int, constant: set[fx.Node]) -> bool:
    """Whether a product is read by a sum with one number per channel alone, which then stands for both."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not aten.add.Tensor:
        return False
    return any(_dim_of(operand, users[0], constant) == dim for operand in users[0].all_input_nodes)


def _dim_of(operand: Any, node: fx.Node, constant: set[fx.Node]) -> int | None:
    """Return the dim of a result along which a constant operand has one number per index; None where it has not."""
    if operand not in constant or value(node) is None or not isinstance(value(operand), Tensor):
        return None
    shape, rank = value(operand).shape, value(node).dim()
    wide = [d + rank - len(shape) for d, size in enumerate(shape) if size != 1]
    if len(wide) != 1 or value(node).shape[wide[0]] != value(operand).numel():
        return None
    return int(wide[0])


def _along(operand: Any, node: fx.Node, dim: int, constant: set[fx.Node]) -> bool:
    return operand in constant and tuple(value(operand).shape) == (value(node).shape[dim],)


def _norm(
    module: fx.GraphModule,
    maker: Maker,
    config: QuantConfig,
    ignore: Sequence[str],
    constant: set[fx.Node],
    readers: dict[str, list[fx.Node]],
) -> Norm | str:
    """Return a maker with the layers that read its value; or why there are none, "" where none would be quantized."""
    found: list[Reader] = []
    moves: list[fx.Node] = []
    why, others, asked = "", False, False
    waiting = [maker.at]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if compute_of(user) is not None:
                reader = _reader(module, user, node, constant, readers)
                asked = asked or _has_range(_activations(user, config, ignore, constant))
                if isinstance(reader, Reader):
                    found.append(reader)
                else:
                    why = why or reader
            elif _moves(user, node, constant) and _leads_to_layers(user, constant):
                moves.append(user)
                waiting.append(user)
            else:
                others = True
    if not asked or not isinstance(maker.channels, int) or maker.channels < 2:
        return ""
    if why:
        return why
    place = {node: k for k, node in enumerate(module.graph.nodes)}
    found.sort(key=lambda reader: place[reader.node])
    return Norm(maker, tuple(found), tuple(sorted(moves, key=place.__getitem__)), others)


def _leads_to_layers(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a layer reads what an op moves, behind more such ops or not."""
    return any(
        compute_of(user) is not None or (_moves(user, node, constant) and _leads_to_layers(user, constant))
        for user in node.users
    )


def _moves(node: fx.Node, operand: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether an op only moves the elements of a value; where the channels are then is looked up in a run."""
    if not is_op(node) or not isinstance(value(node), Tensor):
        return False
    move = move_of(node)
    passes = move is not None and not move.pools and not move.pads and bind(node)[move.operand] is operand
    return passes or (keeps_zeros(node) and node.all_input_nodes[0] is operand and not (move and move.pads))


def _activations(node: fx.Node, config: QuantConfig, ignore: Sequence[str], constant: set[fx.Node]) -> QuantSpec | None:
    path = module_path(node) or layer_name(bind(node).get(operands_of(node).weight), constant)
    return None if any(matches(name, path) for name in ignore) else config.specs(path)[1]


def _has_range(spec: QuantSpec | None) -> bool:
    """Whether a value is quantized by a range that is read off data."""
    return spec is not None and not spec.dynamic


def _reader(
    module: fx.GraphModule,
    node: fx.Node,
    read: fx.Node,
    constant: set[fx.Node],
    readers: dict[str, list[fx.Node]],
) -> Reader | str:
    """Return the layer that an op is, or why its weight cannot take factors."""
    operands, arguments = operands_of(node), bind(node)
    weight = arguments[operands.weight]
    data = [name for name in operands.data if arguments[name] is read and arguments[name] is not weight]
    if weight not in constant or len(data) != 1 or sum(n is read for n in arguments.values()) != 1:
        return f"{node.name} multiplies it with a value that is computed from the inputs"
    if data[0] != operands.data[0]:
        return f"{node.name} has its constant on the left"
    chain = moved_parameter(weight)
    if chain is None:
        return f"the weight of {node.name} is computed"
    source, moves = chain
    own = [*moves, node]
    if read_by_others(readers, source, own[0]) or any(len(n.users) > 1 for n in moves):
        return f"the weight of {node.name} is read elsewhere, too"
    held = Held(source, moves, fetch(module, str(source.target)).detach())
    if int(held.index.bincount().max()) != 1:
        return f"the weight of {node.name} repeats elements"
    rank = value(weight).dim()
    if operands.convolution:
        dim, inputs = channels_of(node), 0 if operands.transposed else 1
    else:
        out = operands.out % rank
        if rank < 2 or value(read).dim() < 2 or out < rank - 2:
            return f"{node.name} multiplies a vector"
        dim, inputs = value(read).dim() - 1, 2 * rank - 3 - out
    return Reader(node, data[0], dim, (operands.weight, inputs), held, _bias(module, node, readers))


def _bias(module: fx.GraphModule, node: fx.Node, readers: dict[str, list[fx.Node]]) -> str:
    """Return the argument of a bias that can take a shift: with padding, the edges read no shifted zeros."""
    operands, arguments = operands_of(node), bind(node)
    bias = arguments.get(operands.bias) if operands.bias else None
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or read_by_others(readers, bias, node):
        return ""
    if tuple(value(bias).shape) != (value(node).shape[channels_of(node)],):
        return ""
    padding = arguments.get("padding", 0)
    padded = isinstance(padding, str) or any(padding if isinstance(padding, (list, tuple)) else [padding])
    scaled = (arguments.get("beta", 1), arguments.get("alpha", 1)) != (1, 1)
    return "" if padded or scaled or operands.transposed else operands.bias


class Moved:
    """Follows the channels of norms through ops that move elements, by numbers in their place.

    Attributes:
        lost: norm -> the layer that does not read all channels in their order.
    """

    def __init__(self, norms: Sequence[Norm]) -> None:
        self.at = {norm.maker.at: norm for norm in norms}
        self.moves = {move: norm for norm in norms for move in norm.moves}
        self.readers = {reader.node: norm for norm in norms for reader in norm.readers}
        self.dims: dict[fx.Node, int | None] = {norm.maker.at: norm.maker.dim for norm in norms}
        self.lost: dict[Norm, str] = {}

    def compute(self, module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a node, and find the channels in the result of one that moves them."""
        if node in self.moves:
            move = move_of(node)
            name = move.operand if move is not None else next(iter(bind(node)))
            operand = bind(node)[name]
            given = bound(node.target, args, kwargs)
            dim = self.dims.get(operand)
            if dim is not None:
                numbers = _numbers(given[name], dim)
                target: Any = node.target
                self.dims[node] = _found(target(**{**given, name: numbers}), numbers.shape[dim])
        if norm := self.readers.get(node):
            for reader in norm.readers:
                if reader.node is node and self.dims.get(reader.read) != reader.dim:
                    self.lost[norm] = node.name
        return compute_node(module, node, args, kwargs)


def _numbers(like: Tensor, dim: int) -> Tensor:
    """A tensor of a shape that holds the number of the channel, shifted so that it has both signs."""
    count = like.shape[dim]
    own = torch.arange(count, dtype=torch.float32, device=like.device) - count // 2 + 0.5
    return own.view([-1 if d == dim else 1 for d in range(like.dim())]).expand(like.shape)


def _found(found: Tensor, count: int) -> int | None:
    """Return the dim along which a tensor holds the numbers of all channels in order."""
    for dim in reversed(range(found.dim())):
        if found.shape[dim] == count and torch.equal(found.float(), _numbers(found, dim)):
            return dim
    return None
