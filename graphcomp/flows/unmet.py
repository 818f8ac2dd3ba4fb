"""What a trained model does not meet of what was asked for: sparsity, bits and budget are compared with the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from graphcomp.methods.base import Goal, Method
from graphcomp.methods.geta.units import trainable
from graphcomp.methods.sizes import FLOAT_BYTES, bytes_within, quantized_parameters
from graphcomp.methods.stages import last_quantizing
from graphcomp.pruning.allocation import Budget, units_to_remove
from graphcomp.pruning.shares import parts_of
from graphcomp.quantization.sites import Site
from graphcomp.report.report import Change, Report
from graphcomp.training.prepared import Prepared

NAMED = 5
"""Layers that a note names at most."""


def unmet(stages: Sequence[Method], goals: Sequence[Goal], ready: Prepared, report: Report) -> tuple[str, ...]:
    """Return a note on each part of a goal that the result does not meet.

    Args:
        stages: of the method.
        goals: of each stage.
        ready: what the last stage has trained.
        report: of the result.
    """
    last = last_quantizing(stages, goals)
    return (
        *_of_sparsity(goals[0], ready),
        *(_of_bits(goals[last], ready) if last >= 0 else ()),
        *_of_budget(goals[0].budget, stages[0], ready, report),
    )


def _of_sparsity(goal: Goal, ready: Prepared) -> Iterator[str]:
    """Compare the share of elements that are gone, where single elements are pruned, else of units."""
    if goal.sparsity is None:
        return
    if ready.elements and not isinstance(goal.sparsity, Mapping):
        masks = ready.elements.values()
        gone, total = sum(int((~mask).sum()) for mask in masks), sum(mask.numel() for mask in masks)
        if gone != round(goal.sparsity * total):
            yield _other_share(goal.sparsity, gone, total, "weights")
        return
    kept = ready.kept()
    for part in parts_of(ready.session.plan.model, trainable(ready, tuple(kept)), goal.sparsity):
        total = sum(group.size for group in part.groups)
        gone = total - sum(len(kept[group]) for group in part.groups)
        if abs(gone - units_to_remove(part.sparsity, total)) >= goal.round_to:
            yield _other_share(part.sparsity, gone, total, f"units{f' of {part.name}' * bool(part.name)}")


def _other_share(asked: float, gone: int, total: int, what: str) -> str:
    return (
        f"sparsity={asked:g} is not what the result has: {gone} of {total} {what} are gone ({gone / max(total, 1):.3g})"
    )


def _of_bits(goal: Goal, ready: Prepared) -> Iterator[str]:
    """Compare the bits of quantizers with the range, and with the bits that the method gives the first and the last."""
    session = ready.session
    if not session.sites:
        if session.quantized is session.plan:  # else a note says why no layer is
            yield f"bits={_asked(goal)} are not what the result has: no layer is quantized"
        return
    config = session.config
    elsewhere = (config.first_and_last_bits, config.residual_bits) if config else ()
    other = {
        f"{site.layer} ({bits})": None
        for site, quantizer in ready.quantizers()
        if not _within(goal, site, bits := round(float(quantizer.bits.detach()))) and bits not in elsewhere
    }
    if other:
        more = f" and {len(other) - NAMED} more" if len(other) > NAMED else ""
        yield f"bits={_asked(goal)} are not what the result has: {', '.join([*other][:NAMED])}{more}"


def _within(goal: Goal, site: Site, bits: int) -> bool:
    asked = goal.bits if site.is_weight or goal.activation_bits == "same" else goal.activation_bits
    if goal.start is not None or asked is None:
        asked = site.low, site.high
    low, high = (asked, asked) if isinstance(asked, int) else asked
    return bool(low <= bits <= high)


def _asked(goal: Goal) -> str:
    if goal.bits is None:
        return "…"
    return str(goal.bits[0] if goal.bits[0] == goal.bits[1] else goal.bits)


def _of_budget(budget: Budget | None, stage: Method, ready: Prepared, report: Report) -> Iterator[str]:
    """Compare each limit with the cost in the report; bytes by a convention with the codes (no list takes a budget)."""
    for name, asked in (budget.limits() if budget else {}).items():
        cost, by = getattr(report, name), ""
        limit = asked * cost.before if isinstance(asked, float) and asked <= 1 else asked
        if name == "bytes" and stage.convention is not None and budget is not None:
            weights = sum(ready.get_parameter(own).numel() for own in quantized_parameters(ready))
            cost = Change(FLOAT_BYTES * weights, report.sizes.get(stage.convention, cost.after))
            limit, by = bytes_within(budget, weights), f" by {stage.convention}"
        if cost.after > limit:
            got = f"{cost.after:,.0f} {name}{by} of {cost.before:,.0f} ({cost.ratio:.1%})"
            yield f"Budget({name}={asked:g}) is not what the result has: {got}"
