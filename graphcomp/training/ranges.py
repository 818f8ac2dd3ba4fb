"""The range of bits of each quantizer of a module that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx

from graphcomp.errors import PlanError
from graphcomp.ir.graph import module_path
from graphcomp.ir.program import P
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.redundant import moved_from
from graphcomp.quantization.sites import Site
from graphcomp.quantization.spec import MAX_BITS, MIN_BITS, matches


@dataclass(frozen=True)
class LayerBits:
    """Ranges of bits that one layer is given by name: of its weight, and of what the layer reads."""

    weights: tuple[int, int]
    activations: tuple[int, int]


@dataclass(frozen=True)
class ChooseBits:
    """Say which bits each quantizer may have, and let those that learn their bits start at the most.

    Attributes:
        bits: the range of bits of weights; None: each quantizer has the bits of its spec.
        activation_bits: the range of bits of activations; None: as `bits`.
        layer_bits: module name or "re:" pattern -> ranges of its own; the last that matches counts.
    """

    bits: tuple[int, int] | None = None
    activation_bits: tuple[int, int] | None = None
    layer_bits: Mapping[str, LayerBits] = field(default_factory=dict)
    name: ClassVar[str] = "choose bits"

    def __call__(self, program: P, /) -> P:
        """Return the program with its sites in the order of the graph, and a note for each wish that is not met.

        Raises:
            PlanError: an entry of `layer_bits` names no layer with a quantizer.
        """
        nodes: dict[str, list[fx.Node]] = {}
        for node, _ in quantizer_nodes(program.module):
            nodes.setdefault(str(node.target), []).append(node)
        by_name = {site.name: site for site in program.sites}
        program = replace(program, sites=tuple(by_name[name] for name in nodes))
        return program if self.bits is None else self._chosen(program, nodes)

    def _chosen(self, program: P, nodes: Mapping[str, Sequence[fx.Node]]) -> P:
        matched: set[str] = set()
        sites: list[Site] = []
        notes: list[str] = []
        for site in program.sites:
            paths = {module_path(reader): None for node in nodes[site.name] for reader in _readers(node)}
            wishes = {}
            for path in (*paths, *([site.layer] if site.layer not in paths else [])):
                entries = [pattern for pattern in self.layer_bits if matches(pattern, path)]
                matched.update(entries)
                if entries:
                    own = self.layer_bits[entries[-1]]
                    wishes[path] = own.weights if site.is_weight else own.activations
            sites.append(self._within(site, wishes))
            notes += _unmet(sites[-1], wishes)
        if unmatched := sorted(self.layer_bits.keys() - matched):
            layers = dict.fromkeys(site.layer for site in sites if site.is_weight)
            raise PlanError(
                f"layer_bits names {', '.join(unmatched)}, which is no module with a quantizer",
                fix=f"quantized layers: {', '.join(layers)}",
            )
        start_at_the_most(program.module, sites)
        return replace(program, sites=tuple(sites), notes=(*program.notes, *notes))

    def _within(self, site: Site, wishes: Mapping[str, tuple[int, int]]) -> Site:
        """Return a site with its range: the general one, or the most bits that one of its layers was given by name."""
        assert self.bits is not None
        low, high = self.bits if site.is_weight else self.activation_bits or self.bits
        if wishes:
            low, high = max(wishes.values(), key=lambda own: (own[1], own[0]))
        return site.within(low, high)


def _unmet(site: Site, wishes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Yield a note for each layer that was given another range by name than its quantizer has."""
    what = "weight" if site.is_weight else "input"
    for path, wish in wishes.items():
        if wish != (site.low, site.high):
            yield (
                f"{path}: its {what} has {site.low} to {site.high} bits, not {wish[0]} to {wish[1]}, "
                f"as it shares the quantizer of {site.layer} with {', '.join(p for p in wishes if p != path)}"
            )


def bounds(sites: Sequence[Site]) -> tuple[int, int]:
    """Return the fewest and the most bits of quantizers."""
    return min((site.low for site in sites), default=MIN_BITS), max((site.high for site in sites), default=MAX_BITS)


@torch.no_grad()
def start_at_the_most(graph: fx.GraphModule, sites: Sequence[Site]) -> None:
    """Give quantizers that learn their bits the most bits of their range."""
    for site in sites:
        quantizer = graph.get_submodule(site.name)
        if isinstance(quantizer, GetaQuantizer) and round(float(quantizer.bits)) != site.high:
            quantizer.project_bits(site.high, site.high)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the ops that read the elements of `node`, through ops that only move them."""
    for user in node.users:
        if moved_from(user) is node:
            yield from _readers(user)
        else:
            yield user
