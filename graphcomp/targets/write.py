"""CompressedModel.export: one file for another runtime, run there before it is handed over."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.resized import OPEN, fixed_lengths, input_name, outputs, with_twice
from graphcomp.errors import ExportError, InputError, first_line
from graphcomp.ir.inputs import copies
from graphcomp.ir.module import names_quoted, tensor_leaves
from graphcomp.ir.preserve import eval_copy
from graphcomp.ir.run_nodes import failed_at
from graphcomp.quantization.lower import CLIPS
from graphcomp.quantization.raising import integer_graph
from graphcomp.system.files import replacing
from graphcomp.targets.lengths import CAPTURED, Lengths, Names, doubled
from graphcomp.targets.onnxruntime.export import export_onnx
from graphcomp.targets.onnxruntime.floats import Clips
from graphcomp.targets.onnxruntime.kernels import KernelProof, prove
from graphcomp.targets.onnxruntime.speed import Guarded, Speed, counted, guard, measured
from graphcomp.targets.outputs import file_names
from graphcomp.targets.pt2 import export_program, graph_of, quiet
from graphcomp.targets.runtime import Agreement, agreement, compare, open_session
from graphcomp.torch_compat import pytree

log = logging.getLogger("graphcomp.export")

Format = Literal["onnx", "program"]
SATURATED = 2.0
"""The default kernels are off by so many times what the exact ones are: more than rounding explains."""

SATURATES = (
    "%s is %.3g quantization steps off in onnxruntime's default kernels: on this CPU they add products of uint8 and "
    "int8 in 16 bits and saturate; compress(…, reduce_range=True) avoids it, and so does "
    'SessionOptions.add_session_config_entry("session.x64quantprecision", "1"), which onnxruntime refuses where layers '
    "share a weight"
)
WEIGHT_ONLY = (
    "%s is %.3g quantization steps off in onnxruntime's default kernels: MatMulNBits rounds its activations to int8; "
    'SessionOptions.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1") keeps them float'
)

LONGER = 10.0
"""Quantization steps that a file may be off on inputs that are longer, and so lie outside of what was calibrated."""

FORMATS: dict[str, Format] = {".onnx": "onnx", ".pt2": "program"}


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it ran on the example inputs.

    Attributes:
        path: the file.
        format: "onnx" or "program".
        bytes: of the file and of the weights beside it, if they have a file of their own.
        agreement: with the module, in onnxruntime with exact integer sums or from the reloaded program.
        as_run: the same in onnxruntime as users run it by default, on this CPU; it is off where the CPU's fast integer
            kernels saturate (see `graphcomp.targets.runtime.open_session`). None for a program.
        kernels: which layers onnxruntime runs on integers; None for a program.
        notes: for which inputs alone the file holds (lengths that are fixed in it, branches that were not seen), and
            what could not be checked.
        open_lengths: names of lengths, other than the batch, that may be others than those of the example inputs.
        speed: beside the float form of an ONNX file with layers on integers; None where it was not measured.
        left_in_float: kinds of layers, and layers of other kinds, that a guard left in float, as integers do not pay
            there.
    """

    path: str
    format: Format
    bytes: int
    agreement: Agreement
    as_run: Agreement | None
    kernels: KernelProof | None
    notes: tuple[str, ...] = ()
    open_lengths: tuple[str, ...] = ()
    speed: Speed | None = None
    left_in_float: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        own = {"kernels": self.kernels and self.kernels.to_dict(), "speed": self.speed and self.speed.to_dict()}
        return {**asdict(self), **own}


@names_quoted()
def write_file(
    module: nn.Module,
    path: Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: Names | None = None,
    *,
    measure: bool = True,
    guarded: bool = False,
) -> ExportReport:
    """Write `module` to a .onnx or .pt2 file and run the file on the example inputs; nothing is left if either fails.

    How far the file is off is in the report; where the default kernels are off by far more than the exact ones, that is
    logged as a warning.

    Args:
        dynamic: input -> dim -> name of its length, for lengths that must be open. By default those are open that the
            graph does not depend on.
        measure: time an ONNX file beside its float form.
        guarded: leave in float what is slower on integers.

    Raises:
        CaptureError: the module cannot be captured.
        InputError: the module does not run on the inputs.
        ExportError: there are no example inputs; the module cannot be written, or the file does not run.
    """
    if not tensor_leaves((args, dict(kwargs))):
        raise ExportError(
            f"no example inputs to export to {path.suffix} with",
            why="a model that was loaded from a checkpoint folder comes without them",
            fix=f"small.export({path.name!r}, example_inputs=torch.randn(1, 3, 224, 224))",
        )
    _check_runs(module, args, kwargs)
    if FORMATS[path.suffix] == "onnx":
        check_dtypes(module, tensor_leaves((args, dict(kwargs))))
    proof = as_run = speed = None
    open_: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    with replacing(path) as fresh:
        if FORMATS[path.suffix] == "onnx":
            found, notes, open_ = _write_onnx(module, fresh, args, kwargs, dynamic or {})
            chosen, more = _guard(fresh, args, kwargs, _clips(module)) if guarded else (None, ())
            if chosen is not None and chosen.left:
                left, found = chosen.left, compare(fresh, module, args, kwargs)
            as_run = compare(fresh, module, args, kwargs, exact=False)
            proof = prove(fresh, {name for name, parameter in module.named_parameters() if parameter.dim() >= 2})
            if chosen is not None:
                speed = Speed(*counted(proof), chosen.ms, chosen.float_ms)
            elif measure and not guarded:
                speed, more = _measure(fresh, proof, args, kwargs, _clips(module))
            notes = (*notes, *more)
        else:
            graph = graph_of(module, args, kwargs, dynamic)
            notes = graph.notes
            export_program(graph.module, args, kwargs, fresh, lengths=Lengths(dynamic or {}))
            with quiet(), torch.no_grad():
                given, named = copies((args, dict(kwargs)))
                result = torch.export.load(fresh).module()(*given, **named)
            found = agreement(module, tensor_leaves(result), args, kwargs)
        size = sum(made.stat().st_size for made in fresh.parent.iterdir())
    warn_of_kernels(path, found, as_run, proof)
    if speed is not None:
        log.info("%s: %s", path.name, speed)
    return ExportReport(str(path), FORMATS[path.suffix], size, found, as_run, proof, notes, open_, speed, left)


