"""saliency="zeros": remove exactly the units that are zero already, and nothing that changes an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import PlanError
from graphcomp.ir.preserve import same_buffers
from graphcomp.numerics.compare import relative_error, tolerance_of
from graphcomp.pruning.acting import with_acting
from graphcomp.pruning.evidence import Evidence
from graphcomp.pruning.mask import InsertMasks, set_masks
from graphcomp.pruning.multiples import step_of
from graphcomp.pruning.saliency import dead_units, parameters, per_unit

NAME = "zeros"


def without_zeros(
    analysis: Analysis, groups: Sequence[ChannelGroup], round_to: int
) -> tuple[dict[ChannelGroup, Tensor], list[str]]:
    """Return the units of each group that stay, (k,) int64, and notes.

    A unit is a candidate where all matrices that make the unit, all that read the unit, or all vectors of the unit
    (scale and shift of a norm) are zero. The candidates of a group go where the masked model computes on the example
    inputs what the model computes: biases and norms can make something of a row of zeros.

    Raises:
        PlanError: the model could only be recorded, so that no masked model can be run.
    """
    captured = analysis.captured
    if captured.producer != "export":
        raise PlanError(
            'saliency="zeros" needs a graph that runs, and the model could only be recorded',
            why=f"torch.export refused: {captured.reason}",
            fix='saliency="l2" with a sparsity: units that are zero go first',
        )
    evidence = Evidence(analysis, tuple(groups))
    acting = with_acting(groups, evidence.acting)
    staying = {group: _staying(_zero(acting[group], evidence), step_of(group, round_to)) for group in groups}
    changed = [group for group, units in staying.items() if len(units) < group.size]
    kept: dict[ChannelGroup, Tensor] = {group: torch.arange(group.size) for group in groups}
    notes = []
    if changed:
        masked = InsertMasks(analysis.coupling, changed)(captured).module
        expected = _outputs(masked, analysis)
        for group in changed:
            set_masks(masked, changed, {group: staying[group]})
            if relative_error(expected, _outputs(masked, analysis)) <= tolerance_of(expected):
                kept[group] = staying[group]
            else:
                count = group.size - len(staying[group])
                notes.append(f"{group.name}: {count} units have weights of zero, and are not zero: they stay")
    if all(len(kept[group]) == group.size for group in groups):
        notes.append('saliency="zeros": no unit is zero')
    return kept, notes


def _zero(group: ChannelGroup, evidence: Evidence) -> Tensor:
    """The candidates: (size,) bool."""
    vectors = [member for member in parameters(group) if len(member.shape) == 1]
    silent = torch.zeros(group.size, dtype=torch.bool)
    if vectors:
        silent = per_unit(group, lambda name: (evidence.weight(name) != 0).float(), vectors) == 0
    return dead_units(group, evidence) | silent


def _staying(zero: Tensor, round_to: int) -> Tensor:
    """The units that stay: those that are not zero, and of the others the first as far as `round_to` asks for more."""
    left = int((~zero).sum())
    wanted = min(max(-(-left // round_to) * round_to, round_to), len(zero))
    again = zero.nonzero().flatten()[: wanted - left]
    return torch.cat([(~zero).nonzero().flatten(), again]).sort().values


def _outputs(masked: fx.GraphModule, analysis: Analysis) -> Any:
    args, kwargs = analysis.captured.inputs.copies()
    with same_buffers(masked), torch.no_grad():
        return masked(*args, **kwargs)


def check_alone(given: Mapping[str, bool]) -> None:
    """Refuse what says how many units go: that is how many are zero.

    Raises:
        PlanError: one of the options is given.
    """
    names = [name for name, is_given in given.items() if is_given]
    if names:
        raise PlanError(
            f'{", ".join(names)} with saliency="zeros"',
            why="the units that go are those that are zero, in one shot",
            fix='saliency="zeros" alone, or saliency="l2" with a sparsity: units that are zero go first',
        )
