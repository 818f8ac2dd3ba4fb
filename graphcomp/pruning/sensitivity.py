"""Sensitivity: by how much the model's outputs move where a share of one group's units goes, after the repair.

Errors of layers do not compare: a layer's own output may move by much and the model's by little. So each group is cut
alone, by a few shares, its consumers are repaired, and the error is that of the model's outputs on batches that the
repair has not seen. Between the shares the error is taken as straight, and made convex: the first units of a group are
never dearer than the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.cost import BitsOf, CostModel
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import CalibrationError, PlanError
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.preserve import writes
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.pruning.allocation import Budget, Meter
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.grams import grams
from graphcomp.pruning.probing import Trial, Trials
from graphcomp.pruning.readers import find_readers
from graphcomp.pruning.repair import repair_cut
from graphcomp.pruning.slice import SliceGroups

logger = logging.getLogger("graphcomp")

SHARES = (0.125, 0.25, 0.5, 0.75)
"""Shares of a group that are cut to see what the group is worth."""
SAMPLES = 128
"""Samples that the probes are repaired on at most, and as many that they are judged on."""
ROWS = 8_000
"""Rows that a consumer is solved on in a probe."""
POWER = 3
"""Growth of the error beyond the last share."""


@dataclass(frozen=True)
class Curve:
    """Error of the model's outputs by the number of units that one group has lost.

    Attributes:
        size: units of the group.
        removed: numbers of units, ascending, 0 first.
        errors: relative squared error of the outputs for each; the first is 0 for a model that nothing was cut from.
    """

    size: int
    removed: tuple[int, ...]
    errors: tuple[float, ...]

    def slopes(self) -> Tensor:
        """Return what the k-th unit costs, (size,) float64, not decreasing: the slopes of the lower convex hull."""
        points = list(zip(self.removed, self.errors, strict=True))
        last, error = points[-1]
        if last < self.size:
            first = self.errors[0]
            points.append((self.size, first + (error - first) * (self.size / max(last, 1)) ** POWER))
        hull: list[tuple[int, float]] = []
        for point in points:
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        pieces = [torch.full((b[0] - a[0],), _slope(a, b)) for a, b in pairwise(hull)]
        return torch.cat(pieces).double().clamp(min=0).cummax(0).values


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@torch.no_grad()
def probe(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    batches: Sequence[Sequence[Any]],
    wanted: fx.GraphModule | None = None,
) -> dict[ChannelGroup, Curve]:
    """Return the curve of each group, its units of the lowest scores gone first.

    Readers of a group are repaired by Gram matrices of the uncut model, and the model runs from the first reader on.
    That is the repair itself where one layer reads the group; where several do, a layer does not see what is left of
    the errors of layers before. A group whose units other ops sum is sliced, repaired and run as a whole.

    Args:
        plan: of the whole model, exported.
        groups: of `plan`.
        scores: for each group (size,).
        batches: flat inputs, in the order of the placeholders. Every second one judges; a single one does both.
        wanted: a graph with the outputs that are wanted. Default: that of `plan`.

    Raises:
        CalibrationError: no batch, one that the model does not run on, or values that are not finite.
        PlanError: the model returns no floats.
    """
    if not batches:
        raise CalibrationError("there is no batch to probe groups on", fix="calibration=[batch, …]")
    module = plan.captured.module
    fit, held = _some(batches[::2]), _some(batches[1::2] or batches)
    judge = _Judge([_floats(tensor_leaves(run_tapped(wanted or module, batch))) for batch in held])
    if not any(judge.wanted):
        raise PlanError("no output is of floats, so nothing says how much a group matters", fix='ranking="global"')
    removed = {g: sorted({round(g.size * share) for share in SHARES} - {0, g.size}) for g in groups}
    orders = {group: scores[group].argsort(stable=True) for group in groups}
    readers = find_readers(plan, () if writes(module) else groups)
    trials = Trials(module, readers.consumers)
    made: dict[Trial, tuple[ChannelGroup, int]] = {}
    for group, own in grams(plan, readers, fit, ROWS):
        if not isinstance(own, str):
            found = {count: trials.of(own, orders[group][:count]) for count in removed[group]}
            made |= {trial: (group, count) for count, trial in found.items() if trial is not None}
    errors: dict[Any, float] = dict.fromkeys([*made.values(), None], 0.0)
    for k, batch in enumerate(held):
        for trial, output in trials.outputs(batch, list(made)):
            errors[None if trial is None else made[trial]] += judge.error(k, _floats(tensor_leaves(output)))
    curves: dict[ChannelGroup, Curve] = {}
    for group in groups:
        for count in removed[group]:
            if (group, count) not in errors:
                errors[group, count] = _whole(plan, {group: orders[group][count:].sort().values}, fit, held, judge)
        curves[group] = Curve(
            group.size, (0, *removed[group]), (errors[None], *(errors[group, n] for n in removed[group]))
        )
        logger.debug("sensitivity of %s: %s", group.name, curves[group])
    return curves


def sensitivities(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    batches: Sequence[Sequence[Any]],
    budget: Budget | None = None,
    bits: BitsOf | None = None,
    wanted: fx.GraphModule | None = None,
) -> Scores:
    """Return scores that compare between groups, in the order that `scores` have within each; see `probe`.

    Args:
        budget: what units are to save; None: all units count alike.
        bits: what the layers will be quantized to, for a budget on bit operations.

    Raises:
        PlanError: the model could only be recorded, or returns no floats.
    """
    if plan.captured.producer == "record":
        raise PlanError(
            f"{type(plan.model).__name__} could only be recorded: no graph runs, and no group can be probed",
            why=f"torch.export refused: {plan.captured.reason}",
            fix='ranking="global"',
        )
    curves = probe(plan, groups, scores, batches, wanted)
    if budget is None:
        return marginal(curves, scores, lambda _: 1.0)
    meter = Meter(CostModel(plan), budget, groups, bits)
    return marginal(curves, scores, meter.saved_by_a_unit)


def notes(batches: Sequence[Sequence[Any]]) -> list[str]:
    """Say which of the batches the groups were probed on."""
    fit, held = len(_some(batches[::2])), len(_some(batches[1::2]))
    if len(batches) == 1:
        return ["sensitivity: the only batch both repairs the probes and judges them; two batches or more are better"]
    said = f"sensitivity: probes were repaired on {fit} of {len(batches)} batches and judged on {held} others"
    more = fit + held < len(batches)
    return [f"{said}; {SAMPLES} samples of each kind are enough" if more else said]


def marginal(curves: dict[ChannelGroup, Curve], scores: Scores, cost: Callable[[ChannelGroup], float]) -> Scores:
    """Return scores that compare between groups: what losing the unit costs the outputs, for each unit of `cost`.

    Args:
        curves: of `probe`.
        scores: the order within each group.
        cost: what one unit of a group saves, of what is to be saved.
    """
    found = {}
    for group, curve in curves.items():
        own = torch.empty(group.size, dtype=torch.float64)
        own[scores[group].argsort(stable=True)] = curve.slopes() / max(cost(group), torch.finfo(own.dtype).tiny)
        found[group] = own.clamp(max=torch.finfo(own.dtype).max)
    return found


@dataclass(frozen=True, eq=False)
class _Judge:
    """The outputs that are wanted: for each batch the floats, float64."""

    wanted: list[list[Tensor]]

    @cached_property
    def norm(self) -> float:
        return max(sum(float(t.square().sum()) for own in self.wanted for t in own), torch.finfo(torch.float64).tiny)

    def error(self, batch: int, found: Sequence[Tensor]) -> float:
        """Return the share of one batch in Σ ||y - t||² / Σ ||t||²."""
        pairs = zip(found, self.wanted[batch], strict=True)
        return sum(float((y - t).square().sum()) for y, t in pairs) / self.norm


def _whole(plan: Analysis, kept: Kept, fit: Sequence[Any], held: Sequence[Any], judge: _Judge) -> float:
    """Return the error of a cut whose consumers are repaired, from end to end."""
    small = SliceGroups(plan.coupling, kept).rewrite(plan.captured.module)
    repaired = repair_cut(plan, kept, small, fit, direct=True, rows=ROWS).graph
    return sum(judge.error(k, _floats(tensor_leaves(run_tapped(repaired, batch)))) for k, batch in enumerate(held))


def _floats(found: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors of floats, in float64."""
    return [t.double() for t in found if t.is_floating_point()]


def _some(batches: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return the first batches, of SAMPLES samples at most, one at least."""
    found: list[Sequence[Any]] = []
    count = 0
    for batch in batches:
        found.append(batch)
        count += next((len(t) for t in batch if isinstance(t, Tensor) and t.dim()), 1)
        if count >= SAMPLES:
            break
    return found
