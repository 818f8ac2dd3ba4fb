"""Several budgets of one model: what does not depend on the budget is made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from graphcomp.pruning.allocation import Budget

Made = TypeVar("Made")


class Once:
    """Makes each value once, and hands it out again by its name."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __call__(self, name: str, make: Callable[[], Made]) -> Made:
        """Return what `make` made for the name the first time."""
        if name not in self._made:
            self._made[name] = make()
        made: Made = self._made[name]
        return made


@dataclass(frozen=True)
class MemberBudget(Budget):
    """The budget of one of a family, with what the others have made: the capture, scores, probes and times.

    Attributes:
        shared: of the family.
    """

    shared: Once = field(default_factory=Once, compare=False, repr=False)


def shared_by(budget: Budget | None) -> Once:
    """Return what a family has made; of a budget of its own, nothing yet."""
    return budget.shared if isinstance(budget, MemberBudget) else Once()
