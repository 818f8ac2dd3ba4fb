"""From a trained module to what is handed back: slice, fold, lower, verify."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphcomp.capture.backward import LeaveOutBackward
from graphcomp.capture.capture import Captured
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import TrainingError, VerificationError
from graphcomp.flows.held import held_by_class
from graphcomp.flows.kept_class import asks_for_class, integers_in_class
from graphcomp.flows.one_shot import cut_groups
from graphcomp.flows.results import as_integers, as_model
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.passes import Pass, Pipeline, applied
from graphcomp.ir.preserve import same_buffers
from graphcomp.ir.program import P
from graphcomp.ir.taught import suspected
from graphcomp.native.model import NativeResult
from graphcomp.numerics.compare import in_float64, is_whole, relative_error, why_silent
from graphcomp.numerics.float64 import Float64ByDefault
from graphcomp.numerics.provenance import compare_before, heard
from graphcomp.pruning.slice import SliceGroups, kept_of_tensors, select
from graphcomp.pruning.verify import in_double
from graphcomp.quantization.fold_scales import Finish, QuantizeTables, finishing
from graphcomp.quantization.redundant import RepeatQuantizers
from graphcomp.quantization.verify import CheckLowering
from graphcomp.result import CompressedModel
from graphcomp.system.threads import one_at_a_time
from graphcomp.torch_compat import pytree
from graphcomp.training.prepared import Prepared
from graphcomp.training.session import Session
from graphcomp.training.shrink import session_of, settled

SLICING, FOLDING = 1e-9, 1e-6
"""Largest relative errors, in float64, of slicing a trained graph and of folding its batch norms into its steps."""

UNVERIFIED = "finalize(ready, verify=False) goes on all the same"


@one_at_a_time
def as_trained(ready: Prepared, *, verify: bool, measure_latency: bool) -> CompressedModel:
    """The model that training left: sliced to the units whose masks are 1, in integers where it was quantized.

    Raises:
        PlanError: a schedule was begun and has not come to its cool-down.
        TrainingError: a parameter or buffer is not finite.
        VerificationError: the small model does not compute what the trained one does.
    """
    trained = ready = settled(ready, verify=verify)
    while (cut_from := ready.session.cut_from) is not None:
        ready = cut_from.grown(ready)
    for name, tensor in trained.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"'{name}' holds values that are NaN or infinite",
                why="training diverged, or a batch held such values",
                fix="go back to the last sound state_dict; a lower lr, clipped gradients",
            )
    session = session_of(ready)
    plan, kept = session.plan, ready.kept()
    in_floats = {group.name: group for group in plan.groups}
    groups: list[ChannelGroup] = [in_floats[group.name] for group in session.groups]
    cut = cut_groups(plan, dict(zip(groups, kept.values(), strict=True)), groups, verify=False)
    cut = cut.noted(*session.notes, *trained.remarks, *_pruned_elements(trained))
    start = session.quantized.captured
    cutting: tuple[Pass, ...] = (
        SliceGroups(session.quantized.coupling, kept),
        *([CheckTrained(trained, session)] if verify else []),
    )
    if session.bits is None:
        sliced = Pipeline("finalize", cutting)(start)
        _, held = held_by_class(cut)
        return as_model(cut.proved(sliced.verified, sliced.unchecked), held, measure_latency=measure_latency)
    assert session.config is not None
    inputs = plan.captured.inputs.flat()
    integers = Pipeline("finalize", (
        *cutting,
        LeaveOutBackward(),
        RepeatQuantizers(),
        QuantizeTables(session.config.embeddings, session.ignore),
        *finishing([inputs]),
        *([CheckLowering(inputs)] if verify else []),
    ))(start)  # fmt: skip
    said = integers.notes_since(start)
    in_class: NativeResult | None = None
    if asks_for_class(plan.model, None):
        cut, floats = held_by_class(cut)
        in_class, rounds_off = integers_in_class(cut, floats, integers)
        said = (*said, *rounds_off)
    return as_integers(cut, integers, said, measure_latency=measure_latency, held=in_class)


def _pruned_elements(trained: Prepared) -> Iterator[str]:
    """Count the elements that masks of elements set to zero, in the units that stay; nothing without such masks."""
    kept = kept_of_tensors(trained.session.quantized.coupling, trained.kept())
    masks = [select(mask.cpu(), kept.get(name, {})) for name, mask in trained.elements.items()]
    if masks:
        pruned, total = sum(int((~mask).sum()) for mask in masks), sum(mask.numel() for mask in masks)
        yield f"{pruned} of {total} weights in {len(masks)} tensors are pruned one by one: they are zero, and stored"


# ------------------------------------------------------------------------------------------------ verification
@dataclass(frozen=True)
class CheckTrained:
    """Check that the trained, the sliced and the folded graph compute the same on the example inputs, in eval mode.

    In float64: in float32 the rounding of a sum can send an activation to the next code, and what follows with it.
    """

    trained: Prepared
    session: Session
    name: ClassVar[str] = "check sliced and folded"

    def __call__(self, program: P, /) -> P:
        """Return the sliced program with the laws among `verified` or `unchecked`.

        Raises:
            VerificationError: the graphs differ.
        """
        captured, exact = self.session.plan.captured, in_double(program.module)
        laws = {"trained == sliced": (in_double(self.trained), exact, SLICING)}
        if self.session.bits is not None:
            folded = applied(program.rewritten(exact), RepeatQuantizers(), Finish()).module
            laws["sliced == folded"] = (exact, folded, FOLDING)
        verified, unchecked = dict(program.verified), dict(program.unchecked)
        for law, (wanted, got, allowed) in laws.items():
            error, silent = _compare(wanted, got, captured, allowed)
            verified |= {} if math.isnan(error) else {law: error}
            unchecked |= {law: silent} if math.isnan(error) else {}
        return replace(program, verified=verified, unchecked=unchecked)


def _compare(wanted: fx.GraphModule, got: fx.GraphModule, captured: Captured, allowed: float) -> tuple[float, str]:
    """Return the relative error of `got`, NaN with the reason where the outputs prove nothing.

    Where an output proves nothing (classes, flags), the floats that it is computed from are compared.

    Raises:
        VerificationError: the two differ.
    """
    expected, actual = _outputs(wanted, captured), _outputs(got, captured)
    errors = [_checked(relative_error(expected, actual), allowed, captured)]
    outputs = tensor_leaves(expected[0])
    silent = [
        f"output '{name}' {why}"
        for name, t in zip(captured.output_names, outputs, strict=True)
        if (why := why_silent(t))
    ]
    if not silent and not any(map(is_whole, outputs)):
        return max(errors), ""
    if len(silent) == len(outputs):
        errors = []
    before = [_floats_before(graph, captured) for graph in (wanted, got)]
    found = [compare_before(a, b) for a, b in zip(*before, strict=True) if a]
    errors += [_checked(error, allowed, captured) for error in found if not math.isnan(error)]
    return max(errors, default=math.nan), "; ".join(silent)


def _outputs(graph: fx.GraphModule, captured: Captured) -> Any:
    """Return what a graph in float64 returns, and its inputs after that.

    Raises:
        VerificationError: it does not run.
    """
    args, kwargs = pytree.tree_map(in_float64, captured.inputs.copies())
    try:
        with same_buffers(graph), Float64ByDefault(), torch.no_grad():
            return graph(*args, **kwargs), args, kwargs
    except Exception as error:  # whatever the ops raise that do not take float64
        raise VerificationError(
            "the trained model does not run in float64, in which it would be compared with the small one",
            why=str(error)[:300],
            fix="finalize(ready, verify=False) goes without",
        ) from error


def _floats_before(graph: fx.GraphModule, captured: Captured) -> list[list[Tensor]]:
    """Return the floats that each output of a graph in float64 is computed from where it proves nothing itself."""
    args, kwargs = pytree.tree_map(in_float64, captured.inputs.copies())
    with same_buffers(graph), Float64ByDefault():
        output, provenance = heard(graph, args, kwargs)
    return [
        provenance.before(tensor) if why_silent(tensor) or is_whole(tensor) else [] for tensor in tensor_leaves(output)
    ]


def _checked(error: float, allowed: float, captured: Captured) -> float:
    """Return `error`.

    Raises:
        VerificationError: it is more than `allowed`.
    """
    if not (error <= allowed or math.isnan(error)):
        raise VerificationError(
            "the small model does not compute what the trained model computes",
            why=f"largest relative error {error:.1e} in float64, allowed {allowed:.0e}",
            fix=f"{suspected(captured.module.graph)}; {UNVERIFIED}",
        )
    return error
