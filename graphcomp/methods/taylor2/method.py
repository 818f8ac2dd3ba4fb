"""Taylor in two stages: units are pruned round after round by first-order scores, then what is left is quantized.

Stage 1 repeats: train with a gate on each unit, average the gates' derivatives over the minibatches, rank all units
together by score, or by score per cost, and close the gates of the lowest, so that every round takes the same share of
the survivors. Stage 2 is LSQ on what is left, at bits that go down (8, 4, 2) to those that were asked for.

Source: Yu, Wu, Klopp, Chen, Chien 2020 (arXiv 2010.01892), reconstructed: only the abstract could be read, and no code
is public. Scores are those of Molchanov et al. 2019 (arXiv 1906.10771). Ours are: the gate where a unit is read
(`gates`), scores by the derivative at the quantized weights, scores divided by costs, what "dense" lets return, and
steps that are set anew at each change of bits. The paper's exact score and its fine-tuning are not known.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from torch import nn, tensor

from graphcomp.arguments import check_word, is_number, shown
from graphcomp.errors import PlanError
from graphcomp.methods.base import Goal, Method, Source, refuse
from graphcomp.methods.geta.units import (
    Units,
    check_sparsity,
    frozen_note,
    groups_to_prune,
)
from graphcomp.methods.takes import UNITS
from graphcomp.methods.taylor2.bits import changes_at, levels_of
from graphcomp.methods.taylor2.plan import Cost, Plan, rounds_at
from graphcomp.methods.taylor2.run import Taylor2Run
from graphcomp.methods.taylor2.scores import Score
from graphcomp.pruning.saliency import named
from graphcomp.quantization.spec import ACTIVATIONS, QuantConfig, QuantSpec, check_bits
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.schedule import Schedule, is_whole

SPARSITY = 0.5
"""Share of the units that goes where neither a share nor a budget is given."""

COARSE = 4
"""Bits below which the first and the last layer get 8."""

FULL_RANGE = 8
"""Bits of activations from which on levels reach the largest value; with fewer, the range has the least error."""

Tune = Literal["dense", "masked", "distill"]
"""How the network is trained between rounds."""


@dataclass(frozen=True)
class Taylor2(Method):
    """Prunes units round after round by Taylor scores, then quantizes at bits that go down.

    Attributes:
        score: of the derivatives of a unit's gate over minibatches: "squares" (their mean), "mean" (its magnitude),
            "signed" (by how much the loss is greater without the unit; units whose absence helps go first).
        cost: what a score is divided by: "macs", "params", "bytes" or "bops" that go with the unit; "budget": those of
            the limit that is missed most, or nothing without a budget; None: nothing.
        tune: "dense": closed gates are 0 forward, what reads the unit learns on, and the unit returns when its score
            says so. "masked": what is gone stays gone. "distill": as "dense", and the unpruned network is the teacher
            (`Training(teacher=…)` and `distill=` say otherwise).
        momentum: of the averages, 0 to below 1: what a minibatch leaves of the average before.
        rounds: of pruning, where `every` is None.
        every: steps from one round to the next.
        quota: share of the survivors that a round takes; None: as the rounds need to meet the goal.
        until: share of the steps after which no unit goes.
        quantize_from: share of the steps after which weights are quantized; None: from `until` on. Where less than
            `until`, pruning goes on at the quantized weights.
        path: bits that training goes through before those that were asked for.
    """

    name: ClassVar[str] = "taylor2"
    prunes = True
    quantizes = True
    score: Score = "squares"
    cost: Cost | None = "budget"
    tune: Tune = "dense"
    momentum: float = 0.9
    rounds: int = 30
    every: int | None = None
    quota: float | None = None
    until: float = 0.5
    quantize_from: float | None = None
    path: tuple[int, ...] = (8, 4)

    def __post_init__(self) -> None:
        check_word("score", self.score, get_args(Score))
        check_word("tune", self.tune, get_args(Tune))
        if self.cost is not None:
            check_word("cost", self.cost, get_args(Cost))
        for name, value, fix in (("rounds", self.rounds, 30), ("every", self.every, 10)):
            if (value is not None or name == "rounds") and not (is_whole(value) and value >= 1):  # type: ignore[operator]
                raise PlanError(
                    f"Taylor2: {name} must be a whole number, 1 at least, got {shown(value)}", fix=f"{name}={fix}"
                )
        for name, share in (("momentum", self.momentum), ("quantize_from", self.quantize_from)):
            if (share is not None or name == "momentum") and not (is_number(share) and 0 <= share < 1):  # type: ignore[operator]
                raise PlanError(f"Taylor2: {name} must be a share, 0 to below 1, got {shown(share)}", fix=f"{name}=0.5")
        for name, share in (("quota", self.quota), ("until", self.until)):
            if (share is not None or name == "until") and not (is_number(share) and 0 < share <= 1):  # type: ignore[operator]
                raise PlanError(
                    f"Taylor2: {name} must be a share, above 0 and at most 1, got {shown(share)}",
                    fix="quota=0.02" if name == "quota" else "until=0.5",
                )
        if not isinstance(self.path, tuple):
            raise PlanError(f"Taylor2: path must be a tuple of bits, got {shown(self.path)}", fix="path=(8, 4)")
        for bits in self.path:
            check_bits(bits, "path")

    # ------------------------------------------------------------------------------------------ what is asked
    def takes(self, goal: Goal) -> Collection[str]:
        """What units go by but a saliency; with bits, those of activations, whose ranges batches of training give."""
        return (UNITS - {"saliency"}) | ({"activation_bits"} if goal.bits is not None else set())

    def check(self, goal: Goal) -> None:
        """One number of bits for weights, one for activations, or none; something to do."""
        for name, asked in (("bits", goal.bits), ("activation_bits", goal.activation_bits)):
            if isinstance(asked, (tuple, list)) and asked[0] != asked[-1]:
                raise PlanError(
                    f"{name} must be one number for method='taylor2', got {tuple(asked)}",
                    why="bits go down to what is asked for, through those of Taylor2(path=…)",
                    fix=f"{name}={asked[0]}",
                )
        if goal.bits is None and goal.sparsity == 0 and goal.budget is None:
            raise PlanError("method='taylor2' with sparsity=0 and no bits has nothing to do", fix="sparsity=0.5")

    def least_steps(self, goal: Goal, training: Training) -> int:
        """One for a round, and one for each number of bits."""
        return int(_prunes(goal)) + len(self._levels(goal))

    def taught(self, training: Training, model: nn.Module) -> Training:
        """The unpruned network, with "distill", where no other teacher was given."""
        if self.tune != "distill" or training.teacher is not None:
            return training
        return replace(training, teacher=model)

    # ------------------------------------------------------------------------------------------ the run
    def prepare(self, source: Source, goal: Goal) -> Prepared:
        """Stand quantizers with one step per output channel on weights, and one per tensor on activations."""
        if goal.bits is None:
            return source()
        low, activations = goal.bits[0], None
        if (bits := _activation_bits(goal)) is not None:
            activations = replace(ACTIVATIONS, bits=bits, observer="minmax" if bits >= FULL_RANGE else "mse")
        weights = QuantSpec(low, granularity="channel", observer="mse")
        return source(config=QuantConfig(weights, activations, first_and_last_bits=8 if low < COARSE else low))

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> Taylor2Run:
        """Begin a run."""
        refuse(self, {"a Schedule": isinstance(training.schedule, Schedule)}, "its stages are GETA's; give steps")
        levels = self._levels(goal)
        cut = min(max(round(self.until * steps), 1), steps - len(levels)) if _prunes(goal) else 0
        begin = cut if self.quantize_from is None else min(round(self.quantize_from * steps), steps - len(levels))
        plan = self._plan(ready, goal, rounds_at(cut, self.every, self.rounds)) if _prunes(goal) else None
        about = {name: str(getattr(self, name)) for name in self.__dataclass_fields__}
        about |= {name: str(getattr(goal, name)) for name in ("sparsity", "budget", "bits", "round_to")}
        return Taylor2Run(
            ready,
            () if plan is None else plan.units.groups,
            plan,
            score=self.score,
            momentum=self.momentum,
            bits_at=changes_at(begin, steps, len(levels)) if levels else (),
            levels=levels,
            about=about,
            lr_quant=training.lr_quant,
        )

    def _plan(self, ready: Prepared, goal: Goal, at: tuple[int, ...]) -> Plan:
        """Return the rounds.

        Raises:
            NothingToPrune: no group may lose units.
            BudgetError, PlanError: the goal cannot be met.
        """
        session = ready.session
        sparsity = SPARSITY if goal.sparsity is None and goal.budget is None else goal.sparsity
        check_sparsity(sparsity, goal.budget)
        groups = groups_to_prune(ready, "sparsity=0")
        units = Units(session, groups, sparsity, named("taylor"), "none", goal.round_to, 1.0)
        masks = ready.kept()
        plan = Plan(
            session,
            units,
            {group: masks[group] for group in units.groups},
            goal.budget,
            tensor([float(site.low) for site in session.sites]),
            cost=self.cost,
            at=at,
            quota=self.quota,
            returns=self.tune != "masked",
        )
        notes = (frozen_note(session, groups), *units.notes)
        ready.remarks = (*ready.remarks, *(note for note in notes if note))
        return plan

    def _levels(self, goal: Goal) -> tuple[int, ...]:
        """Return the bits that training goes through; nothing without bits."""
        if goal.bits is None:
            return ()
        return levels_of(self.path, min(goal.bits[0], _activation_bits(goal) or goal.bits[0]))


def _prunes(goal: Goal) -> bool:
    """Return whether units are to go."""
    return goal.sparsity != 0 or goal.budget is not None


def _activation_bits(goal: Goal) -> int | None:
    """Return the bits of activations; None: they stay float."""
    asked = goal.activation_bits
    if asked is None or goal.bits is None:
        return None
    if asked == "same":
        return goal.bits[0]
    return int(asked[0] if isinstance(asked, (tuple, list)) else asked)