def warn_of_kernels(path: Path, found: Agreement, as_run: Agreement | None, proof: KernelProof | None) -> None:
    """Log how far a file is off, and warn where the default kernels are off by far more than the exact ones."""
    if not found.within_a_step:
        # in a deep network one code that is rounded the other way sets off others behind it
        log.info("%s is %.3g quantization steps off on the example inputs", path.name, found.steps)
    if as_run is not None and as_run.steps > SATURATED * max(found.steps, 1.0):
        weight_only = proof is not None and "MatMulNBits" in proof.integer
        log.warning(WEIGHT_ONLY if weight_only else SATURATES, path.name, as_run.steps)


def _check_runs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise InputError where the model does not run on the inputs that its file is to be made with."""
    try:
        with eval_copy(module, real=True) as copied, torch.no_grad():
            given, named = copies((args, dict(kwargs)))
            copied(*given, **named)
    except Exception as error:  # of the user's code, or of an op
        raise InputError(
            f"{type(module).__name__} does not run on the example inputs",
            at=failed_at(error),
            why=f"{type(error).__name__}: {first_line(error)[:300]}",
            fix="inputs in the form of those that the model was compressed with",
        ) from error


# ------------------------------------------------------------------------------------------------ speed
def _measure(
    path: Path, proof: KernelProof, args: tuple[Any, ...], kwargs: Mapping[str, Any], clips: Clips | None
) -> tuple[Speed | None, tuple[str, ...]]:
    """Time a file beside its float form; a note says why where that cannot be done."""
    try:
        return measured(path, proof, args, kwargs, clips), ()
    except ExportError as error:
        return None, (f"was not timed beside its float form: {error.why or error.what}",)


def _clips(module: nn.Module) -> Clips | None:
    """Return the clips that lowering left out, of the graph in a module; None where nothing knows them."""
    graph = integer_graph(module)
    found: Clips | None = None if graph is None else graph.meta.get(CLIPS)
    return found


def _guard(
    path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any], clips: Clips | None
) -> tuple[Guarded | None, tuple[str, ...]]:
    """Put the fastest form of a file in its place; notes say what is left in float, or why nothing was tried."""
    try:
        found = guard(path, args, kwargs, clips)
    except ExportError as error:
        return None, (f"was not guarded: {error.why or error.what}",)
    if found is None:
        return None, ("was not guarded: no layer of it reads integers",)
    if found.note:
        log.warning("%s %s", path.name, found.note)
    return found, (found.note,) if found.note else ()


# ------------------------------------------------------------------------------------------------ open lengths
def _write_onnx(
    module: nn.Module, path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any], named: Names
) -> tuple[Agreement, tuple[str, ...], tuple[str, ...]]:
    """Write a file with as many open lengths as can be, and run the file on the example inputs and on longer ones.

    Returns:
        How far the file is off, notes, and the lengths that are open.
    """
    graph = graph_of(module, args, kwargs)
    given = file_names(graph.module, graph.names) if graph.names else None
    refused: ExportError | None = None
    for lengths in _attempts(module, graph.module, (args, dict(kwargs)), named):
        try:
            if lengths.named or lengths.others:  # what the model computes from these is then computed in the file
                longer = graph_of(module, args, kwargs, {**lengths.others, **lengths.named})
            else:
                longer = graph
            export_onnx(longer.module, args, kwargs, path, output_names=given, lengths=lengths)
            found = compare(path, module, args, kwargs)
            open_, notes = _check_longer(module, path, args, kwargs, found, named)
        except ExportError as error:
            log.debug("%s: %s", lengths, error)
            refused = error if refused is None or lengths == CAPTURED else refused
            continue
        if not lengths.captured and refused is not None:
            notes = (*notes, f"holds for inputs of the example's shapes alone: {refused.why or refused.what}")
            log.warning("%s %s", path.name, notes[-1])
        return found, (*longer.notes, *notes), open_
    assert refused is not None
    raise refused


def _attempts(module: nn.Module, graph: fx.GraphModule, inputs: Any, named: Names) -> list[Lengths]:
    """Return which lengths to leave open, the most first."""
    if named:
        _check_depends(module, named)
        return [Lengths(named)]
    leaves = pytree.tree_leaves(inputs)
    places = graph.graph.find_nodes(op="placeholder")
    some = any(CAPTURED.of(place, leaf) for place, leaf in zip(places, leaves, strict=False))
    others = _others(module, graph, inputs)
    more = [Lengths(others=others)] if any(others.values()) else []
    return [*more, CAPTURED, *([Lengths(captured=False)] if some else [])]


def _others(module: nn.Module, graph: fx.GraphModule, inputs: Any) -> Mapping[str, Sequence[int]]:
    """Return dims whose lengths may be open: of a graph those that were checked when the graph was made; of a model of
    the user's class those on which the model runs, as the file is compared with the model."""
    if isinstance(module, fx.GraphModule):
        checked: Mapping[str, Sequence[int]] = module.meta.get(OPEN, {})
        return checked
    if any(isinstance(part, fx.GraphModule) for part in module.modules()):
        return {}
    fixed = fixed_lengths(graph, pytree.tree_leaves(inputs))
    return {
        name: [dim for dim in dims if _runs(module, with_twice(graph, inputs, name, dim))]
        for name, dims in fixed.items()
    }


