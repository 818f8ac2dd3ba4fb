"""Gram matrices of what readers of groups read, and what optimal repair leaves of an error when units go.

    H = Σ x xᵀ + λ · mean diag · I,   err_u = tr(W_u (H⁻¹_uu)⁻¹ W_uᵀ)
    W ← W − W_u (H⁻¹_uu)⁻¹ H⁻¹_u·,   H⁻¹ ← H⁻¹ − H⁻¹_·u (H⁻¹_uu)⁻¹ H⁻¹_u·

x are rows of the uncut model, weighted by what they count for its outputs (`influence.py`): one pass over the data
serves each choice of units.

Source: Frantar and Alistarh, ZipLM, 2023 (optimal brain surgeon over structures).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import CalibrationError
from graphcomp.ir.run_nodes import Lockstep, refused_batch
from graphcomp.ir.streamed import in_memory
from graphcomp.numerics.regression import Moments, Rows, choose_ridge, solve
from graphcomp.pruning.consumers import Consumer, operands
from graphcomp.pruning.influence import Influences, influences
from graphcomp.pruning.least_squares import FEWEST_ROWS, Problem
from graphcomp.pruning.readers import Reader, Readers, removed_features

RIDGE = 1e-3
"""λ of orders, in units of the mean second moment of the features."""
MOST_FEATURES = 4096
"""Features above which the matrix of a layer is not built: 128 MiB in float64."""
STEPS = 32
"""Downdates of one order at most: a group of more units loses several at a time."""


@dataclass(frozen=True, eq=False)
class Gram:
    """What one layer reads, of all rows.

    Attributes:
        reader: the layer, with the units of one group.
        problem: the regression.
        fit, held: moments of the rows that a solution is of, and of those that the ridge is chosen on; no targets.
        weight: (g, n, o) float64; a row of zeros for the intercept, the last one where there is one.
        units: (g, n) int64: the unit of each feature, -1 where of none.
    """

    reader: Reader
    problem: Problem
    fit: Moments
    held: Moments
    weight: Tensor
    units: Tensor

    @property
    def xx(self) -> Tensor:
        """(g, n, n) over all rows."""
        return self.fit.xx + self.held.xx

    @property
    def norm(self) -> float:
        """Σ y² of the layer's output, the intercept left out."""
        return float((self.weight * (self.xx @ self.weight)).sum())

    def damped(self, ridge: float) -> Tensor:
        """H, (g, n, n); no ridge is on the intercept."""
        xx = self.xx
        diagonal = xx.diagonal(dim1=1, dim2=2)
        mean = (diagonal[:, :-1] if self.problem.intercept else diagonal).mean(1, keepdim=True)
        added = (ridge * torch.where(mean > 0, mean, 1.0)).expand_as(diagonal).clone()
        if self.problem.intercept:
            added[:, -1] = ridge * xx[:, -1, -1] * 1e-6
        return xx + torch.diag_embed(added)

    def without(self, gone: Tensor) -> Tensor | None:
        """Return the weight (g, n, o) that best restores the output without some units, zero at their features.

        Args:
            gone: units, (k,).

        Returns:
            None where matrices lose unequal numbers of features.
        """
        removed = removed_features(self.units, gone)
        if removed is None:
            return None
        stay, away = ((~removed).nonzero()[:, 1], removed.nonzero()[:, 1])
        stay, away = stay.view(len(removed), -1), away.view(len(removed), -1)
        fit, held = (_without(own, self.weight, stay, away) for own in (self.fit, self.held))
        ridge = choose_ridge(fit, held, self.problem.intercept) if fit.rows + held.rows >= FEWEST_ROWS else math.inf
        change = solve(fit + held, ridge, self.problem.intercept)
        weight = self.weight.clone()
        weight[removed] = 0
        if change is not None:
            weight.scatter_add_(1, stay[..., None].expand_as(change), change)
        return weight


def _without(moments: Moments, weight: Tensor, stay: Tensor, away: Tensor) -> Moments:
    """Return the moments of features that stay, the targets being what the features that go away gave."""
    rows = moments.xx.take_along_dim(stay[..., None], 1)
    lost = weight.take_along_dim(away[..., None], 1)
    of_away = moments.xx.take_along_dim(away[..., None], 1).take_along_dim(away[:, None], 2)
    total = float((lost * (of_away @ lost)).sum())
    return Moments(
        rows.take_along_dim(stay[:, None], 2), rows.take_along_dim(away[:, None], 2) @ lost, total, moments.rows
    )


