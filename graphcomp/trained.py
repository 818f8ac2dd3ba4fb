"""From a trained module to what is handed back: slice, fold, lower, verify."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.fx.node import map_aggregate

from graphcomp.assemble import as_model, cut_groups, with_integers
from graphcomp.capture import Captured
from graphcomp.compare import default_dtype, in_float64, relative_error
from graphcomp.compressed import CompressedModel
from graphcomp.cost import flat_inputs
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import TrainingError, VerificationError
from graphcomp.methods.prepared import Prepared, Session
from graphcomp.methods.shrink import expanded, hand_over, settled
from graphcomp.pruning.slice import SliceGroups
from graphcomp.quantization.finish import Finish, from_training, with_embeddings
from graphcomp.quantization.repeats import with_repeats
from graphcomp.threads import one_at_a_time
from graphcomp.untouched import same_buffers

SLICING, FOLDING = 1e-9, 1e-6
"""Largest relative errors, in float64, of slicing a trained graph and of folding its batch norms into its steps."""


@one_at_a_time
def as_trained(ready: Prepared, *, verify: bool, measure_latency: bool) -> CompressedModel:
    """The model that training left: sliced to the units whose masks are 1, in integers where it was quantized.

    Raises:
        PlanError: a schedule was begun and has not come to its cool-down.
        TrainingError: a parameter or buffer is not finite.
        VerificationError: the small model does not compute what the trained one does.
    """
    trained = ready = settled(ready, verify=verify)
    while ready.session.whole is not None:
        ready = expanded(ready)
    session = ready.session
    for name, tensor in trained.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"'{name}' holds values that are NaN or infinite",
                why="training diverged, or a batch held such values",
                fix="go back to the last sound state_dict; a lower lr, clipped gradients",
            )
    hand_over(ready, session)
    plan, kept = session.plan, ready.kept()
    in_floats = {group.name: group for group in plan.groups}
    groups: list[ChannelGroup] = [in_floats[group.name] for group in session.groups]
    cut = cut_groups(plan, dict(zip(groups, kept.values(), strict=True)), groups, verify=False)
    sliced = SliceGroups(session.quantized.coupling, kept)(session.quantized.captured.module)
    verified = _verified(trained, sliced, session) if verify else {}
    if session.bits is None:
        return as_model(replace(cut, verified=verified), measure_latency=measure_latency)
    inputs = flat_inputs(plan.captured, plan.captured.args, plan.captured.kwargs)
    quantized = from_training(with_embeddings(with_repeats(sliced)), [inputs])
    return with_integers(
        replace(cut, verified=verified),
        quantized,
        (*session.notes, *quantized.notes),
        inputs if verify else None,
        measure_latency=measure_latency,
    )


# ------------------------------------------------------------------------------------------------ verification
def _verified(ready: Prepared, sliced: fx.GraphModule, session: Session) -> dict[str, float]:
    """How far the trained, the sliced and the folded graph are apart on the example inputs, in eval mode and in
    float64: in float32 the rounding of a sum can send an activation to the next code, and what follows with it.

    Raises:
        VerificationError: they differ.
    """
    captured, exact = session.plan.captured, _in_double(sliced)
    expected, actual = (_outputs(graph, captured) for graph in (_in_double(ready), exact))
    errors = {"trained == sliced": _error(expected, actual, SLICING)}
    if session.bits is not None:
        folded = Finish()(with_repeats(exact))
        errors["sliced == folded"] = _error(actual, _outputs(folded, captured), FOLDING)
    return errors


def _outputs(graph: fx.GraphModule, captured: Captured) -> Any:
    """Return what a graph in float64 returns, and its inputs after that; tensors that it makes are in float64, too.

    Raises:
        VerificationError: it does not run.
    """
    args, kwargs = pytree.tree_map(in_float64, captured.inputs())
    try:
        with same_buffers(graph), default_dtype(torch.float64), torch.no_grad():
            return graph(*args, **kwargs), args, kwargs
    except Exception as error:  # whatever the ops raise that do not take float64
        raise VerificationError(
            "the trained model does not run in float64, in which it would be compared with the small one",
            why=str(error)[:300],
            fix="finalize(ready, verify=False) goes without",
        ) from error


def _error(expected: Any, actual: Any, allowed: float) -> float:
    """Their relative error.

    Raises:
        VerificationError: it is more than `allowed`.
    """
    error = relative_error(expected, actual)
    if not error <= allowed:
        raise VerificationError(
            "the small model does not compute what the trained model computes",
            why=f"largest relative error {error:.1e} in float64, allowed {allowed:.0e}",
            fix="please report the model; finalize(ready, verify=False) goes on all the same",
        )
    return error


def _in_double(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in eval mode that computes in float64, where the graph names float32 too."""
    exact = copy.deepcopy(module).double().eval()
    for node in exact.graph.nodes:
        node.args, node.kwargs = (map_aggregate(found, _named_double) for found in (node.args, node.kwargs))
    exact.recompile()
    return exact


def _named_double(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument
