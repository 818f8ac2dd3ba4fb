"""A cut repaired on calibration data, and checked again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graphcomp.flows.one_shot import cut_groups
from graphcomp.flows.results import Cut, listed
from graphcomp.pruning.repair import Repaired, repair_cut
from graphcomp.pruning.slice import by_factor
from graphcomp.system.threads import one_at_a_time


@one_at_a_time
def repaired(cut: Cut, batches: Sequence[Sequence[Any]], *, verify: bool) -> Cut:
    """Return the cut with repaired weights, checked as the cut was: its plan holds these values.

    Args:
        cut: of weights as they were.
        batches: flat calibration inputs.
        verify: check Law 2 of the repaired cut.

    Raises:
        CalibrationError: the data do not fit, or are not finite.
        VerificationError: the sliced model does not compute what the masked one does.
    """
    if why := _unfit(cut):
        return replace(cut, notes=(*cut.notes, f"not repaired: {why}")) if why != NOTHING else cut
    assert cut.graph is not None
    found = repair_cut(cut.plan, cut.kept, cut.graph, batches)
    small = cut_groups(found.plan, cut.kept, cut.groups, verify=verify)
    return small.after(replace(cut, notes=(*cut.notes, *notes(found, len(batches))), repaired=found.layers))


NOTHING = "nothing was cut"


def _unfit(cut: Cut) -> str:
    """Return why a cut cannot be repaired."""
    if not by_factor(cut.kept):
        return NOTHING
    if cut.graph is None:
        return "the model could only be recorded"
    if any(p.is_meta for p in cut.graph.parameters()):
        return "the model has no values (meta device)"
    return ""


def notes(found: Repaired, batches: int) -> list[str]:
    """Say what was repaired, on which data, and which layers were not, by reason."""
    said = []
    solved = [layer for layer in found.layers.values() if not math.isinf(layer.ridge)]
    if solved:
        rows = min(layer.rows for layer in solved), max(layer.rows for layer in solved)
        of = f"{rows[0]}" if rows[0] == rows[1] else f"{rows[0]} to {rows[1]}"
        said.append(f"{len(solved)} layers were repaired by least squares on {of} rows of calibration data")
    if found.batches < batches:
        said.append(f"the repair used the first {found.batches} of {batches} batches, which memory is for")
    same = [name for name, layer in found.layers.items() if math.isinf(layer.ridge)]
    by_reason: dict[str, list[str]] = {"no change helps on rows that are held out": same} if same else {}
    for name, why in found.left.items():
        by_reason.setdefault(why, []).append(name)
    said += [f"not repaired, as {why}: {listed(quoted(names))}" for why, names in by_reason.items()]
    if found.reestimated:
        said.append(
            f"batch norms behind these have the statistics of the calibration data: {listed(quoted(found.reestimated))}"
        )
    return said


def quoted(names: Sequence[str]) -> list[str]:
    """Return the names in quotes."""
    return [f"'{name}'" for name in names]
