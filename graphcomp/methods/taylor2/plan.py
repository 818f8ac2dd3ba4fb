"""Which units go, round after round: how many at a time, ranked by scores or by scores per cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

from torch import Tensor

from graphcomp.coupling.groups import Kept
from graphcomp.methods.geta.steering import Target
from graphcomp.methods.geta.units import Units
from graphcomp.pruning.allocation import Budget
from graphcomp.pruning.evidence import Scores
from graphcomp.training.session import Session

Cost: TypeAlias = Literal["budget", "macs", "params", "bytes", "bops"]
"""What a score is divided by: what the result saves where a unit of the group goes. "budget": of the limit that is
missed most, or nothing without a budget."""


LIMITS: Mapping[str, Budget] = {
    "macs": Budget(macs=0.5), "params": Budget(params=0.5), "bytes": Budget(bytes=0.5), "bops": Budget(bops=0.5),
}  # fmt: skip
"""Budgets whose costs are counted: the differences between units are the same whatever the limit."""


def rounds_at(end: int, every: int | None, rounds: int) -> tuple[int, ...]:
    """Return the steps after which units go, the last after step `end`.

    Args:
        every: steps from one round to the next; None: as many as `rounds` rounds leave.
    """
    length = max(1, end // rounds) if every is None else every
    return tuple(range(end, 0, -length))[::-1]


def left_after(k: int, rounds: int, total: int, left: int, end: int, quota: float | None) -> int:
    """Return how many units are left after round `k` of 1 to `rounds`.

    Every round takes the same share of the survivors, so that `end` are left after the last; with `quota`, that share,
    and the last round takes what it takes.

    Args:
        total, left, end: units before the first round, now, and in the end.
    """
    if k == rounds:
        return end
    if quota is not None:
        return max(end, round(left * (1 - quota)))
    return round(total * math.pow(end / total, k / rounds))


class Plan:
    """Rounds of pruning.

    Attributes:
        units: of the groups, and how many are gone in the end.
        base: units that may be kept: those that were not gone when the run began.
        at: steps after which units go.
        forced: share of the survivors that the last round took above `quota`; 0 without.

    Args:
        session: of the prepared module.
        units: of its groups.
        kept: units that are not gone now.
        budget: that holds in the end; None without.
        low: (l,) bits of each quantizer in the end.
        cost: what scores are divided by; None: nothing.
        at: see above.
        quota: share of the survivors that one round takes; None: what the rounds need.
        returns: whether units that are gone may return.

    Raises:
        BudgetError, PlanError: the goal cannot be met.
    """

    def __init__(
        self,
        session: Session,
        units: Units,
        kept: Kept,
        budget: Budget | None,
        low: Tensor,
        *,
        cost: Cost | None,
        at: tuple[int, ...],
        quota: float | None,
        returns: bool,
    ) -> None:
        self.units, self.base, self.at, self.quota, self.returns = units, dict(kept), at, quota, returns
        self.low = [round(bits) for bits in low.tolist()]
        if budget is not None:
            units.target = Target(session, budget, units.groups, session.sites, low)
        units.settle(kept, self.low)
        self.costs = units.target if cost == "budget" else None
        if cost is not None and cost != "budget":
            limit = LIMITS[cost]
            self.costs = Target(session, limit, units.groups, session.sites, low)
        self.forced = 0.0

    def choose(self, k: int, scores: Scores, chosen: Kept) -> Kept:
        """Return the units that are left after round `k` (from 1).

        Args:
            scores: of all units, low for what can go.
            chosen: units that are left before.
        """
        units, already = self.units, self.base if self.returns else chosen
        ranked = self.per_cost(scores, chosen)
        wanted: Kept | None = None
        if units.target is not None and units.sparsity is None:
            wanted = units.within_budget(units.target, already, ranked, self.low)
            units.final = units.gone(wanted)
        elif units.target is not None:
            ranked = units.cheap_enough(units.target, already, ranked)
        total, left = units.total - units.gone(self.base), units.total - units.gone(chosen)
        end = units.total - units.final
        after = left_after(k, len(self.at), total, left, end, self.quota)
        if self.quota is not None and k == len(self.at):
            taken = 1 - after / left
            self.forced = taken if taken > self.quota + 1 / left else 0.0
        if wanted is not None and k == len(self.at):
            return wanted
        return units.allocate(already, ranked, units.total - after)

    def per_cost(self, scores: Scores, chosen: Kept) -> Scores:
        """Return scores divided by what a unit costs where `chosen` units are left; without costs, as they are.

        Scores that may be below 0 are moved up by one number first, so that dividing keeps their order in a group.
        """
        if self.costs is None:
            return scores
        least = min(float(own.min()) for own in scores.values())
        moved = {group: own - min(least, 0.0) for group, own in scores.items()}
        return self.costs.cheaper(moved, chosen, 1.0)
