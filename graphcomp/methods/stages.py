"""The stages of a method, which train one model in turn: what each is asked for, and what it finds of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphcomp.errors import PlanError
from graphcomp.methods.base import Goal, Method, Source
from graphcomp.methods.takes import START, check_taken
from graphcomp.quantization.ptq import PostTraining
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared

BITS = ((4, 8), 4, 2)
"""Bits that a message proposes: the first that every stage takes."""


def folders(stages: Sequence[Method]) -> list[str]:
    """Return the folder of each stage inside the folder of a run."""
    what = ["prune" if stage.prunes else "quantize" if stage.quantizes else stage.name for stage in stages]
    return [f"{k + 1}-{own}" for k, own in enumerate(what)]


def goals_of(stages: Sequence[Method], goal: Goal, start: PostTraining | None) -> list[Goal]:
    """Return what is asked of each stage: bits as `start` of those that begin with post-training quantization.

    Args:
        goal: with the bits that are asked for as a range.
        start: post-training quantization at fixed bits; None: bits are learned, or not asked for.
    """
    calibrated = replace(goal, start=start, bits=None, activation_bits="same")
    return [calibrated if stage.calibrated and start is not None else goal for stage in stages]


def last_quantizing(stages: Sequence[Method], goals: Sequence[Goal]) -> int:
    """Return the position of the stage whose quantizers the result has; -1 without one."""
    own = zip(stages, goals, strict=True)
    return max((k for k, (stage, goal) in enumerate(own) if stage.quantizes and goal.quantizes), default=-1)


def check_goals(
    stages: Sequence[Method], name: str, goals: Sequence[Goal], given: Mapping[str, Any]
) -> tuple[str, ...]:
    """Refuse a goal that the stages of a method do not reach, and options that the stages have no use for.

    Args:
        goals: of each stage.
        given: option -> value, of all in `OPTIONS`.

    Returns:
        Notes of options that change nothing, and whose result is as asked.

    Raises:
        PlanError: bits or a sparsity that no stage does, no bits where they are all that is done, a budget for several
            stages, or an option without a use.
    """
    goal, asks_for_bits = goals[0], any(goal.quantizes for goal in goals)
    prunes, quantizes = (any(getattr(stage, what) for stage in stages) for what in ("prunes", "quantizes"))
    if not asks_for_bits and any(stage.quantizes and not stage.prunes for stage in stages):
        raise PlanError(f"method={name!r} quantizes, and no bits are given", fix=f"bits={_bits_for(stages, goal)}")
    if asks_for_bits and not quantizes:
        raise PlanError(f"method={name!r} does not quantize", fix='method="geta", or bits=None')
    if goal.sparsity and not prunes:
        raise PlanError(f"method={name!r} does not prune", fix='method="geta", or sparsity=0')
    notes = check_taken(name, _taken(stages, goals), given)
    if goal.budget is not None and len(stages) > 1:
        raise PlanError(
            f"a budget with method={name!r}",
            why="the run that prunes does not know the bits that the other one gives",
            fix='method="geta"' + ", or sparsity=0.5 in place of the budget" * prunes,
        )
    for stage, own in zip(stages, goals, strict=True):
        stage.check(own)
    return notes


def least_steps(stages: Sequence[Method], goals: Sequence[Goal], training: Training) -> list[int]:
    """Return the fewest steps of each stage."""
    return [stage.least_steps(goal, training) for stage, goal in zip(stages, goals, strict=True)]


def _taken(stages: Sequence[Method], goals: Sequence[Goal]) -> set[str]:
    """Return the options that the stages have a use for; of quantization, those of the stage that the result is of."""
    last, found = last_quantizing(stages, goals), set[str]()
    for k, (stage, goal) in enumerate(zip(stages, goals, strict=True)):
        of_result = k == last or last < 0
        found.update(option for option in stage.takes(goal) if of_result or option not in START)
    return found


def _bits_for(stages: Sequence[Method], goal: Goal) -> int | tuple[int, int]:
    """Return bits that every stage takes."""
    for bits in BITS:
        low, high = bits if isinstance(bits, tuple) else (bits, bits)
        asked = [stage for stage in stages if not (stage.calibrated and low == high)]  # others take any fixed bits
        if all(_takes(stage, replace(goal, bits=(low, high))) for stage in asked):
            return bits
    return BITS[0]


def _takes(stage: Method, goal: Goal) -> bool:
    try:
        stage.check(goal)
    except PlanError:
        return False
    return True


@dataclass
class Following:
    """The model as each stage finds it: with the quantizers that the stages before have trained, where there are any.

    Attributes:
        source: makes what a stage asks for.
        before: the module that the last stage has trained; None before the first.
    """

    source: Source
    before: Prepared | None = None

    def prepare(self, method: Method, goal: Goal) -> Prepared:
        """Return the module that a method trains.

        Quantizers that stages before have trained stay where the method asks for none of its own. Units and elements
        that are gone stay out.
        """
        before = self.before
        ready = method.prepare(self._ask, goal)
        if before is not None and ready is not before:
            kept = {group.name: units for group, units in before.kept().items()}
            ready.keep({group: kept[group.name] for group in ready.session.groups if group.name in kept})
            ready.keep_elements(before.elements)
            if before.session.sites and ready.session.sites:
                replaced = f"{method.name} begins with quantizers of its own, in place of those of the stages before"
                ready.remarks = (*ready.remarks, replaced)
        self.before = ready
        return ready

    def _ask(self, **asked: Any) -> Prepared:
        """Return what a stage asks for; without quantizers of its own, the module with those of the stages before."""
        before, own = self.before, any(asked.get(what) is not None for what in ("bits", "start", "config"))
        if own or before is None or not before.session.sites:
            return self.source(**asked)
        return before.freeze_norms(False)
