"""Sensitivity: by how much the model's outputs move where a share of one group's units goes, after the repair.

Errors of layers do not compare: a layer's own output may move by much and the model's by little. So each group is cut
alone, by a few shares, its readers are repaired, and the error is that of the model's outputs on batches that the
repair has not seen. Between the shares the error has the shape of what is left at the readers, where units go in the
order of saliency "repairable"; in another order it is taken as straight. It is made convex: the first units of a group
are never dearer than the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from graphcomp.cost import BitsOf, CostModel
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import CalibrationError, PlanError
from graphcomp.ir.inputs import first_samples
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.preserve import writes
from graphcomp.ir.run_nodes import refused_batch, run_tapped
from graphcomp.numerics.compare import squared_error
from graphcomp.pruning.allocation import Budget, Meter
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.grams import errors_left, grams, row_counts, uneven
from graphcomp.pruning.influence import Influences, rows_alike
from graphcomp.pruning.probing import Trial, Trials
from graphcomp.pruning.readers import find_readers
from graphcomp.pruning.repair import layer_influences, repair_cut
from graphcomp.pruning.saliency import score
from graphcomp.pruning.slice import SliceGroups

logger = logging.getLogger("graphcomp")

SHARES = (0.125, 0.25, 0.5, 0.75)
"""Shares of a group that are cut to see what the group is worth."""
SAMPLES = 256
"""Samples that the probes are repaired on at most, and as many that they are judged on."""
ROWS = 8_000
"""Rows that a consumer is solved on in a probe."""
POWER = 3
"""Growth of the error beyond the last share."""
SHOWN = 8
"""Names that a note shows."""
SMALL = 1e-6
"""Share of all that a group's readers can lose below which a piece of the curve says nothing of the outputs."""


Batches: TypeAlias = dict[int, Sequence[Any]]
"""Position among the calibration batches -> flat inputs."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Error of the model's outputs by the number of units that one group has lost.

    Attributes:
        order: the units, first those that go first, (size,) int64.
        removed: numbers of units, ascending, 0 first.
        errors: relative squared error of the outputs for each; the first is 0 for a model that nothing was cut from.
        steps: what each unit in turn adds to the errors of the layers that read the group, (size,), ascending. None:
            not known.
        alike: why rows of a reader counted alike in the repair of the probes; "" where rows count what they do for the
            outputs.
    """

    order: Tensor
    removed: tuple[int, ...]
    errors: tuple[float, ...]
    steps: Tensor | None = None
    alike: str = ""

    @property
    def size(self) -> int:
        """Units of the group."""
        return len(self.order)

    def slopes(self) -> Tensor:
        """Return what the k-th unit costs, (size,) float64, not decreasing: the slopes of the lower convex hull.

        With `steps`, what an error of the readers costs the outputs is taken from the hull, and goes from the middle of
        one piece to the middle of the next in a straight line.
        """
        hull = self._hull()
        if self.steps is None or not bool(self.steps.sum() > 0):
            pieces = [torch.full((b[0] - a[0],), _slope(a, b)) for a, b in pairwise(hull)]
            return torch.cat(pieces).double().clamp(min=0).cummax(0).values
        steps = self.steps.double()
        total = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
        least = SMALL * float(total[-1])
        rates = [max(b[1] - a[1], 0.0) / max(float(total[b[0]] - total[a[0]]), least) for a, b in pairwise(hull)]
        middles = [(a[0] + b[0] - 1) / 2 for a, b in pairwise(hull)]
        return (steps * _interpolated(middles, rates, self.size)).cummax(0).values

    def _hull(self) -> list[tuple[int, float]]:
        """Return the corners of the lower convex hull, from no unit to all."""
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
        return hull


