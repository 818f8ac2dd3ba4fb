"""What the native model must return, and how far a smaller model is from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.beside import in_modes
from graphcomp.capture.capture import user_line
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import Kept
from graphcomp.ir.inputs import copies, updates
from graphcomp.ir.module import copied, leaf_names
from graphcomp.ir.preserve import eval_copy, writes
from graphcomp.native.masked_run import masked_model
from graphcomp.numerics.compare import TOLERANCE, in_float64, is_whole, why_silent
from graphcomp.numerics.float64 import Float64ByDefault
from graphcomp.numerics.provenance import compare_before, heard
from graphcomp.pruning.slice import SliceGroups
from graphcomp.torch_compat import pytree, refresh_flat_weights

EXACT = 1e-6  # largest relative error in float64; some models compute in float32 inside, whatever they are given


@dataclass(frozen=True)
class Verdict:
    """How far a model is from the reference; `difference` says in what way it is not the same, "" where it is.

    `silent`: why nothing could be compared, where `error` is NaN.
    """

    error: float = math.nan
    difference: str = ""
    rounding: str = ""
    silent: str = ""


class Reference:
    """What the native model must return: by the sliced graph, or where the graph holds for one path only, by the
    user's model with everything masked that goes.

    Two runs of the latter may differ by no more than rounding and still take different paths (which of two boxes that
    score alike survives). So what differs is run again in float64, both sides.
    """

    def __init__(self, analysis: Analysis, kept: Kept, graph: fx.GraphModule | None) -> None:
        self.analysis = analysis
        self.masked: nn.Module | None = None
        self.exact: dict[str, Any] | None = None
        captured = analysis.captured
        if captured.producer == "record":
            self.masked = masked_model(analysis, kept)
            self.module: nn.Module = self.masked
            self.calls = 1 + captured.path.stateful
            self.expected = outputs_of(self.masked, captured.inputs.copies(), calls=self.calls)
        else:
            self.module = graph or SliceGroups(analysis.coupling, kept)(captured.module)
            stateful = captured.path.stateful or writes(captured.module)
            self.calls = 1 + (stateful and not captured.second_call)
            found = outputs_of(self.module, captured.inputs.copies(), calls=self.calls)
            names = dict(zip(found, captured.output_names, strict=False))
            self.expected = {_renamed(name, names): tensor for name, tensor in found.items()}

    def compare(self, module: nn.Module) -> Verdict:
        """Run `module` on the example inputs.

        Raises:
            Whatever the module raises.
        """
        found = self._run(module)
        if not found.difference or self.masked is None or not any(is_coarse(p) for p in module.parameters()):
            return found
        try:
            exact = self._run(module, exactly=True)
        except Exception as error:  # a model may insist on its dtype in any way
            return Verdict(difference=f"{found.difference}; in float64 the comparison does not run: {refusal(error)}")
        if exact.difference:
            return Verdict(difference=f"{found.difference}, and in float64: {exact.difference}")
        return replace(exact, rounding=found.difference)

    def _run(self, module: nn.Module, *, exactly: bool = False) -> Verdict:
        """Compare one run of `module` with the reference; `exactly`: in float64, both sides."""
        inputs = self.analysis.captured.inputs.copies
        if exactly:
            self.exact = self.exact or outputs_of(self.module, inputs(), exactly=True)
            expected, got = self.exact, outputs_of(module, inputs(), exactly=True)
        else:
            expected, got = self.expected, outputs_of(module, inputs(), calls=self.calls)
        found = difference(expected, got, EXACT if exactly else None)
        if isinstance(found, str):
            return Verdict(difference=found)
        return self._with_floats_before(module, expected, found, exactly=exactly)

    def _with_floats_before(
        self, module: nn.Module, expected: Mapping[str, Any], error: float, *, exactly: bool
    ) -> Verdict:
        """Compare the floats, too, that outputs are computed from whose own comparison proves nothing."""
        silent = {name: why for name, found in expected.items() if (why := why_silent(found))}
        outputs = [name for name in expected if not name.startswith("input ")]
        errors = [] if math.isnan(error) else [error]
        weak = {name for name in outputs if name in silent or is_whole(expected[name])}
        if any(not expected[name].is_meta for name in weak):
            inputs = self.analysis.captured.inputs.copies
            wanted = dict(zip(outputs, _floats_before(self.module, inputs(), exactly=exactly).values(), strict=False))
            got = _floats_before(module, inputs(), exactly=exactly)
            for name in weak & wanted.keys() & got.keys():
                before = compare_before(wanted[name], got[name])
                tolerances = (EXACT if exactly else TOLERANCE.get(tensor.dtype, 1e-1) for tensor in wanted[name])
                if before > max(tolerances, default=0.0):
                    return Verdict(difference=f"what output '{name}' is computed of differs by {before:.1e} (relative)")
                errors += [] if math.isnan(before) else [before]
        why = "; ".join(f"output '{name}' {why}" for name, why in silent.items())
        return Verdict(max(errors, default=math.nan), silent="" if errors else why)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Return "logits, second call" for "0, second call"."""
    first, comma, call = name.partition(", ")
    return f"{names.get(first, first)}{comma}{call}"


