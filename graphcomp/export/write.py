"""CompressedModel.export: one file for another runtime, run there before it is handed over."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphcomp.errors import ExportError
from graphcomp.export.files import replacing
from graphcomp.export.kernels import KernelProof, prove
from graphcomp.export.onnx import export_onnx
from graphcomp.export.program import export_program, graph_and_notes, quiet
from graphcomp.export.runtime import Agreement, agreement, compare
from graphcomp.graph_module import names_quoted, tensor_leaves
from graphcomp.inputs import copies

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
            kernels saturate (see `graphcomp.export.runtime.open_session`). None for a program.
        kernels: which layers onnxruntime runs on integers; None for a program.
        notes: for which inputs alone the file holds: sizes that are fixed in it, branches that were not seen.
    """

    path: str
    format: Format
    bytes: int
    agreement: Agreement
    as_run: Agreement | None
    kernels: KernelProof | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "kernels": self.kernels and self.kernels.to_dict()}


@names_quoted()
def write_file(module: nn.Module, path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportReport:
    """Write `module` to a .onnx or .pt2 file and run the file on the example inputs; nothing is left if either fails.

    How far the file is off is in the report; where the default kernels are off by far more than the exact ones, that is
    logged as a warning.

    Raises:
        CaptureError: the module cannot be captured.
        ExportError: there are no example inputs; the module cannot be written, or the file does not run.
    """
    if not tensor_leaves((args, dict(kwargs))):
        raise ExportError(
            f"no example inputs to export to {path.suffix} with",
            why="a model that was loaded from a checkpoint folder comes without them",
            fix=f"small.export({path.name!r}, example_inputs=torch.randn(1, 3, 224, 224))",
        )
    if FORMATS[path.suffix] == "onnx":
        _check_dtypes(module, tensor_leaves((args, dict(kwargs))))
    proof = as_run = None
    graph, notes = graph_and_notes(module, args, kwargs)
    with replacing(path) as fresh:
        if FORMATS[path.suffix] == "onnx":
            export_onnx(graph, args, kwargs, fresh)
            found = compare(fresh, module, args, kwargs)
            as_run = compare(fresh, module, args, kwargs, exact=False)
            proof = prove(fresh, {name for name, parameter in module.named_parameters() if parameter.dim() >= 2})
        else:
            export_program(graph, args, kwargs, fresh)
            with quiet(), torch.no_grad():
                given, named = copies((args, dict(kwargs)))
                result = torch.export.load(fresh).module()(*given, **named)
            found = agreement(module, tensor_leaves(result), args, kwargs)
        size = sum(made.stat().st_size for made in fresh.parent.iterdir())
    if not found.within_a_step:
        # in a deep network one code that is rounded the other way sets off others behind it
        log.info("%s is %.3g quantization steps off on the example inputs", path.name, found.steps)
    if as_run is not None and as_run.steps > SATURATED * max(found.steps, 1.0):
        weight_only = proof is not None and "MatMulNBits" in proof.integer
        log.warning(WEIGHT_ONLY if weight_only else SATURATES, path.name, as_run.steps)
    return ExportReport(str(path), FORMATS[path.suffix], size, found, as_run, proof, notes)


def _check_dtypes(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Raise ExportError where onnxruntime has no kernels on a CPU for what the model computes with."""
    if any(t.dtype is torch.bfloat16 for t in (*module.parameters(), *module.buffers(), *inputs)):
        raise ExportError(
            "a model in bfloat16 cannot be exported to ONNX",
            why="onnxruntime's kernels for the CPU, on which the file is run before it is handed over, take none",
            fix="model.float() and inputs in float32, before it is compressed; or export to .pt2",
        )