def _interpolated(places: Sequence[float], values: Sequence[float], size: int) -> Tensor:
    """Return values at 0, 1, …, size - 1: straight lines between places, constant beyond, (size,) float64."""
    x, y = torch.tensor(places, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    if len(x) == 1:
        return y.expand(size)
    at = torch.arange(size, dtype=torch.float64).clamp(float(x[0]), float(x[-1]))
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + share * (y[right] - y[right - 1])


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@torch.no_grad()
def probe(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    scores: Scores | None,
    batches: Sequence[Sequence[Any]],
    wanted: fx.GraphModule | None = None,
) -> dict[ChannelGroup, Curve]:
    """Return the curve of each group.

    Readers of a group are repaired by Gram matrices of the uncut model, and the model runs from the first reader on.
    That is the repair itself where one layer reads the group; where several do, a layer does not see what is left of
    the errors of layers before. A group whose units other ops sum is sliced, repaired and run as a whole.

    Args:
        plan: of the whole model, exported.
        groups: of `plan`.
        scores: for each group (size,); the lowest go first. None: as saliency "repairable" says; groups that have no
            closed form, by the norms of their weights.
        batches: flat inputs, in the order of the placeholders. Every second one judges; a single one does both.
        wanted: a graph with the outputs that are wanted. Default: that of `plan`.

    Raises:
        CalibrationError: no batch, one that the model does not run on, or values that are not finite.
        PlanError: the model returns no floats.
    """
    if not batches:
        raise CalibrationError("there is no batch to probe groups on", fix="calibration=[batch, …]")
    module = plan.captured.module
    fit, held = _split(batches)
    judge = _Judge([_outputs(wanted or module, batch, k) for k, batch in held.items()])
    if not any(judge.wanted):
        raise PlanError("no output is of floats, so nothing says how much a group matters", fix='ranking="global"')
    readers = find_readers(plan, () if writes(module) else groups)
    trials = Trials(module, readers.consumers)
    made: dict[Trial, tuple[ChannelGroup, int]] = {}
    found: dict[ChannelGroup, Tensor] = {}
    counted = row_counts(plan, readers, fit)
    for group, own in grams(plan, readers, fit, ROWS, counted):
        if isinstance(own, str) or (scores is None and uneven(own, group.size)):
            continue
        found[group] = errors_left(own, group.size) if scores is None else scores[group]
        order = found[group].argsort(stable=True)
        some = {count: trials.of(own, order[:count]) for count in _counts(group)}
        made |= {trial: (group, count) for count, trial in some.items() if trial is not None}
    errors: dict[tuple[ChannelGroup, int] | None, float] = dict.fromkeys([*made.values(), None], 0.0)
    for k, batch in enumerate(held.values()):
        for trial, output in trials.outputs(batch, list(made)):
            errors[None if trial is None else made[trial]] += judge.error(k, _floats(output))
    others = [group for group in groups if group not in found]
    by_norm = score("l2", plan, others) if others and scores is None else scores or {}
    curves: dict[ChannelGroup, Curve] = {}
    influence: Influences | None = None
    for group in groups:
        own_scores = found.get(group, by_norm.get(group))
        assert own_scores is not None
        order = own_scores.argsort(stable=True)
        alike = counted.alike(reader.consumer for reader in readers.of.get(group, ()))
        for count in _counts(group):
            if (group, count) not in errors:
                influence = influence or layer_influences(plan, list(fit.values()))
                kept = {group: order[count:].sort().values}
                errors[group, count] = _whole(plan, kept, fit, held, judge, influence)
                alike = alike or influence.why
        points = (0, *_counts(group))
        steps = found[group][order] if scores is None and group in found else None
        curves[group] = Curve(order, points, tuple(errors[(group, n) if n else None] for n in points), steps, alike)
        logger.debug("sensitivity of %s: %s", group.name, curves[group])
    return curves


def sensitivities(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    scores: Scores | None,
    batches: Sequence[Sequence[Any]],
    budget: Budget | None = None,
    bits: BitsOf | None = None,
    wanted: fx.GraphModule | None = None,
) -> tuple[Scores, list[str]]:
    """Return scores that compare between groups, and notes; the arguments are those of `probe`, and:

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
    said = notes(batches)
    others = [group.name for group, curve in curves.items() if scores is None and curve.steps is None]
    if others:
        some = ", ".join(others[:SHOWN]) + (" and more" if len(others) > SHOWN else "")
        said.append(f"sensitivity: units go by the norms of their weights, as no closed form reads them, in {some}")
    alike: dict[str, list[str]] = {}
    for group, curve in curves.items():
        if curve.alike:
            alike.setdefault(curve.alike, []).append(group.name)
    said += [f"sensitivity: {line}" for line in rows_alike(alike)]
    if budget is None:
        return marginal(curves), said
    meter = Meter(CostModel(plan), budget, groups, bits)
    return marginal(curves, meter.saved_by_a_unit), said


def marginal(curves: Mapping[ChannelGroup, Curve], cost: Callable[[ChannelGroup], float] = lambda _: 1.0) -> Scores:
    """Return scores that compare between groups: what losing the unit costs the outputs, for each unit of `cost`.

    Args:
        curves: of `probe`.
        cost: what one unit of a group saves, of what is to be saved.
    """
    found = {}
    for group, curve in curves.items():
        own = torch.empty(group.size, dtype=torch.float64)
        own[curve.order] = curve.slopes() / max(cost(group), torch.finfo(own.dtype).tiny)
        found[group] = own.clamp(max=torch.finfo(own.dtype).max)
    return found


def notes(batches: Sequence[Sequence[Any]]) -> list[str]:
    """Say which of the batches the groups were probed on."""
    fit, held = _split(batches)
    if len(batches) == 1:
        return ["sensitivity: the only batch repaired the probes and judged them, too; two batches or more are better"]
    used = f"sensitivity: probes were repaired on {len(fit)} and judged on {len(held)} others of {len(batches)} batches"
    return [f"{used}, {SAMPLES} samples of each kind" if len(fit) + len(held) < len(batches) else used]


@dataclass(frozen=True, eq=False)
class _Judge:
    """The outputs that are wanted: for each batch the floats, float64."""

    wanted: list[list[Tensor]]

    @cached_property
    def norm(self) -> float:
        return max(sum(squared_error(own, own)[1] for own in self.wanted), torch.finfo(torch.float64).tiny)

    def error(self, batch: int, found: Sequence[Tensor]) -> float:
        """Return the share of one batch in Σ ||y - t||² / Σ ||t||²."""
        return squared_error(self.wanted[batch], found)[0] / self.norm


def _counts(group: ChannelGroup) -> list[int]:
    """Return the numbers of units that a group loses in probes."""
    return sorted({round(group.size * share) for share in SHARES} - {0, group.size})


def _whole(plan: Analysis, kept: Kept, fit: Batches, held: Batches, judge: _Judge, influence: Influences) -> float:
    """Return the error of a cut whose consumers are repaired, from end to end."""
    small = SliceGroups(plan.coupling, kept).rewrite(plan.captured.module)
    batches = list(fit.values())
    repaired = repair_cut(plan, kept, small, batches, direct=True, rows=ROWS, influence=influence).graph
    return sum(judge.error(k, _outputs(repaired, batch, number)) for k, (number, batch) in enumerate(held.items()))


def _outputs(module: fx.GraphModule, batch: Sequence[Any], k: int) -> list[Tensor]:
    """Return the floats that a graph returns of batch `k`."""
    try:
        return _floats(run_tapped(module, batch))
    except Exception as error:  # whatever the ops raise on inputs of another shape
        raise refused_batch(k, error) from error


def _floats(output: Any) -> list[Tensor]:
    """Return the tensors of floats that an output holds, in float64."""
    return [t.double() for t in tensor_leaves(output) if t.is_floating_point()]


def _split(batches: Sequence[Sequence[Any]]) -> tuple[Batches, Batches]:
    """Return the batches that probes are repaired on, and those that judge: every second one, SAMPLES samples each."""
    if len(batches) == 1:
        return {0: batches[0]}, {0: batches[0]}
    return _some(batches, 0), _some(batches, 1)


def _some(batches: Sequence[Sequence[Any]], first: int) -> Batches:
    """Return every second batch from the `first` on, up to SAMPLES samples, one batch at least."""
    chosen = first_samples(batches[first::2], SAMPLES)
    return {first + 2 * k: batch for k, batch in enumerate(chosen)}
