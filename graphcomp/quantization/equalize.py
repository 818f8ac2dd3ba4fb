"""Cross-layer equalization: channels that one layer makes large and the next reads small meet in the middle.

Where a value passes only through what scales with it (relu, pooling, a residual sum), the layers that make a channel
may divide it by s and those that read it multiply it by s. s is chosen so that the channel spans the same range in both
weights, and with one step per tensor no channel falls between the levels.

Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.1; s as in equation 11, passed over the pairs until it settles.
Differences: values that are added share one s, chosen by the geometric mean of the ranges of all layers concerned; and
no channel is scaled by more than MOST, lest the bias of a nearly dead one become the largest activation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.graph import assign, attributes, bind, clone, fetch, is_op, value
from graphcomp.ops.answers import clip_of, compute_of, is_convolution, operands_of
from graphcomp.ops.facts import Compute
from graphcomp.ops.registry import facts_of
from graphcomp.quantization.placement import channels_of

aten = torch.ops.aten

ROUNDS = 50
SETTLED = 1e-3  # of a logarithm: a tenth of a percent
MOST = 1e3


def equalize(module: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """Even out the ranges of weights along the channels between layers; the float function stays as it is.

    Args:
        module: a captured graph without quantizers, batch norms folded. Not changed.

    Returns:
        A new module that shares the tensors that stay, and a line for each kind of op that was in the way.
    """
    equal, _ = clone(module)
    plan = _Plan(equal)
    links = [link for link in plan.links() if not link.blocked and link.made_by and link.read_by]
    with torch.no_grad():
        for _ in range(ROUNDS):
            if max((link.balance() for link in links), default=0.0) < SETTLED:
                break
        for layer in {id(end.layer): end.layer for link in links for end in (*link.made_by, *link.read_by)}.values():
            layer.write(equal)
    return equal, plan.notes()


# ------------------------------------------------------------------------------------------------ layers and links
class Layer:
    """A convolution or linear layer, and by what its outputs are divided and its inputs multiplied.

    Attributes:
        extent: (groups, o / groups, i / groups) float64: the largest magnitude of each kernel, scaled as far as it is.
        made, read: (o,) and (i,) float64: the factors so far.
    """

    def __init__(self, module: fx.GraphModule, node: fx.Node) -> None:
        arguments = bind(node)
        self.node = node
        operands = operands_of(node)
        self.weight = str(arguments[operands.weight].target)
        self.bias = str(arguments[operands.bias].target) if arguments[operands.bias] else ""
        weight = fetch(module, self.weight).detach()
        self.groups = arguments.get("groups", 1)
        extent = weight.double().abs().flatten(2).amax(2) if weight.dim() > 2 else weight.double().abs()
        self.extent = extent.view(self.groups, -1, extent.shape[1])
        self.made = extent.new_ones(extent.shape[0])
        self.read = extent.new_ones(extent.shape[1] * self.groups)

    def divide_outputs(self, s: Tensor) -> None:
        self.made *= s
        self.extent /= s.view(self.groups, -1, 1)

    def multiply_inputs(self, s: Tensor) -> None:
        self.read *= s
        self.extent *= s.view(self.groups, 1, -1)

    def write(self, module: fx.GraphModule) -> None:
        """New tensors in place of the old."""
        old = fetch(module, self.weight)
        shape = [self.groups, -1, self.extent.shape[2], *[1] * (old.dim() - 2)]
        factor = self.read.view(self.groups, 1, -1) / self.made.view(self.groups, -1, 1)
        scaled = old.double().view(*shape[:3], *old.shape[2:]) * factor.view(*factor.shape, *shape[3:])
        _put(module, self.weight, scaled.view(old.shape))
        if self.bias:
            _put(module, self.bias, fetch(module, self.bias).double() / self.made)


def _put(module: fx.GraphModule, name: str, tensor: Tensor) -> None:
    old = fetch(module, name)
    new = tensor.to(old.dtype)
    assign(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


@dataclass
class _End:
    """Where a link meets a layer; `repeat` inputs in a row belong to one channel (after a flatten)."""

    layer: Layer
    repeat: int = 1


@dataclass(eq=False)
class _Link:
    """Values whose channels are scaled as one, and the layers at both ends."""

    channels: int
    made_by: list[_End] = field(default_factory=list)
    read_by: list[_End] = field(default_factory=list)
    blocked: str = ""
    merged: _Link | None = None

    def balance(self) -> float:
        """Scale the channels to equal ranges at both ends; the largest |log s|."""
        rows = [end.layer.extent.amax(2).view(-1) for end in self.made_by]
        columns = [end.layer.extent.amax(1).view(-1, end.repeat).amax(1) for end in self.read_by]
        logs = _mean_log(rows) - _mean_log(columns)
        # a channel that is zero on one side has nothing to be evened out
        s = torch.exp(torch.where(logs.isfinite(), logs / 2, 0.0))
        so_far = self.made_by[0].layer.made
        s = (so_far * s).clamp(1 / MOST, MOST) / so_far
        for end in self.made_by:
            end.layer.divide_outputs(s)
        for end in self.read_by:
            end.layer.multiply_inputs(s.repeat_interleave(end.repeat))
        return float(s.log().abs().max())


def _mean_log(ranges: list[Tensor]) -> Tensor:
    return torch.stack(ranges).log().mean(0)


@dataclass(frozen=True)
class _Place:
    """On which dim of a value the channels of a link lie, `repeat` indices each."""

    link: _Link
    dim: int
    repeat: int = 1


# ------------------------------------------------------------------------------------------------ the walk
class _Plan:
    """Follows the channels of each layer's result through the graph."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.readers = _readers(module)
        self.places: dict[fx.Node, _Place] = {}
        self.all: list[_Link] = []
        for node in module.graph.nodes:
            place = self._after(node)
            if place is None:
                self._block(node)
            else:
                self.places[node] = place

    def links(self) -> Iterator[_Link]:
        """Each link once."""
        yield from (link for link in self.all if link.merged is None)

    def notes(self) -> list[str]:
        """What kept layers from being equalized with those that read them."""
        counts = Counter(link.blocked for link in self.links() if link.blocked)
        return [f"not equalized: {n} value{'s'[: n > 1]} {reason}" for reason, n in counts.items()]

    def _after(self, node: fx.Node) -> _Place | None:
        """Where the result's channels lie; None where the op does not let a scale through."""
        if not is_op(node):
            return None
        compute, scales = compute_of(node), facts_of(node.target).scales
        if compute is not None and compute.bias and compute.out == 0:
            return self._layer(node, compute)
        if scales == "added":
            return self._sum(node)
        operands = node.all_input_nodes
        place = self._place(operands[0]) if len(operands) == 1 else None
        if place is None or not isinstance(value(node), Tensor):
            return None
        if scales == "elements" or (scales == "channels" and place.dim == 1 and place.repeat == 1):
            return place
        if scales == "averaged":
            return _after_mean(node, place)
        if scales == "regrouped":
            return _after_reshape(value(operands[0]), value(node), place)
        return None

    def _layer(self, node: fx.Node, compute: Compute) -> _Place | None:
        arguments = bind(node)
        own = [arguments[name] for name in (compute.weight, compute.bias) if arguments[name]]
        if any(n.op != "get_attr" or self.readers[id(fetch(self.module, str(n.target)))] != 1 for n in own):
            return None  # computed, or tied to another layer's
        layer = Layer(self.module, node)
        (data,) = (arguments[name] for name in compute.data)
        place = self._place(data)
        rank = value(data).dim()
        contracted = channels_of(node)
        if place is not None and (place.dim, rank) == (contracted, max(rank, 2)) and self._fits(node, place):
            place.link.read_by.append(_End(layer, place.repeat))
        elif place is not None:
            self._stop(place.link, node)
        made = _Link(len(layer.made), [_End(layer)])
        self.all.append(made)
        return _Place(made, channels_of(node))

    def _fits(self, node: fx.Node, place: _Place) -> bool:
        return place.repeat == 1 or not is_convolution(node)

    def _sum(self, node: fx.Node) -> _Place | None:
        arguments = bind(node)
        operands = arguments["self"], arguments["other"]
        one, other = (self._place(n) if isinstance(n, fx.Node) else None for n in operands)
        if one is None or other is None or (one.dim, one.repeat) != (other.dim, other.repeat):
            return None
        if value(operands[0]).shape != value(operands[1]).shape or one.link.channels != other.link.channels:
            return None
        return _Place(_merge(one.link, other.link), one.dim, one.repeat)

    def _place(self, node: fx.Node) -> _Place | None:
        place = self.places.get(node)
        return None if place is None else _Place(_root(place.link), place.dim, place.repeat)

    def _block(self, node: fx.Node) -> None:
        """Nothing may be scaled that this node reads."""
        for operand in node.all_input_nodes:
            place = self._place(operand)
            if place is not None:
                self._stop(place.link, node)

    def _stop(self, link: _Link, node: fx.Node) -> None:
        if node.op == "output":
            why = "returned by the model"
        elif clip_of(node):
            why = f"clipped at a fixed number by {node.target}: relu alone scales with its operand"
        else:
            why = f"read by {node.target}, which does not scale channel by channel"
        link.blocked = link.blocked or why


