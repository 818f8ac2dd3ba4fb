"""A budget on latency: the prediction that says what is within, the choice of widths, and the result measured.

The speed of a machine drifts by more than predictions err. So the original is the anchor: each network that is timed
takes turns with the original, and what a prediction says is the ratio of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from torch import nn

from graphcomp.cost import BitsOf, CostModel, Counts
from graphcomp.cost.latency_table import LatencyTable, Predicted
from graphcomp.cost.model import counts_of
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import PlanError
from graphcomp.flows.family import Once
from graphcomp.flows.timed import Networks, Step, time_plan
from graphcomp.flows.timed_choice import timed_choice
from graphcomp.pruning.allocation import Budget, Meter, Scope, normalized
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.knapsack import Item, choose_widths, items_of, same_shares, unreachable
from graphcomp.quantization.ptq import PostTraining
from graphcomp.report.report import Change, Report
from graphcomp.result import CompressedModel
from graphcomp.system.threads import one_at_a_time
from graphcomp.targets.timing import Timer

OFF = 0.1
"""Relative error of a prediction from which on a note names the error."""
DRIFT = 0.05
"""Relative change of the original's time since the table was made from which on a note names the change."""

Hold: TypeAlias = Callable[[Kept, Meter], tuple[Kept, nn.Module | None]]
"""From a choice and a budget's meter to a choice that the user's class can hold, and the model; None where none can."""


@dataclass(frozen=True, eq=False)
class TimedBudget:
    """A budget on latency, and what is needed to meet the budget.

    Attributes:
        asked: the budget as it was given.
        networks: makes calls of the original and of what is cut.
        predicted: milliseconds by the units that stay.
        meter: says whether a choice is within the budget.
        round_to: units that stay are multiples.
        drift: the time of the original, taken again, over that in the table; the prediction is scaled by the drift.
        timed: of each choice that was timed, milliseconds predicted and measured, the one that stays last.
    """

    asked: Budget
    networks: Networks
    predicted: Predicted
    meter: Meter
    round_to: int
    drift: float = 1.0
    timed: tuple[tuple[float, float], ...] = ()

    def choose(self, scores: Scores, ranking: Scope, hold: Hold | None = None) -> tuple[TimedBudget, Kept]:
        """Return the units that stay, and the budget with the prediction by which they were chosen.

        Args:
            scores: (size,) per group; with "sensitivity" what the outputs lose with each unit.
            ranking: "local": the same share of each group, as near as the widths allow.
            hold: from a choice to one that the user's class can hold, and the model; None: graphs are timed.

        Raises:
            BudgetError: no choice is within the budget.
        """
        comparable = normalized(scores, "none" if ranking == "sensitivity" else "mean")
        items = items_of(self.networks.groups, comparable, self.round_to)
        kept = self._choose(items, ranking, self.predicted)
        whole = all(len(units) == group.size for group, units in kept.items())
        if not self.networks.here or (whole and self.networks.quantization is None):  # the original meets the budget
            return self, kept
        held: dict[tuple[int, ...], tuple[Kept, nn.Module | None]] = {}
        of_files, free = self.networks.table.runtime == "onnxruntime", list[bool]()

        def choose(predicted: Predicted) -> Kept:
            chosen = self._choose(items, ranking, predicted)
            widths = _widths(chosen)
            if widths not in held:
                found = hold(chosen, self.meter.with_latency(predicted)) if hold and not free else (chosen, None)
                held[widths] = held[_widths(found[0])] = found
                if of_files and found[1] is not None and _widths(found[0]) == widths:
                    free.append(True)  # the class holds what is chosen as it is, and files are written of graphs
            return held[widths][0]

        def time(kept: Kept) -> float:
            return self._time(kept, held[_widths(kept)][1])

        tried = timed_choice(self.predicted, self.meter.limits["latency_ms"], choose, time, partial(_lost, comparable))
        best = tried[-1]
        meter = self.meter.with_latency(best.predicted)
        return replace(
            self, predicted=best.predicted, meter=meter, timed=tuple((t.expected, t.ms) for t in tried)
        ), best.kept

    def _choose(self, items: Sequence[Item], ranking: Scope, predicted: Predicted) -> Kept:
        holds = self.meter.with_latency(predicted).holds
        if ranking != "local":
            return choose_widths(items, predicted, holds)
        kept = same_shares(items, holds)
        if kept is None:
            raise unreachable(predicted, {item.group.factor: item.widths[-1] for item in items})
        return kept

    def _time(self, kept: Kept, held: nn.Module | None) -> float:
        """Return milliseconds of the network with `kept` units, as if the original took what the prediction says."""
        timer = self.networks.timer()
        before, after = timer.times([self.networks.original(timer), self.networks.cut(kept, timer, held)])
        return after * self.predicted.original_ms / before

    @one_at_a_time
    def measured(self, small: CompressedModel, kept: Kept, timer: Timer | None = None) -> Report:
        """Return the report with the latency of the original and of the result, measured side by side.

        Args:
            small: the result.
            kept: the units that stay.
            timer: takes the time; by default that of the table's runtime on this machine.
        """
        networks, ms = self.networks, self.predicted(counts_of(kept))
        assert isinstance(small.report, Report)
        if timer is None and not networks.here:
            machine = networks.table.machine
            note = f"{ms:.3f} ms are predicted on {machine}, and this is another machine: not measured"
            return replace(small.report, notes=(*small.report.notes, note))
        timer = timer or networks.timer()
        calls = [networks.original(timer), timer.whole(small.module, networks.plan.captured.inputs)]
        calls += [networks.uncut(timer)] if self.asked.baseline == "quantized" else []
        before, after, *uncut = timer.times(calls)
        notes = self._notes(ms * before / self.predicted.original_ms, before, after, *uncut)
        return replace(small.report, latency_ms=Change(before, after), notes=(*small.report.notes, *notes))

    def _notes(self, expected: float, before: float, after: float, uncut: float | None = None) -> list[str]:
        """Say what was predicted and measured, and how; and where the two differ, or the budget is not met."""
        table, asked, off = self.networks.table, self.asked, expected / after - 1
        threads = f"{table.threads} thread{'s' if table.threads > 1 else ''}"
        how = "onnxruntime" if table.runtime == "onnxruntime" else "PyTorch"
        by = f", the best of {len(self.timed)} timed choices" if len(self.timed) > 1 else ""
        said = [
            f"latency in {how}, {threads}: {before:.3f} ms before, {expected:.3f} ms predicted, {after:.3f} ms "
            f"measured ({off:+.1%} off, {before / after:.2f} times as fast{by}; the least of many runs, on "
            f"{table.machine})"
        ]
        if len(self.timed) > 1:
            each = ", ".join(f"{predicted:.3f} and {ms:.3f}" for predicted, ms in self.timed)
            said.append(f"choices that were timed, ms predicted and measured, the one that stays last: {each}")
        if uncut is not None:
            said.append(f"quantized and uncut {uncut:.3f} ms: the result is {uncut / after:.2f} times as fast")
        if abs(self.drift - 1) > DRIFT:
            said.append(f"the original takes {self.drift:.2f} times what the table says, and so do predictions")
        if abs(off) > OFF:
            said.append(f"the prediction of the latency is off by {off:+.0%}")
        reached = (before if uncut is None else uncut) / after
        if asked.speedup is not None and reached < asked.speedup:
            said.append(
                f"{asked.speedup:g} times as fast by the prediction, and not by what was measured: {reached:.3f}"
            )
        if asked.latency_ms is not None and after > asked.latency_ms:
            said.append(
                f"the budget of {asked.latency_ms:.3f} ms is met by the prediction, and not by what was measured"
            )
        return said


