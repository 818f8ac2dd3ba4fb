"""ONNX: a captured or lowered graph as one file that onnxruntime runs with integer kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from graphcomp.errors import ExportError, GraphcompError, first_line
from graphcomp.ir.graph import is_op, source_line
from graphcomp.ir.passes import Pipeline
from graphcomp.quantization.attention import WriteOutAttention
from graphcomp.system.files import replacing
from graphcomp.targets.lengths import CAPTURED, Lengths
from graphcomp.targets.outputs import OwnOutputs, own_names
from graphcomp.targets.pt2 import InEvalMode, export_program, graph_of, quiet

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 21  # the first with 16-bit and 4-bit integers, and with blocks
OPSET_OF_TWO_BITS = 25
EXTERNAL_ABOVE = 2**31 - 2**20
"""Bytes of weights above which they go to a file of their own: protobuf holds 2 GiB, the graph needs some of it."""

PACKAGES = ("onnx", "onnxscript", "onnx_ir")

WRITABLE = Pipeline(
    "writing ONNX",
    (
        InEvalMode(),
        OwnOutputs(),
        # the exporter's own way takes a softmax apart for NaN, in each layer, and turns keys around by reshaping them
        WriteOutAttention(zero_hidden=True),
    ),
    values=False,  # torch.export infers all shapes anew
)
"""From a captured or lowered graph to one that torch's exporter writes."""


def export_onnx(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    path: str | Path,
    *,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    lengths: Lengths = CAPTURED,
) -> None:
    """Write `module` in eval mode as an ONNX file, whole or not at all.

    Quantized values are integers: QuantizeLinear and DequantizeLinear around every layer, weights and biases as
    integer constants (those of few bits packed), in the form that onnxruntime fuses to integer kernels. The dims that
    capture left symbolic, the batch above all, are dynamic.

    Args:
        module: a graph that `capture` made, lowered or not; or any module, which is captured first. Not modified.
        args, kwargs: example inputs.
        path: where to write. Above 2 GiB the weights are in a second file beside it, `<name>.data`.
        opset: 21 or more. By default 21, but 25 where there are weights of two bits and the installed onnxruntime runs
            that: no earlier one has a type for them, and they take four bits, as those of three bits always do.
        input_names, output_names: one for each tensor; by default those of the arguments and of what the model returns,
            such as "logits", or "output" where that is one tensor. Numbers, words and sizes that the model returns are
            no outputs of the file.
        lengths: which dims of the inputs are dynamic; by default those that capture left symbolic.

    Raises:
        CaptureError: `module` cannot be captured.
        ExportError: the `onnx` extra is not installed; an op has no ONNX form; the path cannot be written.
    """
    need("writing ONNX", PACKAGES)
    if opset is not None and opset < OPSET:
        raise ExportError(
            f"opset {opset} is too old",
            why="integers of 4 and 16 bits, and one scale per block, came with opset 21",
            fix=f"opset={OPSET}",
        )
    model = _translate(module, args, dict(kwargs or {}), opset, input_names, output_names, lengths)
    with replacing(Path(path)) as fresh:
        _save(model, fresh)


def need(what: str, packages: Sequence[str], fix: str = "pip install 'graphcomp[onnx]'") -> None:
    """Raise ExportError unless all `packages` can be imported."""
    missing = [name for name in packages if not _there(name)]
    if missing:
        raise ExportError(
            f"{what} needs {', '.join(missing)}",
            why="not installed" if len(missing) == 1 else "they are not installed",
            fix=fix,
        )


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that is blocked, or set up by hand, has no spec
        return False


def _translate(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    opset: int | None,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    lengths: Lengths,
) -> ir.Model:
    from graphcomp.targets.onnxruntime import passes
    from graphcomp.targets.onnxruntime.ops import translation_table

    found = graph_of(module, args, kwargs)
    names = own_names(found.module, found.names)
    graph = WRITABLE(found).module
    program = export_program(graph, args, kwargs, lengths=lengths)
    try:
        with silent():
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset or OPSET,
                input_names=input_names,
                output_names=output_names or names,
                custom_translation_table=translation_table(opset or OPSET),
                optimize=False,
                verbose=False,
            )
            assert written is not None
            passes.prepare(written.model)
            written.optimize()
            passes.finish(written.model)
            passes.name_lengths(written.model, lengths.names_by_place(graph), lengths.outputs)
            if opset is None and _runs_two_bits():
                passes.narrow(written.model, OPSET_OF_TWO_BITS)
    except GraphcompError:
        raise
    except Exception as error:  # the exporter, its optimizer and onnx-ir's passes share no base class
        op, line = _untranslated(error)
        raise ExportError(
            f"{type(module).__name__} cannot be written as ONNX",
            at=line,
            why=f"{op}: {_cause(error)}" if op else _cause(error),
            fix=f"export to .pt2, or replace {op or 'the op'}",
        ) from error
    model: ir.Model = written.model
    return model


def _untranslated(error: BaseException) -> tuple[str, str]:
    """Return the op that the exporter could not translate, and the user's line; "" where they are not known."""
    found: fx.Node | None = None
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            node = frame.f_locals.get("node")
            found = node if isinstance(node, fx.Node) and is_op(node) else found
        cause = cause.__cause__
    return (str(found.target), source_line(found)) if found is not None else ("", "")


@functools.cache
def _runs_two_bits() -> bool:
    """Whether the onnxruntime that is installed can dequantize INT2."""
    if not _there("onnxruntime"):
        return False
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        model = onnx.parser.parse_model(
            f"""<ir_version: 13, opset_import: ["" : {OPSET_OF_TWO_BITS}]> probe (int8[4] x, float s) => (float[4] y)
            {{ codes = Cast <to = {onnx.TensorProto.INT2}> (x) y = DequantizeLinear (codes, s) }}"""
        )
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's exceptions have no public base class; an older onnx has no INT2
        return False
    return True


def _cause(error: BaseException) -> str:
    """The innermost exception in one line: torch's own message is a page on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """The exporter prints its progress and logs what it tries; the result or the exception says it all."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _save(model: ir.Model, path: Path) -> None:
    import onnx
    import onnx_ir as ir

    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    model.producer_name = "graphcomp"
    ir.save(model, path, external_data=f"{path.name}.data" if weights > EXTERNAL_ABOVE else None)
    onnx.checker.check_model(path)
