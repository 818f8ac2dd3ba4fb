"""When what happens in a run: warm-up, projection, joint pruning and quantization, cool-down."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor

from graphcomp.arguments import check_flag
from graphcomp.errors import PlanError
from graphcomp.training.folder import plain

PERIODS = 5
"""Of a stage, where there are steps for so many."""

FEWEST = 1000
"""Number of steps below which the fewest of a schedule are looked for."""


class Stage(IntEnum):
    """The four stages of a run, in their order."""

    WARMUP = 0
    PROJECTION = 1
    JOINT = 2
    COOLDOWN = 3


@dataclass(frozen=True)
class Moment:
    """Where in a schedule a step stands.

    Attributes:
        stage: of the run.
        period: of the stage, from 0; 0 in stages without periods.
        step: in the period, from 0.
        length: of the period, in steps; 0 for the cool-down, which has no end.
    """

    stage: Stage
    period: int
    step: int
    length: int

    @property
    def first(self) -> bool:
        """Whether a period begins."""
        return self.step == 0

    @property
    def last(self) -> bool:
        """Whether a period ends with this step."""
        return self.step == self.length - 1

    @property
    def remaining(self) -> int:
        """Steps of the period that are left, this one included."""
        return self.length - self.step


@dataclass(frozen=True)
class Schedule:
    """The stages of a run, in steps of the optimizer (not of batches, where gradients are accumulated).

    Each length is a number of steps (int), or a fraction of all steps (float below 1); the rest is the cool-down, in
    which accuracy comes back: 30 % of the run at least.

    Attributes:
        steps: of the whole run.
        warmup: weights settle, and ranges follow what is quantized; bits are the most allowed.
        projection: the most bits allowed go down by `bit_reduction` at the start of each but the first of
            `projection_periods` (None: five, or as many as there are steps).
        joint: units are forgotten while bits go on adapting, in `pruning_periods` (likewise), each of which ends with
            its share of the units gone.
        bit_reduction: bits per period; never below the fewest bits of the range. None: two thirds of the range in all,
            to the nearest bit: 16, 14, 12, 10, 8 for 4 to 16 bits, and 5 in the end for 4 to 8.

    Raises:
        PlanError: lengths that do not fit into the run, or a period without a step.

    Source: GETA (Qu et al. 2025, arXiv 2502.16638), QASSO.
    """

    steps: int
    warmup: int | float = 0.05
    projection: int | float = 0.10
    joint: int | float = 0.20
    projection_periods: int | None = None
    pruning_periods: int | None = None
    bit_reduction: float | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, plain(getattr(self, each.name)))
        if not is_whole(self.steps) or self.steps < 1:
            why = "a run has at least one step, and a whole number of them"
            raise PlanError(f"Schedule(steps={self.steps!r})", why=why, fix="steps=1000")
        for name in ("warmup", "projection", "joint"):
            self._check_length(name)
        if self.bit_reduction is not None and not (
            is_number(self.bit_reduction) and 0 <= self.bit_reduction < float("inf")
        ):
            raise PlanError(f"Schedule(bit_reduction={self.bit_reduction!r})", fix="bit_reduction=2")
        self._check_periods("projection", self.projection_periods, self.lengths[1])
        self._check_periods("pruning", self.pruning_periods, self.lengths[2])
        if self.ends[2] >= self.steps:
            taken = " + ".join(str(n) for n in self.lengths[:3])
            raise PlanError(
                f"a schedule of {self.steps} steps leaves none for the cool-down",
                why=f"warmup, projection and joint take {taken} = {self.ends[2]}",
                fix=f"steps={self.ends[2] * 3 // 2 + 1}, or shorter stages",
            )

    def _check_length(self, name: str) -> None:
        length = getattr(self, name)
        if not (is_number(length) and length >= 0) or (isinstance(length, float) and length >= 1):  # NaN is neither
            raise PlanError(
                f"Schedule({name}={length!r})",
                why="a length is a number of steps (int), or a fraction of the run (float from 0 to below 1)",
                fix=f"{name}=0.1",
            )

    def _check_periods(self, name: str, periods: int | None, length: int) -> None:
        if periods is None:
            return
        stage = "joint" if name == "pruning" else name
        if not is_whole(periods) or periods < 1:
            raise PlanError(
                f"Schedule({name}_periods={periods!r})", why="a whole number, or None", fix=f"{name}_periods=5"
            )
        if 0 < length < periods:
            raise PlanError(
                f"{periods} {name} periods do not fit into {length} steps",
                why="each period has at least one step",
                fix=f"{name}_periods={length}, or {stage}={periods} and more",
            )

    @classmethod
    def of(cls, steps: int, *, transformer: bool = False, prune: bool = True, quantize: bool = True) -> Schedule:
        """The default for a model with attention, or without.

        Transformers lose more when bits go down, and come back more slowly: each stage takes more of the run. Where
        nothing is pruned, or nothing quantized, the cool-down gets the steps of that stage.
        """
        for name, flag in (("transformer", transformer), ("prune", prune), ("quantize", quantize)):
            check_flag(name, flag)
        warmup, projection, joint = (0.10, 0.20, 0.25) if transformer else (0.05, 0.10, 0.20)
        return cls(steps, warmup=warmup, projection=projection * quantize, joint=joint * prune)

    @property
    def lengths(self) -> tuple[int, int, int, int]:
        """Steps of warm-up, projection, joint stage and cool-down."""
        first = [n if isinstance(n, int) else round(n * self.steps) for n in (self.warmup, self.projection, self.joint)]
        return first[0], first[1], first[2], max(self.steps - sum(first), 0)

    @property
    def ends(self) -> tuple[int, int, int]:
        """The first step after warm-up, projection and joint stage."""
        warmup, projection, joint, _ = self.lengths
        return warmup, warmup + projection, warmup + projection + joint

    def __str__(self) -> str:
        """Each field and its value, with as many periods as there are."""
        projection, pruning = self.periods
        fields = {**asdict(self), "projection_periods": projection, "pruning_periods": pruning}
        return ", ".join(f"{name} {value}" for name, value in fields.items())

    @property
    def periods(self) -> tuple[int, int]:
        """Of the projection and of the joint stage; 1 where it has no steps."""
        _, projection, joint, _ = self.lengths
        return (
            max(1, min(PERIODS, projection)) if self.projection_periods is None else self.projection_periods,
            max(1, min(PERIODS, joint)) if self.pruning_periods is None else self.pruning_periods,
        )

    def moment(self, step: int) -> Moment:
        """Where step `step` (from 0) stands; steps after the end belong to the cool-down."""
        warmup, projection, joint = self.ends
        if step < warmup:
            return Moment(Stage.WARMUP, 0, step, warmup)
        if step < projection:
            return _in_period(Stage.PROJECTION, step - warmup, projection - warmup, self.periods[0])
        if step < joint:
            return _in_period(Stage.JOINT, step - projection, joint - projection, self.periods[1])
        return Moment(Stage.COOLDOWN, 0, step - joint, 0)

    def most_bits(self, step: int, low: Tensor, high: Tensor, end: Tensor | None = None) -> Tensor:
        """The most bits allowed in a step, between `low` and `high`: they go down with the projection periods.

        Args:
            low, high: (l,) ranges.
            end: (l,) what they come to when the projection is over, where that is less.
        """
        warmup, projection, _ = self.ends
        if step < warmup or warmup == projection:
            return high
        whole = self.periods[0] - 1
        done = self.moment(step).period if step < projection else whole
        if self.bit_reduction is not None:
            most = torch.maximum(low, high - self.bit_reduction * done)
        else:
            in_all = ((high - low) * (2 / 3)).round()  # whole, as the bits are in the end
            most = high - in_all * done / max(whole, 1)
        if end is None:
            return most
        share = done / whole if whole else float(step >= projection)
        return torch.minimum(most, high - (high - end) * share)


def fewest_steps(schedule: Callable[[int], Schedule]) -> int:
    """Return the fewest steps of a schedule in which units can go; 1 where no number of steps has a joint stage.

    Args:
        schedule: number of steps -> the schedule.
    """
    for steps in range(1, FEWEST):
        with suppress(PlanError):  # too few steps for stages of a fixed length
            if schedule(steps).lengths[2]:
                return steps
    return 1


def is_whole(value: object) -> bool:
    """Whether it is a Python int; a flag is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a Python int or float; a flag is none."""
    return is_whole(value) or isinstance(value, float)


def _in_period(stage: Stage, step: int, length: int, periods: int) -> Moment:
    """Periods differ in length by one step at most."""
    period = ((step + 1) * periods - 1) // length
    begin, end = (k * length // periods for k in (period, period + 1))
    return Moment(stage, period, step - begin, end - begin)
