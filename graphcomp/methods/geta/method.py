"""GETA as a method, and the methods that are settings of it: HESSO, and the two halves of sequential compression."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from graphcomp.methods.base import Goal, Method, of_activations
from graphcomp.methods.geta.run import GetaRun
from graphcomp.methods.takes import UNITS
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.schedule import Schedule


@dataclass(frozen=True)
class Geta(Method):
    """Joint structured pruning and quantization (Qu et al. 2025, arXiv 2502.16638).

    Attributes:
        name: in messages.
        prunes, quantizes: what is done.
        forgetting: "descent" (GETA's rule), or "uniform" (equal shares in each step, as HESSO's).
    """

    name: str = "geta"  # type: ignore[misc]
    prunes: bool = True
    quantizes: bool = True
    forgetting: Literal["descent", "uniform"] = "descent"

    def takes(self, goal: Goal) -> Collection[str]:
        """What units go by, a budget on bits, and what activations are quantized by."""
        return {"budget", *(UNITS if self.prunes else ()), *(of_activations(goal) if self.quantizes else ())}

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> GetaRun:
        """Begin a run with the schedule that was given, or the default one."""
        sparsity = goal.sparsity if self.prunes else 0.0
        return GetaRun(
            ready,
            schedule_of(ready, training, steps, prune=sparsity != 0),
            lr_quant=training.lr_quant,
            sparsity=sparsity,
            budget=goal.budget,
            saliency=goal.saliency or "geta",
            forgetting=self.forgetting,
            round_to=goal.round_to,
        )


def schedule_of(ready: Prepared, training: Training, steps: int, *, prune: bool) -> Schedule:
    """Return the schedule that was given; else the default one of so many steps."""
    if isinstance(training.schedule, Schedule):
        return training.schedule
    session = ready.session
    return Schedule.of(steps, transformer=session.has_attention, prune=prune, quantize=session.learns_bits)
