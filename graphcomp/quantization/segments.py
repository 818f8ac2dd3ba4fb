"""Segments of a fake-quant graph whose rounding is learned together: from one value that all pass through to the next.

A residual block, a convolution with its clip, attention with the sum behind: whatever lies between two places where one
single value is carried on. A segment ends in front of the next quantizer or product, so that clips and norms belong to
the products in front of them. A segment of many layers (a network with long skips) falls into single layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from graphcomp.ops.answers import compute_of
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import constants_with_quantizers

MOST_LAYERS = 8
"""Layers with quantized weights of one segment; of more, each layer is a segment."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Nodes in a row.

    Attributes:
        nodes: in the order of the graph; the last one's value is compared with the float one.
        weights: quantizer nodes of weights that ops of the segment multiply with, and no op outside.
        entry: the value that is carried in; None where there is none.
    """

    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    entry: fx.Node | None = None

    @property
    def exit(self) -> fx.Node:
        """The node whose value is carried on."""
        return self.nodes[-1]

    @property
    def outside(self) -> list[fx.Node]:
        """What the segment reads and does not compute."""
        own = set(self.nodes)
        return list(dict.fromkeys(n for node in self.nodes for n in node.all_input_nodes if n not in own))


def segments_of(fake: fx.GraphModule) -> tuple[Segment, ...]:
    """Return segments that hold all nodes of a fake-quant graph but the output, in its order."""
    constant = constants_with_quantizers(fake)
    quantizers = dict(quantizer_nodes(fake))
    weights = [node for node in quantizers if node in constant and any(compute_of(user) for user in node.users)]
    nodes = [node for node in fake.graph.nodes if node.op != "output"]
    carries = _carriers(fake, set(weights))
    found: list[Segment] = []
    begin, entry, end = 0, None, -1  # `end`: where the segment may end, once it has a product
    for k, node in enumerate(nodes):
        opens = (node in quantizers and node not in constant) or any(n in weights for n in node.all_input_nodes)
        if opens and end >= begin:
            found += _split(tuple(nodes[begin : end + 1]), weights, entry)
            begin, entry = end + 1, nodes[end]
        waiting = nodes[begin : k + 1]
        if node in carries and (end >= begin or any(n in weights for w in waiting for n in w.all_input_nodes)):
            end = k
    if begin < len(nodes):
        found += _split(tuple(nodes[begin:]), weights, entry)
    return tuple(found)


def _carriers(fake: fx.GraphModule, weights: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes behind which their value alone is still to be read, of all that hang on quantized weights.

    Other values (masks, positions) may pass beside.
    """
    place = {node: k for k, node in enumerate(fake.graph.nodes)}
    last = {operand: place[node] for node in fake.graph.nodes for operand in node.all_input_nodes}
    heavy: set[fx.Node] = set()
    live: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in fake.graph.nodes:
        if any(n in heavy or (n in weights) for n in node.all_input_nodes):
            heavy.add(node)
            if last.get(node, -1) > place[node]:
                live.add(node)
        live = {other for other in live if last[other] > place[node]}
        if live == {node}:
            found.add(node)
    return found


def _split(nodes: tuple[fx.Node, ...], weights: Sequence[fx.Node], entry: fx.Node | None) -> Iterator[Segment]:
    """Yield one segment, or, of many layers, one for each."""
    own = set(nodes)
    inside = tuple(w for w in weights if w.users and own.issuperset(w.users))
    if len(inside) <= MOST_LAYERS:
        yield Segment(nodes, inside, entry)
        return
    begin = 0
    for k, node in enumerate(nodes):
        mine = tuple(n for n in node.all_input_nodes if n in inside and set(n.users) == {node})
        if not mine or compute_of(node) is None:
            continue
        if begin < k:
            yield Segment(nodes[begin:k], ())
        data = [n for n in node.all_input_nodes if n not in mine and n.op != "get_attr"]
        yield Segment((node,), mine, data[0] if len(data) == 1 else None)
        begin = k + 1
    if begin < len(nodes):
        yield Segment(nodes[begin:], ())
