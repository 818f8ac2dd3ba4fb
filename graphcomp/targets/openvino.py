"""Run an exported ONNX file in OpenVINO on the CPU, time it, and say which of its layers run on integers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphcomp.cost import Latency
from graphcomp.errors import ExportError, first_line
from graphcomp.ir.module import tensor_leaves
from graphcomp.targets.onnxruntime.export import need
from graphcomp.targets.runtime import Args, timed

if TYPE_CHECKING:
    from openvino import CompiledModel

LAYERS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention"})
"""What OpenVINO calls convolutions and matrix products once it has fused what follows into them."""


@dataclass(frozen=True)
class OpenVINOKernels:
    """What OpenVINO makes of a file.

    Attributes:
        integer: convolutions and matrix products that multiply integers, OpenVINO's name of the layer -> how many.
        float_: those that multiply floats. Attention that is fused into a kernel of its own is in neither.
    """

    integer: Mapping[str, int]
    float_: Mapping[str, int]

    @property
    def share(self) -> float:
        """Of integer ones; 1.0 where there is none at all."""
        whole, floats = sum(self.integer.values()), sum(self.float_.values())
        return whole / (whole + floats) if whole + floats else 1.0


def open_model(path: str | Path, *, threads: int = 1, exact: bool = False) -> CompiledModel:
    """An ONNX file compiled for the CPU, floats in float32.

    Args:
        threads: of one request.
        exact: quantized values are computed in floats, which hold every code, instead of on integers. As onnxruntime's
            do, OpenVINO's integer kernels add pairs of products in 16 bits on x86 without VNNI, and saturate. It is for
            comparing; what users run by default is timed.

    Raises:
        ExportError: openvino is not installed, or cannot load the file.
    """
    need("running in OpenVINO", ("openvino",), fix="pip install 'graphcomp[openvino]'")
    import openvino

    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    if exact:
        options["LP_TRANSFORMS_MODE"] = False  # OpenVINO's own name for making integer layers of quantized ones
    try:
        return openvino.Core().compile_model(os.fspath(path), "CPU", options)
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot load {path}", why=f"{type(error).__name__}: {first_line(error)}") from error


def run(path: str | Path, args: Args, kwargs: Mapping[str, Any] | None = None, *, exact: bool = True) -> list[Tensor]:
    """The outputs of an ONNX file in OpenVINO, flat.

    Args:
        args, kwargs: as the module's; nested tensors are fed in order.
        exact: see `open_model`.

    Raises:
        ExportError: openvino is not installed, cannot load the file, or fails to run it on these inputs.
    """
    compiled = open_model(path, exact=exact)
    tensors = [tensor.detach().cpu().numpy() for tensor in tensor_leaves((args, dict(kwargs or {})))]
    try:
        return [torch.from_numpy(array.copy()) for array in compiled(tensors).values()]
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot run {path}", why=f"{type(error).__name__}: {first_line(error)}") from error


def prove(path: str | Path) -> OpenVINOKernels:
    """Load an ONNX file in OpenVINO as users do, and read which kernels it would run.

    Raises:
        ExportError: see `open_model`.
    """
    found: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for node in open_model(path).get_runtime_model().get_ops():
        about = node.get_rt_info()
        if about["layerType"].value in LAYERS:
            # the kernel tells; `runtimePrecision` is int8 too where a float kernel reads integer weights
            found[about["primitiveType"].value.upper().endswith("I8")][about["layerType"].value] += 1
    return OpenVINOKernels(dict(found[True]), dict(found[False]))


def latency(
    path: str | Path,
    args: Args,
    kwargs: Mapping[str, Any] | None = None,
    *,
    threads: int = 1,
    warmup: int = 5,
    repeats: int = 50,
    exact: bool = False,
) -> Latency:
    """Time an ONNX file in OpenVINO on the CPU.

    Args:
        args, kwargs: as the module's.
        threads: of one request.
        warmup, repeats: runs that are not counted, and that are.
        exact: see `open_model`; False is what users get by default.

    Raises:
        ExportError: see `run`; `repeats` is below 1.
    """
    request = open_model(path, threads=threads, exact=exact).create_infer_request()
    arrays = [tensor.detach().cpu().numpy() for tensor in tensor_leaves((args, dict(kwargs or {})))]
    return timed(lambda: request.infer(arrays, share_inputs=True, share_outputs=True), warmup, repeats)
