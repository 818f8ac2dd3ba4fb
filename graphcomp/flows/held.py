"""A cut that the model's own class can hold: with equal counts where the class needs them, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from torch import nn

from graphcomp.cost import CostModel
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import BudgetError
from graphcomp.flows.one_shot import cut_groups
from graphcomp.flows.results import Cut
from graphcomp.flows.said_by_config import with_width
from graphcomp.native.model import NativeResult, native
from graphcomp.pruning.allocation import Budget, Meter, Scope, allocate, normalized
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.multiples import in_multiples
from graphcomp.pruning.ties import Left, Tie, equalized, merged
from graphcomp.system.threads import one_at_a_time

Choose: TypeAlias = Callable[[Sequence[Tie]], Kept]
"""Ties -> the units that stay, equally many of the groups of each tie."""

Others: TypeAlias = Callable[[frozenset[ChannelGroup]], Kept]
"""Groups that stay whole -> the units that stay of the others."""

MAX_ROUNDS = 8  # choices with more and more ties
SHOWN = 3  # ties that a note names
NAMED = 8  # groups that a note names

LEFT_WHOLE = 0.25
"""Largest share of the removed units that may come back, and others go, where a class cannot hold a cut of them."""


@one_at_a_time
def held_by_class(
    cut: Cut, choose: Choose | None = None, others: Others | None = None, *, widths: bool = True
) -> tuple[Cut, NativeResult]:
    """Return the cut and the model of the user's class that holds the cut; no module, and the reason, where none does.

    Args:
        choose: makes another choice of units, for a class that can hold lengths only as long as they are equal. The
            cut that is returned is of that choice, where the choice keeps the class.
        others: makes a choice without groups that the class can hold whole alone; they stay whole where they are few.
        widths: let the model's config say residual widths where it can.
    """
    found = native(cut.plan, cut.kept, cut.graph, share=True)
    if found.module is None and choose is not None:
        cut, found = _tied(cut, found, choose)
    if found.module is None and others is not None:
        cut, found = _with_some_whole(cut, found, others)
    if found.module is None:
        return cut, replace(found, reason=found.reason + _what_keeps_the_class(cut, found))
    said = with_width(cut.plan, cut.kept, found) if widths else ()
    return cut.noted(*(note for note in said if note not in cut.notes)), found


def equal_counts(
    plan: Analysis,
    kept: Kept,
    scores: Scores,
    budget: Budget | None,
    ranking: Scope,
    round_to: int,
    meter: Meter | None = None,
) -> Choose:
    """Return a function from ties to a choice like `kept`, with equal counts within each tie.

    Args:
        meter: of the budget, of the groups of `kept` in their order; made here where it is not given.
    """
    groups = list(kept)
    meter = meter or (None if budget is None else Meter(CostModel(plan), budget, groups))

    def holds(left: Left) -> bool:
        assert meter is not None
        return meter.holds([left[group] for group in groups])

    comparable = normalized(scores, "none" if ranking == "sensitivity" else "mean")
    local = ranking == "local"
    return partial(equalized, kept, comparable, step=round_to, local=local, holds=None if meter is None else holds)


@one_at_a_time
def held_choice(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    ranking: Scope,
    round_to: int,
    kept: Kept,
    meter: Meter,
) -> tuple[Kept, nn.Module | None]:
    """Return a choice like `kept` that the user's class can hold, and the model; where none can, `kept` and None.

    Args:
        groups: of the choice; the other arguments as of `equal_counts`.
    """
    choose = equal_counts(plan, kept, scores, None, ranking, round_to, meter)
    cut, found = held_by_class(cut_groups(plan, kept, groups, verify=False), choose, widths=False)
    return cut.kept, found.module


def _tied(cut: Cut, found: NativeResult, choose: Choose) -> tuple[Cut, NativeResult]:
    """Return a cut that the class can hold, with ties of counts; else what was given, the reason completed."""
    group_of = {group.factor: group for group in cut.groups}
    ties: tuple[Tie, ...] = ()
    latest = found
    for _ in range(MAX_ROUNDS):
        more = [frozenset(group_of[factor] for factor in tie if factor in group_of) for tie in latest.ties]
        wider = merged([*ties, *more])
        if set(wider) == set(ties):
            break
        ties = wider
        tied = cut_groups(cut.plan, choose(ties), cut.groups, verify=False)
        latest = native(cut.plan, tied.kept, tied.graph, share=True)
        if latest.module is not None:
            if cut.program.verified or cut.program.unchecked:
                tied = cut_groups(cut.plan, tied.kept, cut.groups, verify=True)
            return replace(tied, notes=(*tied.notes, _tie_note(ties))), latest
    if ties:
        return cut, replace(latest, reason=f"with equal counts of {len(ties)} sets of groups, too: {latest.reason}")
    return cut, found


def _with_some_whole(cut: Cut, found: NativeResult, others: Others) -> tuple[Cut, NativeResult]:
    """Return a cut without the groups that the class cannot hold cut, where they are few; else what was given."""
    gone = {group: group.size - len(units) for group, units in cut.kept.items()}
    removed = sum(gone.values())
    for whole in found.suspects:
        if sum(gone[group] for group in whole) > LEFT_WHOLE * removed:
            continue
        rest = others(frozenset(whole))
        less = cut_groups(cut.plan, rest, cut.groups, verify=False)
        held = native(cut.plan, rest, less.graph, explain=False, share=True)
        if held.module is None:
            continue
        if cut.program.verified or cut.program.unchecked:
            less = cut_groups(cut.plan, rest, cut.groups, verify=True)
        now = sum(group.size - len(units) for group, units in rest.items())
        fewer = "" if now == removed else f"; {now} units go, not {removed}"
        names = ", ".join(group.name for group in whole[:NAMED]) + (
            f" and {len(whole) - NAMED} more" * (len(whole) > NAMED)
        )
        note = f"left whole, as {type(cut.plan.model).__name__} cannot hold them cut: {names}{fewer} ({found.reason})"
        return replace(less, notes=(*cut.notes, note)), held
    return cut, found


def other_units(kept: Kept, scores: Scores, ranking: Scope, round_to: int) -> Others:
    """Return a function from groups that are to stay whole to a choice of as many units of the other groups.

    Where the others have not as many to give, and without scores, they lose what they lose in `kept`.
    """

    def choose(whole: frozenset[ChannelGroup]) -> Kept:
        rest = {group: units for group, units in kept.items() if group not in whole}
        removed = sum(group.size - len(units) for group, units in kept.items())
        total = sum(group.size for group in rest)
        if removed >= total or not rest.keys() <= scores.keys():
            return rest
        try:
            found = allocate(
                list(rest), scores, sparsity=removed / total, scope=ranking, round_to=round_to, nearest=True
            )
        except BudgetError:
            return rest
        return in_multiples(found, scores, round_to)[0]

    return choose


def _what_keeps_the_class(cut: Cut, found: NativeResult) -> str:
    """Say what to pass so that the class holds the rest of the cut: tried out, where there is a rest."""
    by_role = {group.role: [g for g in cut.kept if g.role == group.role] for group in (*found.blamed, *cut.kept)}
    for whole in ([*found.blamed], *by_role.values()):
        rest = {group: units for group, units in cut.kept.items() if group not in whole}
        if whole and (native(cut.plan, rest, explain=False).module is not None if rest else found.blamed):
            return f"; to keep the class, pass {_leave_whole(whole, list(rest))}"
    return ""


def _leave_whole(groups: Sequence[ChannelGroup], others: Sequence[ChannelGroup]) -> str:
    """Return the option that leaves `groups` whole: their modules, or the other roles where there are many."""
    modules = tuple(dict.fromkeys(group.name.rpartition("/")[0] for group in groups))
    roles = tuple(dict.fromkeys(group.role for group in others))
    if roles and not set(roles) & {group.role for group in groups} and len(modules) > 1:
        return f"prune={roles!r}"
    return f"ignore={modules[0] if len(modules) == 1 else modules!r}"


def _tie_note(ties: Sequence[Tie]) -> str:
    names = [" = ".join(sorted(group.name for group in tie)) for tie in ties]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"equally many units are kept, so that the class can hold them: {'; '.join(names[:SHOWN])}{more}"
