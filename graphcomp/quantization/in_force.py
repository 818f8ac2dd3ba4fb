"""Bits in force: how a layer will read its operands, by the sites that `PlaceQuantizers` will fill.

The bits of a layer in the config are not those. The first and the last layer, a value that layers of different bits or
sums read, and a table that is stored once have others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from graphcomp.ir.graph import bind
from graphcomp.ops.answers import operands_of
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.placement import place
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.sites import Site
from graphcomp.quantization.spec import QuantConfig, QuantSpec


@dataclass(frozen=True)
class Rounding:
    """How one layer reads its operands.

    Attributes:
        value: the specs of the quantizers in front of the layer, in their order; none: the layer reads floats.
        weight: that of the weight, with a range from the least to the largest number, which a trial is quick to find;
            None: the weight stays float.
        dim: of the weight's channels, where each has a step.
    """

    value: tuple[QuantSpec, ...]
    weight: QuantSpec | None
    dim: int | None

    def of_weight(self, weight: Tensor) -> Tensor:
        """Return a weight, of the shape that the layer reads, as the layer will read the weight."""
        if self.weight is None:
            return weight
        quantizer = make_quantizer(self.weight, shape=weight.shape, dim=self.dim).to(weight)
        calibrate_weight(quantizer, weight)
        rounded: Tensor = quantizer(weight)
        return rounded


class Placed:
    """The quantizers that stand between values and the layers that read them.

    Args:
        module: a captured graph without quantizers. Not changed.
        config, ignore: as of `place`.
    """

    def __init__(self, module: fx.GraphModule, config: QuantConfig, ignore: Sequence[str]) -> None:
        self._between: dict[tuple[str, str], list[Site]] = {}
        for site in place(module, config, ignore).sites:
            for read, users in site.at.items():
                for user in users:
                    self._between.setdefault((read, user), []).append(site)

    def rounding(self, layer: fx.Node, data: str) -> Rounding:
        """Return how a layer reads the argument `data`, and its weight."""
        arguments = bind(layer)
        value, weight = (
            self._between.get((arguments[name].name, layer.name), []) for name in (data, operands_of(layer).weight)
        )
        specs = tuple(site.spec for site in value)
        if not weight:
            return Rounding(specs, None, None)
        return Rounding(specs, replace(weight[0].spec, observer="minmax"), weight[0].dim)
