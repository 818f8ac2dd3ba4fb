"""A cut repaired on calibration data, and checked again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphcomp.coupling.analysis import Analysis
from graphcomp.errors import CalibrationError, PlanError
from graphcomp.flows.one_shot import cut_groups
from graphcomp.flows.results import Cut, check_batches, listed
from graphcomp.ir.graph import all_tensors
from graphcomp.ir.inputs import first_samples, sample_count
from graphcomp.ir.module import tensor_names
from graphcomp.ir.run_nodes import output_errors
from graphcomp.pruning.evidence import arguments_of
from graphcomp.pruning.repair import Repaired, repair_cut
from graphcomp.pruning.slice import by_factor, kept_units
from graphcomp.result import CompressedModel
from graphcomp.system.threads import one_at_a_time
from graphcomp.torch_compat import pytree

NOTHING_CUT = "nothing was cut"
"""Why a cut of no units is not repaired."""


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
        return replace(cut, notes=(*cut.notes, f"not repaired: {why}"))
    assert cut.graph is not None
    found = repair_cut(cut.plan, cut.kept, cut.graph, batches)
    judged = judge(cut.plan, (cut.graph, found.graph), batches)
    if judged is not None and judged.errors[1] > judged.errors[0]:
        return replace(cut, notes=(*cut.notes, f"not repaired, as it would not help: {judged}"))
    said = [*notes(found, len(batches)), *([f"by the repair {judged}"] if judged is not None else [])]
    small = cut_groups(found.plan, cut.kept, cut.groups, verify=verify)
    return small.after(replace(cut, notes=(*cut.notes, *said), repaired=found.layers))


@dataclass(frozen=True)
class Judged:
    """How far the outputs are from those before the cut, ||y - t|| / ||t||, of the sliced and the repaired model."""

    errors: tuple[float, float]
    samples: int

    def __str__(self) -> str:
        before, after = self.errors
        of = f"relative, {self.samples} calibration samples"
        return f"the error of the outputs goes from {before:.3g} to {after:.3g} ({of})"


@torch.no_grad()
def judge(plan: Analysis, graphs: tuple[fx.GraphModule, fx.GraphModule], batches: Sequence[Any]) -> Judged | None:
    """Compare the outputs of two cuts with those before; None where no output is of floats.

    Args:
        plan: of the model before.
        graphs: sliced, and repaired.
        batches: flat inputs; some of the last are used, which a repair short of memory has not seen.
    """
    used = first_samples(batches[::-1], JUDGED)
    sums, norm = output_errors(plan.captured.module, graphs, used)
    if not math.isfinite(norm) or norm == 0:
        return None
    before, after = (math.sqrt(error / norm) for error in sums)
    return Judged((before, after), sum(map(sample_count, used)))


JUDGED = 64
"""Samples that a repair is judged on at most, and the rest of a batch."""


def flat_batches(plan: Analysis, batches: Iterable[Any]) -> list[list[Any]]:
    """Return the flat inputs of each batch.

    Raises:
        CalibrationError: `batches` is no series of batches, or one of them holds no sample.
        InputError: a batch does not have the form of the example inputs.
    """
    captured = plan.captured
    check_batches((captured.inputs.args, captured.inputs.kwargs), batches)
    return checked_samples(captured.inputs.of(*arguments_of(captured, batch)).flat() for batch in batches)


def as_batches(plan: Analysis, rows: Sequence[Sequence[Any]] | None) -> list[Any] | None:
    """Return flat inputs as a saliency takes them: positional arguments, or keywords; None of a call of both."""
    found = []
    for flat in rows or ():
        args, kwargs = pytree.tree_unflatten(list(flat), plan.captured.inputs.spec)
        if args and kwargs:
            return None
        found.append(kwargs or args)
    return found or None


def checked_samples(batches: Iterable[list[Any]]) -> list[list[Any]]:
    """Return flat batches.

    Raises:
        CalibrationError: one holds no sample.
    """
    found = list(batches)
    for k, batch in enumerate(found):
        if not sample_count(batch):
            raise CalibrationError(
                f"batch {k} of the calibration data holds no sample", fix="leave batches of length 0 out"
            )
    return found


def cut_again(plan: Analysis, small: CompressedModel) -> Cut:
    """Return the cut that `small` is.

    Raises:
        PlanError: `small` is no cut of `plan`, or its weights are not those of the plan.
    """
    names = plan.coupling.attributes.keys()
    if not small.kept.keys() <= names:
        raise PlanError(
            "the model was not cut by this plan",
            why=f"the plan has no {sorted(small.kept.keys() - names)[0]!r}",
            fix="the plan that slice_groups(plan, kept) was given",
        )
    cut = cut_groups(plan, kept_units(plan.coupling, plan.groups, small.kept), plan.groups, verify=False)
    tensors = {} if cut.graph is None else dict(all_tensors(cut.graph))
    held = dict(tensor_names(small.module))
    other = [n for n, t in tensors.items() if n in held and not (held[n].shape == t.shape and torch.equal(held[n], t))]
    if other or not tensors.keys() & held.keys():
        raise PlanError(
            "the weights of the model are not those that the plan's model has at the units that stay",
            why=f"'{other[0]}' is another tensor" if other else "the model holds none of the plan's tensors",
            fix="repair a cut before it is trained or quantized: compress(…, repair=None), slice_groups(plan, kept)",
        )
    return cut


def _unfit(cut: Cut) -> str:
    """Return why a cut cannot be repaired."""
    if not by_factor(cut.kept):
        return NOTHING_CUT
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
    if solved and found.alike:
        said.append(f"rows of calibration data count alike, as {found.alike}")
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
