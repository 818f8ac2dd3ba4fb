"""AJPQ: a channel of 0 bits is a channel that goes, so that pruning and quantization are one search over bits.

Two controllers decide by one importance (`plan.py`): how many units of each group get 0 bits, and the bits of the
channels that stay. What they say is repaired to the budget (`budget.py`), put on the module (`trial.py`) and scored on
held-out data; the best plan is then trained with the plan fixed (LSQ), or is the result as it is.

    fixed mode   bits=4: channels have 0 or 4 bits
    mixed mode   bits=(2, 8): channels have 0, or 2 to 8 bits

Source: AJPQ (Tang, Wei and Li 2020, arXiv 2011.06231), reconstructed: only the abstract could be read, and no code is
public. The unification by 0 bits, the two levels and the shared importance are the paper's. Ours are: the cross-entropy
method in place of the paper's reinforcement learning (DDPG), plans that spend the budget before they are repaired, the
search's start at uniform plans, units alone or bits alone first, and the repair of a plan in closed form before it is
scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graphcomp.arguments import check_callable, check_number, check_whole, check_word
from graphcomp.cost.conventions import Convention
from graphcomp.errors import NothingToPrune, PlanError
from graphcomp.methods.ajpq.budget import Meter
from graphcomp.methods.ajpq.evaluations import Evaluations
from graphcomp.methods.ajpq.plan import CONTROLLERS, Actions, ChannelPlan, Controller, Layout
from graphcomp.methods.ajpq.search import CrossEntropy
from graphcomp.methods.ajpq.trial import Trial
from graphcomp.methods.base import Goal, Method, Shown, Source, of_activations, refuse
from graphcomp.methods.geta.units import nothing_trainable, trainable
from graphcomp.quantization.spec import ACTIVATIONS, QuantConfig, QuantSpec
from graphcomp.training.identity import code_digest
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Run
from graphcomp.training.schedule import Schedule

GENERATION = 20
"""Plans that are drawn before the distribution moves."""
DEVIATIONS: Mapping[Controller, tuple[float, float]] = {"spread": (0.15, 0.02), "channel": (0.3, 0.05)}
"""Of the actions that are drawn first, about those of the best uniform plan, and the least: a mean is a real number,
and actions of one channel that are less than a bit apart are one plan."""
IDLE = 5
"""Generations in a row that hold no plan which is new, after which the search ends."""
MEANS = 7
"""Mean bits that uniform plans are tried at, from the fewest to the most."""
BISECTIONS = 12
"""Of a number of 0 … 1 that the cost rises with."""
FULL_RANGE = 8
"""Bits of activations from which on levels reach the largest value; with fewer, the range has the least error."""


class AjpqRun(Run):
    """Trains weights and steps with units and bits fixed."""

    name: ClassVar[str] = "ajpq"

    def __init__(self, ready: Prepared, *, about: Mapping[str, str], lr_quant: float | None = None) -> None:
        super().__init__(ready, lr_quant=lr_quant)
        self.about = about

    def bits(self) -> Tensor:
        """(l,) bits of each quantizer, of channels with bits of their own the mean of those that stay."""
        return torch.stack([quantizer.bits.detach().cpu().float() for _, quantizer in self.ready.quantizers()])


@dataclass(frozen=True)
class Ajpq(Method):
    """Searches bits of each channel, 0 among them, within a budget; then trains with the plan fixed.

    With `data`, a loss and a length, the plan is trained; without a length the result is the best plan, repaired in
    closed form. Plans are scored by the loss on batches that plans are not repaired on, or, without a loss, by the
    error of the outputs. `sparsity=0` leaves all units.

    Attributes:
        evaluations: plans that are evaluated at most.
        evaluate: module -> score of the plan on it, higher is better; None: as above. The module is in eval mode.
        controller: "spread": two actions per weight, mean and spread of its bits; "channel": one per channel.
        most: share of each group that may go at most.
    """

    name: ClassVar[str] = "ajpq"
    prunes = True
    quantizes = True
    searches = True
    convention: Convention | None = "C0"
    evaluations: int = 300
    evaluate: Callable[[Any], float] | None = None
    controller: Controller = "spread"
    most: float = 0.9

    def __post_init__(self) -> None:
        check_whole("evaluations", self.evaluations)
        if self.evaluate is not None:
            check_callable("evaluate", self.evaluate, fix="evaluate=lambda module: -float(loss_of(module))")
        check_word("controller", self.controller, CONTROLLERS)
        check_number("most", self.most)
        if not 0 < self.most < 1:
            raise PlanError(f"most must be above 0 and below 1, got {self.most!r}", fix="Ajpq(most=0.9)")

    # ------------------------------------------------------------------------------------------ what is asked
    def takes(self, goal: Goal) -> Collection[str]:
        """A budget; what units go by; bits and ranges of activations; calibration data, which plans are repaired on."""
        return {"budget", "round_to", "prune", "keep_inputs", "calibration", *of_activations(goal)}

    def check(self, goal: Goal) -> None:
        """A budget, and bits or units to meet the budget with."""
        if goal.sparsity:
            raise PlanError(
                f"sparsity={goal.sparsity} with method='ajpq'",
                why="the search says how many units get 0 bits, within the budget",
                fix="budget=Budget(bops=0.05); sparsity=0 leaves all units",
            )
        if goal.bits is None and goal.sparsity is not None:
            raise PlanError("method='ajpq' with sparsity=0, and no bits are given", fix="bits=(2, 8)")
        ranged = goal.bits is not None and goal.bits[0] < goal.bits[1]
        if goal.budget is None and (ranged or goal.sparsity is None):
            raise PlanError(
                "method='ajpq' needs a budget",
                why="more bits and more units are never worse, and nothing says what they may cost",
                fix="budget=Budget(bops=0.05), or Budget(bytes=0.15)",
            )
        if goal.budget is not None and goal.budget.timed:
            raise PlanError(
                "a budget of time with method='ajpq'",
                why="bits of channels change bit operations and bytes, and no kernel's time",
                fix="Budget(bops=0.05), or Budget(macs=0.5)",
            )
        if goal.budget is not None and goal.budget.bytes is not None and goal.bits is None:
            raise PlanError(
                "Budget(bytes=…) with method='ajpq', and no bits are given",
                why="the codes are counted, of so many bits each",
                fix="bits=(2, 8); or Budget(params=0.5)",
            )
        if isinstance(goal.activation_bits, (tuple, list)):
            raise PlanError(
                f"activation_bits of method='ajpq' must be one number, got {goal.activation_bits!r}",
                why="bits of weights are searched, those of activations are fixed",
                fix=f"activation_bits={goal.activation_bits[-1]}",
            )

    def prepare(self, source: Source, goal: Goal) -> Prepared:
        """Stand a quantizer on each weight whose channels have bits of their own, all at the most."""
        return source() if goal.bits is None else source(config=_config(goal))

    # ------------------------------------------------------------------------------------------ the search
    def search(self, ready: Prepared, goal: Goal, shown: Shown) -> None:
        """Find the best plan, and put the plan on the module.

        Raises:
            BudgetError: the fewest bits and units cost more.
            NothingToPrune: units are to go, and none may.
            CheckpointError: the folder holds another search.
        """
        groups = () if goal.sparsity == 0 else trainable(ready, ready.session.groups)
        if not groups and goal.sparsity is None:
            if ready.session.groups:
                raise nothing_trainable()
            fix = "sparsity=0, for bits alone"
            raise NothingToPrune("nothing can be pruned", why=ready.session.no_groups, fix=fix)
        layout = Layout(ready, groups, goal.round_to)
        searching = Searching(self, ready, goal, layout)
        about = {**shown.about, **self._about(goal)}
        found = Evaluations(shown.folder, about)
        try:
            trial = Trial(ready, layout, shown.rows, repair=shown.repair)
            score = shown.score if self.evaluate is None else partial(_scored, self.evaluate, ready)

            def evaluate(plan: ChannelPlan) -> float:
                trial.put(plan)
                return score()

            plan = searching.best(evaluate, found, shown.seed, shown.said)
            trial.put(plan)
        finally:
            found.close()
        ready.remarks = (*ready.remarks, *searching.remarks(plan, found))

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> AjpqRun:
        """Begin a run on the plan that was found."""
        refuse(self, {"a Schedule": isinstance(training.schedule, Schedule)}, "its stages are GETA's; give steps")
        return AjpqRun(ready, about=self._about(goal), lr_quant=training.lr_quant)

    def _about(self, goal: Goal) -> dict[str, str]:
        options = {name: getattr(self, name) for name in ("evaluations", "controller", "most")}
        asked = {"sparsity": goal.sparsity, "bits": goal.bits, "budget": goal.budget, "round_to": goal.round_to}
        scored = "" if self.evaluate is None else code_digest(self.evaluate)
        return {**{name: str(value) for name, value in {**options, **asked}.items()}, "evaluate": scored}


def _config(goal: Goal) -> QuantConfig:
    """Return where quantizers stand: the first and the last layer have bits as all others."""
    assert goal.bits is not None
    low, high = goal.bits
    own = high if goal.activation_bits == "same" else goal.activation_bits
    activations = None
    if own is not None:
        observer: Literal["minmax", "mse"] = "minmax" if own >= FULL_RANGE else "mse"
        activations = replace(ACTIVATIONS, bits=own, observer=observer)
    return QuantConfig(QuantSpec(high, granularity="channel", kind="mixed"), activations, first_and_last_bits=low)


class Searching:
    """One search: from actions to plans within the budget, and the best of those."""

    def __init__(self, method: Ajpq, ready: Prepared, goal: Goal, layout: Layout) -> None:
        self.method, self.layout = method, layout
        self.bits = goal.bits
        self.actions = Actions(
            layout, goal.bits, prunes=bool(layout.groups), most=method.most, controller=method.controller
        )
        low = goal.bits[0] if goal.bits is not None else 0
        self.meter = None if goal.budget is None else Meter(ready, layout, goal.budget, low)
        self.score = -math.inf

    def best(
        self,
        evaluate: Callable[[ChannelPlan], float],
        found: Evaluations,
        seed: int,
        said: Callable[[str], None] = lambda text: None,
    ) -> ChannelPlan:
        """Return the plan of the highest score; of equal ones the first.

        Args:
            evaluate: plan -> score.
            found: scores that are known.
            seed: of what is drawn.
            said: takes a text on how far the search is.
        """
        if not self.actions.size:
            return self._within(self.actions.plan(torch.empty(0, dtype=torch.float64)))
        starts = self._starts()
        plans = [self.fitted(own) for own in starts]
        limit = self.method.evaluations
        results: list[tuple[float, ChannelPlan]] = []

        def score_all(vectors: Sequence[Tensor], own: Sequence[ChannelPlan]) -> list[float]:
            scores = []
            for _, plan in zip(vectors, own, strict=True):
                if len(found.used) >= limit and plan.key not in found.used:
                    break
                scores.append(found(plan, evaluate))
                results.append((scores[-1], plan))
                said(f"{len(found.used)} of {limit} plans, best score {max(results, key=_first)[0]:.4g}")
            return scores

        scores = score_all(starts, plans)
        first = max(range(len(scores)), key=lambda k: (scores[k], -k))
        deviation, narrowest = DEVIATIONS[self.method.controller]
        draws = CrossEntropy(starts[first], deviation, narrowest, seed)
        draws.tell(torch.stack(list(starts[: len(scores)])), scores)
        draws.mean, draws.deviation = starts[first].clone(), torch.full_like(starts[first], deviation)
        drawn = self._first_draws(draws, starts[0], starts[first])
        idle = 0
        while len(found.used) < limit and idle < IDLE:
            before = len(found.used)
            scores = score_all(list(drawn), [self.fitted(own) for own in drawn])
            draws.tell(drawn[: len(scores)], scores)
            idle = idle + 1 if len(found.used) == before else 0
            drawn = draws.ask(GENERATION)
        self.score, plan = max(results, key=_first)
        return plan

    def _first_draws(self, draws: CrossEntropy, whole: Tensor, best: Tensor) -> Tensor:
        """Return the first generation: units alone about one start, and bits alone about another, where both may move.

        What is drawn at once of all actions leaves no layer as it is, and few such plans are better than a uniform one.

        Args:
            whole: the start with the fewest bits, and the most units.
            best: the start of the highest score.
        """
        units = self.actions.units
        if not units or not self.actions.of_bits:
            return draws.ask(GENERATION)
        of_units, of_bits = draws.ask(GENERATION // 2, about=best), draws.ask(GENERATION // 2, about=whole)
        of_units[:, units:], of_bits[:, :units] = best[units:], whole[:units]
        return torch.cat([of_units, of_bits])

    # ------------------------------------------------------------------------------------------ within the budget
    def _within(self, plan: ChannelPlan) -> ChannelPlan:
        return plan if self.meter is None else self.meter.repaired(plan)

    def fitted(self, actions: Tensor) -> ChannelPlan:
        """Return the plan of actions that spends the budget: all move together as far as it holds; then repaired."""
        if self.meter is None:
            return self.actions.plan(actions)
        low, high = -1.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.meter.holds(self.actions.plan(actions, middle)) else (low, middle)
        return self._within(self.actions.plan(actions, low))

    def _starts(self) -> list[Tensor]:
        """Return actions of uniform plans: so many bits for all, and the share of units that the budget then takes."""
        ranged = bool(self.actions.of_bits)
        means = [k / (MEANS - 1) for k in range(MEANS)] if ranged and self.actions.units else [0.5]
        found = [self.actions.uniform(self._share(mean), mean) for mean in means]
        if ranged and self.actions.units:
            found.append(self.actions.uniform(0.0, 0.5))
        return found

    def _share(self, mean: float) -> float:
        """Return the least share of all groups with which the budget holds at these bits; 1 where none does."""
        if self.meter is None or not self.actions.units:
            return 0.0
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            holds = self.meter.holds(self.actions.plan(self.actions.uniform(middle, mean)))
            low, high = (low, middle) if holds else (middle, high)
        return high

    # ------------------------------------------------------------------------------------------ what is said
    def remarks(self, plan: ChannelPlan, found: Evaluations) -> list[str]:
        """Say how the plan was found, and what the plan is."""
        said = []
        if found.used:
            said.append(
                f"the cross-entropy method chose among {len(found.used)} plans of bits per channel "
                f"(the paper's search is DDPG); best score {self.score:.4g}"
            )
        gone = sum(int((~own).sum()) for own in plan.left)
        if gone:
            said.append(f"{gone} of {sum(map(len, plan.left))} units have 0 bits, and are gone")
        bits = torch.cat([*plan.bits, torch.empty(0, dtype=torch.int64)])
        if self.bits is not None and len(bits):
            counts = [f"{int((bits == n).sum())} with {n}" for n in sorted(set(bits[bits > 0].tolist()))]
            said.append(f"bits of output channels: {', '.join(counts)}")
        return said


def _scored(evaluate: Callable[[Any], float], ready: Prepared) -> float:
    return float(evaluate(ready))


def _first(pair: tuple[float, ChannelPlan]) -> float:
    return pair[0]
