"""Scores by the outputs' sensitivity, for a goal that is reached in one round or in several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graphcomp.cost import BitsOf, CostModel
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import PlanError
from graphcomp.pruning.allocation import Budget, Meter, allocate_budget
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.repair import within_memory
from graphcomp.pruning.rounds import in_rounds
from graphcomp.pruning.sensitivity import sensitivities
from graphcomp.pruning.shares import Part, allocate_parts
from graphcomp.system.threads import one_at_a_time


@one_at_a_time
def by_sensitivity(
    plan: Analysis,
    parts: Sequence[Part],
    scores: Scores | None,
    batches: Sequence[Sequence[Any]],
    *,
    budget: Budget | None = None,
    bits: BitsOf | None = None,
    rounds: int = 1,
) -> tuple[Scores, Kept, list[str]]:
    """Return scores that compare between groups, the units that earlier rounds left, and notes.

    Args:
        plan: of the whole model.
        parts: groups, and the share of units that each part is to lose; with a budget the groups alone count.
        scores: the order within each group; None: what is repairable.
        batches: flat inputs.
        budget: what the result may cost.
        bits: what the layers will be quantized to, for a budget on bit operations.
        rounds: the goal is reached in so many rounds, with a repair and new scores after each; see `in_rounds`.

    Raises:
        PlanError: the model could only be recorded, or returns no floats.
        CalibrationError: the model does not run on a batch, or values are not finite.
        BudgetError: the smallest network there is costs more.
    """
    groups = tuple(group for part in parts for group in part.groups)
    said: dict[str, None] = {}

    def rank(own: Analysis, some: Sequence[ChannelGroup], order: Scores | None) -> Scores:
        ranked, remarks = sensitivities(own, some, order, batches, budget, bits, plan.captured.module)
        said.update(dict.fromkeys(remarks))
        return ranked

    def choose(found: Scores, already: Kept, share: float) -> Kept:
        if budget is not None:
            goal = _part_of(plan, groups, budget, bits, share)
            return allocate_budget(plan, groups, found, goal, scope="sensitivity", already=already, bits=bits)
        some = [replace(part, sparsity=part.sparsity * share) for part in parts]
        return allocate_parts(some, found, scope="sensitivity", round_to=1, already=already)[0]

    used = within_memory(plan.captured.module, batches)
    found, already = in_rounds(plan, groups, scores, rank, choose, used, rounds)
    return found, already, list(said)


def _part_of(
    plan: Analysis, groups: Sequence[ChannelGroup], budget: Budget, bits: BitsOf | None, share: float
) -> Budget:
    """Return the budget that takes a share of what `budget` takes."""
    meter = Meter(CostModel(plan), budget, groups, bits)
    costs = {name: (meter.original[name], limit) for name, limit in meter.limits.items()}
    limits: dict[str, Any] = {n: max(2, round(cost - (cost - limit) * share)) for n, (cost, limit) in costs.items()}
    return Budget(**limits)


def check_rounds(rounds: int, ranking: str, budget: Budget | None) -> None:
    """Refuse several rounds where nothing is measured anew after a round.

    Raises:
        PlanError: more than one round, by another ranking, or for a budget of time, whose parts are not known.
    """
    if rounds > 1 and budget is not None and budget.timed:
        raise PlanError(
            f"rounds={rounds} with a budget of time",
            why="widths are chosen for the whole goal at once, so that no round has a part of it",
            fix="rounds=1, or a budget of macs",
        )
    if rounds > 1 and ranking != "sensitivity":
        raise PlanError(
            f"rounds={rounds} with ranking={ranking!r}",
            why="nothing is measured between the rounds",
            fix=f'ranking="sensitivity", rounds={rounds}',
        )
