"""From scores to kept units: how many of each group stay, so that a sparsity or a budget is met.

Units leave in *blocks*: of one unit, or, where lengths must be multiples of `round_to`, of as many units as make those
(the first block of a group brings it to a multiple). All blocks stand in one ranking, cheapest first, in which those of
one group come in order: every prefix of the ranking is a legal choice, and a longer one removes more of everything.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from graphcomp.arguments import check_instance, check_mapping, check_number, check_whole, check_word, is_number, shown
from graphcomp.cost import BitsOf, Bops, CostModel, Counts
from graphcomp.cost.latency_table import LatencyTable
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import BudgetError, NotBuiltError, NothingToPrune, PlanError
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.multiples import units_of_length
from graphcomp.pruning.slice import check_group_list, check_kept

Scope: TypeAlias = Literal["global", "local", "sensitivity"]
Baseline: TypeAlias = Literal["original", "quantized"]
Normalize: TypeAlias = Literal["mean", "max", "l2", "none"]

NORMALIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.abs().mean(),
    "max": lambda scores: scores.abs().max(),
    "l2": lambda scores: scores.norm(),
    "none": lambda scores: scores.new_ones(()),
}
"""What the scores of a group are divided by before groups are compared."""


def allocate(
    groups: Sequence[ChannelGroup],
    scores: Scores,
    *,
    sparsity: float = 0.5,
    scope: Scope = "global",
    normalize: Normalize = "mean",
    round_to: int = 1,
    min_units: int = 1,
    max_group_sparsity: float = 1.0,
    already: Kept | None = None,
    nearest: bool = False,
) -> Kept:
    """Remove exactly `units_to_remove(sparsity, total units)` units, those with the lowest scores.

    Args:
        groups: whose units count, and may be removed.
        scores: (size,) per group, finite.
        sparsity: fraction of all units to remove, 0 <= sparsity < 1.
        scope: "global" ranks the units of all groups together; "local" removes the same share of every group, to the
            nearest unit (divisor method of Webster, which makes the total exact), lowest scores first. "sensitivity":
            as "global", of scores that compare as they are (see `graphcomp.pruning.sensitivity`).
        normalize: divide each group's scores by their mean, maximum or L2 norm before they are compared.
        round_to: the lengths of the dims of each group are multiples of it, or the group stays whole; a unit of several
            indices (a head) may be a multiple by itself.
        min_units: kept of each group, at least (smaller groups stay whole).
        max_group_sparsity: fraction of each group that may be removed, at most.
        already: an earlier choice: what it removed stays removed, and counts.
        nearest: where multiples of `round_to` do not allow that number, remove the nearest they allow.

    Returns:
        For every group the units that stay: (k,) int64, ascending.

    Raises:
        BudgetError: no legal choice removes exactly that many units, or with `nearest` a number less than `round_to`
            apart; the message says which numbers are possible.
        PlanError: an argument out of range, or scores that are missing, of the wrong shape or not finite.
        NothingToPrune: there are no groups.
    """
    check_group_list("groups", groups)
    total = sum(group.size for group in groups)
    wanted = units_to_remove(sparsity, total)
    if not groups:
        raise NothingToPrune("there are no groups to prune")
    ranking = rank(groups, scores, scope, normalize, round_to, min_units, max_group_sparsity, already)
    gone = total - sum(ranking.left)
    return ranking.keep(_exactly(ranking, wanted, gone, total, nearest))


def rounding_note(groups: Sequence[ChannelGroup], kept: Kept, sparsity: float, round_to: int, name: str = "") -> str:
    """Say that another number of units than asked went, as `allocate(…, nearest=True)` chose; "" where none did.

    Args:
        name: the modules that the sparsity is of; "" for all.
    """
    total = sum(group.size for group in groups)
    removed = sum(group.size - len(kept[group]) for group in groups)
    asked = units_to_remove(sparsity, total)
    if not asked or removed == asked:  # of a sparsity of zero units may be gone since a run before
        return ""
    of = f" of {name}" if name else ""
    return (
        f"round_to={round_to}: {removed} of {total} units{of} are removed (sparsity {removed / total:.3g}), "
        f"the nearest to sparsity={sparsity:g} that multiples of {round_to} allow"
    )


def is_share(found: Any) -> bool:
    """Whether it is a number from 0 to below 1."""
    return is_number(found) and 0 <= float(found) < 1


def normalized(scores: Scores, normalize: Normalize) -> Scores:
    """The scores of each group divided by their mean, maximum or L2 norm, in float64 on the CPU.

    Raises:
        PlanError: `normalize` is none of these.
    """
    check_word("normalize", normalize, tuple(NORMALIZE))
    found = {}
    for group, own in scores.items():
        values = own.detach().double().cpu()
        found[group] = values / NORMALIZE[normalize](values).clamp(min=torch.finfo(values.dtype).tiny)
    return found


def units_to_remove(sparsity: float, total: int) -> int:
    """`sparsity` of `total` units as a whole number: the nearest, a half rounds down.

    Raises:
        PlanError: sparsity outside [0, 1).
    """
    if not is_share(sparsity):
        raise PlanError(
            f"sparsity={shown(sparsity)} is outside [0, 1)",
            why="it is the fraction of prunable units to remove, and at least one unit of each group stays",
        )
    exact = Fraction(str(float(sparsity))) * total  # the number as it is written: 0.07 * 50 is 3.5, not a bit more
    return math.ceil(exact - Fraction(1, 2))


def iterative(sparsity: float, steps: int, *, start: float = 0.0, power: float = 3.0) -> tuple[float, ...]:
    """The sparsities to reach one after the other, fast at first: s(t) = end + (start - end) (1 - t/T)^power.

    Hand each step's result to the next `allocate(…, already=…)`, so that what is removed stays removed.

    Args:
        sparsity: the last one, met exactly.
        steps: T, at least 1.
        start: where s(0) begins; it is not part of the result.
        power: 3 is the cubic schedule, 1 a straight line.

    Returns:
        s(1), …, s(T), not decreasing.

    Raises:
        PlanError: an argument out of range.

    Source: Zhu and Gupta, To Prune, or Not to Prune, 2017, eq. 1.
    """
    check_whole("steps", steps)
    for name, value in (("sparsity", sparsity), ("start", start), ("power", power)):
        check_number(name, value)
    if not start <= sparsity < 1 or power == 0:
        raise PlanError(f"no schedule from {start} to {sparsity} in {steps} steps of power {power}")
    found = [sparsity + (start - sparsity) * (1 - t / steps) ** power for t in range(1, steps)]
    return (*found, sparsity)


# ------------------------------------------------------------------------------------------------ ranking
@dataclass(frozen=True)
class Ranking:
    """All blocks that may leave, cheapest first.

    Attributes:
        groups: the groups.
        orders: for each group the units it has left, lowest score first, (n,) int64.
        group: position of each block's group, (b,) int64.
        units: units in each block, (b,) int64.
        steps: for each group the size of a whole block; a group's first one may be smaller.
    """

    groups: tuple[ChannelGroup, ...]
    orders: tuple[Tensor, ...]
    group: Tensor
    units: Tensor
    steps: tuple[int, ...]

    @property
    def left(self) -> list[int]:
        """Units each group has left before anything is removed."""
        return [len(order) for order in self.orders]

    def left_after(self, blocks: Tensor) -> list[int]:
        """Units each group has left when `blocks` (positions in the ranking) leave."""
        removed = torch.zeros(len(self.groups), dtype=torch.int64)
        removed.index_add_(0, self.group[blocks], self.units[blocks])
        return [n - r for n, r in zip(self.left, removed.tolist(), strict=True)]

    def keep(self, left: Sequence[int]) -> Kept:
        """The units that stay when `left` of each group do."""
        triples = zip(self.groups, self.orders, left, strict=True)
        return {group: order[len(order) - n :].sort().values for group, order, n in triples}


def rank(
    groups: Sequence[ChannelGroup],
    scores: Scores,
    scope: Scope,
    normalize: Normalize,
    round_to: int,
    min_units: int,
    max_group_sparsity: float,
    already: Kept | None,
) -> Ranking:
    """Rank the units of all groups; the arguments are those of `allocate`."""
    _check_options(scope, normalize, round_to, min_units, max_group_sparsity)
    if scope == "sensitivity":
        normalize = "none"
    check_mapping("scores", scores, "score(saliency, analysis, groups)")
    check_kept({} if already is None else already)
    orders, sizes, keys = [], [], []
    steps = tuple(units_of_length(group, round_to) for group in groups)
    for group, step in zip(groups, steps, strict=True):
        units = (already or {}).get(group, torch.arange(group.size)).cpu()
        values = _checked(group, scores)
        values = (values / NORMALIZE[normalize](values).clamp(min=torch.finfo(values.dtype).tiny))[units]
        values, order = values.sort(stable=True)
        most = math.floor(Fraction(str(float(max_group_sparsity))) * group.size)
        least = max(1, min(min_units, group.size), group.size - most)
        blocks = _blocks(len(units), least, step)
        orders.append(units[order])
        sizes.append(blocks)
        local = scope == "local"
        keys.append(_shares(blocks, group.size - len(units), group.size) if local else _means(values, blocks))
    key = torch.cat([*keys, torch.empty(0, dtype=torch.float64)])
    position = key.argsort(stable=True)
    group_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor([len(s) for s in sizes], dtype=torch.int64))
    units_of = torch.cat([*sizes, torch.empty(0, dtype=torch.int64)])
    return Ranking(tuple(groups), tuple(orders), group_of[position], units_of[position], steps)


def _blocks(left: int, least: int, step: int) -> Tensor:
    """Sizes of the blocks that may leave a group with `left` units of which `least` stay: (b,) int64."""
    least = -(-least // step) * step
    first = left % step or step
    if left - first < least:
        return torch.empty(0, dtype=torch.int64)
    sizes = torch.full((1 + (left - first - least) // step,), step)
    sizes[0] = first
    return sizes


def _means(values: Tensor, blocks: Tensor) -> Tensor:
    """Mean score of each block of ascending `values`: (b,) float64, ascending."""
    ends = blocks.cumsum(0)
    if len(blocks) == 0 or int(ends[-1]) == len(blocks):  # none, or one unit each
        return values[: len(blocks)]
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    means = (sums[ends] - sums[ends - blocks]) / blocks
    return means.cummax(0).values  # rounding must not change their order


def _shares(blocks: Tensor, removed: int, size: int) -> Tensor:
    """The share of the group that is gone when half of the block is: (b,) float64, ascending."""
    return (removed + blocks.cumsum(0) - blocks / 2).double() / size


def _checked(group: ChannelGroup, scores: Scores) -> Tensor:
    """The group's scores: (size,) float64."""
    found = scores.get(group)
    if not isinstance(found, Tensor) or tuple(found.shape) != (group.size,):
        given = f"scores of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"scores {shown(found)}"
        raise PlanError(f"{group.name} has {group.size} units and {given}", fix="one score per unit: (size,)")
    bad = int((~torch.isfinite(found)).sum())
    if bad:
        raise PlanError(
            f"{bad} of {group.size} scores of {group.name} are NaN or infinite",
            why="a parameter, a gradient or an activation of the group is",
            fix="check the weights with torch.isfinite",
        )
    return found.detach().double().cpu()


