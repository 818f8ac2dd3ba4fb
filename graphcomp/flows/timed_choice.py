"""Search for the widths that take a given time: choices are timed, and the prediction is scaled until the two agree.

A choice by a prediction finds the widths at which the prediction errs to its advantage, so that a table alone is too
optimistic about what is chosen from the table. The factor of the prediction is searched instead: proportional steps
(the factor times measured over predicted), and bisection within the bracket of a factor whose choice was too slow and
one whose choice was fast enough, where a step leaves the bracket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphcomp.cost.latency_table import Predicted
from graphcomp.cost.model import counts_of
from graphcomp.coupling.groups import Kept
from graphcomp.errors import BudgetError

CHOICES = 6
"""Choices that are timed, at most."""
CLOSE = 0.03
"""Relative error of a prediction with which a choice stays."""
NARROW = 1.005
"""Quotient of the ends of a bracket from which on the search ends."""


@dataclass(frozen=True, eq=False)
class Tried:
    """A choice that was timed.

    Attributes:
        predicted: the prediction by which the choice was made.
        kept: the units that stay.
        ms: milliseconds of the whole network.
        lost: what the outputs lose.
    """

    predicted: Predicted
    kept: Kept
    ms: float
    lost: float

    @property
    def expected(self) -> float:
        """Milliseconds that were predicted."""
        return self.predicted(counts_of(self.kept))

    def close(self, limit: float) -> bool:
        """Return whether the choice is within the limit, and the prediction is right."""
        return self.ms <= limit and abs(self.expected / self.ms - 1) <= CLOSE


def timed_choice(
    first: Predicted,
    limit: float,
    choose: Callable[[Predicted], Kept],
    time: Callable[[Kept], float],
    lost: Callable[[Kept], float],
) -> tuple[Tried, ...]:
    """Return the choices that were timed, the best one last: of those within the limit the one that loses the least;
    where none is within, the fastest.

    Args:
        first: the prediction that the search begins with.
        limit: milliseconds.
        choose: from a prediction to the units that stay.
        time: from units that stay to milliseconds of the network.
        lost: from units that stay to what the outputs lose.

    Raises:
        BudgetError: by the first prediction no choice is within the budget.
    """
    tried: list[Tried] = []
    predicted: Predicted | None = first
    for _ in range(2 * CHOICES):
        if predicted is None or len(tried) == CHOICES:
            break
        try:
            kept = choose(predicted)
        except BudgetError:  # by the first prediction there was a choice: the notes say what was measured
            if not tried:
                raise
            break
        same = next((other for other in tried if counts_of(other.kept) == counts_of(kept)), None)
        ms = time(kept) if same is None else same.ms
        if same is not None:  # the choice stands for a range of factors
            tried.remove(same)
        tried.append(Tried(predicted, kept, ms, lost(kept)))
        predicted = None if tried[-1].close(limit) else _next(tried, limit)
    within = [other for other in tried if other.ms <= limit]
    best = min(within, key=lambda t: t.lost) if within else min(tried, key=lambda t: t.ms)
    return (*(other for other in tried if other is not best), best)


def _next(tried: Sequence[Tried], limit: float) -> Predicted | None:
    """Return the next prediction to choose by; None where the search has nothing left to try."""
    last = tried[-1]
    share = last.predicted.share * last.ms / last.expected
    slow = max((t.predicted.share for t in tried if t.ms > limit), default=0.0)
    fast = min((t.predicted.share for t in tried if t.ms <= limit), default=float("inf"))
    if slow and fast < float("inf"):
        if fast / slow < NARROW:
            return None
        share = share if slow < share < fast else (slow * fast) ** 0.5
    return last.predicted.with_share(share)
