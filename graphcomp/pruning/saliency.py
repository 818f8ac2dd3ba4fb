"""How much each unit matters: scores per unit, low ones can go.

A saliency is a callable that takes an Evidence and returns, for each of its groups, a (size,) float tensor. The ones
below are values (frozen dataclasses) with their options as fields; SALIENCIES gives each a name.

Over a unit: every floating-point parameter of the group counts (no buffers), all elements whose index on the member's
dim belongs to the unit. Where a weight is computed from parameters (masks, weight norm), the weight counts in their
place. An element of a weight lies in a unit of its rows' group and in one of its columns' group, and
counts for both. Scores are of the parameters in float32, sums taken on their device, results on the CPU.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graphcomp.arguments import (
    check_callable,
    check_choice,
    check_instance,
    check_mapping,
    check_number,
    check_whole,
    shown,
)
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.axis import normal
from graphcomp.coupling.groups import ChannelGroup, Member
from graphcomp.coupling.propagate import Coupling
from graphcomp.errors import PlanError
from graphcomp.ir.graph import bind
from graphcomp.ops.registry import facts_of
from graphcomp.pruning.acting import with_acting
from graphcomp.pruning.evidence import (
    Evidence,
    Loss,
    Meeting,
    NotedScores,
    Place,
    Scores,
    axis_at,
    notes_of,
    units_at,
)
from graphcomp.pruning.repairable import Repairable
from graphcomp.pruning.slice import check_groups
from graphcomp.system.threads import one_at_a_time

aten = torch.ops.aten

EPSILON = 1e-8
"""Keeps a norm of 0 from dividing; as in GETA's code."""


class Saliency(Protocol):
    """Scores the units of all of `evidence.groups`: for each group (size,) float, low for what can go."""

    def __call__(self, evidence: Evidence, /) -> Scores: ...