def _lost(scores: Scores, kept: Kept) -> float:
    """Return the sum of the scores of the units that go, the least of each group."""
    gone = (own.clamp(min=0).sort().values[: len(own) - len(kept[group])] for group, own in scores.items())
    return sum(float(values.double().sum()) for values in gone)


def _widths(kept: Kept) -> tuple[int, ...]:
    return tuple(len(units) for units in kept.values())


def timed_budget(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    budget: Budget,
    once: Once,
    *,
    quantization: PostTraining | None = None,
    bits: BitsOf | None = None,
    stored: Callable[[Counts], int] | None = None,
    round_to: int = 1,
    step: Step = lambda text: None,
) -> TimedBudget:
    """Time what the budget's table lacks, and the original, and return the budget in milliseconds of now.

    Args:
        plan: of the whole model.
        groups: that may be cut.
        budget: with a limit on latency.
        once: what others of a family have made.
        quantization: what is left is lowered to; None: floats.
        bits, stored: as for `allocate_budget`.
        round_to: units that stay are multiples.
        step: is told what begins.

    Raises:
        PlanError, ExportError: see `time_plan`; a budget that counts from the quantized network, and no bits.
    """
    if budget.baseline == "quantized" and quantization is None:
        raise PlanError(
            'Budget(baseline="quantized") without bits',
            why="nothing is quantized: there is no such network to count from",
            fix="bits=8, or Budget(speedup=…) alone",
        )
    predict = partial(
        time_plan, plan, groups, budget.table or LatencyTable(), quantization=quantization, round_to=round_to, step=step
    )
    table, predicted = once("latency", predict)
    networks = Networks(plan, groups, table, quantization, once)
    original, counted = _now(networks, predicted, budget)
    drift, anchored = original / predicted.original_ms, predicted.anchored(original, counted)
    meter = Meter(CostModel(plan), budget.in_ms(counted), groups, bits, stored, anchored)
    return TimedBudget(budget, networks, anchored, meter, round_to, drift)


@one_at_a_time
def _now(networks: Networks, predicted: Predicted, budget: Budget) -> tuple[float, float]:
    """Return milliseconds of the original, and of the network that the budget counts from, on this machine now; on
    another machine than the table's, as the table says."""
    of_integers = budget.baseline == "quantized"
    if not networks.here:
        return predicted.original_ms, predicted.dense_ms if of_integers else predicted.original_ms
    timer = networks.timer()
    times = timer.times([networks.original(timer), *([networks.uncut(timer)] if of_integers else [])])
    return times[0], times[-1]
