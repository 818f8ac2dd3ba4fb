"""Two forms of one model compared on inputs: a graph with its reference, and the user's class with the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.capture.capture import Captured
from graphcomp.capture.second_inputs import variants
from graphcomp.errors import VerificationError, first_line
from graphcomp.ir.inputs import copies, named_tensors
from graphcomp.ir.module import tensor_leaves, tensor_names
from graphcomp.ir.preserve import eval_copy
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.native.model import NativeResult
from graphcomp.numerics.compare import relative_error, tolerance_of, why_silent
from graphcomp.pruning.verify import COMPARED_ON
from graphcomp.torch_compat import pytree

EXAMPLE = "the example inputs"
NO_VALUES = "the model has no values (meta device)"

Given = Mapping[str, Sequence[Any]]
"""Name -> flat inputs in the order of the placeholders; those of EXAMPLE must run."""


@dataclass
class Checked:
    """Law -> largest relative error; law, or part of one -> why it could not be checked."""

    verified: dict[str, float] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)

    def with_class(self, law: str, found: NativeResult) -> Checked:
        """Return the same with what a comparison of the user's class proved."""
        if found.module is None:
            return self
        if math.isnan(found.error):
            return replace(self, unchecked={**self.unchecked, law: found.silent})
        return replace(self, verified={**self.verified, law: found.error})


def given_to(captured: Captured) -> Given:
    """Return the example inputs, other values and another batch size."""
    found = {EXAMPLE: captured.inputs.flat()}
    for other in variants(captured):
        if other.name in COMPARED_ON:
            found[other.name] = captured.inputs.of(other.args, other.kwargs).flat()
    return found


def check_graph(
    law: str,
    reference: fx.GraphModule,
    small: fx.GraphModule,
    given: Given,
    what: str,
    adjust: Callable[[Tensor, Tensor], Tensor] = lambda wanted, _: wanted,
) -> Checked:
    """Compare a graph with its reference.

    Args:
        what: the graph, for the error: "the model with a trimmed vocabulary".
        adjust: from an output of the reference and of the graph to what the latter must be.

    Raises:
        VerificationError: they differ.
    """
    checked = Checked()
    if any(t.is_meta for t in tensor_names(small).values()):
        checked.unchecked[law] = NO_VALUES
        return checked
    errors: list[float] = []
    for name, flat in given.items():
        try:
            wanted = run_graph(reference, flat)
        except Exception as error:  # whatever ops raise on inputs that are not the user's
            if name == EXAMPLE:
                raise
            checked.unchecked[f"{law}, on {name}"] = f"the model does not run on them: {first_line(error)[:200]}"
            continue
        got = run_graph(small, flat)
        if len(wanted) == len(got):
            wanted = [adjust(w, g) for w, g in zip(wanted, got, strict=True)]
        off = _error(wanted, got)
        if not off <= tolerance_of(wanted):
            raise VerificationError(
                f"{what} does not compute what the model computes",
                why=f"on {name}, the outputs are off by {off:.1e} (relative)",
                fix="please report the model",
            )
        if not all(map(why_silent, wanted)):
            errors.append(off)
    if errors:
        checked.verified[law] = max(errors)
    else:
        checked.unchecked[law] = "no output proves anything"
    return checked


def check_class(found: NativeResult, small: fx.GraphModule, given: Given, captured: Captured) -> NativeResult:
    """Compare a model of the user's class with the graph; return no module, and why, where they differ."""
    if found.module is None:
        return found
    if any(t.is_meta for t in tensor_names(found.module).values()):
        return replace(found, silent=NO_VALUES)
    errors: list[float] = []
    for name, flat in given.items():
        args, kwargs = pytree.tree_unflatten(copies(list(flat)), captured.inputs.spec)
        try:
            wanted = run_graph(small, flat)
        except Exception:
            if name == EXAMPLE:
                raise
            continue  # the model does not run on them either
        try:
            with eval_copy(found.module, real=True) as copied, torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(0)
                got = _that_matter(copied(*args, **kwargs), captured)
        except Exception as error:  # of the user's code, which met another model than before
            return NativeResult(None, f"{type(error).__name__}: {first_line(error)[:200]}")
        off = _error(wanted, got)
        if not off <= tolerance_of(wanted):
            return NativeResult(None, "the class, cut likewise, gives other outputs")
        errors.append(off)
    return replace(found, error=max(errors))


def _that_matter(outputs: Any, captured: Captured) -> list[Tensor]:
    """Return the outputs of a class that the graph returns, too, in its order: the user may have dropped others."""
    named = named_tensors(outputs)
    if not named.keys() >= set(captured.output_names):
        return list(named.values())
    return [named[name] for name in captured.output_names]


def run_graph(module: fx.GraphModule, flat: Sequence[Any]) -> list[Tensor]:
    """Return the tensors that a graph returns; random numbers are the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tensor_leaves(run_tapped(module, list(flat)))


def _error(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    if [(t.shape, t.dtype) for t in wanted] != [(t.shape, t.dtype) for t in got]:
        return math.inf
    others = [(a, b) for a, b in zip(wanted, got, strict=True) if not a.is_floating_point()]
    if any(not torch.equal(a, b) for a, b in others):
        return math.inf
    return relative_error(list(wanted), list(got))