def _runs(module: nn.Module, inputs: Any) -> bool:
    """Whether the user's module runs on inputs of other lengths."""
    try:
        outputs(module, *inputs, resized=True)
    except Exception as error:  # of the user's code
        log.debug("other lengths do not run: %s", error)
        return False
    return True


def _check_depends(module: nn.Module, named: Names) -> None:
    """Raise ExportError where a graph is known to compute something else than its model on other lengths."""
    if not isinstance(module, fx.GraphModule) or OPEN not in module.meta:
        return
    checked = module.meta[OPEN]
    for place in module.graph.find_nodes(op="placeholder"):
        name, held = input_name(place), place.meta.get("val")
        dims = [dim for dim in named.get(name, ()) if dim not in checked.get(name, ())]
        fixed = [dim for dim in dims if isinstance(held, Tensor) and dim < held.dim() and type(held.shape[dim]) is int]
        if fixed:
            raise ExportError(
                f"dynamic={{{name!r}: …}} cannot be met along dim {', '.join(map(str, fixed))}",
                why="the model does not run on twice the length, or computes from it what is constant in the graph",
                fix="name other dims, or compress the model on inputs of the size to run on",
            )


def _checked(graph: fx.GraphModule, named: Names) -> bool:
    """Whether a graph was compared with the model on other lengths of the named dims."""
    checked = graph.meta.get(OPEN, {})
    return all(dim in checked.get(name, ()) for name, dims in named.items() for dim in dims)


def _check_longer(
    module: nn.Module, path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Agreement, named: Names
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Run the file and the module on inputs whose open lengths, other than the batch, are twice as long.

    Returns:
        The open lengths, and notes.

    Raises:
        ExportError: the file computes something else than the module; or the module fails, and no length was named.
    """
    shapes = [list(given.shape) for given in open_session(path).get_inputs()]
    (longer, more), open_ = doubled(shapes, (args, dict(kwargs)))
    if not open_:
        return (), ()
    which = ", ".join(open_)
    try:
        off = compare(path, module, longer, more, resized=True)
    except ExportError:
        raise
    except Exception as error:  # of the user's code
        if named:
            return open_, (f"was not checked with other {which}: the model fails on inputs twice as long",)
        raise ExportError("the model fails on inputs twice as long", why=first_line(error)) from error
    if off.steps > max(SATURATED * found.steps, LONGER):
        raise ExportError(
            f"the file computes other results than the model where {which} are twice as long",
            why=f"{off.steps:.3g} quantization steps off; what the model computes from lengths is constant in the file",
            fix="no dynamic=, or example_inputs= of the size to run on",
        )
    if isinstance(module, fx.GraphModule) and not _checked(module, named):
        return open_, (f"takes other {which}, but what the model computes from these lengths is constant",)
    return open_, ()


def check_dtypes(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Raise ExportError where onnxruntime has no kernels on a CPU for what the model computes with."""
    if any(t.dtype is torch.bfloat16 for t in (*module.parameters(), *module.buffers(), *inputs)):
        raise ExportError(
            "a model in bfloat16 cannot be exported to ONNX",
            why="onnxruntime's kernels for the CPU, on which the file is run before it is handed over, take none",
            fix="model.float() and inputs in float32, before it is compressed; or export to .pt2",
        )