@one_at_a_time
def score(
    saliency: str | Saliency,
    analysis: Analysis,
    groups: Sequence[ChannelGroup],
    *,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> Scores:
    """Score every unit of `groups`.

    Args:
        saliency: a name in SALIENCIES, or a callable of your own.
        data: batches, for saliencies that need activations or gradients (see Evidence).
        loss: loss(model output, batch) -> scalar, for those that need gradients.
        seed: of "random".

    Returns:
        For each group (size,) float32 on the CPU.

    Raises:
        PlanError: no such saliency; it needs data, a loss or weights that are not there; a result of the wrong shape.
    """
    check_instance("analysis", analysis, Analysis, "graphcomp.analyze(model, example_inputs)")
    check_groups("groups", analysis.groups, groups)
    scorer = named(saliency) if isinstance(saliency, str) else saliency
    check_callable("saliency", scorer, 'saliency="l2"')
    evidence = Evidence(analysis, tuple(groups), data, loss, seed)
    acting = with_acting(groups, evidence.acting)
    evidence = evidence.of(tuple(acting.values()))
    scores = scorer(evidence)
    check_mapping("what a saliency returns", scores, "{group: scores for group in evidence.groups}, each (size,)")
    found = {g: score_of(g, scores.get(own, scores.get(g)), saliency) for g, own in acting.items()}
    if not isinstance(scorer, (Magnitude, Cosine, Geta, NormScale, GeometricMedian, Activation, Taylor, Repairable)):
        return NotedScores(found, notes_of(scores))
    found = {group: _dead_first(values, dead_units(acting[group], evidence)) for group, values in found.items()}
    return NotedScores(found, notes_of(scores))


def _dead_first(values: Tensor, dead: Tensor) -> Tensor:
    """Give units that are dead the lowest score."""
    return values.masked_fill(dead, min(float(values.min()), 0.0)) if bool(dead.any()) else values


def dead_units(group: ChannelGroup, evidence: Evidence) -> Tensor:
    """Return which units carry nothing: all matrices that make them, or all that read them, are zero there. (size,)
    bool."""
    matrices = [member for member in parameters(group) if len(member.shape) > 1]
    dead = torch.zeros(group.size, dtype=torch.bool)
    for consumes in (False, True):
        own = [member for member in matrices if member.consumes == consumes]
        if own:
            dead |= per_unit(group, lambda name: (evidence.weight(name) != 0).float(), own) == 0
    return dead


def score_of(group: ChannelGroup, found: Any, saliency: object) -> Tensor:
    """Return the scores of a group, as a saliency gave them: (size,) float32 on the CPU.

    Raises:
        PlanError: they are missing, or of another shape.
    """
    if not isinstance(found, Tensor) or tuple(found.shape) != (group.size,):
        given = f"scores of shape {tuple(found.shape)}" if isinstance(found, Tensor) else shown(found)
        raise PlanError(
            f"the saliency {shown(saliency)} gives {group.name} {given}; it has {group.size} units",
            fix="a tensor of one number per unit, (size,)",
        )
    return found.detach().float().cpu()


def named(name: str) -> Saliency:
    """The saliency of that name.

    Raises:
        PlanError: there is none.
    """
    if name not in SALIENCIES:
        near = difflib.get_close_matches(name, SALIENCIES, n=1, cutoff=0.0)
        raise PlanError(f"no saliency {name!r}", why=f"there are {', '.join(SALIENCIES)}", fix=f"saliency={near[0]!r}")
    return SALIENCIES[name]


def reads_data(saliency: str | Saliency | None) -> bool:
    """Whether a saliency may read data or a loss: all but those that are known to read weights alone."""
    scorer = SALIENCIES.get(saliency) if isinstance(saliency, str) else saliency
    if isinstance(scorer, NormScale):
        return reads_data(scorer.fallback)
    return scorer is not None and not isinstance(scorer, (Magnitude, Random, GeometricMedian))


# ------------------------------------------------------------------------------------------------ sums over units
def per_unit(group: ChannelGroup, element: Callable[[str], Tensor], members: Sequence[Member] | None = None) -> Tensor:
    """Σ of `element(name)`, a tensor shaped like the parameter `name`, over the elements of each unit: (size,) float32.

    `members` default to all parameters of the group that hold floating-point numbers.
    """
    total = torch.zeros(group.size)
    for member in parameters(group) if members is None else members:
        total += scatter(group, member.unit_of, along(element(member.name), member.dim))
    return total


def parameters(group: ChannelGroup) -> list[Member]:
    """The members that count: parameters, not buffers."""
    return [member for member in group.members if member.is_parameter]


def along(values: Tensor, dim: int) -> Tensor:
    """Sum over all dims but `dim`: (length of the dim,)."""
    others = [d for d in range(values.dim()) if d != dim]
    return values.sum(others) if others else values


def scatter(group: ChannelGroup, unit_of: Tensor, values: Tensor) -> Tensor:
    """Sum of `values` (length,) over the indices of each unit; `unit_of` is (occurrences, length). (size,) on the CPU.

    An index that belongs to one unit twice counts once.
    """
    values = values.cpu()
    total = values.new_zeros(group.size + 1)  # the last entry takes what belongs to no unit
    for k, row in enumerate(unit_of):
        again = (unit_of[:k] == row).any(0)
        total.index_add_(0, row.masked_fill((row < 0) | again, group.size), values)
    return total[: group.size]


def elements(group: ChannelGroup) -> Tensor:
    """How many parameter elements each unit has: (size,) float32."""
    total = torch.zeros(group.size)
    for member in parameters(group):
        length = member.shape[member.dim]
        each = float(math.prod(member.shape) // length)
        total += scatter(group, member.unit_of, torch.full((length,), each))
    return total


# ------------------------------------------------------------------------------------------------ magnitude, random
@dataclass(frozen=True)
class Magnitude:
    """The p-norm of a unit's parameters, p = 1 or 2.

    Source: Li et al., Pruning Filters for Efficient ConvNets, 2017 (L1 of filters); here over all members of a group.
    """

    p: int = 2

    def __post_init__(self) -> None:
        check_choice("p", self.p, (1, 2))

    def __call__(self, evidence: Evidence) -> Scores:
        """(size,) per group, in the units of the weights."""
        if self.p == 1:
            return {g: per_unit(g, lambda name: evidence.weight(name).abs()) for g in evidence.groups}
        return {g: _norms(g, evidence.weight) for g in evidence.groups}


def _norms(group: ChannelGroup, tensor: Callable[[str], Tensor]) -> Tensor:
    return per_unit(group, lambda name: tensor(name).square()).sqrt()


@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1), drawn with the evidence's seed."""

    def __call__(self, evidence: Evidence) -> Scores:
        """(size,) per group. Needs no weights."""
        generator = torch.Generator().manual_seed(evidence.seed)
        return {g: torch.rand(g.size, generator=generator) for g in evidence.groups}


# ------------------------------------------------------------------------------------------------ gradients
def _products(group: ChannelGroup, evidence: Evidence) -> Tensor:
    """<x_u, v_u>: a unit's parameters with their gradients."""
    return per_unit(group, lambda name: evidence.weight(name) * evidence.gradient(name))


@dataclass(frozen=True)
class Taylor:
    """How much the loss changes when the unit is set to zero: |<x, v>| to first order, 0.5 <x, v>² to second.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, eq. 8; the second-order form
    (the Hessian as the square of the gradient) as in GETA.
    """

    order: int = 1

    def __post_init__(self) -> None:
        check_choice("order", self.order, (1, 2))

    def __call__(self, evidence: Evidence) -> Scores:
        """(size,) per group; needs data and a loss."""
        products = {g: _products(g, evidence) for g in evidence.groups}
        if self.order == 1:
            return {g: product.abs() for g, product in products.items()}
        return {g: 0.5 * product.square() for g, product in products.items()}


@dataclass(frozen=True)
class Cosine:
    """sign · cos(x, v) + 1, in [0, 2], between a unit's parameters x and their gradients v.

    GETA's code has sign +1: a unit is unimportant where descent makes it grow (cos = -1). With sign -1 it is
    unimportant where descent shrinks it anyway. Both are worth trying.
    """

    sign: int = 1

    def __post_init__(self) -> None:
        check_choice("sign", self.sign, (1, -1))

    def __call__(self, evidence: Evidence) -> Scores:
        """(size,) per group; needs data and a loss."""
        return {g: self._of(g, evidence) for g in evidence.groups}

    def _of(self, group: ChannelGroup, evidence: Evidence) -> Tensor:
        sizes = (_norms(group, evidence.weight) + EPSILON) * (_norms(group, evidence.gradient) + EPSILON)
        return self.sign * _products(group, evidence) / sizes + 1


@dataclass(frozen=True)
class Geta:
    """A weighted sum of five proxies, each divided by its L2 norm over all units of all groups.

    Magnitude, magnitude per element, cosine, Taylor of first and of second order. Without data and a loss the two
    magnitudes only. Already comparable between groups: allocate with normalize="none" for the ranking of the paper.

    Source: GETA (Qu et al., 2025) and its code, `importance_score`.
    """

    magnitude: float = 0.2
    mean_magnitude: float = 0.2
    cosine: float = 0.2
    taylor: float = 0.2
    taylor2: float = 0.2
    cosine_sign: int = 1

    def __post_init__(self) -> None:
        for name in ("magnitude", "mean_magnitude", "cosine", "taylor", "taylor2"):
            check_number(name, getattr(self, name), fix=f"{name}=0.2")
        check_choice("cosine_sign", self.cosine_sign, (1, -1))

    def __call__(self, evidence: Evidence) -> Scores:
        """(size,) per group, without unit."""
        norms = Magnitude(2)(evidence)
        means = {g: norm / (elements(g) + 1e-6) for g, norm in norms.items()}
        proxies: list[tuple[float, Scores]] = [(self.magnitude, norms), (self.mean_magnitude, means)]
        if evidence.has_gradients:
            proxies += [
                (self.cosine, Cosine(self.cosine_sign)(evidence)),
                (self.taylor, Taylor(1)(evidence)),
                (self.taylor2, Taylor(2)(evidence)),
            ]
        total = {g: torch.zeros(g.size) for g in evidence.groups}
        for weight, proxy in proxies:
            norm = torch.cat(list(proxy.values())).norm() + EPSILON
            for group, values in proxy.items():
                total[group] += weight * values / norm
        return total


# ------------------------------------------------------------------------------------------------ normalisation scales


@dataclass(frozen=True)
class NormScale:
    """Mean |gamma| of a unit over the batch, layer, group and RMS norms that scale it.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017.

    Attributes:
        fallback: scores the groups that no norm scales. None: they are an error. Their scores have another unit, so
            rank with a normalisation.
    """

    fallback: Saliency | None = None

    def __post_init__(self) -> None:
        if self.fallback is not None:
            check_callable("fallback", self.fallback, "fallback=Magnitude()")

    def __call__(self, evidence: Evidence) -> Scores:
        """(size,) per group, in the units of gamma."""
        gammas = norm_weights(evidence.analysis.coupling)
        scaled = {g: [m for m in parameters(g) if m.name in gammas] for g in evidence.groups}
        scores = {g: self._of(g, members, evidence) for g, members in scaled.items() if members}
        return _filled(evidence, scores, self.fallback, "no normalisation scales", "bn_scale", "NormScale")

    def _of(self, group: ChannelGroup, members: Sequence[Member], evidence: Evidence) -> Tensor:
        total = per_unit(group, lambda name: evidence.weight(name).abs(), members)
        return total / per_unit(group, lambda name: torch.ones_like(evidence.weight(name)), members)


def norm_weights(coupling: Coupling) -> set[str]:
    """Names of the parameters that norms scale by."""
    norms = (bind(node).get("weight") for node in coupling.graph.nodes if facts_of(node.target).norm)
    return {str(weight.target) for weight in norms if weight is not None and str(weight.target) in coupling.first_names}


def _filled(evidence: Evidence, scores: Scores, fallback: Saliency | None, why: str, name: str, scorer: str) -> Scores:
    """`scores`, with those of `fallback` for the groups that have none."""
    missing = [g for g in evidence.groups if g not in scores]
    if not missing:
        return scores
    if fallback is None:
        raise PlanError(
            f"saliency '{name}' cannot score {len(missing)} of {len(evidence.groups)} groups",
            why=f"{why} {', '.join(g.name for g in missing[:8])}{', …' if len(missing) > 8 else ''}",
            fix=f"saliency={scorer}(fallback=Magnitude()), or leave these groups out",
        )
    others = fallback(evidence.of(missing))
    check_mapping("what a saliency returns", others, "{group: scores for group in evidence.groups}, each (size,)")
    return {**scores, **others}


# ------------------------------------------------------------------------------------------------ geometric median
@dataclass(frozen=True)
class GeometricMedian:
    """Sum of a unit's Euclidean distances to all units of its group: low where others can stand in for it.

    A unit's point is all that makes it: its elements of every producing parameter, end to end.

    Source: He et al., Filter Pruning via Geometric Median, 2019, eq. 4 (the sum itself, no median is sought).

    Attributes:
        chunk: distances held in memory at once.
    """

    chunk: int = 1 << 24

    def __post_init__(self) -> None:
        check_whole("chunk", self.chunk)

    def __call__(self, evidence: Evidence) -> Scores:
        """(size,) per group, in the units of the weights."""
        return {g: self._of(_points(g, evidence)) for g in evidence.groups}

    def _of(self, points: Tensor) -> Tensor:
        points = points - points.mean(0)  # distances stay, rounding errors shrink
        step = max(self.chunk // len(points), 1)
        sums = []
        for start in range(0, len(points), step):
            distances = torch.cdist(points[start : start + step], points)
            rows = torch.arange(len(distances), device=points.device)
            distances[rows, rows + start] = 0
            sums.append(distances.sum(1))
        return torch.cat(sums).cpu()


def _points(group: ChannelGroup, evidence: Evidence) -> Tensor:
    """(size, elements of the unit): all that makes each unit; where nothing does, all that reads it."""
    members = [m for m in parameters(group) if not m.consumes] or parameters(group)
    return torch.cat([_rows(evidence.weight(m.name), m, row) for m in members for row in m.unit_of], 1)


def _rows(weight: Tensor, member: Member, row: Tensor) -> Tensor:
    """(size, elements): the slices of each unit, its indices in order. All units have equally many."""
    inside = (row >= 0).nonzero().flatten()
    order = inside[row[inside].argsort(stable=True)]
    units = int(row.max()) + 1
    return weight.movedim(member.dim, 0)[order.to(weight.device)].reshape(units, -1)


# ------------------------------------------------------------------------------------------------ activations
@dataclass(frozen=True)
class Activation:
    """Σ |w| · rms(x) over the weights w that read a unit, x being the activation each is multiplied with.

    Where two activations meet (queries and keys) the product of their root mean squares over the unit's indices. A
    unit of several indices that the weight and the activation order differently gets one rms for all.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models (Wanda), 2024, eq. 1, summed
    over the outputs.

    Attributes:
        fallback: scores the groups that nothing reads. None: they are an error.
    """

    fallback: Saliency | None = None

    def __post_init__(self) -> None:
        if self.fallback is not None:
            check_callable("fallback", self.fallback, "fallback=Magnitude()")

    def __call__(self, evidence: Evidence) -> Scores:
        """(size,) per group, in the units of the outputs; needs data."""
        totals: dict[ChannelGroup, Tensor] = {}
        by_factor = {g.factor: g for g in evidence.groups}
        for meeting in evidence.meetings:
            for factor in meeting.factors(evidence.analysis.coupling) & by_factor.keys():
                group = by_factor[factor]
                totals[group] = totals.get(group, torch.zeros(group.size)) + _met(group, meeting, evidence)
        return _filled(evidence, totals, self.fallback, "no product sums over", "activation", "Activation")


def _met(group: ChannelGroup, meeting: Meeting, evidence: Evidence) -> Tensor:
    """What one product reads of each unit: (size,)."""
    coupling = evidence.analysis.coupling
    left, right = meeting.left, meeting.right
    if left[0] in coupling.sources:
        left, right = right, left
    if right[0] not in coupling.sources:
        return _rms(group, left, evidence) * _rms(group, right, evidence)
    names = coupling.sources[right[0]] | {name for name, own in evidence.acting.items() if own.node is right[0]}
    total = torch.zeros(group.size)
    for member in parameters(group):
        if member.consumes and member.name in names:
            total += _weighted(group, member, left, evidence)
    return total


def _weighted(group: ChannelGroup, member: Member, place: Place, evidence: Evidence) -> Tensor:
    """Σ |w| · rms(x), index by index where the two dims are alike, else unit by unit."""
    magnitudes = along(evidence.weight(member.name).abs(), member.dim).cpu()
    if repr(member.axis) == repr(normal(axis_at(evidence.analysis.coupling, place))):
        return scatter(group, member.unit_of, magnitudes * evidence.moments[place].sqrt())
    return scatter(group, member.unit_of, magnitudes) * _rms(group, place, evidence)


def _rms(group: ChannelGroup, place: Place, evidence: Evidence) -> Tensor:
    """Root mean square of an activation over each unit's indices: (size,)."""
    units = units_at(evidence.analysis.coupling, place, group)[None]
    squares = evidence.moments[place]
    return (scatter(group, units, squares) / scatter(group, units, torch.ones_like(squares))).sqrt()


SALIENCIES: dict[str, Saliency] = {
    "l1": Magnitude(1),
    "l2": Magnitude(2),
    "taylor": Taylor(1),
    "taylor2": Taylor(2),
    "cosine": Cosine(),
    "geta": Geta(),
    "bn_scale": NormScale(),
    "geometric_median": GeometricMedian(),
    "activation": Activation(),
    "repairable": Repairable(),
    "random": Random(),
}
"""Name -> saliency, as in compress(saliency="l2")."""