def _root(link: _Link) -> _Link:
    while link.merged is not None:
        link = link.merged
    return link


def _merge(a: _Link, b: _Link) -> _Link:
    if a is b:
        return a
    b.merged = a
    a.made_by += b.made_by
    a.read_by += b.read_by
    a.blocked = a.blocked or b.blocked
    return a


def _after_mean(node: fx.Node, place: _Place) -> _Place | None:
    arguments = bind(node)
    rank = value(node.all_input_nodes[0]).dim()
    dims = {d % rank for d in arguments["dim"] or range(rank)}
    if place.dim in dims:
        return None
    gone = 0 if arguments["keepdim"] else sum(d < place.dim for d in dims)
    return _Place(place.link, place.dim - gone, place.repeat)


def _after_reshape(before: Tensor, after: Tensor, place: _Place) -> _Place | None:
    """(n, c, …) as (n, c …); other views are not followed."""
    if place.dim != 1 or after.dim() != 2 or before.dim() < 2:
        return None
    lengths = [n for n in before.shape[1:] if isinstance(n, int)]
    if len(lengths) != before.dim() - 1 or after.shape[1] != math.prod(lengths):
        return None
    return _Place(place.link, 1, place.repeat * math.prod(lengths[1:]))


def _readers(module: fx.GraphModule) -> Counter[int]:
    """id(tensor) -> how many nodes read it, under whatever name."""
    return Counter(id(t) for node, t in attributes(module) for _ in node.users)