def _check_options(scope: str, normalize: str, round_to: int, min_units: int, max_group_sparsity: float) -> None:
    check_word("scope", scope, get_args(Scope))
    check_word("normalize", normalize, tuple(NORMALIZE))
    check_whole("round_to", round_to)
    check_whole("min_units", min_units)
    check_number("max_group_sparsity", max_group_sparsity, 0, 1, fix="max_group_sparsity=1.0")


# ------------------------------------------------------------------------------------------------ exact numbers
@dataclass(frozen=True)
class _Odd:
    """A group whose first block is smaller than the others. If it leaves, `more` whole blocks may follow."""

    position: int  # of the first block in the ranking
    units: int
    more: int


_Chosen: TypeAlias = tuple[int, "_Chosen"] | None
"""Positions of odd blocks, as a linked list."""


def _exactly(ranking: Ranking, wanted: int, gone: int, total: int, nearest: bool) -> list[int]:
    """Units left of each group when `wanted` units in all are gone, of which `gone` are already.

    Whole blocks are taken in the order of the ranking. Which of the odd first blocks go decides whether the number can
    be met; of the sets that do, the one is taken that differs least from the order of the ranking.
    """
    step, more = max(ranking.steps), wanted - gone
    if min(ranking.steps) < step:
        return _in_mixed_steps(ranking, wanted, gone, total, nearest)
    odd = _odd_blocks(ranking)
    after_odd = torch.zeros(len(ranking.groups), dtype=torch.bool)
    after_odd[ranking.group[[o.position for o in odd]]] = True
    free = int((~after_odd[ranking.group]).sum()) * step
    threshold = int((ranking.units.cumsum(0) <= more).sum())
    near = _subsets(odd, lambda o, taken: (1 + abs(o.position - threshold)) * (taken != (o.position < threshold)), step)
    chosen = _positions(near.get(more % step, (0, None))[1])
    low = sum(o.units for o in odd if o.position in chosen)
    high = free + sum(o.units + o.more * step for o in odd if o.position in chosen)
    if not _reaches((low, high), more, step):  # the number is impossible, or near the ends of what is possible
        widest = _subsets(odd, lambda o, taken: -(o.units + o.more * step) * taken, None)
        spans = {low: (low, free - int(cost)) for low, (cost, _) in widest.items()}
        low = next((low for low, span in spans.items() if _reaches(span, more, step)), -1)
        if low < 0:
            possible = _possible(wanted, gone, step, list(spans.values()))
            closest = min(possible, key=lambda n: abs(n - wanted))
            most = gone + max(high for _, high in spans.values())
            if nearest and abs(closest - wanted) < step and most > gone:
                return _exactly(ranking, closest, gone, total, nearest)
            raise _impossible(wanted, gone, total, step, possible, most)
        chosen = _positions(widest[low][1])
    return ranking.left_after(_with_odd(ranking, odd, chosen, (more - low) // step))


def _in_mixed_steps(ranking: Ranking, wanted: int, gone: int, total: int, nearest: bool) -> list[int]:
    """Units left of each group when `wanted` units are gone, of groups of several step sizes.

    With `nearest`, as many blocks in the order of the ranking as come nearest to the number. Else blocks as long as
    they fit: a group stops at the first block that does not, and small blocks (heads) make up for the rest.
    """
    more, sums = wanted - gone, ranking.units.cumsum(0)
    count = int((sums <= more).sum())
    below = int(sums[count - 1]) if count else 0
    if nearest and below < more:
        over = count < len(sums) and int(sums[count]) - more < more - below
        return ranking.left_after(torch.arange(count + over))
    taken, left, stopped = [], more, set[int]()
    for block, (group, units) in enumerate(zip(ranking.group.tolist(), ranking.units.tolist(), strict=True)):
        if group not in stopped and units <= left:
            taken.append(block)
            left -= units
        else:
            stopped.add(group)
    if left:
        most = gone + int(sums[-1]) if len(sums) else gone
        raise _impossible(wanted, gone, total, max(ranking.steps), [min(wanted - left, most)], most)
    return ranking.left_after(torch.tensor(taken, dtype=torch.int64))


def _reaches(span: tuple[int, int], more: int, step: int) -> bool:
    """Whether `more` is one of low, low + step, …, high."""
    low, high = span
    return low <= more <= high and (more - low) % step == 0


def _odd_blocks(ranking: Ranking) -> list[_Odd]:
    counts = torch.bincount(ranking.group, minlength=len(ranking.groups)).tolist()
    positions = (ranking.units < max(ranking.steps)).nonzero().flatten().tolist()
    groups, units = ranking.group.tolist(), ranking.units.tolist()
    return [_Odd(p, units[p], counts[groups[p]] - 1) for p in positions]


def _subsets(
    odd: Sequence[_Odd], cost: Callable[[_Odd, bool], float], modulus: int | None
) -> dict[int, tuple[float, _Chosen]]:
    """For each sum of units (modulo `modulus`) that a set of odd blocks can have: the lowest cost, and the set."""
    best: dict[int, tuple[float, _Chosen]] = {0: (0, None)}
    for o in odd:
        known, best = best, {}
        for total, (value, chosen) in known.items():
            with_it = total + o.units if modulus is None else (total + o.units) % modulus
            for key, candidate in (
                (total, (value + cost(o, False), chosen)),
                (with_it, (value + cost(o, True), (o.position, chosen))),
            ):
                if key not in best or candidate[0] < best[key][0]:
                    best[key] = candidate
    return best


def _positions(chosen: _Chosen) -> set[int]:
    found = set()
    while chosen is not None:
        position, chosen = chosen
        found.add(position)
    return found


def _with_odd(ranking: Ranking, odd: Sequence[_Odd], chosen: set[int], count: int) -> Tensor:
    """The chosen odd blocks, and the first `count` whole blocks of groups that may lose one."""
    stays = torch.zeros(len(ranking.groups), dtype=torch.bool)
    stays[ranking.group[[o.position for o in odd if o.position not in chosen]]] = True
    whole = ranking.units == max(ranking.steps)
    candidates = (whole & ~stays[ranking.group]).nonzero().flatten()
    return torch.cat([torch.tensor(sorted(chosen), dtype=torch.int64), candidates[:count]])


def _possible(wanted: int, gone: int, step: int, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The nearest numbers below and above `wanted` that can be removed, `gone` among them."""
    more = wanted - gone
    below = [n - (n - low) % step for low, n in ((low, min(high, more)) for low, high in spans) if n >= low]
    above = [n for n, high in ((max(low, more + (low - more) % step), high) for low, high in spans) if n <= high]
    return [gone + n for n in (*sorted(below)[-1:], *sorted(above)[:1])]


def _impossible(wanted: int, gone: int, total: int, step: int, possible: Sequence[int], most: int) -> BudgetError:
    """What was asked, and the nearest numbers that can be met."""
    options = " or ".join(f"{n} (sparsity={_fraction(n, total)})" for n in possible)
    rules = f" in steps of {step}" if step > 1 else ""
    already = f", {gone} of them gone already" if gone else ""
    closest = min(possible, key=lambda n: abs(n - wanted))
    return BudgetError(
        f"cannot remove exactly {wanted} of {total} units{rules}{already}",
        why=f"possible are {options}, and at most {most}",
        fix=f"sparsity={_fraction(closest, total)}",
    )


def _fraction(count: int, total: int) -> float:
    """The shortest sparsity that stands for `count` of `total` units."""
    candidates = (round(count / total, digits) for digits in range(1, 18))
    return next(c for c in candidates if 0 <= c < 1 and units_to_remove(c, total) == count)


# ------------------------------------------------------------------------------------------------ budgets
@dataclass(frozen=True)
class Budget:
    """What the smaller network may cost at most. All limits that are given hold together.

    A float up to 1 is a fraction of the original cost, a number above 1 (or the int 1) the cost itself, in the units of
    `graphcomp.cost`. Bit operations are those of convolutions, linear and recurrent layers; the original cost of `bops`
    is that of the float network, 32 x 32 bits. Bytes are what the report counts of the result: with bits, packed codes,
    steps, zero points and integer biases too.

    Latency is of one forward on the example inputs on this machine's CPU, the least of many runs. The units that stay
    are then those with which the outputs lose the least within the time (`graphcomp.pruning.knapsack`), and their
    numbers are multiples of what kernels work on at once.

    Attributes:
        latency_ms: milliseconds, never a fraction.
        speedup: how many times as fast as the baseline, at least.
        baseline: what `speedup` counts from: "original": the model as it is, in floats. "quantized": the model with the
            same `bits`, uncut.
        table: measured times of the layers, and the runtime and its threads; layers that the table lacks are measured.
            Default: `LatencyTable()`, onnxruntime with one thread.

    Raises:
        PlanError: no limit, or one that is not positive; a table without a limit on latency.
    """

    params: float | int | None = None
    macs: float | int | None = None
    bops: float | int | None = None
    bytes: float | int | None = None
    latency_ms: float | int | None = None
    speedup: float | int | None = None
    table: LatencyTable | None = None
    baseline: Baseline = "original"

    def __post_init__(self) -> None:
        if self.table is not None:
            check_instance("table", self.table, LatencyTable, 'table=graphcomp.LatencyTable.load("table.json")')
        asked = self.limits() | ({} if self.speedup is None else {"speedup": self.speedup})
        if not asked:
            raise PlanError("a budget without a limit", fix="Budget(macs=0.5)")
        for name, value in asked.items():
            if not is_number(value) or value <= 0:
                raise PlanError(
                    f"Budget({name}={shown(value)}) is not a positive number",
                    fix=f"Budget({name}={2 if name == 'speedup' else 0.5})",
                )
        if self.table is not None and not self.timed:
            raise PlanError("a table of latencies, and no limit on latency", fix="Budget(speedup=2, table=table)")
        check_word("baseline", self.baseline, get_args(Baseline))
        if self.baseline != "original" and self.speedup is None:
            raise PlanError(
                f"baseline={self.baseline!r} without a speedup", fix='Budget(speedup=1.2, baseline="quantized")'
            )

    def __repr__(self) -> str:
        """As of earlier versions where nothing newer is given: folders of training hold the text."""
        newer = {"speedup": self.speedup, "table": self.table}
        named = {f.name: getattr(self, f.name) for f in fields(Budget) if f.name not in (*newer, "baseline")}
        named |= {name: value for name, value in newer.items() if value is not None}
        named |= {} if self.baseline == "original" else {"baseline": self.baseline}
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in named.items())})"

    @property
    def timed(self) -> bool:
        """Whether there is a limit on latency."""
        return self.latency_ms is not None or self.speedup is not None

    def limits(self) -> dict[str, float | int]:
        """The limits that are given, by name, but for `speedup`, which is none until the original is timed."""
        named = {
            "params": self.params, "macs": self.macs, "bops": self.bops, "bytes": self.bytes,
            "latency_ms": self.latency_ms,
        }  # fmt: skip
        return {name: value for name, value in named.items() if value is not None}

    def in_ms(self, baseline_ms: float) -> Budget:
        """Return the budget with `latency_ms` in place of `speedup`, of a baseline that takes so long."""
        if self.speedup is None:
            return self
        limit = baseline_ms / self.speedup
        limit = limit if self.latency_ms is None else min(limit, self.latency_ms)
        return replace(self, latency_ms=limit, speedup=None, baseline="original")


def allocate_budget(
    analysis: Analysis,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    budget: Budget,
    *,
    scope: Scope = "global",
    normalize: Normalize = "mean",
    round_to: int = 1,
    min_units: int = 1,
    max_group_sparsity: float = 1.0,
    already: Kept | None = None,
    bits: BitsOf | None = None,
    stored: Callable[[Counts], int] | None = None,
) -> Kept:
    """Remove as few of the lowest-scored units as bring the network within `budget`.

    The ranking is cut at the shortest prefix that meets the budget; then units are put back, highest scores first, as
    long as it still holds. So no block (unit, or `round_to` of them) of any group could come back on top.

    Args:
        analysis: of the whole model; its other groups count as they are.
        groups, scores, scope, normalize, round_to, min_units, max_group_sparsity, already: as in `allocate`.
        bits: what the layers will be quantized to, for a budget on bit operations; layers left out are float.
        stored: bytes of what will be stored, for a budget on bytes; without it, those of the parameters and persistent
            buffers, the weights at `bits`.

    Returns:
        For every group the units that stay: (k,) int64, ascending.

    Raises:
        BudgetError: the smallest network there is costs more.
        PlanError: as in `allocate`, or `bits` names no layer.
        NothingToPrune: as in `allocate`.
    """
    if not groups:
        raise NothingToPrune("there are no groups to prune")
    ranking = rank(groups, scores, scope, normalize, round_to, min_units, max_group_sparsity, already)
    meter = Meter(CostModel(analysis), budget, ranking.groups, bits, stored)
    blocks = torch.arange(len(ranking.group))
    smallest = ranking.left_after(blocks)
    if not meter.holds(smallest):
        raise meter.exceeded(smallest)
    count = bisect_left(range(len(blocks) + 1), True, key=lambda n: meter.holds(ranking.left_after(blocks[:n])))
    left = ranking.left_after(blocks[:count])
    _put_back(ranking, count, left, meter)
    return ranking.keep(left)


def _put_back(ranking: Ranking, count: int, left: list[int], meter: Meter) -> None:
    """Give `left` back what the budget allows of the first `count` blocks, the last ones first."""
    full = [False] * len(left)
    for group, units in zip(
        reversed(ranking.group[:count].tolist()), reversed(ranking.units[:count].tolist()), strict=True
    ):
        if full[group]:
            continue
        left[group] += units
        if not meter.holds(left):
            left[group] -= units
            full[group] = True


def originals(costs: CostModel) -> dict[str, int]:
    """Return each cost of the float network."""
    return {
        "params": costs.params(),
        "macs": costs.macs(),
        "bops": Bops(costs).layers(),
        "bytes": costs.bytes(),
    }


def limits_of(costs: CostModel, budget: Budget) -> dict[str, float]:
    """Return each limit of a budget in the units of the cost. Milliseconds are never a share."""
    whole = originals(costs)
    shares = {n for n, value in budget.limits().items() if n in whole and isinstance(value, float) and value <= 1}
    return {n: value * whole[n] if n in shares else value for n, value in budget.limits().items()}


class Meter:
    """Whether a choice is within the budget, and by how much it is not."""

    def __init__(
        self,
        costs: CostModel,
        budget: Budget,
        groups: Sequence[ChannelGroup],
        bits: BitsOf | None = None,
        stored: Callable[[Counts], int] | None = None,
        latency: Callable[[Counts], float] | None = None,
    ) -> None:
        _check_counted(costs, budget)
        if budget.timed and latency is None:
            raise NotBuiltError(
                "Budget(latency_ms=…) and Budget(speedup=…) are built for compress in one shot alone",
                fix="Budget(macs=0.5); or compress(…, budget=…) without training",
            )
        self.groups = groups
        self.measures: dict[str, Callable[[Counts], float]] = {
            "params": costs.params,
            "macs": costs.macs,
            "bops": Bops(costs, bits).layers,
            "bytes": stored or (lambda counts: costs.bytes(counts, _weight_bits(costs, bits or {}))),
        }
        self.original: dict[str, float] = {**originals(costs)}
        if latency is not None:
            self.measures["latency_ms"], self.original["latency_ms"] = latency, latency({})
        self.limits = limits_of(costs, budget)

    def with_latency(self, latency: Callable[[Counts], float]) -> Meter:
        """Return a meter of the same limits that asks another prediction."""
        other = copy.copy(self)
        other.measures = {**self.measures, "latency_ms": latency}
        return other

    def holds(self, left: Sequence[int]) -> bool:
        """Whether all limits hold when `left` units of each group stay."""
        counts = self._counts(left)
        return all(self.measures[name](counts) <= limit for name, limit in self.limits.items())

    def excess(self, left: Sequence[int]) -> float:
        """By which fraction of its limit the cost is above it, for the limit that is missed most."""
        counts = self._counts(left)
        return max(self.measures[name](counts) / limit - 1 for name, limit in self.limits.items())

    def saved_by_a_unit(self, group: ChannelGroup) -> float:
        """Return which share of the limited costs one unit of a group saves, on average over half of the group."""
        count = max(1, group.size // 2)
        less = {group.factor: group.size - count}
        return sum((self.measures[n]({}) - self.measures[n](less)) / self.measures[n]({}) for n in self.limits) / count

    def exceeded(self, left: Sequence[int]) -> BudgetError:
        """The error that says what the smallest network costs."""
        counts = self._counts(left)
        rows = [(name, self.measures[name](counts), limit) for name, limit in self.limits.items()]
        over = [(name, cost, limit) for name, cost, limit in rows if cost > limit]
        name, cost, limit = over[0]
        share = cost / self.original[name]
        return BudgetError(
            f"no choice of units meets the budget of {limit:,.0f} {name}",
            why=f"with the fewest units that may stay there are {cost:,} ({share:.1%} of the original)",
            fix=f"Budget({name}={math.ceil(share * 100) / 100}), more groups, or a smaller round_to",
        )

    def _counts(self, left: Sequence[int]) -> Counts:
        return {group.factor: n for group, n in zip(self.groups, left, strict=True)}


def _check_counted(costs: CostModel, budget: Budget) -> None:
    """Refuse a budget on multiply-accumulates or bit operations where ops are left out of the count.

    Raises:
        BudgetError: an op may multiply, and nothing says how often.
    """
    limits = [name for name in budget.limits() if name in ("macs", "bops")]
    if limits and costs.uncounted:
        first = costs.uncounted[0]
        raise BudgetError(
            f"a budget of {limits[0]} cannot be checked: {first.op} is not counted",
            at=first.source,
            why=first.why,
            fix="; or ".join(fix for fix in (first.fix, "Budget(params=0.5)") if fix),
        )


def _weight_bits(costs: CostModel, bits: BitsOf) -> dict[str, float]:
    """Layer -> bits of its weight, for the layers that have some."""
    found = {op.layer: bits.get(op.node) or bits.get(op.layer) for op in costs.operations}
    return {layer: float(own.weight) for layer, own in found.items() if own is not None}