def row_counts(plan: Analysis, readers: Readers, batches: Mapping[int, Sequence[Any]]) -> Influences:
    """Return how much the rows of all readers count for the outputs; the arguments are those of `grams`."""
    consumers = readers.consumers
    reads = {reader.consumer for own in readers.of.values() for reader in own}
    nodes = {consumer.node: consumer for own in reads for consumer in consumers.together[own]}
    return influences(plan.captured.module, nodes, list(batches.values()))


@torch.no_grad()
def grams(
    plan: Analysis, readers: Readers, batches: Mapping[int, Sequence[Any]], rows: int, counted: Influences
) -> Iterator[tuple[ChannelGroup, tuple[Gram, ...] | str]]:
    """Yield each group with the Grams of its readers, as soon as the last one is reached; or why there are none.

    Args:
        plan: of the whole model.
        readers: of groups of `plan`.
        batches: flat inputs, by the number that an error names.
        rows: of each layer at most, or ten for each feature where that is more.
        counted: what rows count; those of layers that are missing count alike.

    Raises:
        CalibrationError: the model does not run on a batch, or values that are not finite.
    """
    module, consumers = plan.captured.module, readers.consumers
    waiting = {group: {reader.consumer.node for reader in own} for group, own in readers.of.items()}
    reads = {reader.consumer for own in readers.of.values() for reader in own}
    found: dict[Consumer, Read] = {}
    values = Lockstep(module, list(batches.values()))
    for node in module.graph.nodes:
        for k, run in zip(batches, values.runs, strict=True):
            try:
                run.step(node)
            except Exception as error:  # whatever the ops raise on inputs of another shape
                raise refused_batch(k, error) from error
        consumer = consumers.at.get(node)
        if consumer in reads and consumer is not None:
            first = consumers.together[consumer][0]
            found[first] = _added(found.get(first), _read(consumer, values, rows, counted.rows.get(node)))
            for group in [group for group, nodes in waiting.items() if node in nodes]:
                waiting[group].remove(node)
                if not waiting[group]:
                    del waiting[group]
                    yield group, _of_group(readers, group, found)
            needed = {consumers.together[r.consumer][0] for group in waiting for r in readers.of[group]}
            found = {own: gram for own, gram in found.items() if own in needed}
        values.drop(node)


Read = tuple[Problem, Moments, Moments, Tensor] | str


def _read(consumer: Consumer, values: Lockstep, rows: int, counts: Sequence[Tensor] | None) -> Read:
    """Return the moments of what a layer reads, rows counted by `counts` of each batch."""
    problem = Problem.of(consumer, values)
    if isinstance(problem, str):
        return problem
    if problem.features > MOST_FEATURES:
        return f"'{consumer.name}' has {problem.features} features, more than {MOST_FEATURES}"
    found = operands(consumer.node)
    inputs, weight = (
        problem.side_by_side(values.of(found[consumer.data])),
        in_memory(values.of(found[consumer.weight])[0]),
    )
    none: list[Tensor | None] = [None] * len(inputs)
    parts = list(zip(inputs, counts or none, problem.chosen(inputs, rows, counts), strict=True))
    fit, held = (_sum([problem.moments(x, None, chosen[k], counts=own) for x, own, chosen in parts]) for k in range(2))
    if not (fit + held).finite:
        raise CalibrationError("the data, or what the model computes of them, are not finite", at=consumer.name)
    matrices = problem.design.matrices(weight.detach()).double()
    if problem.intercept:
        matrices = torch.cat([matrices, matrices.new_zeros(len(matrices), 1, matrices.shape[2])], 1)
    return problem, fit, held, matrices


def _sum(parts: Sequence[Moments | Rows]) -> Moments:
    """Return the moments of all parts; layers of more features have rows in their place."""
    moments = [own for own in parts if isinstance(own, Moments)]
    assert len(moments) == len(parts), f"up to {MOST_FEATURES} features there are moments"
    return sum(moments[1:], moments[0])


def _added(old: Read | None, new: Read) -> Read:
    """Add the moments of another layer with the same weight."""
    if old is None or isinstance(new, str) or isinstance(old, str):
        return new if old is None or isinstance(new, str) else old
    return old[0], old[1] + new[1], old[2] + new[2], old[3]


def _of_group(readers: Readers, group: ChannelGroup, found: dict[Consumer, Read]) -> tuple[Gram, ...] | str:
    result = []
    for reader in readers.of[group]:
        if reader.consumer is not readers.consumers.together[reader.consumer][0]:
            continue
        read = found[reader.consumer]
        if isinstance(read, str):
            return read
        problem, fit, held, weight = read
        units = reader.features(problem.design)
        if units is None:
            return f"features of '{reader.consumer.name}' are of several units"
        if problem.intercept:
            units = torch.cat([units, units.new_full((len(units), 1), -1)], 1)
        result.append(Gram(reader, problem, fit, held, weight, units))
    return tuple(result)


