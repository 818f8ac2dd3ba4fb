"""The search for widths that take a given time, on one group whose times are plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from graphcomp.cost.latency_table import Predicted
from graphcomp.coupling.groups import Kept
from graphcomp.errors import BudgetError
from graphcomp.flows.timed_choice import CHOICES, CLOSE, Tried, timed_choice

SIZE, LIMIT = 1000, 500.0


class Linear:
    """Predicts `share` milliseconds for each unit."""

    def __init__(self, share: float = 1.0) -> None:
        self.share = share

    def __call__(self, counts: Any) -> float:
        (count,) = counts.values()
        return self.share * count

    def with_share(self, share: float) -> Linear:
        return Linear(share)


class Group:
    factor = "factor"


GROUP = Group()


def kept_of(count: int) -> Kept:
    return cast(Kept, {GROUP: torch.arange(count)})


def search(real: Callable[[int], float], step: int = 1) -> tuple[Tried, ...]:
    """Search with multiples of `step`; `real` is the time by the units that stay."""

    def choose(predicted: Predicted) -> Kept:
        count = min(SIZE, int(LIMIT / predicted.share + 1e-9) // step * step)
        if not count:
            raise BudgetError("no choice")
        return kept_of(count)

    def count(kept: Kept) -> int:
        (units,) = kept.values()
        return len(units)

    return timed_choice(
        cast(Predicted, Linear()), LIMIT, choose, lambda kept: real(count(kept)), lambda kept: SIZE - count(kept)
    )


@pytest.mark.parametrize("factor", [0.6, 0.97, 1.0, 1.3, 2.5])
def test_a_factor_is_found_at_once(factor: float) -> None:
    tried = search(lambda n: factor * n)
    assert len(tried) <= 2
    assert 0.96 * LIMIT <= tried[-1].ms <= LIMIT and abs(tried[-1].expected / tried[-1].ms - 1) <= CLOSE


@pytest.mark.parametrize(
    "real",
    [
        lambda n: 3 * n**0.8,
        lambda n: 200 + 0.8 * n,
        lambda n: n**2 / 400,
        lambda n: 0.7 * n if n < 480 else 1.4 * n,
        lambda n: 1.25 * n * (1 + 0.1 * ((n // 40) % 2)),
    ],
)
def test_what_no_factor_describes_converges(real: Callable[[int], float]) -> None:
    tried = search(real)
    best = tried[-1]
    assert best.ms <= LIMIT and len(tried) <= CHOICES
    assert abs(best.expected / best.ms - 1) <= 0.1 or real(480) > 1.1 * LIMIT


def test_the_best_that_was_timed_stays() -> None:
    tried = search(lambda n: {500: 600.0, 416: 450.0}.get(n, 501.0))
    assert tried[-1].ms == 450.0
    assert len({len(next(iter(t.kept.values()))) for t in tried}) == len(tried)  # no choice is timed twice
    # none is within: the fastest
    tried = search(lambda n: 510.0 + n % 7)
    assert tried[-1].ms == min(t.ms for t in tried)


def test_coarse_widths_end_the_search() -> None:
    timed: list[int] = []

    def real(n: int) -> float:
        timed.append(n)
        return 1.2 * n

    tried = search(real, step=250)
    assert timed == [500, 250] and tried[-1].ms == 300.0


def test_out_of_reach_by_the_first_prediction_is_refused() -> None:
    with pytest.raises(BudgetError):
        search(lambda n: n, step=SIZE + 1)
