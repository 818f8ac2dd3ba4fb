"""How much a piece of a graph computes and moves, by the units kept: what the time of the piece is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from graphcomp.cost.model import Counts, Lengths, Polynomial
from graphcomp.cost.pieces import Piece
from graphcomp.coupling.axis import Axes, Factor
from graphcomp.coupling.propagate import Coupling

BLOCK = 16
"""Channels that vector kernels work on at once (floats of 512 bits)."""

Volume = tuple[Polynomial, ...]
"""Lengths that are multiplied."""


@dataclass(frozen=True, eq=False)
class Work:
    """What one piece multiplies, reads, writes and computes.

    Attributes:
        products: of each op that multiplies, the lengths of all dims that are gone over.
        read: lengths of what the piece reads, weights included.
        written: lengths of what the piece returns.
        computed: lengths of what each node of the piece computes.
    """

    products: tuple[Volume, ...] = ()
    read: tuple[Volume, ...] = ()
    written: tuple[Volume, ...] = ()
    computed: tuple[Volume, ...] = ()

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        """The factors that the work depends on, in order of their first occurrence."""
        volumes = (*self.products, *self.read, *self.written, *self.computed)
        found = (f for volume in volumes for length in volume for term in length.terms for f in term)
        return tuple(dict.fromkeys(found))

    def local(self, counts: Counts) -> tuple[int, ...]:
        """Return how many units stay of each of `factors`."""
        return tuple(counts.get(factor, factor.size) for factor in self.factors)

    def features(self, local: Sequence[int]) -> tuple[float, ...]:
        """Return numbers >= 0 of which the time is a sum: 1; what is multiplied, as it is, with each length rounded up
        to whole BLOCKs, and where a length is no whole BLOCKs, which takes other kernels; what is read, and what is
        read by such kernels; what is written; what each node computes.

        Args:
            local: for each of `factors` how many units stay.
        """
        counts = dict(zip(self.factors, local, strict=True))
        exact, blocks = (_total(self.products, counts, block) for block in (1, BLOCK))
        partial = [v for v in self.products if _volume(v, counts, 1) < _volume(v, counts, BLOCK)]
        read, written, computed = (_total(v, counts, 1) for v in (self.read, self.written, self.computed))
        return (1.0, exact, blocks, _total(partial, counts, 1), read, read * bool(partial), written, computed)

    @cached_property
    def text(self) -> str:
        """The polynomials, with numbers in place of the factors: equal for pieces whose times are the same function."""
        place = {factor: k for k, factor in enumerate(self.factors)}
        sizes = [factor.size for factor in self.factors]
        parts = [
            [[_text(length, place) for length in v] for v in vs] for vs in (self.products, self.read, self.written)
        ]
        return f"{sizes} {parts}"


def _text(length: Polynomial, place: Mapping[Factor, int]) -> list[tuple[list[int], int]]:
    return sorted((sorted(place[factor] for factor in term), number) for term, number in length.terms.items())


def _total(volumes: Iterable[Volume], counts: Counts, block: int) -> float:
    return float(sum(_volume(volume, counts, block) for volume in volumes))


def _volume(volume: Volume, counts: Counts, block: int) -> int:
    return math.prod(_rounded(length, counts, block) for length in volume)


def _rounded(length: Polynomial, counts: Counts, block: int) -> int:
    """Return the length, rounded up where the length depends on units."""
    value = length(counts)
    fixed = block == 1 or not any(length.terms)
    return value if fixed else -(-value // block) * block


def work_of(piece: Piece, coupling: Coupling, lengths: Lengths) -> Work:
    """Return the work of a piece of the analysed graph.

    Args:
        piece: of the graph that `coupling` is of.
        lengths: whose variables are the units that may go.

    Raises:
        UnknownLength: a length depends on data.
    """

    def volumes(nodes: Iterable[fx.Node]) -> tuple[Volume, ...]:
        return tuple(tuple(lengths.lengths(axes)) for node in nodes for axes in _axes(coupling, node))

    calls = [coupling.calls[node] for node in piece.nodes if node in coupling.calls]
    products = tuple(tuple(lengths.lengths(product.axes)) for call in calls for product in call.products)
    weights = dict.fromkeys(r for node in piece.nodes for r in node.all_input_nodes if r.op == "get_attr")
    return Work(products, volumes((*piece.inputs, *weights)), volumes(piece.outputs), volumes(piece.nodes))


def _axes(coupling: Coupling, node: fx.Node) -> Sequence[Axes]:
    return coupling.axes.get(node, [])
