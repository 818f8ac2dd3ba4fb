"""Quantizers of values that were only moved: needless in training, wanted by integer kernels.

What a view, a transpose or a max pooling returns lies on the grid of what it read; to quantize it again changes nothing
and costs a pass. Where the largest level lies above the range it even keeps gradients from the elements there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from graphcomp.ir.graph import bind, clone, value
from graphcomp.ir.memory import writers
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import after, redirect
from graphcomp.ops.answers import move_of
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import constants_with_quantizers
from graphcomp.quantization.placement import fills
from graphcomp.quantization.sites import Site


def without_repeats(sites: Sequence[Site], graph: fx.Graph) -> tuple[Site, ...]:
    """Return the sites without values that were moved from another value of the same quantizer."""
    nodes = {node.name: node for node in graph.nodes}
    return tuple(site if site.is_weight else replace(site, at=_not_moved(site.at, nodes)) for site in sites)


def _not_moved(at: Mapping[str, tuple[str, ...]], nodes: Mapping[str, fx.Node]) -> dict[str, tuple[str, ...]]:
    sources = {value: moved_from(nodes[value]) for value in at}
    moved = {value for value, source in sources.items() if source is not None and value in at.get(source.name, ())}
    return {value: users for value, users in at.items() if value not in moved}


def moved_from(node: fx.Node) -> fx.Node | None:
    """What a node moves the elements of; None where it does more than that, or returns several values."""
    move = move_of(node)
    if move is None or not isinstance(node.meta.get("val"), torch.Tensor) or fills(node):
        return None
    source = bind(node)[move.operand]
    return source if isinstance(source, fx.Node) else None


def quantizer_before(node: fx.Node, quantizers: Mapping[fx.Node, object]) -> fx.Node | None:
    """The fake-quant node on whose grid `node` lies: itself, or one that it was moved from."""
    found: fx.Node | None = node
    while found is not None and found not in quantizers:
        found = moved_from(found)
    return found


@dataclass(frozen=True)
class RepeatQuantizers(GraphPass):
    """Put a quantizer behind every value that was moved from a quantized one, unless an op writes into the value after
    that: the graph computes the same."""

    name: ClassVar[str] = "repeat quantizers behind moves"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return a new module that shares the tensors of `module`."""
        repeated, _ = clone(module)
        written, constant = writers(repeated), constants_with_quantizers(repeated)
        quantizers = {node: str(node.target) for node, _ in quantizer_nodes(repeated) if node not in constant}
        for node in list(repeated.graph.nodes):
            source = moved_from(node)
            own = quantizers.get(source) if source is not None else None
            users = [user for user in node.users if quantizers.get(user) != own and user.op != "output"]
            if source is None or own is None or not users or node in written:
                continue
            again = after(node).submodule(own, node, val=value(node))
            quantizers[again] = own
            redirect(users, node, again)
        repeated.recompile()
        return repeated