# ------------------------------------------------------------------------------------------------ orders
@torch.no_grad()
def errors_left(grams: Sequence[Gram], size: int, *, ridge: float = RIDGE, steps: int = STEPS) -> Tensor:
    """Return what losing each unit adds to the relative squared error after the optimal repair, summed over layers.

    Units go one after the other, the cheapest first, and each is judged by the weights that its forerunners left. A
    unit's score is above that of its forerunner, so that scores stand in that order.

    Args:
        grams: of all readers of a group, each unit with equally many features (see `uneven`).
        size: units of the group.
        ridge: λ > 0, tenfold until H can be factored.
        steps: downdates at most.

    Returns:
        (size,) float32.
    """
    surgeons = [_Surgeon.of(gram, size, ridge) for gram in grams]
    scores = torch.zeros(size)
    left = torch.arange(size)
    last = torch.tensor(-1.0)
    while len(left):
        errors = torch.stack([own.errors(left) for own in surgeons]).sum(0)
        order = errors.argsort(stable=True)
        count = -(-size // steps)
        for k in order[:count].tolist():
            last = torch.maximum(errors[k].float(), torch.nextafter(last, torch.tensor(math.inf)))
            scores[left[k]] = last
        gone, left = left[order[:count]], left[order[count:].sort().values]
        for own in surgeons if len(left) else ():
            own.remove(gone)
    return scores


@dataclass(eq=False)
class _Surgeon:
    """One layer while units leave.

    Attributes:
        weight: (g, n, o), of what is left.
        inverse: H⁻¹, (g, n, n), of what is left.
        features: (g, size, m): features of each unit.
        norm: Σ y² before.
    """

    weight: Tensor
    inverse: Tensor
    features: Tensor
    norm: float

    @classmethod
    def of(cls, gram: Gram, size: int, ridge: float) -> _Surgeon:
        order = gram.units.sort(stable=True, dim=1)
        none = int((gram.units[0] < 0).sum())
        features = order.indices[:, none:].reshape(len(gram.units), size, -1)
        factor, failed = torch.linalg.cholesky_ex(gram.damped(ridge))
        while bool(failed.any()):  # more features than rows, and a small ridge
            ridge *= 10
            factor, failed = torch.linalg.cholesky_ex(gram.damped(ridge))
        inverse = torch.cholesky_inverse(factor)
        return cls(gram.weight.clone(), inverse, features, max(gram.norm, torch.finfo(torch.float64).tiny))

    def errors(self, units: Tensor) -> Tensor:
        """Return err_u / Σ y², (k,)."""
        at = self.features[:, units]  # (g, k, m)
        block, weight = self._block(at), self._rows(self.weight, at)
        solved = torch.linalg.solve(block, weight) if block.shape[-1] > 1 else weight / block
        return (weight * solved).sum((0, 2, 3)) / self.norm

    def remove(self, units: Tensor) -> None:
        """Let the weights that stay make up for units that go."""
        at = self.features[:, units].flatten(1)  # (g, f)
        columns = self.inverse.take_along_dim(at[:, None], 2)  # (g, n, f)
        inner = columns.take_along_dim(at[..., None], 1)  # (g, f, f)
        lost = self.weight.take_along_dim(at[..., None], 1)
        solved = torch.linalg.solve(inner, torch.cat([lost, columns.mT], 2))
        outputs = lost.shape[2]
        self.weight -= columns @ solved[..., :outputs]
        self.inverse -= columns @ solved[..., outputs:]

    def _block(self, at: Tensor) -> Tensor:
        g, k, m = at.shape
        rows = self.inverse.take_along_dim(at.reshape(g, -1, 1), 1).view(g, k, m, -1)
        return rows.take_along_dim(at[:, :, None], 3)

    def _rows(self, weight: Tensor, at: Tensor) -> Tensor:
        g, k, m = at.shape
        return weight.take_along_dim(at.reshape(g, -1, 1), 1).view(g, k, m, -1)


def uneven(grams: Sequence[Gram], size: int) -> str:
    """Return why units have unequal numbers of features; "" where they have equal ones."""
    for gram in grams:
        for row in gram.units:
            counts = torch.bincount(row[row >= 0], minlength=size)
            if bool((counts != counts[0]).any()) or not int(counts[0]):
                return f"units have unequal numbers of features in '{gram.reader.consumer.name}'"
    return ""
