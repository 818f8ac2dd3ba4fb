"""Cut in several rounds: a part goes, the rest is repaired, and what goes next is chosen on the repaired model.

Each round cuts the model as it was, at all units that are gone by then, and repairs that cut from the start: errors of
rounds do not add up. Scores of a round are of the repaired model, measured against the outputs of the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphcomp.coupling.analysis import Analysis, analyze_rewritten
from graphcomp.coupling.groups import ChannelGroup, Kept, Member
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.repair import repair_cut
from graphcomp.pruning.slice import SliceGroups, kept_of_tensors

Rank = Callable[[Analysis, Sequence[ChannelGroup], Scores | None], Scores]
"""From a plan, groups of the plan and the order within each to scores that compare between groups."""
Choose = Callable[[Scores, Kept, float], Kept]
"""From scores, units that earlier rounds left, and the share of the goal to reach, to the units that stay."""

GONE = -1.0
"""Score of units that are gone."""


def in_rounds(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    scores: Scores | None,
    rank: Rank,
    choose: Choose,
    batches: Sequence[Sequence[Any]],
    rounds: int,
) -> tuple[Scores, Kept]:
    """Return the scores of the last round, and the units that the rounds before left.

    Args:
        plan: of the whole model, exported.
        groups: of `plan`.
        scores: the order within each group, (size,); None: as `rank` says.
        rank: scores the groups of a plan of the repaired model.
        choose: chooses a share of the goal, from 0 to 1.
        batches: flat inputs to repair on.
        rounds: at least 1; 1 cuts nothing before the last choice.

    Returns:
        For each group (size,) scores, -1 where the unit is gone, and (k,) units that are left.
    """
    kept: Kept = {}
    found = rank(plan, groups, scores)
    for k in range(1, rounds):
        kept = choose(found, kept, k / rounds)
        found = _rank_after(plan, groups, scores, kept, rank, batches)
    return found, kept


def _rank_after(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    scores: Scores | None,
    kept: Kept,
    rank: Rank,
    batches: Sequence[Sequence[Any]],
) -> Scores:
    """Return the scores of what a cut leaves, on the repaired model."""
    small = SliceGroups(plan.coupling, kept).rewrite(plan.captured.module)
    repaired = repair_cut(plan, kept, small, batches)
    after = analyze_rewritten(plan, plan.captured.rewritten(repaired.graph))
    cuts = kept_of_tensors(plan.coupling, kept)
    found = {group: _same_units(group, after.groups, cuts) for group in groups}
    matched = {group: own for group, own in found.items() if own is not None}
    order = None if scores is None else {own: scores[group][old] for group, (own, old) in matched.items()}
    ranked = rank(after, [own for own, _ in matched.values()], order)
    result: dict[ChannelGroup, Tensor] = {}
    for group in groups:
        values = torch.full((group.size,), GONE, dtype=torch.float64)
        values[kept.get(group, torch.arange(group.size))] = torch.finfo(values.dtype).max  # can lose no more
        if group in matched:
            own, old = matched[group]
            values[old] = ranked[own].double()
        result[group] = values
    return result


def _same_units(
    group: ChannelGroup, others: Sequence[ChannelGroup], cuts: Mapping[str, Mapping[int, Tensor]]
) -> tuple[ChannelGroup, Tensor] | None:
    """Return the group of the cut model with the units that are left of a group, and which these were, (k,)."""
    member = group.members[0]
    for other in others:
        for own in other.members:
            if (own.name, own.dim) == (member.name, member.dim):
                units = _old_units(member, own, other.size, cuts.get(own.name, {}).get(own.dim))
                if units is not None:
                    return other, units
    return None


def _old_units(old: Member, new: Member, size: int, kept: Tensor | None) -> Tensor | None:
    """Return the unit before of each unit after; None where these are of another group."""
    before = old.unit_of[0] if kept is None else old.unit_of[0][kept]
    after = new.unit_of[0]
    inside = after >= 0
    if before.shape != after.shape or not bool(((before >= 0) == inside).all()):
        return None
    units = torch.full((size,), -1)
    units[after[inside]] = before[inside]
    return units if bool((units[after[inside]] == before[inside]).all()) else None
