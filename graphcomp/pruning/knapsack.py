"""Widths as a knapsack: of all choices within a time the one that loses the least, width by width.

The time of a layer is a product of its widths in and out, so that what a group saves depends on the widths of others:
the times do not add up as in a textbook knapsack. Its relaxation is solved instead: at a price for each millisecond,
each group takes the width at which error and time together cost the least, the others as they are, until no group
changes; the lowest price that meets the limit is found by bisection. What is left of the limit then goes to the widths
that win back the most. The prediction is asked at each step, and no linearisation stands for it.

Source: the knapsack over measured latencies of Shen et al., Structural Pruning via Latency-Saliency Knapsack (HALP),
2022, and of Kurtić et al., ZipLM, 2023. Theirs add up layer by layer; ours do not.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from graphcomp.cost.latency_table import Predicted
from graphcomp.cost.model import Counts
from graphcomp.coupling.axis import Factor
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import BudgetError, NothingToPrune
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.multiples import step_of

Holds: TypeAlias = Callable[[Sequence[int]], bool]
"""Whether so many units of each group are within a budget."""

WIDTHS = 16
"""Widths that a group chooses from, at most."""
SWEEPS = 8
"""Times that each group may choose again, at one price."""
HALVINGS = 30
"""Bisections of the price."""


@dataclass(frozen=True, eq=False)
class Item:
    """A group, and what each of its widths would cost.

    Attributes:
        group: the group.
        widths: units that stay, descending; the whole group first.
        errors: what the outputs lose at each width; 0 first, not decreasing.
        order: units, the least important first.
    """

    group: ChannelGroup
    widths: tuple[int, ...]
    errors: tuple[float, ...]
    order: Tensor

    def keep(self, choice: int) -> Tensor:
        """Return the units that stay at a width: (k,) int64, ascending."""
        return self.order[self.group.size - self.widths[choice] :].sort().values


def widths_of(group: ChannelGroup, round_to: int = 1, most: int = WIDTHS) -> tuple[int, ...]:
    """Return the whole group, and multiples of what its ops and `round_to` take, spread over its size: descending.

    Args:
        most: how many, at most; two at least.
    """
    step = step_of(group, round_to)
    multiples = range(step, group.size, step)
    stride = -(-len(multiples) // (most - 1)) or 1
    return (group.size, *reversed(multiples[::stride]))


def items_of(groups: Sequence[ChannelGroup], scores: Scores, round_to: int = 1) -> list[Item]:
    """Return what the groups may choose from.

    Args:
        groups: that may be cut.
        scores: (size,) per group, comparable between groups: what the outputs lose with each unit, least first.
        round_to: units that stay are multiples.
    """
    found = []
    for group in groups:
        values, order = scores[group].detach().double().cpu().sort(stable=True)
        gone = torch.cat([values.new_zeros(1), values.clamp(min=0).cumsum(0)])
        widths = widths_of(group, round_to)
        found.append(Item(group, widths, tuple(float(gone[group.size - n]) for n in widths), order))
    return found


def choose_widths(items: Sequence[Item], predicted: Predicted, holds: Holds) -> Kept:
    """Return the units that stay, as many as a budget allows.

    Args:
        items: of `items_of`.
        predicted: milliseconds by the units that stay.
        holds: whether a number of units of each item is within the budget.

    Raises:
        BudgetError: no choice that was found is within the budget.
        NothingToPrune: there are no groups.
    """
    if not items:
        raise NothingToPrune("there are no groups to prune")
    chosen = [0] * len(items)
    if not holds(_left(items, chosen)):
        chosen = _cheapest(items, predicted, holds)
        _win_back(items, holds, chosen)
    return _kept(items, chosen)


def same_shares(items: Sequence[Item], holds: Holds) -> Kept | None:
    """Return the units that stay where each group keeps the same share, as near as its widths allow: the largest share
    that is within the budget; None where none is."""
    shares = sorted({width / item.group.size for item in items for width in item.widths}, reverse=True)
    for share in shares:
        fits = [[k for k, n in enumerate(i.widths) if n <= share * i.group.size] for i in items]
        chosen = [own[0] if own else len(i.widths) - 1 for own, i in zip(fits, items, strict=True)]
        if holds(_left(items, chosen)):
            return _kept(items, chosen)
    return None


def unreachable(predicted: Predicted, counts: Counts) -> BudgetError:
    """Return the error that says how fast the network can become."""
    shortest = predicted(counts)
    speedup = math.floor(100 * predicted.baseline_ms / shortest) / 100
    of_integers = predicted.baseline_ms != predicted.original_ms
    counted = f", the quantized network that is not cut {predicted.baseline_ms:.3f} ms" if of_integers else ""
    baseline = ', baseline="quantized"' if of_integers else ""
    reached = math.ceil(1000 * shortest) / 1000
    return BudgetError(
        "no choice of units meets the budget of latency",
        why=f"{shortest:.3f} ms are predicted of the fastest, and the original takes {predicted.original_ms:.3f} ms"
        f"{counted}",
        fix=f"Budget(latency_ms={reached:g}), Budget(speedup={speedup:g}{baseline}), more groups, or a smaller "
        "round_to",
    )


def _cheapest(items: Sequence[Item], predicted: Predicted, holds: Holds) -> list[int]:
    """Return the choice at the lowest price of a millisecond that is within the budget."""
    best = fastest(items, predicted)
    if not holds(_left(items, best)):
        raise unreachable(predicted, _counts(items, best))
    low, high = 0.0, math.inf
    price = (sum(item.errors[-1] for item in items) or 1.0) / predicted.dense_ms
    for _ in range(HALVINGS):
        chosen = _at_price(items, predicted, price)
        if holds(_left(items, chosen)):
            high, best = price, chosen
        else:
            low = price
        price = 4 * low if high == math.inf else (low + high) / 2
    return list(best)


def fastest(items: Sequence[Item], predicted: Predicted) -> list[int]:
    """Return the choice of the least time: the narrowest of all, or where no group is faster at another width."""
    free = [replace(item, errors=(0.0,) * len(item.widths)) for item in items]
    found = [len(item.widths) - 1 for item in items], _at_price(free, predicted, 1.0)
    return min(found, key=lambda chosen: predicted(_counts(items, chosen)))


def _at_price(items: Sequence[Item], predicted: Predicted, price: float) -> list[int]:
    """Return where no group gains by another width of its own."""
    chosen = [0] * len(items)
    counts = _counts(items, chosen)
    for _ in range(SWEEPS):
        before = list(chosen)
        for k, item in enumerate(items):
            costs = []
            for error, width in zip(item.errors, item.widths, strict=True):
                counts[item.group.factor] = width
                costs.append(error + price * predicted.touching(item.group.factor, counts))
            chosen[k] = min(range(len(costs)), key=costs.__getitem__)
            counts[item.group.factor] = item.widths[chosen[k]]
        if chosen == before:
            break
    return chosen


def _win_back(items: Sequence[Item], holds: Holds, chosen: list[int]) -> None:
    """Widen groups as long as the budget allows, those first that win back the most."""
    left = _left(items, chosen)
    heap = [(_loss(items[k], chosen[k]), k, chosen[k] - 1) for k in range(len(items)) if chosen[k]]
    heapq.heapify(heap)
    while heap:
        _, k, wider = heapq.heappop(heap)
        before, left[k] = left[k], items[k].widths[wider]
        if holds(left):
            chosen[k] = wider
        else:
            left[k] = before  # a wider one may be faster: its kernels may be others
        if wider:
            heapq.heappush(heap, (_loss(items[k], wider), k, wider - 1))


def _loss(item: Item, choice: int) -> float:
    """Return minus what the next width wins back."""
    return item.errors[choice - 1] - item.errors[choice]


def _kept(items: Sequence[Item], chosen: Sequence[int]) -> Kept:
    return {item.group: item.keep(k) for item, k in zip(items, chosen, strict=True)}


def _left(items: Sequence[Item], chosen: Sequence[int]) -> list[int]:
    return [item.widths[k] for item, k in zip(items, chosen, strict=True)]


def _counts(items: Sequence[Item], chosen: Sequence[int]) -> dict[Factor, int]:
    return {item.group.factor: item.widths[k] for item, k in zip(items, chosen, strict=True)}
