"""The regression of one layer: rows of what it reads, and what is to be added to its result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphcomp.ir.run_nodes import Lockstep
from graphcomp.numerics.regression import Evidence, Moments, Rows, joined
from graphcomp.ops.design import Design, Patches, design_of, packed
from graphcomp.pruning.consumers import Consumer, ends_of, is_routed, operands

ROWS, ROWS_PER_FEATURE = 30_000, 10
"""A layer is solved on at most so many rows, or so many for each feature where that is more."""
FEWEST_ROWS = 32
"""Rows below which a layer keeps the sliced weights."""
CHUNK = 1 << 23
"""Elements of rows that are multiplied at a time: 64 MiB in float64."""
MOST_FEATURES = 8192
"""Features of a problem up to which sums are kept, 512 MiB; of more features as many bytes of rows are kept."""
HELD_OUT = 5
"""One sample of so many is held out to choose the ridge on."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Moments of the rows that a layer is solved on, of those that the ridge is chosen on, and Σ t².

    Where a layer has too many features for moments, the rows stand in their place.
    """

    fit: Evidence
    held: Evidence
    norm: float

    def __add__(self, other: Sums) -> Sums:
        return Sums(joined(self.fit, other.fit), joined(self.held, other.held), self.norm + other.norm)

    @property
    def all(self) -> Evidence:
        """Moments of all rows."""
        return joined(self.fit, self.held)


@dataclass(frozen=True, eq=False)
class Problem:
    """The regression of one layer.

    Attributes:
        design: the layer as products with matrices.
        features: unknowns of each output, the intercept included.
        intercept: whether there is one.
        ends: of a layer with a matrix for some of the rows: where the rows of each matrix end, by batch.
    """

    design: Design
    features: int
    intercept: bool
    ends: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, consumer: Consumer, values: Lockstep) -> Problem | str:
        """Return the problem of a layer, or why there is none."""
        found = operands(consumer.node)
        x, weight = values.of(found[consumer.data])[0], values.of(found[consumer.weight])[0]
        problem = cls.between(consumer.node, (consumer.data, x), (consumer.weight, weight), bool(consumer.bias))
        ends = ends_of(consumer.node) if is_routed(consumer.node) else None
        return problem if isinstance(problem, str) or ends is None else replace(problem, ends=tuple(values.of(ends)))

    @classmethod
    def between(
        cls, node: fx.Node, data: tuple[str, Tensor], weight: tuple[str, Tensor], intercept: bool
    ) -> Problem | str:
        """Return the problem of an op with these arguments, name and value of each, or why there is none."""
        (data_name, x), (weight_name, w) = data, weight
        if not x.is_floating_point() or not w.is_floating_point():
            return f"it computes in {w.dtype}"
        design = design_of(node, data_name, weight_name, {data_name: x.shape, weight_name: w.shape})
        if design is None:
            return f"{node.target} with this weight is no product with a matrix"
        return cls(design, design.matrices(w).shape[1] + intercept, intercept)

    @classmethod
    def points(cls, x: Tensor) -> Problem:
        """Return the problem of mapping channels at each position, with an intercept."""
        ones = (1,) * (x.dim() - 2)
        return cls(
            Patches((1, x.shape[1], *ones), 1, ones, ones, ((0, 0),) * len(ones), ones, False), x.shape[1] + 1, True
        )

    def sums(
        self,
        inputs: Sequence[Tensor],
        rest: Sequence[Tensor],
        wanted: Sequence[Tensor],
        most: int,
        weights: Sequence[Tensor] | None = None,
        counts: Sequence[Tensor] | None = None,
    ) -> Sums:
        """Return the sums over a random share of the rows, the same in each run.

        Args:
            inputs, rest, wanted: what the layer reads, what its result lacks, and what it is to give, per batch.
            most: rows, or ten for each feature where that is more.
            weights: per batch, what the squared error of each element of the result counts, shaped like `wanted`;
                only for layers whose products have one output each. None: 1.
            counts: per batch, what each row counts, (r,); rows that count nothing are left out. None: 1.
        """
        inputs, rest, wanted = (self.side_by_side(values) for values in (inputs, rest, wanted))
        if counts is not None and self.features > MOST_FEATURES:  # the dual problem has one weight for all rows
            counts = [(own > 0).float() for own in counts]
        none = [None] * len(inputs)
        parts: list[Sums] = []
        for x, r, t, w, c, (fit, held) in zip(
            inputs, rest, wanted, weights or none, counts or none, self.chosen(inputs, most, counts), strict=True
        ):
            both = torch.cat([fit, held])
            squares = self.design.results(t, both).double().square()
            if w is not None:
                squares = squares * self.design.results(w, both)
            if c is not None:
                squares = squares * c[both, None]
            norm = float(squares.sum())
            parts.append(Sums(self.moments(x, r, fit, w, c), self.moments(x, r, held, w, c), norm))
        return sum(parts[1:], parts[0])

    def chosen(
        self, inputs: Sequence[Tensor], most: int, counts: Sequence[Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, of each input, the rows that the layer is solved on and those that the ridge is chosen on.

        The arguments are those of `sums`.
        """
        inputs = [self.design.batched(x) for x in inputs]
        numbers = [torch.arange(self.design.count(x), device=x.device) for x in inputs]
        if counts is not None:
            numbers = [rows[own > 0] for rows, own in zip(numbers, counts, strict=True)]
        total = [len(rows) for rows in numbers]
        wished = max(most, ROWS_PER_FEATURE * self.features)
        if self.features > MOST_FEATURES:
            wished = max(FEWEST_ROWS, MOST_FEATURES**2 // self.features)
        share = wished / max(*total, sum(total), 1)
        generator = torch.Generator().manual_seed(0)
        few = sum(len(x) for x in inputs) < HELD_OUT
        samples = 0
        for x, rows in zip(inputs, numbers, strict=True):
            some = torch.randperm(len(rows), generator=generator)[: math.ceil(len(rows) * min(share, 1.0))]
            chosen = rows[some.sort().values.to(rows.device)]
            sample = chosen if few else self.design.samples(x, chosen) + samples
            held = sample % HELD_OUT == HELD_OUT - 1
            samples += len(x)
            yield chosen[~held], chosen[held]

    def side_by_side(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return values with the rows of each matrix side by side."""
        return [packed(x, ends) for x, ends in zip(values, self.ends, strict=True)] if self.ends else values

    def moments(
        self,
        x: Tensor,
        rest: Tensor | None,
        chosen: Tensor,
        weights: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Evidence:
        """Return the moments of chosen rows, of which `rest` holds the targets; without `rest` there are none.

        `weights` and `counts` are those of one batch, see `sums`.
        """
        total: Evidence | None = None
        kind = Moments.of if self.features <= MOST_FEATURES else Rows
        at_once, some = 1, chosen[:1]
        if len(some):
            at_once = max(1, CHUNK // self.design.rows(x, some).numel())
        for some in torch.split(chosen, at_once):
            rows = self.design.rows(x, some).double()
            if self.intercept:
                rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
            lacking = rows[..., :0] if rest is None else self.design.results(rest, some).double()
            if weights is not None:
                roots = self.design.results(weights, some).double().sqrt()
                assert roots.shape[2] == 1, "a row has one weight"
                rows, lacking = rows * roots, lacking * roots
            if counts is not None:
                roots = counts[some, None].double().sqrt()
                rows, lacking = rows * roots, lacking * roots
            found = kind(rows, lacking)
            total = found if total is None else joined(total, found)
        assert total is not None, "split gives one part at least"
        return total
