"""Bit operations: what a multiply-accumulate costs where both operands have few bits.

    bops = sum over convolutions, linear and recurrent layers of MACs x bits of the weight x bits of the activation

An operand that is not quantized has 32 bits. Products of two activations, attention's, are counted the same way and
stand apart: papers leave them out. Norms, activations and embeddings have none.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from torch import fx

from graphcomp.cost.model import WHOLE, CostModel, Counts, Operation, Polynomial
from graphcomp.errors import PlanError

FLOAT_BITS = 32


@dataclass(frozen=True)
class Bits:
    """Bits of the two operands of a layer; of attention, those of the first and the second activation.

    A learned number of bits counts as the nearest whole one (a half, as the nearest even one); a fraction, the mean of
    channels with bits of their own, counts as it is.

    Raises:
        PlanError: bits outside 1 to 32.
    """

    weight: float | Fraction = FLOAT_BITS
    activation: float = FLOAT_BITS

    def __post_init__(self) -> None:
        for name, bits in (("weight", self.weight), ("activation", self.activation)):
            if isinstance(bits, bool) or not 1 <= bits <= FLOAT_BITS:
                raise PlanError(f"{name}={bits!r} is not a number of bits from 1 to {FLOAT_BITS}", fix=f"{name}=8")

    @property
    def per_mac(self) -> int | Fraction:
        """Bit operations of one multiply-accumulate."""
        weight = self.weight if isinstance(self.weight, Fraction) else round(self.weight)
        return weight * round(self.activation)


BitsOf: TypeAlias = Mapping[str | fx.Node, Bits]
"""Bits by layer (`Operation.layer`), or by op of the analysed graph, which counts more; what is left out is float."""


class Bops:
    """Bit operations of one forward on the example inputs, at fixed bits, for any number of units kept.

    Args:
        costs: of the model.
        bits: by layer or op.

    Raises:
        PlanError: `bits` names neither a layer, a parameter nor an op with multiply-accumulates.

    Source: GETA (CVPR 2025), whose code counts so. It takes a linear layer's input for (batch, tokens, features) and
        counts fewer tokens where the rank is higher (Swin); here all are counted.
    """

    def __init__(self, costs: CostModel, bits: BitsOf | None = None) -> None:
        bits = bits or {}
        _check_names(costs, bits)
        self._operations = [(operation, _per_mac(operation, bits)) for operation in costs.operations]
        self._layers, self._attention = Polynomial(), Polynomial()
        for operation, per_mac in self._operations:
            count = operation.macs * Polynomial.constant(per_mac)
            if operation.kind == "attention":
                self._attention += count
            else:
                self._layers += count

    def layers(self, counts: Counts = WHOLE) -> int:
        """BOPs of convolutions, linear and recurrent layers: what papers call the BOPs of a network."""
        return self._layers(counts)

    def attention(self, counts: Counts = WHOLE) -> int:
        """BOPs of products of two activations."""
        return self._attention(counts)

    def by_layer(self, counts: Counts = WHOLE) -> dict[str, int]:
        """`layers` and `attention`, apart for each layer (see `Operation.layer`)."""
        found: dict[str, int | Fraction] = {}
        for operation, per_mac in self._operations:
            found[operation.layer] = found.get(operation.layer, 0) + operation.macs(counts) * per_mac
        return {layer: math.ceil(count) for layer, count in found.items()}


def _per_mac(operation: Operation, bits: BitsOf) -> int | Fraction:
    found = bits.get(operation.node) or bits.get(operation.layer) or Bits()
    return found.per_mac


def _check_names(costs: CostModel, bits: BitsOf) -> None:
    nodes = {operation.node for operation in costs.operations}
    for key in bits:
        # a layer without multiply-accumulates (an embedding) may have bits all the same
        if key in nodes or key in costs.layers:
            continue
        near = difflib.get_close_matches(str(key), costs.layers, n=1)
        raise PlanError(
            f"bits are given for {str(key)!r}, which is no layer of the model",
            why="layers are named as their weights, without '.weight'",
            fix=f"one of {', '.join(near or sorted(costs.layers)[:20])}",
        )
