"""GETA as a method, and the methods that are settings of it: HESSO, and the two halves of sequential compression."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from graphcomp.arguments import check_word
from graphcomp.errors import BudgetError
from graphcomp.methods.base import Goal, Method, of_activations
from graphcomp.methods.geta.run import GetaRun
from graphcomp.methods.takes import UNITS
from graphcomp.pruning.analytic import ByErrors
from graphcomp.training.elements import Allocation
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.schedule import Schedule, fewest_steps


@dataclass(frozen=True)
class Geta(Method):
    """Joint structured pruning and quantization (Qu et al. 2025, arXiv 2502.16638).

    Attributes:
        name: in messages.
        prunes, quantizes: what is done.
        forgetting: "descent" (GETA's rule), or "uniform" (equal shares in each step, as HESSO's).
        allocation: how many units of each group go: "global" ranks all together by their scores, "opq" by the errors
            that OPQ counts; scores then say which of a group go.
    """

    name: str = "geta"  # type: ignore[misc]
    prunes: bool = True
    quantizes: bool = True
    forgetting: Literal["descent", "uniform"] = "descent"
    allocation: Allocation = "global"

    def __post_init__(self) -> None:
        check_word("allocation", self.allocation, get_args(Allocation))

    def takes(self, goal: Goal) -> Collection[str]:
        """What units go by, a budget on bits, and what activations are quantized by."""
        return {"budget", *(UNITS if self.prunes else ()), *(of_activations(goal) if self.quantizes else ())}

    def least_steps(self, goal: Goal, training: Training) -> int:
        """As many as let units go, where a schedule of that many steps has a stage for this."""
        schedule = training.schedule
        if not self.prunes or goal.sparsity == 0:
            return 1
        if isinstance(schedule, Schedule):
            return fewest_steps(lambda steps: replace(schedule, steps=steps))
        kinds = itertools.product((False, True), repeat=2)
        return max(fewest_steps(partial(Schedule.of, transformer=own, quantize=bits)) for own, bits in kinds)

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> GetaRun:
        """Begin a run with the schedule that was given, or the default one."""
        sparsity = goal.sparsity if self.prunes else 0.0
        try:
            return self._run(ready, goal, training, steps, sparsity)
        except BudgetError as error:
            if self.prunes:
                raise
            raise BudgetError(
                f"method={self.name!r} does not meet the budget with the fewest bits",
                why=f"no units go; {error.why}",
                fix='method="geta", which removes units, too; or a larger budget',
            ) from error

    def _run(
        self, ready: Prepared, goal: Goal, training: Training, steps: int, sparsity: float | Mapping[str, float] | None
    ) -> GetaRun:
        saliency = goal.saliency or "geta"
        return GetaRun(
            ready,
            schedule_of(ready, training, steps, prune=sparsity != 0),
            lr_quant=training.lr_quant,
            sparsity=sparsity,
            budget=goal.budget,
            saliency=saliency if self.allocation == "global" else ByErrors(saliency),
            forgetting=self.forgetting,
            round_to=goal.round_to,
        )


def schedule_of(ready: Prepared, training: Training, steps: int, *, prune: bool) -> Schedule:
    """Return the schedule that was given; else the default one of so many steps."""
    if isinstance(training.schedule, Schedule):
        return training.schedule
    session = ready.session
    return Schedule.of(steps, transformer=session.has_attention, prune=prune, quantize=session.learns_bits)
