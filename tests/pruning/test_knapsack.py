"""The knapsack of widths against all choices there are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from graphcomp.api import analyze
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import BudgetError, NothingToPrune
from graphcomp.pruning.knapsack import Item, choose_widths, items_of, same_shares, widths_of
from graphcomp.pruning.multiples import with_fast_widths


class Chain:
    """Predicts the time of layers in a row: width in times width out."""

    def __init__(self, groups: Sequence[ChannelGroup], into: int, out: int, jump: int = 1) -> None:
        self.groups, self.into, self.out, self.jump = groups, into, out, jump
        self.dense_ms = self.original_ms = self.baseline_ms = self({})

    def __call__(self, counts: Any) -> float:
        return sum(self._pairs(counts))

    def touching(self, factor: Any, counts: Any) -> float:
        """See `Predicted`."""
        at = [group.factor for group in self.groups].index(factor)
        return sum(self._pairs(counts)[at : at + 2])

    def _pairs(self, counts: Any) -> list[float]:
        inner = [-(-counts.get(g.factor, g.size) // self.jump) * self.jump for g in self.groups]
        return [1e-2 * a * b for a, b in itertools.pairwise([self.into, *inner, self.out])]


@pytest.fixture(scope="module")
def groups() -> tuple[ChannelGroup, ...]:
    layers = [nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)]
    return analyze(nn.Sequential(*layers).eval(), torch.randn(2, 8)).groups


def scores_of(groups: Sequence[ChannelGroup], seed: int) -> dict[ChannelGroup, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(groups), generator=generator) * 3
    return {g: torch.rand(g.size, generator=generator) * w for g, w in zip(groups, weights, strict=True)}


def lost(items: Sequence[Item], left: Sequence[int]) -> float:
    return sum(item.errors[item.widths.index(n)] for item, n in zip(items, left, strict=True))


@pytest.mark.parametrize("jump", [1, 4])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_near_the_best_of_all_choices(groups: Any, seed: int, share: float, jump: int) -> None:
    predicted = cast(Any, Chain(groups, 8, 4, jump))
    items = items_of(groups, scores_of(groups, seed))
    limit = share * predicted.dense_ms

    def holds(left: Sequence[int]) -> bool:
        return bool(predicted({g.factor: n for g, n in zip(groups, left, strict=True)}) <= limit)

    kept = choose_widths(items, predicted, holds)
    left = [len(kept[group]) for group in groups]
    assert holds(left)
    every = [lost(items, choice) for choice in itertools.product(*(item.widths for item in items)) if holds(choice)]
    assert lost(items, left) <= min(every) + 0.08 * sum(item.errors[-1] for item in items)
    for k, item in enumerate(items):  # nothing can be given back
        wider = [n for n in item.widths if n > left[k]]
        assert not any(holds([*left[:k], n, *left[k + 1 :]]) for n in wider)


def test_units_of_the_lowest_scores_go(groups: Any) -> None:
    predicted, scores = cast(Any, Chain(groups, 8, 4)), scores_of(groups, 0)
    items = items_of(groups, scores)
    kept = choose_widths(items, predicted, lambda left: sum(left) <= 20)
    assert sum(len(units) for units in kept.values()) <= 20
    for group, units in kept.items():
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[units] = False
        assert not gone.any() or scores[group][gone].max() <= scores[group][units].min()
        assert torch.equal(units, units.sort().values)


def test_a_network_within_the_budget_stays_whole(groups: Any) -> None:
    items = items_of(groups, scores_of(groups, 0))
    kept = choose_widths(items, cast(Any, Chain(groups, 8, 4)), lambda left: True)
    assert [len(units) for units in kept.values()] == [12, 12, 12]
    with pytest.raises(NothingToPrune):
        choose_widths([], cast(Any, None), lambda left: True)


def test_what_cannot_be_met_is_refused_with_what_can(groups: Any) -> None:
    items = items_of(groups, scores_of(groups, 0), round_to=4)
    with pytest.raises(BudgetError, match=r"0\.800 ms are predicted of the fastest") as caught:
        choose_widths(items, cast(Any, Chain(groups, 8, 4)), lambda left: sum(left) < 3)
    assert caught.value.fix is not None and "Budget(latency_ms=0.8)" in caught.value.fix


def test_the_same_shares(groups: Any) -> None:
    items = items_of(groups, scores_of(groups, 0), round_to=4)
    kept = same_shares(items, lambda left: sum(left) <= 28)
    assert kept is not None and [len(units) for units in kept.values()] == [8, 8, 8]
    assert same_shares(items, lambda left: sum(left) < 3) is None


def test_widths_are_few_and_multiples() -> None:
    net = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 6), nn.Linear(6, 2))
    found = with_fast_widths(analyze(net.eval(), torch.randn(2, 4)).groups)
    assert [group.multiple for group in found] == [16, 8, 1]
    assert widths_of(found[0]) == (256, *range(240, 0, -16))
    assert widths_of(found[1], round_to=3) == (64, 48, 24)
    assert widths_of(found[2]) == (6, 5, 4, 3, 2, 1)
    assert len(widths_of(found[0], most=5)) <= 5 and widths_of(found[0], most=5)[0] == 256
