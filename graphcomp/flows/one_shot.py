"""One shot, from top to bottom: slice, check; with bits, the same pipeline goes on to integers.

The model of the user's own class (`held.py`) is made beside the sliced graph, and compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.flows.results import Cut
from graphcomp.ir.passes import Pass, Pipeline, Remember
from graphcomp.ir.program import Program
from graphcomp.pruning.slice import SliceGroups
from graphcomp.pruning.verify import CheckSlicing
from graphcomp.quantization.ptq import PostTraining, quantizing
from graphcomp.quantization.verify import CheckLowering
from graphcomp.system.threads import one_at_a_time

SLICED = "sliced"
"""The stage after the cut, in floats."""


@one_at_a_time
def cut_groups(plan: Analysis, kept: Kept, groups: Sequence[ChannelGroup], *, verify: bool) -> Cut:
    """Slice the captured graph; a recorded model has none that runs, and its cut has no graph.

    Raises:
        PlanError: a group would lose all units, or an index is none of its units.
        VerificationError: the sliced model does not compute what the masked one does.
    """
    if plan.captured.producer == "record":
        return Cut(plan, kept, groups, plan.captured)
    sliced = Pipeline("one shot", cutting(plan, kept, verify=verify))(plan.captured)
    return Cut(plan, kept, groups, sliced, sliced.notes_since(plan.captured))


@one_at_a_time
def cut_to_integers(
    plan: Analysis,
    kept: Kept,
    groups: Sequence[ChannelGroup],
    options: PostTraining,
    batches: Sequence[Sequence[Any]],
    *,
    verify: bool,
    repair: bool = False,
    shown: bool = False,
    add_biases: bool = True,
) -> tuple[Cut, Program]:
    """Slice the captured graph, quantize what is left, and lower.

    Args:
        batches: flat inputs to calibrate on; at least one.
        repair: move weights towards the float output before they are rounded.
        shown: show a progress line while rounding is learned.
        add_biases: give convolutions without a bias one, where to correct: not where the user's class is to hold the
            result.

    Returns:
        The cut in floats, and the program of integers.

    Raises:
        PlanError, VerificationError: see `cut_groups`.
        CalibrationError: the data do not fit, or are not finite.
        VerificationError: the integers do not compute what the fake-quant graph does.
    """
    integers = Pipeline("one shot, with bits", (
        *cutting(plan, kept, verify=verify),
        Remember(SLICED),
        *quantizing(options, batches, repair=repair, shown=shown, add_biases=add_biases),
        *([CheckLowering(batches[0])] if verify and batches else []),  # without any, calibration refuses
    ))(plan.captured)  # fmt: skip
    sliced = integers.stages[SLICED]
    return Cut(plan, kept, groups, sliced, sliced.notes_since(plan.captured)), integers


def cutting(plan: Analysis, kept: Kept, *, verify: bool) -> tuple[Pass, ...]:
    """Return the passes from the captured graph to the sliced one."""
    check = CheckSlicing(plan.coupling, plan.captured, kept)
    return (SliceGroups(plan.coupling, kept), *([check] if verify and kept else []))
