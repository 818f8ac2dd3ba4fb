"""A compressed submodule in the model that it came from: put in place, run there and compared."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.capture import Captured, user_line
from graphcomp.capture.outside import Outside, held_outside, registered_outside
from graphcomp.capture.path import seen_path
from graphcomp.capture.record import argument_names, named_tensors
from graphcomp.errors import InputError, VerificationError, first_line
from graphcomp.flows.results import Cut, shapes
from graphcomp.ir.graph import assign, fetch, replace_module
from graphcomp.ir.inputs import copies
from graphcomp.ir.module import by_placeholder, copied, is_resized, tensor_names
from graphcomp.ir.preserve import eval_copy
from graphcomp.native.masked_run import masked_model
from graphcomp.numerics.compare import relative_error, tolerance_of, why_silent
from graphcomp.pruning.mask import InsertMasks, set_masks
from graphcomp.pruning.verify import LAW as SLICING
from graphcomp.report.report import Report
from graphcomp.result import CompressedModel
from graphcomp.targets.pt2 import in_eval_mode

LAW = "whole model around the submodule"
"""The rest of the model computes with the smaller submodule what it computes with the masked one in its place."""


def into_whole(
    model: nn.Module, small: CompressedModel, captured: Captured, inputs: tuple[Any, Any], cut: Cut | None = None
) -> CompressedModel:
    """Return `model`, copied, with its submodule replaced by what became of it.

    Args:
        small: of the submodule alone.
        captured: the submodule as it was captured.
        inputs: the example inputs of the whole model, (args, kwargs).
        cut: what the submodule was cut to in one shot: each call of the submodule is compared with the masked one.

    Raises:
        InputError: the model cannot be copied.
        VerificationError: the rest of the model does not compute with it what it has to.
    """
    scope, part = captured.scope, model.get_submodule(captured.scope)
    module = small.module
    if isinstance(module, fx.GraphModule):
        for called in captured.outside.modules():
            _adopt(module, called, part.get_submodule(called))
    memo: dict[int, Any] = {id(part): module}
    apart = _share(memo, model, part, module)
    whole = _copied(model, memo)
    found = check_whole(model, whole, small, scope, inputs, None if cut is None else masked_part(cut))
    assert isinstance(small.report, Report)
    path = seen_path(model, argument_names(model, *inputs), *inputs, captured.path.reads)
    own = captured.path.notes()  # the path of the whole model takes their place
    notes = [note for note in small.report.notes if note not in own]
    notes += [*_notes(scope, captured.outside), *path.notes(), *apart]
    args, kwargs = copies(inputs)  # a tensor of the caller may be a window on much more memory
    result = CompressedModel(
        whole,
        form=small.form,
        kept={f"{scope}.{name}": dims for name, dims in small.kept.items()},
        report=replace(
            small.report,
            verified={**small.report.verified, **found.verified},
            unchecked={**small.report.unchecked, **found.unchecked},
            notes=tuple(dict.fromkeys(notes)),
        ),
        reason=small.reason,
        edits=tuple((f"{scope}.{path}".rstrip("."), name, value) for path, name, value in small.edits),
        original_shapes=shapes(model),
        example_args=args,
        example_kwargs=kwargs,
    )
    result.path = path
    if isinstance(module, fx.GraphModule):
        result.called = tuple(f"{scope}.{path}" for path in captured.outside.modules())
    return result


def _notes(scope: str, outside: Outside) -> list[str]:
    """Say which parts of the submodule stay as they are, since the rest of the model reads them."""
    owners = dict.fromkeys(name.rpartition(".")[0] or name for name in outside.reads)
    named = ", ".join(f"'{scope}.{owner}'" for owner in owners)
    return [f"{named} stay as they are, since the rest of the model reads them"] if named else []


# ------------------------------------------------------------------------------------------------ putting in place
def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy of the model.

    Raises:
        InputError: something in it cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # of whatever the model holds
        raise InputError(
            f"{type(model).__name__} cannot be copied, to put the smaller part in its place",
            why=first_line(error)[:300],
            fix="copy.deepcopy(model) has to work: tensors that were computed, locks and files are in its way",
        ) from error


def _share(memo: dict[int, Any], model: nn.Module, part: nn.Module, module: nn.Module) -> list[str]:
    """Let the copy of the rest hold the new tensors and modules where the rest holds the old ones; note exceptions."""
    old, new = tensor_names(part), tensor_names(module)
    apart = []
    for name, other in held_outside(model, part).items():
        twin = new.get(name)
        if twin is not None and type(twin) is type(old[name]) and _alike(twin, old[name]):
            memo[id(old[name])] = twin
        else:
            apart.append(f"'{other}' is no longer one tensor with '{name}' of the submodule, which is stored otherwise")
    if not isinstance(module, fx.GraphModule):
        twins = dict(module.named_modules())
        memo |= {id(m): twins[path] for path, m in part.named_modules() if path and path in twins}
        return apart
    modules = dict(module.named_modules())
    for path, other in registered_outside(model, part).items():
        own = part.get_submodule(path)
        if type(modules.get(path)) is type(own):  # adopted
            memo[id(own)] = modules[path]
        else:
            apart.append(f"'{other}' is no longer one module with '{path}' of the submodule, which became a graph")
    return apart


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _adopt(graph: fx.GraphModule, path: str, module: nn.Module) -> None:
    """Give a graph a submodule of the user's that the rest of the model calls at `path`, on the graph's own tensors.

    Where the graph's tensor of a name is another (a norm was folded into a weight), it gets another name.
    """
    twin = copied(module)
    for name, tensor in tensor_names(twin).items():
        target = f"{path}.{name}"
        readers = [n for n in graph.graph.find_nodes(op="get_attr") if n.target == target]
        if not readers:
            continue
        own = fetch(graph, target)
        if _alike(own, tensor) and torch.equal(own, tensor):
            assign(twin, name, own)
            continue
        free = "graphcomp_" + target.replace(".", "_")
        if isinstance(own, nn.Parameter):
            graph.register_parameter(free, own)
        else:
            graph.register_buffer(free, own)
        for node in readers:
            node.target = free
    graph.add_submodule(path, twin)
    graph.recompile()


# ------------------------------------------------------------------------------------------------ comparing
@dataclass
class Found:
    """What the runs of the whole model proved."""

    verified: dict[str, float] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)


def masked_part(cut: Cut) -> nn.Module | None:
    """Return the submodule at full size in which masked units count as gone; None where no unit goes."""
    captured, kept = cut.plan.captured, cut.kept
    if not kept or not cut.program.verified:
        return None
    if captured.producer == "record":
        return masked_model(cut.plan, kept)
    masked = InsertMasks(cut.plan.coupling, list(kept))(captured).module
    set_masks(masked, list(kept), kept)
    return masked


def check_whole(
    model: nn.Module,
    whole: nn.Module,
    small: CompressedModel,
    scope: str,
    inputs: tuple[Any, Any],
    masked: nn.Module | None,
) -> Found:
    """Run `whole`, and `model` at full size with the forward of its submodule replaced; compare what they return.

    What the rest of the model reads of the submodule is the old one in the second run. Each call of the submodule is
    compared with `masked`, too, on the inputs of the call.

    Raises:
        VerificationError: the two differ, or one of them does not run.
    """
    if any(t.is_meta for t in tensor_names(model).values()):
        return Found(unchecked={LAW: "the model has no values (meta device)"})
    with eval_copy(in_eval_mode(small.module), real=True) as inner, eval_copy(model, real=True) as reference:
        calls = _Calls(inner, masked, scope)
        reference.get_submodule(scope).forward = calls
        expected = _run(reference, inputs, scope)
    with eval_copy(in_eval_mode(small.module), real=True) as inner, eval_copy(whole, real=True) as twin:
        replace_module(twin, twin.get_submodule(scope), inner)
        actual = _run(twin, inputs, scope)
    pairs = list(zip(expected.values(), actual.values(), strict=False))
    same = list(expected) == list(actual) and all(_alike(a, b) for a, b in pairs)
    exact = same and all(torch.equal(a, b) for a, b in pairs if not a.is_floating_point() and not a.is_complex())
    error = relative_error(list(expected.values()), list(actual.values())) if exact else math.inf
    if not error <= tolerance_of(list(expected.values())):
        raise _violated(scope, f"the outputs differ by {error:.1e} (relative)")
    found = Found(unchecked=calls.unchecked)
    silent = {name: why_silent(tensor) for name, tensor in expected.items() if name.startswith("output")}
    if all(silent.values()):
        found.unchecked[LAW] = "; ".join(f"{name} {why}" for name, why in silent.items()) or "no tensor is returned"
    else:
        found.verified[LAW] = error
    return found


class _Calls:
    """Stands in for the forward of the old submodule: returns what the new one returns, each call compared."""

    def __init__(self, small: nn.Module, masked: nn.Module | None, scope: str) -> None:
        self.small, self.masked, self.scope = small, masked, scope
        self.count = 0
        self.unchecked: dict[str, str] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.masked is not None and self.count > 1:  # the first call was compared when the submodule was cut
            self._compare(self.masked, args, kwargs)
        return self.small(*args, **kwargs)

    def _compare(self, masked: nn.Module, args: Any, kwargs: Any) -> None:
        law = f"{SLICING}, at call {self.count} of '{self.scope}'"
        if isinstance(masked, fx.GraphModule):
            pairs = by_placeholder(masked, args, kwargs)
            if not pairs or any(is_resized(node, leaf) for node, leaf in pairs):
                self.unchecked[law] = "the inputs have other sizes than at the first call, for which the graph holds"
                return
        outputs = []
        for module in (masked, self.small):
            given, named = copies((args, kwargs))
            try:
                with torch.random.fork_rng():
                    outputs.append((module(*given, **named), given, named))
            except Exception as refusal:  # whatever ops raise on inputs of another kind
                if module is self.small:
                    raise
                why = f"{type(refusal).__name__}: {first_line(refusal)}"
                self.unchecked[law] = f"the masked submodule does not run: {why}"
                return
        error = relative_error(*outputs)
        if not error <= tolerance_of(outputs[0]):
            raise _violated(self.scope, f"call {self.count} of '{self.scope}' is off by {error:.1e} (relative)")


def _run(model: nn.Module, inputs: tuple[Any, Any], scope: str) -> dict[str, Tensor]:
    """Return the tensors that the model returns, and its inputs after that.

    Raises:
        VerificationError: the model does not run.
    """
    args, kwargs = copies(inputs)
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            output = model(*args, **kwargs)
    except VerificationError:
        raise
    except Exception as error:  # of the user's code, which met other sizes than before
        raise _violated(scope, f"{type(error).__name__}: {first_line(error)}", user_line(error)) from error
    return {**dict(named_tensors(output, "output")), **dict(named_tensors((args, kwargs), "input"))}


def _violated(scope: str, why: str, at: str = "") -> VerificationError:
    return VerificationError(
        f"the rest of the model does not compute with the smaller {scope!r} what it has to",
        at=at,
        why=why,
        fix="compress the whole model, or a submodule of which the rest of the model reads the outputs alone",
    )
