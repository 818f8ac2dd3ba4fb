"""A budget on latency: the prediction that says what is within, the choice of widths, and the result measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from graphcomp.cost import BitsOf, CostModel, Counts
from graphcomp.cost.latency_table import LatencyTable, Predicted, this_machine
from graphcomp.cost.model import counts_of
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import BudgetError
from graphcomp.flows.family import Once
from graphcomp.flows.timed import Step, time_network, time_plan
from graphcomp.pruning.allocation import Budget, Meter, Scope, normalized
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.knapsack import Item, choose_widths, items_of, same_shares, unreachable
from graphcomp.quantization.ptq import PostTraining
from graphcomp.report.report import Change, Report
from graphcomp.result import CompressedModel
from graphcomp.system.threads import one_at_a_time
from graphcomp.targets.timing import Timer, timer_of

CORRECTIONS = 2
"""Times that a choice is timed and made again, at most."""
CLOSE = 0.03
"""Relative error of a prediction with which a choice stays."""
OFF = 0.1
"""Relative error of a prediction from which on a note names the error."""


@dataclass(frozen=True, eq=False)
class TimedBudget:
    """A budget on latency, and what is needed to meet the budget.

    Attributes:
        plan: of the whole model.
        budget: with `latency_ms`, and without `speedup`.
        predicted: milliseconds by the units that stay.
        meter: says whether a choice is within the budget.
        groups: that may be cut.
        round_to: units that stay are multiples.
        once: what others of a family have made: a file of the original is written once.
        quantization: what is left is lowered to; None: floats.
        corrections: choices that were timed, and after which the prediction was corrected.
    """

    plan: Analysis
    budget: Budget
    predicted: Predicted
    meter: Meter
    groups: Sequence[ChannelGroup]
    round_to: int
    once: Once
    quantization: PostTraining | None = None
    corrections: int = 0

    def choose(self, scores: Scores, ranking: Scope) -> tuple[TimedBudget, Kept]:
        """Return the units that stay, and the budget with the prediction by which they were chosen.

        What is chosen is timed, and chosen again where the prediction was off: a choice finds the widths at which the
        prediction errs to its advantage. Of the choices that were timed, the one that loses the least within the time
        stays; where none is within, the fastest.

        Args:
            scores: (size,) per group; with "sensitivity" what the outputs lose with each unit.
            ranking: "local": the same share of each group, as near as the widths allow.

        Raises:
            BudgetError: no choice is within the budget.
        """
        comparable = normalized(scores, "none" if ranking == "sensitivity" else "mean")
        items = items_of(self.groups, comparable, self.round_to)
        timed, kept = self, self._choose(items, ranking)
        whole = all(len(units) == group.size for group, units in kept.items())
        if not self._here or (whole and self.quantization is None):  # the original is within the budget as it is
            return timed, kept
        limit, tried = self.meter.limits["latency_ms"], [_Tried(self, kept, self._time(kept), _lost(items, kept))]
        for _ in range(CORRECTIONS):
            last = tried[-1]
            counts = counts_of(last.kept)
            if last.ms <= limit and abs(last.timed.predicted(counts) / last.ms - 1) <= CLOSE:
                break
            timed = last.timed._with(last.timed.predicted.corrected(counts, last.ms))
            try:
                kept = timed._choose(items, ranking)
            except BudgetError:  # by the first prediction there was a choice: the notes say what was measured
                break
            if any(counts_of(kept) == counts_of(other.kept) for other in tried):
                break
            tried.append(_Tried(timed, kept, self._time(kept), _lost(items, kept)))
        within = [other for other in tried if other.ms <= limit]
        best = min(within, key=lambda t: t.lost) if within else min(tried, key=lambda t: t.ms)
        return best.timed, best.kept

    def _time(self, kept: Kept) -> float:
        return time_network(self.plan, self.groups, kept, self.predicted.table, self.quantization)

    @property
    def _here(self) -> bool:
        """Whether the table is of this machine."""
        return self.predicted.table.machine == this_machine(self.predicted.table.runtime)

    def _with(self, predicted: Predicted) -> TimedBudget:
        return replace(
            self, predicted=predicted, meter=self.meter.with_latency(predicted), corrections=self.corrections + 1
        )

    def _choose(self, items: Sequence[Item], ranking: Scope) -> Kept:
        if ranking != "local":
            return choose_widths(items, self.predicted, self.meter.holds)
        kept = same_shares(items, self.meter.holds)
        if kept is None:
            raise unreachable(self.predicted, {item.group.factor: item.widths[-1] for item in items})
        return kept

    @one_at_a_time
    def measured(self, small: CompressedModel, kept: Kept, timer: Timer | None = None) -> Report:
        """Return the report with the latency of the original and of the result, measured side by side.

        Args:
            small: the result.
            kept: the units that stay.
            timer: takes the time; by default that of the table's runtime on this machine.
        """
        table, inputs = self.predicted.table, self.plan.captured.inputs
        expected = self.predicted(counts_of(kept))
        assert isinstance(small.report, Report)
        if timer is None and not self._here:
            note = f"{expected:.3f} ms are predicted on {table.machine}, and this is another machine: not measured"
            return replace(small.report, notes=(*small.report.notes, note))
        timer = timer or timer_of(table.runtime, table.threads)
        original = self.plan.captured.module if table.runtime == "onnxruntime" else self.plan.model
        first = self.once("original", partial(timer.whole, original, inputs))
        before, after = timer.times([first, timer.whole(small.module, inputs)])
        notes = _notes(self.budget, table, expected, before, after, self.corrections)
        return replace(small.report, latency_ms=Change(before, after), notes=(*small.report.notes, *notes))


@dataclass(frozen=True, eq=False)
class _Tried:
    """A choice that was timed.

    Attributes:
        timed: the budget with the prediction by which the choice was made.
        kept: the units that stay.
        ms: milliseconds of the whole network.
        lost: what the outputs lose.
    """

    timed: TimedBudget
    kept: Kept
    ms: float
    lost: float


def _lost(items: Sequence[Item], kept: Kept) -> float:
    return sum(item.errors[item.widths.index(len(kept[item.group]))] for item in items)


def _notes(
    budget: Budget, table: LatencyTable, expected: float, before: float, after: float, corrections: int
) -> list[str]:
    """Say what was predicted and measured, and how; and where the two differ, or the budget is not met."""
    threads = f"{table.threads} thread{'s' if table.threads > 1 else ''}"
    how = "onnxruntime" if table.runtime == "onnxruntime" else "PyTorch"
    by = f" (corrected by {corrections} timed choice{'s' if corrections > 1 else ''})" if corrections else ""
    said = [
        f"latency in {how}, {threads}: {before:.3f} ms before, {expected:.3f} ms predicted{by}, {after:.3f} ms "
        f"measured ({before / after:.2f} times as fast; the least of many runs, on {table.machine})"
    ]
    if abs(expected / after - 1) > OFF:
        said.append(f"the prediction of the latency is off by {expected / after - 1:+.0%}")
    limit = budget.latency_ms
    if limit is not None and after > limit:
        said.append(f"the budget of {limit:.3f} ms is met by the prediction, and not by what was measured")
    return said


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
    """Time what the budget's table lacks, and return the budget in milliseconds.

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
        PlanError, ExportError: see `time_plan`.
    """
    table = budget.table or LatencyTable()
    predict = partial(time_plan, plan, groups, table, quantization=quantization, round_to=round_to, step=step)
    _, predicted = once("latency", predict)
    budget = budget.in_ms(predicted.original_ms)
    meter = Meter(CostModel(plan), budget, groups, bits, stored, predicted)
    return TimedBudget(plan, budget, predicted, meter, groups, round_to, once, quantization)
