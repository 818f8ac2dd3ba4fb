"""Which spec a value gets that several ops ask for: first the readers that were named, then the most bits.

A wish is the spec that one op asks for one value. Values that share a quantizer (a clip, a pooling, a reshape in a row)
share their wishes. A named reader among readers that were not named gets a quantizer of its own.

What products read has the bits that were asked for. What other ops read (a residual stream: sums, pools, the result of
a linear bottleneck) has `residual_bits` at least, as a stream is rounded again at every sum: few bits belong to the
operands of products, once each. A product that reads a stream of more bits than asked for reads the stream through a
second quantizer, behind the stream's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from graphcomp.quantization.spec import MIN_BITS, QuantSpec, with_bits


@dataclass(frozen=True)
class Chosen:
    """The specs of one op.

    Attributes:
        weights, activations: None: float.
        named: from an override, or from a name to ignore; else from the defaults.
        ignored: named as an op to ignore.
    """

    weights: QuantSpec | None
    activations: QuantSpec | None
    named: bool = False
    ignored: bool = False

    @property
    def any(self) -> bool:
        """Whether anything is to be quantized."""
        return self.weights is not None or self.activations is not None

    def at_least(self, bits: int) -> Chosen:
        """Return the same specs with `bits` at least."""
        return replace(self, weights=_at_least(self.weights, bits), activations=_at_least(self.activations, bits))


@dataclass(frozen=True)
class Wish:
    """The spec that `node` asks for a value that it reads, or returns."""

    spec: QuantSpec
    node: fx.Node
    named: bool
    reads: bool


class Wishes:
    """The wishes for all values of a graph, and classes of values that share one quantizer.

    Args:
        residual_bits: the fewest bits of values that other ops than products read.
    """

    def __init__(self, residual_bits: int = MIN_BITS) -> None:
        self.residual_bits = residual_bits
        self._parent: dict[fx.Node, fx.Node] = {}
        self._wishes: dict[fx.Node, list[Wish]] = {}
        self._derived: dict[fx.Node, list[fx.Node]] = {}
        self._specs: dict[fx.Node, QuantSpec | None] = {}
        self._classes: dict[fx.Node, list[fx.Node]] = {}
        self._others: set[fx.Node] = set()

    def add(self, value: fx.Node, wish: Wish) -> None:
        """Note a wish for a value."""
        self._wishes.setdefault(value, []).append(wish)

    def derive(self, value: fx.Node, operands: Iterable[fx.Node]) -> None:
        """Let a value that is computed on integers have as many bits as its operands, unless a product asks."""
        self._derived.setdefault(value, []).extend(operands)

    def union(self, a: fx.Node, b: fx.Node) -> None:
        """Let two values share a quantizer."""
        a, b = self.shared(a), self.shared(b)
        if a is not b:
            self._parent[b] = a

    def shared(self, value: fx.Node) -> fx.Node:
        """Return the representative of the values that share a quantizer with `value`."""
        while (above := self._parent.get(value, value)) is not value:
            value = above
        return value

    def of(self, value: fx.Node) -> Sequence[Wish]:
        """Return the wishes for one value."""
        return self._wishes.get(value, ())

    def settle(self, others: Mapping[fx.Node, Sequence[fx.Node]]) -> None:
        """End the collection of wishes.

        Args:
            others: each value that is quantized -> its readers that have no wish of their own.
        """
        for value, readers in others.items():
            self._classes.setdefault(self.shared(value), []).append(value)
            if readers:
                self._others.add(self.shared(value))

    def asked(self, value: fx.Node) -> QuantSpec:
        """Return the spec that products, not named, read `value` with."""
        found = self._resolve(self.shared(value))
        assert found is not None, f"nothing asks for {value}"
        return found

    def spec(self, value: fx.Node) -> QuantSpec:
        """Return the spec of the quantizer that `value` shares: of `residual_bits` at least where other ops read."""
        asked, key = self.asked(value), self.shared(value)
        for_products = key not in self._others and any(wish.reads for wish in self._of_class(key))
        return asked if for_products else at_least(asked, self.residual_bits)

    def _of_class(self, key: fx.Node) -> list[Wish]:
        return [wish for value in self._classes[key] for wish in self.of(value)]

    def _resolve(self, key: fx.Node) -> QuantSpec | None:
        if key not in self._specs:
            self._specs[key] = None  # an operand that leads back here adds nothing
            self._specs[key] = self._choose(key)
        return self._specs[key]

    def _choose(self, key: fx.Node) -> QuantSpec | None:
        wishes = self._of_class(key)
        named = [wish.spec for wish in wishes if wish.named and wish.reads]
        products = any(wish.reads for wish in wishes)
        operands = [] if products else [n for value in self._classes[key] for n in self._derived.get(value, ())]
        derived = [spec for n in operands if (spec := self._resolve(self.shared(n))) is not None]
        rest = [wish.spec for wish in wishes if not (wish.named and wish.reads)] + derived
        shared_with_others = key in self._others or any(wish.reads and not wish.named for wish in wishes)
        if named and not (rest and shared_with_others):
            rest = named
        return max(rest, key=lambda spec: spec.bits, default=None)


def at_least(spec: QuantSpec, bits: int) -> QuantSpec:
    """Return the same spec with `bits` at least."""
    return spec if spec.bits >= bits else with_bits(spec, bits)


def _at_least(spec: QuantSpec | None, bits: int) -> QuantSpec | None:
    return None if spec is None else at_least(spec, bits)