def is_coarse(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64 and not tensor.is_meta


def outputs_of(module: nn.Module, inputs: tuple[Any, Any], *, exactly: bool = False, calls: int = 1) -> dict[str, Any]:
    """Name -> tensor, of one run in eval mode: the outputs, then the inputs that the run wrote into.

    The random state is the same each time.

    Args:
        inputs: (args, kwargs); the run gets copies.
        exactly: a copy of `module` runs in float64.
        calls: 2: what a second call returns then, too.
    """
    with _running(module, inputs, exactly) as (copied, args, kwargs):
        outputs = _named(copied(*args, **kwargs))
        if calls == 2:
            outputs |= {f"{name}, second call": tensor for name, tensor in _named(copied(*args, **kwargs)).items()}
    return outputs | updates(inputs, (args, kwargs))


@contextmanager
def _running(
    module: nn.Module, inputs: tuple[Any, Any], exactly: bool
) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Give copies of a module in eval mode and of its inputs, without gradients and from one random state.

    Args:
        exactly: both in float64.
    """
    module = as_float64(module) if exactly else module
    args, kwargs = pytree.tree_map(in_float64, copies(inputs)) if exactly else copies(inputs)
    precision = Float64ByDefault() if exactly else nullcontext()
    with eval_copy(module, real=True) as copied, torch.no_grad(), precision:
        torch.manual_seed(0)
        yield copied, args, kwargs


def outputs_in_modes(module: nn.Module, inputs: tuple[Any, Any], modes: Mapping[str, bool] | None) -> dict[str, Any]:
    """Name -> tensor, of one run with each module in its mode (None: eval mode) and random ops made certain."""
    args, kwargs = copies(inputs)
    with in_modes(module, modes) as copied:
        return _named(copied(*args, **kwargs))


def _floats_before(module: nn.Module, inputs: tuple[Any, Any], *, exactly: bool) -> dict[str, list[Tensor]]:
    """Output -> the floats that it is computed from, of one run; see `Provenance`."""
    with _running(module, inputs, exactly) as (copied, args, kwargs):
        output, provenance = heard(copied, args, kwargs)
        return {name: provenance.before(tensor) for name, tensor in _named(output).items()}


def as_float64(module: nn.Module) -> nn.Module:
    """A copy whose floating tensors are float64: parameters, buffers and plain attributes."""
    exact = copied(module).double()
    for part in exact.modules():
        for name, tensor in [(n, t) for n, t in vars(part).items() if isinstance(t, Tensor)]:
            vars(part)[name] = in_float64(tensor)
        refresh_flat_weights(part)
    return exact


def _named(output: Any) -> dict[str, Any]:
    leaves, spec = pytree.tree_flatten(output)
    if all(leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in leaves):
        return {n: leaf for n, leaf in zip(leaf_names(spec), leaves, strict=True) if isinstance(leaf, Tensor)}
    return dict(_inside(output, "", 0))


def _inside(value: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors in containers that pytree does not know."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth < 8:
        pairs: Any = value.items() if isinstance(value, Mapping) else ()
        pairs = enumerate(value) if isinstance(value, (list, tuple)) else pairs
        pairs = vars(value).items() if hasattr(value, "__dict__") and not isinstance(value, (type, Mapping)) else pairs
        for key, child in list(pairs):
            yield from _inside(child, f"{name}.{key}", depth + 1)


def difference(
    expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], allowed: float | None = None
) -> float | str:
    """The largest relative difference, or in what way the outputs differ; `allowed` is by the dtype if None."""
    worst, compared = 0.0, False
    for name, wanted in expected.items():
        got = actual.get(name)
        if got is None:
            return f"the smaller model returns no output '{name}'"
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"output '{name}' is {_kind(got)} and has to be {_kind(wanted)}"
        if wanted.is_meta or wanted.numel() == 0:
            continue
        error = _relative(wanted, got)
        if not error <= (TOLERANCE.get(wanted.dtype, 0.0) if allowed is None else allowed):
            return f"output '{name}' differs from the reference by {error:.1e} (relative)"
        if not why_silent(wanted):
            worst, compared = max(worst, error), True
    return worst if compared else math.nan


def _relative(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point() and not a.is_complex():
        return 0.0 if torch.equal(a, b) else math.inf
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return math.inf
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return 0.0
    return float((a - b).abs().double().max() / a.abs().double().max().clamp(min=1e-30))


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def refusal(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    at = user_line(error)
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
    return f"{text} at {at}{notes}" if at else text + notes
