"""The range of bits of each quantizer of a module that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphcomp.errors import PlanError
from graphcomp.ir.graph import module_path
from graphcomp.pruning.mask import parameter_behind
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import constants_with_quantizers
from graphcomp.quantization.placement import layer_name
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.redundant import moved_from
from graphcomp.quantization.spec import MAX_BITS, MIN_BITS, matches
from graphcomp.training.session import Site


@dataclass(frozen=True)
class LayerBits:
    """Ranges of bits that one layer is given by name: of its weight, and of what the layer reads."""

    weights: tuple[int, int]
    activations: tuple[int, int]


class _Ranges:
    """The range of bits of each quantizer: the general one, or one that a layer was given by name."""

    def __init__(
        self,
        graph: fx.GraphModule,
        bits: tuple[int, int],
        activation_bits: tuple[int, int],
        layer_bits: Mapping[str, LayerBits],
    ) -> None:
        self.graph, self.bits, self.activation_bits, self.layer_bits = graph, bits, activation_bits, layer_bits
        self.constant = constants_with_quantizers(graph)
        self.parameters = dict(graph.named_parameters(remove_duplicate=False))
        self.matched: set[str] = set()
        self.notes: list[str] = []

    def sites(self) -> tuple[tuple[Site, ...], tuple[str, ...]]:
        """Return the quantizers with their ranges, and a note for each wish that is not met.

        Raises:
            PlanError: an entry of `layer_bits` names no layer with a quantizer.
        """
        nodes: dict[str, list[fx.Node]] = {}
        for node, _ in quantizer_nodes(self.graph):
            nodes.setdefault(str(node.target), []).append(node)
        found = tuple(self._site(name, readers) for name, readers in nodes.items())
        if unmatched := sorted(self.layer_bits.keys() - self.matched):
            layers = dict.fromkeys(site.layer for site in found if site.is_weight)
            raise PlanError(
                f"layer_bits names {', '.join(unmatched)}, which is no module with a quantizer",
                fix=f"quantized layers: {', '.join(layers)}",
            )
        return found, tuple(self.notes)

    def _site(self, name: str, nodes: Sequence[fx.Node]) -> Site:
        """Return the site of one quantizer, which stands at each of `nodes`."""
        (source,) = nodes[0].all_input_nodes
        is_weight = nodes[0] in self.constant
        layer = layer_name(source, self.constant) if is_weight else source.name
        paths = {module_path(reader): None for node in nodes for reader in _readers(node)} | {layer: None}
        wishes = {path: wish for path in paths if (wish := self._wish(path, is_weight)) is not None}
        low, high = self.bits if is_weight else self.activation_bits
        if wishes:
            low, high = max(wishes.values(), key=lambda own: (own[1], own[0]))
        for path, wish in wishes.items():
            if wish != (low, high):
                what = "weight" if is_weight else "input"
                self.notes.append(
                    f"{path}: its {what} has {low} to {high} bits, not {wish[0]} to {wish[1]}, "
                    f"as it shares the quantizer of {layer} with {', '.join(p for p in wishes if p != path)}"
                )
        parameter = parameter_behind(source, self.parameters) if is_weight else ""
        return Site(name, layer, parameter, is_weight, low, high)

    def _wish(self, path: str, is_weight: bool) -> tuple[int, int] | None:
        """Return the range that the last matching entry of `layer_bits` gives; None without one."""
        found = None
        for pattern, own in self.layer_bits.items():
            if matches(pattern, path):
                found = own.weights if is_weight else own.activations
                self.matched.add(pattern)
        return found


def _bounds(sites: Sequence[Site]) -> tuple[int, int]:
    """Return the fewest and the most bits of quantizers."""
    return min((site.low for site in sites), default=MIN_BITS), max((site.high for site in sites), default=MAX_BITS)


def _fixed_sites(graph: fx.GraphModule) -> tuple[Site, ...]:
    """Return the quantizers, each with the bits of its spec."""
    constant = constants_with_quantizers(graph)
    parameters = dict(graph.named_parameters(remove_duplicate=False))
    found: dict[str, Site] = {}
    for node, quantizer in quantizer_nodes(graph):
        (source,) = node.all_input_nodes
        name, is_weight, bits = str(node.target), node in constant, quantizer.spec.bits
        layer = layer_name(source, constant) if is_weight else source.name
        parameter = parameter_behind(source, parameters) if is_weight else ""
        found.setdefault(name, Site(name, layer, parameter, is_weight, bits, bits))
    return tuple(found.values())


@torch.no_grad()
def _start_at_the_most(graph: fx.GraphModule, sites: Sequence[Site]) -> None:
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
