"""Law 2 on one plan: the sliced graph computes what the masked graph computes.

Compared on the example inputs, on other values, and on another batch size where the graph has a symbol for the batch.
Where an output proves nothing (classes, flags, NaN), the floats that it is computed from are compared.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from graphcomp.capture.capture import Captured
from graphcomp.capture.second_inputs import Variant, variants
from graphcomp.coupling.axis import Factor, kept_indices
from graphcomp.coupling.groups import Kept
from graphcomp.coupling.propagate import Coupling
from graphcomp.errors import VerificationError, first_line
from graphcomp.ir.graph import value
from graphcomp.ir.inputs import copies, updates
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.preserve import same_buffers, writes
from graphcomp.ir.program import P
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.ir.taught import suspected
from graphcomp.numerics.compare import TOLERANCE, in_float64, is_whole, relative_error, why_silent
from graphcomp.numerics.float64 import Float64ByDefault
from graphcomp.numerics.provenance import jumps
from graphcomp.pruning.mask import InsertMasks, set_masks
from graphcomp.pruning.slice import by_factor, select
from graphcomp.torch_compat import pytree

log = logging.getLogger("graphcomp.pruning.law")

LAW = "masked == sliced"
EXACT = 1e-6
"""Largest relative error in float64; some models compute in float32 inside, whatever the inputs are."""
SHRINKS = 1e-4
"""Share of the error in float32 that float64 leaves, at most, where the error is one of rounding: a network may make a
rounding 1e10 times larger, and a wrong cut is off by as much in either precision."""
EXAMPLE = "the example inputs"


COMPARED_ON = (EXAMPLE, "other values", "another batch size")


@dataclass(frozen=True)
class Checked:
    """What a comparison proved.

    Attributes:
        error: the largest relative error; NaN where nothing could be compared.
        unchecked: the law, with the part of it that could not be checked -> why.
        notes: what was compared in place of outputs, and in which precision.
    """

    error: float = math.nan
    unchecked: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckSlicing:
    """Check Law 2: a program that was sliced computes what the masked one computes.

    Attributes:
        coupling: of the program before.
        captured: the program before.
        kept: the units that stay.
    """

    coupling: Coupling
    captured: Captured
    kept: Kept
    name: ClassVar[str] = "check slicing"

    def __call__(self, program: P, /) -> P:
        """Return the program with the law among `verified`, and what could not be checked.

        Raises:
            VerificationError: see `check_slicing`.
        """
        found = check_slicing(self.coupling, self.captured, self.kept, program.module)
        verified = {} if math.isnan(found.error) else {LAW: found.error}
        return replace(
            program,
            verified={**program.verified, **verified},
            unchecked={**program.unchecked, **found.unchecked},
            notes=(*program.notes, *found.notes),
        )


def check_slicing(coupling: Coupling, captured: Captured, kept: Kept, small: fx.GraphModule) -> Checked:
    """Compare the sliced graph `small` with the masked graph.

    Raises:
        VerificationError: they differ.
    """
    if any(p.is_meta for p in small.parameters()):
        return Checked(unchecked={LAW: "the model has no values (meta device)"})
    masked = InsertMasks(coupling, list(kept))(captured).module
    set_masks(masked, list(kept), kept)
    pair = _Pair(coupling, captured, by_factor(kept), masked, small)
    given = [Variant(EXAMPLE, captured.inputs.args, captured.inputs.kwargs), *variants(captured)]
    refused: dict[str, str] = {}
    for inputs in given:
        if inputs.name in COMPARED_ON:
            why = pair.compare(inputs)
            refused |= {f"{LAW}, on {inputs.name}": why} if why else {}
    if not pair.errors:
        why = "; ".join(f"{place} {why}" for place, why in pair.silent.items())
        return Checked(unchecked={LAW: why or "nothing is returned that could be compared"}, notes=tuple(pair.notes))
    unchecked = {f"{LAW}, {place}": why for place, why in pair.silent.items()}
    return Checked(max(pair.errors), unchecked | refused, tuple(pair.notes))


class _Pair:
    """The masked and the sliced graph, compared on one set of inputs after the other.

    Attributes:
        errors: relative errors of what could be compared.
        silent: output -> why no comparison of it proved anything, on any of the inputs.
        notes: see `Checked`.
    """

    def __init__(
        self,
        coupling: Coupling,
        captured: Captured,
        units: Mapping[Factor, Tensor],
        masked: fx.GraphModule,
        small: fx.GraphModule,
    ) -> None:
        self.captured, self.masked, self.small = captured, masked, small
        self.axes = {node.name: (coupling.axes.get(node, []), units) for node in captured.module.graph.nodes}
        self.errors: list[float] = []
        self.silent: dict[str, str] = {}
        self.notes: list[str] = []

    def compare(self, given: Variant) -> str:
        """Compare on `given`; return why the masked graph does not run on other inputs than the example, or "".

        Raises:
            VerificationError: the two differ.
        """
        try:
            wanted = _run(self.masked, self.captured, given)
        except Exception as error:  # whatever ops raise on inputs that are not the user's
            if given.name == EXAMPLE:
                raise
            return f"the model does not run on them: {type(error).__name__}: {first_line(error)[:200]}"
        try:
            got = _run(self.small, self.captured, given)
        except Exception as error:
            raise self._violated(given, "the sliced model does not run") from error
        self._compare_outputs(wanted, got, given)
        silent = {place: why for place, found in wanted.items() if (why := why_silent(found))}
        for place in wanted:
            if place not in silent:
                self.silent.pop(place, None)
        weak = {place for place, found in wanted.items() if place in silent or is_whole(found)}
        before = self._compare_before(weak, given) if weak else set()
        if given.name == EXAMPLE:
            self.silent = {place: why for place, why in silent.items() if place not in before and _is_output(place)}
            compared = "the floats that it is computed from were compared"
            self.notes += [f"{place} {why}: {compared}" for place, why in silent.items() if place in before]
        return ""

    def _compare_outputs(self, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], given: Variant) -> None:
        if list(wanted) != list(got):
            raise self._violated(
                given, f"the sliced model gives {', '.join(got)}, the masked model {', '.join(wanted)}"
            )
        exact = None
        for place, expected in wanted.items():
            error = _error(expected, got[place])
            if not error <= TOLERANCE.get(expected.dtype, 1e-1):
                exact = exact or self._in_float64(given)
                if not exact.get(place, math.inf) <= _most_exact(error, expected.dtype):
                    raise self._violated(given, f"{place} is off by {error:.1e} (relative)")
                note = (
                    f"{place} was compared in float64, since in the model's own precision rounding shows: {error:.1e}"
                )
                self.notes += [note] if note not in self.notes else []
                error = exact[place]
            if not why_silent(expected):
                self.errors.append(error)

    def _in_float64(self, given: Variant) -> dict[str, float]:
        """Return the errors in float64, by place; none where the graphs do not run in it."""
        args, kwargs = pytree.tree_map(in_float64, (given.args, given.kwargs))
        exactly = Variant(given.name, args, kwargs)
        try:
            with Float64ByDefault():
                pair = [_run(in_double(graph), self.captured, exactly) for graph in (self.masked, self.small)]
        except Exception as error:  # an op may insist on a dtype in any way
            log.debug("Law 2 cannot be checked in float64: %s", error)
            return {}
        return {place: _error(found, pair[1][place]) for place, found in pair[0].items() if place in pair[1]}

    def _violated(self, given: Variant, why: str) -> VerificationError:
        on = EXAMPLE if given.name == EXAMPLE else f"{given.name} than those of the example"
        report = "please report the model; graphcomp.testing.check_law(model, inputs, groups=[…]) finds the group"
        return VerificationError(
            "the sliced model does not compute what the masked model computes",
            why=f"on {on}, {why}",
            fix=suspected(self.captured.module.graph, report),
        )

    # -------------------------------------------------------------------------------------- what outputs are made of
    def _compare_before(self, weak: set[str], given: Variant) -> set[str]:
        """Compare the floats that weak outputs are computed from; return the outputs for which there are some.

        The sliced graph goes on with the values of the masked graph, so that classes and flags must be the same.
        """
        results = dict(zip(_places(self.captured), _output_nodes(self.masked), strict=True))
        told: set[str] = set()

        def tell(node: fx.Node, found: Any) -> None:
            if _tells(node, found):
                told.add(node.name)

        self._tapped(self.masked, given, see=tell)
        known = told & set(self.axes)
        before = {place: _nearest(results[place], known) for place in weak if place in results}
        names = frozenset().union(*before.values())
        if not names:
            return set()
        values: dict[str, Tensor] = {}

        def keep(node: fx.Node, found: Any) -> None:
            if node.name in names:
                values[node.name] = found.clone()

        follow = _Follow(values, self.axes)
        wanted = self._tapped(self.masked, given, see=keep)
        got = self._tapped(self.small, given, instead=follow)
        for name, error in follow.errors.items():
            if not error <= TOLERANCE.get(values[name].dtype, 1e-1):
                raise self._violated(given, f"{name}, of which an output is computed, is off by {error:.1e} (relative)")
        for place, a, b in zip(results, wanted, got, strict=True):
            if before.get(place) and not a.is_floating_point() and not torch.equal(a, b):
                raise self._violated(given, f"{place} differs, computed of the same floats")
        self.errors += follow.errors.values()
        return {place for place, found in before.items() if found}

    def _tapped(self, graph: fx.GraphModule, given: Variant, **taps: Any) -> list[Tensor]:
        """Run one of the graphs with taps; return the output tensors."""
        inputs = self.captured.inputs.of(given.args, given.kwargs).flat()
        with _seeded(inputs):
            return tensor_leaves(run_tapped(graph, inputs, **taps))


def _most_exact(error: float, dtype: torch.dtype) -> float:
    """Return the largest error in float64 that rounding explains, beside the error in `dtype`."""
    return max(EXACT, SHRINKS * error) if dtype != torch.float64 and math.isfinite(error) else EXACT


def _tells(node: fx.Node, result: Any) -> bool:
    """Return whether a node computes a float tensor whose comparison proves something."""
    if node.op != "call_function" or not isinstance(result, Tensor) or jumps(node.target):
        return False
    return not why_silent(result) and not is_whole(result)


@dataclass(frozen=True)
class _Follow:
    """Compares values of the sliced graph with values of the masked graph, and goes on with the latter.

    Attributes:
        expected: name of a node -> value in the masked graph.
        axes: name of a node -> axes of the values, and the units kept.
        errors: name of a node -> relative error.
    """

    expected: Mapping[str, Tensor]
    axes: Mapping[str, Any]
    errors: dict[str, float] = field(default_factory=dict)

    def __call__(self, node: fx.Node, result: Any) -> Any:
        if node.name not in self.expected:
            return result
        (axes, *_), units = self.axes[node.name]
        dims = {dim: kept_indices(axis, units) for dim, axis in enumerate(axes)}
        wanted = select(self.expected[node.name], {dim: found for dim, found in dims.items() if found is not None})
        self.errors[node.name] = _error(wanted, result)
        return wanted if wanted.shape == result.shape else result


def _nearest(node: fx.Node, known: set[str]) -> frozenset[str]:
    """Return the names of the nearest nodes in `known` that `node` is computed of."""
    found: set[str] = set()
    seen: set[fx.Node] = set()
    open_nodes = [node]
    while open_nodes:
        for operand in open_nodes.pop().all_input_nodes:
            if operand.name in known:
                found.add(operand.name)
            elif operand not in seen:
                seen.add(operand)
                open_nodes.append(operand)
    return frozenset(found)


# ------------------------------------------------------------------------------------------------ running
def _run(graph: fx.GraphModule, captured: Captured, given: Variant) -> dict[str, Tensor]:
    """Return what a graph gives: its outputs, then the inputs that it wrote into.

    A graph that writes into tensors runs twice: what it wrote is read by the second call.
    """
    args, kwargs = copies((given.args, given.kwargs))
    found: dict[str, Tensor] = {}
    with same_buffers(graph), torch.no_grad(), _seeded((args, kwargs)):
        for call in ("", ", second call")[: 1 + writes(graph)]:
            outputs = tensor_leaves(graph(*args, **kwargs))
            changed = updates((given.args, given.kwargs), (args, kwargs))
            named = dict(zip(_places(captured), outputs, strict=True)) | copies(changed)
            found |= {f"{place}{call}": tensor for place, tensor in named.items()}
    return found


def _places(captured: Captured) -> list[str]:
    return [f"output '{name}'" for name in captured.output_names]


def _is_output(place: str) -> bool:
    return place.startswith("output") and not place.endswith("second call")


def _output_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    results = pytree.tree_leaves(graph.graph.output_node().args[0])
    return [result for result in results if isinstance(result, fx.Node) and isinstance(value(result), Tensor)]


@contextmanager
def _seeded(values: Any) -> Iterator[None]:
    """Random numbers are the same each time inside, and go on outside as if there had been none."""
    devices = sorted({t.device.index or 0 for t in tensor_leaves(values) if t.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def _error(expected: Tensor, actual: Tensor) -> float:
    """Return the relative error of a tensor of floats; of others only dtype and shape count."""
    if expected.dtype != actual.dtype or expected.shape != actual.shape:
        return math.inf
    return relative_error(expected, actual)


# ------------------------------------------------------------------------------------------------ float64
def in_double(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy in eval mode that computes in float64, where the graph names float32 too."""
    exact = copy.deepcopy(module).double().eval()
    for node in exact.graph.nodes:
        node.args, node.kwargs = (map_aggregate(found, _named_double) for found in (node.args, node.kwargs))
    exact.recompile()
    return exact


def _named_double(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument
