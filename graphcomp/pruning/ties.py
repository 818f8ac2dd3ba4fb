"""Ties: groups of which equally many units must stay, as their lengths are held by one number of the user's code.

A tie is of counts, not of indices: each group keeps its own best units. The counts of an untied choice are brought down
to the smallest of each tie; then units are given back, best first, as long as the sparsity or the budget allows.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import PlanError
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.multiples import step_of

Tie: TypeAlias = frozenset[ChannelGroup]
Left: TypeAlias = Mapping[ChannelGroup, int]
"""Group -> units that stay."""


def merged(sets: Iterable[frozenset[Any]]) -> tuple[frozenset[Any], ...]:
    """Unite the sets that share a member; sets of one member are left out."""
    found: list[frozenset[Any]] = []
    for own in sets:
        sharing = [other for other in found if other & own]
        united = own.union(*sharing)
        found = [other for other in found if not other & own] + [united]
    return tuple(own for own in found if len(own) > 1)


def equalized(
    kept: Kept,
    scores: Scores,
    ties: Sequence[Tie],
    *,
    step: int = 1,
    local: bool = False,
    holds: Callable[[Left], bool] | None = None,
    already: Kept | None = None,
) -> dict[ChannelGroup, Tensor]:
    """Return a choice with equal counts within each tie, at the sparsity of `kept` or a little above.

    Args:
        kept: an untied choice.
        scores: comparable between groups, (size,) per group.
        ties: sets of groups of one size; groups that `kept` does not name are left out.
        step: units are given back in blocks of `step`, or of what ops can take.
        local: give back where the largest share of a group is gone, rather than where scores are highest.
        holds: whether these counts are allowed; by default as many units as `kept` keeps are.
        already: an earlier choice: units that the earlier choice removed stay removed.

    Raises:
        PlanError: a tie holds groups of different sizes.
    """
    sets = [group_set for tie in merged(ties) if len(group_set := [g for g in kept if g in tie]) > 1]
    for group_set in sets:
        if len({group.size for group in group_set}) > 1:
            raise PlanError(
                "groups of different sizes cannot keep equally many units",
                why=", ".join(f"{group.name} has {group.size}" for group in group_set),
            )
    if not sets:
        return dict(kept)
    orders = {group: _order(scores[group], (already or {}).get(group)) for group in kept}
    left = {group: len(units) for group, units in kept.items()}
    for group_set in sets:
        left.update(dict.fromkeys(group_set, min(left[group] for group in group_set)))
    tied = {group for group_set in sets for group in group_set}
    entries = [*sets, *([group] for group in kept if group not in tied)]
    budget = sum(len(units) for units in kept.values())
    _give_back(entries, left, orders, scores, step, local, holds or (lambda now: sum(now.values()) <= budget))
    return {group: orders[group][len(orders[group]) - n :].sort().values for group, n in left.items()}


def _order(scores: Tensor, left: Tensor | None) -> Tensor:
    """Return the units, lowest score first; those of `left` where some are gone."""
    order = scores.detach().double().cpu().argsort(stable=True)
    if left is None:
        return order
    stays = torch.zeros(len(order), dtype=torch.bool)
    stays[left.cpu()] = True
    return order[stays[order]]


def _give_back(
    entries: Sequence[Sequence[ChannelGroup]],
    left: dict[ChannelGroup, int],
    orders: Mapping[ChannelGroup, Tensor],
    scores: Scores,
    step: int,
    local: bool,
    holds: Callable[[Left], bool],
) -> None:
    """Raise `left`, entry by entry, by the block that is worth most, until no block is allowed any more."""
    values: dict[ChannelGroup, list[float]] = {
        group: scores[group].detach().double().cpu()[order].tolist() for group, order in orders.items()
    }

    def key(entry: Sequence[ChannelGroup]) -> float:
        """Return minus the worth of the next block: its mean score, or the share that is gone."""
        if local:
            return left[entry[0]] / entry[0].size
        block = [v for g in entry for v in values[g][: len(orders[g]) - left[g]][-step_of(g, step) :]]
        return -sum(block) / len(block)

    def has_more(entry: Sequence[ChannelGroup]) -> bool:
        return all(left[group] < len(orders[group]) for group in entry)

    heap = [(key(entry), k) for k, entry in enumerate(entries) if has_more(entry)]
    heapq.heapify(heap)
    while heap:
        _, k = heapq.heappop(heap)
        entry = entries[k]
        before = {group: left[group] for group in entry}
        left.update({group: min(n + step_of(group, step), len(orders[group])) for group, n in before.items()})
        if not holds(left):
            left.update(before)
        elif has_more(entry):
            heapq.heappush(heap, (key(entry), k))
