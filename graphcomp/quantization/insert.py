"""The insertion pass: one fake-quant node per site of a placement."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.graph import clone, value
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import after, redirect
from graphcomp.quantization.placement import Placement, Site
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.make import make_quantizer

PREFIX = "graphcomp_quantizers"


@dataclass(frozen=True)
class InsertQuantizers(GraphPass):
    """Put a quantizer behind each value of a placement, for the users that it names."""

    placement: Placement
    name: ClassVar[str] = "insert quantizers"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """A new module that shares the tensors of `module`; the placement must be of `module`'s graph."""
        quantized, new_node = clone(module)
        names = Names(quantized)
        by_share: dict[object, str] = {}
        for site in self.placement.sites:
            node = new_node[site.value]
            if site.shares not in by_share:
                by_share[site.shares] = f"{PREFIX}.{names.of(node)}"
                quantized.add_submodule(by_share[site.shares], _quantizer(site))
            users = [new_node[user] for user in site.users]
            redirect(users, node, after(node).submodule(by_share[site.shares], node, val=value(node)))
        quantized.recompile()
        return quantized


def _quantizer(site: Site) -> Quantizer:
    found = value(site.value)
    assert isinstance(found, Tensor)
    shape = [n if isinstance(n, int) else -1 for n in found.shape]
    quantizer = make_quantizer(site.spec, shape=shape if site.is_weight else None, dim=site.dim)
    dtype = found.dtype if found.dtype in (torch.float32, torch.float64) else torch.float32
    return quantizer.to(device=found.device, dtype=dtype)


class Names:
    """A name per quantizer that says what it quantizes: 'layer1_0_conv1_weight', 'relu_3'."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.taken = set(dir(nn.Module()))  # a node may be called like a method: 'to'
        if isinstance(already := getattr(module, PREFIX, None), nn.Module):
            self.taken.update(name for name, _ in already.named_children())

    def of(self, node: fx.Node) -> str:
        """A name that says which node's value is quantized."""
        return self.free(re.sub(r"\W", "_", str(node.target) if node.op in ("get_attr", "placeholder") else node.name))

    def free(self, name: str) -> str:
        """`name`, with a number where it is taken."""
        unique, k = name, 1
        while unique in self.taken:
            unique, k = f"{name}_{k}", k + 1
        self.taken.add(unique)
        return unique


def quantizer_nodes(module: fx.GraphModule) -> Iterator[tuple[fx.Node, Quantizer]]:
    """Each fake-quant node of the graph with its quantizer."""
    for node in module.graph.find_nodes(op="call_module"):
        found = module.get_submodule(str(node.target))
        if isinstance(found, Quantizer):
            yield node, found
