"""Sites: the quantizers of a program, by names that hold for each copy of the graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import fx, nn

from graphcomp.quantization.spec import QuantSpec

PREFIX = "graphcomp_quantizers"


@dataclass(frozen=True)
class Site:
    """One quantizer: where the quantizer stands, how values are quantized, and which bits they may have.

    Attributes:
        name: of the quantizer among the modules.
        at: name of a node whose value is quantized -> names of the users that read the value quantized. Several values
            share one quantizer where an op moves elements from one to the other.
        layer: the layer whose weight is quantized, or the first node of `at`.
        parameter: the parameter that is read element by element; "" for activations and computed weights.
        is_weight: whether what is quantized depends on no input.
        spec: how.
        dim: of the channels of a weight, where each has a step; None: one step.
        low, high: the bits that the quantizer may have.
    """

    name: str
    at: Mapping[str, tuple[str, ...]] = field(hash=False)
    layer: str
    parameter: str
    is_weight: bool
    spec: QuantSpec
    dim: int | None
    low: int
    high: int

    def within(self, low: int, high: int) -> Site:
        """Return the same site with another range of bits."""
        return replace(self, low=low, high=high)


class Names:
    """Names of quantizers that say what is quantized: 'layer1_0_conv1_weight', 'relu_3'.

    Args:
        taken: names that quantizers have already.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.taken = {*dir(nn.Module()), *taken}  # a node may be called like a method: 'to'

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


def names_in(module: nn.Module) -> Names:
    """Return names for more quantizers of a module."""
    already = getattr(module, PREFIX, None)
    return Names(name for name, _ in already.named_children()) if isinstance(already, nn.Module) else Names()
