"""The insertion pass: one fake-quant node per value of each site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphcomp.ir.graph import clone, value
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import after, redirect
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.sites import Site


@dataclass(frozen=True)
class InsertQuantizers(GraphPass):
    """Put the quantizers of sites behind the values, for the users that the sites name.

    Users that two sites of one value name read the value through both quantizers, in the order of the sites.
    """

    sites: Sequence[Site]
    name: ClassVar[str] = "insert quantizers"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """A new module that shares the tensors of `module`; the sites must be of `module`'s graph."""
        quantized, _ = clone(module)
        nodes = {node.name: node for node in quantized.graph.nodes}
        position = {name: k for k, name in enumerate(nodes)}
        for site in self.sites:
            quantized.add_submodule(site.name, _quantizer(site, nodes[next(iter(site.at))]))
        read: dict[tuple[str, str], fx.Node] = {}  # value and user -> what the user reads of the value
        spots = [(at, users, site.name) for site in self.sites for at, users in site.at.items()]
        for at, users, name in sorted(spots, key=lambda spot: position[spot[0]]):
            readers = [nodes[user] for user in users]
            node = read.get((at, users[0]), nodes[at])
            wrapped = after(node).submodule(name, node, val=value(node))
            redirect(readers, node, wrapped)
            read.update({(at, user): wrapped for user in users})
        quantized.recompile()
        return quantized


def _quantizer(site: Site, node: fx.Node) -> Quantizer:
    found = value(node)
    assert isinstance(found, Tensor)
    shape = [n if isinstance(n, int) else -1 for n in found.shape]
    quantizer = make_quantizer(site.spec, shape=shape if site.is_weight else None, dim=site.dim)
    dtype = found.dtype if found.dtype in (torch.float32, torch.float64) else torch.float32
    return quantizer.to(device=found.device, dtype=dtype)


def quantizer_nodes(module: fx.GraphModule) -> Iterator[tuple[fx.Node, Quantizer]]:
    """Each fake-quant node of the graph with its quantizer."""
    for node in module.graph.find_nodes(op="call_module"):
        found = module.get_submodule(str(node.target))
        if isinstance(found, Quantizer):
            yield node, found
