"""The ops of a lowered graph: `quantized_decomposed` from torch, and two of our own that it lacks.

Importing this module registers `graphcomp::unpack_int4` and `graphcomp::dequantize_grouped`, and makes sure that
`quantized_decomposed` is there: torch registers it in a place that may move, so it is imported here and nowhere else.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_HOMES = ("torch.ao.quantization.fx._decomposed", "torchao.quantization.pt2e._decomposed")


def _register_decomposed() -> Any:
    """The namespace `quantized_decomposed`, from wherever this torch keeps it, else by definitions of ours."""
    for home in _HOMES:
        with contextlib.suppress(ImportError):
            importlib.import_module(home)
            return torch.ops.quantized_decomposed
    define_decomposed("quantized_decomposed")
    return torch.ops.quantized_decomposed


def define_decomposed(namespace: str) -> None:
    """Define the three ops that a lowered graph uses, with the schemas and results of torch's own."""
    signature = "int quant_min, int quant_max, ScalarType dtype"
    library = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    _LIBRARIES.append(library)  # an op lives as long as its library

    def define(name: str, schema: str, function: Any) -> None:
        library.define(f"{name}{schema}")  # type: ignore[no-untyped-call]
        library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

    define("quantize_per_tensor", f"(Tensor input, float scale, int zero_point, {signature}) -> Tensor", _quantize)
    define(
        "dequantize_per_tensor",
        f"(Tensor input, float scale, int zero_point, {signature}, *, ScalarType? out_dtype=None) -> Tensor",
        _dequantize,
    )
    define(
        "dequantize_per_channel",
        f"(Tensor input, Tensor scales, Tensor? zero_points, int axis, {signature}, *, "
        "ScalarType? out_dtype=None) -> Tensor",
        _dequantize_channels,
    )


_LIBRARIES: list[torch.library.Library] = []


def _quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    x = x.to(torch.float32)  # half floats hold too few codes
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, low, high).to(dtype)


def _dequantize(
    x: Tensor,
    scale: float,
    zero_point: int,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return (x.to(out_dtype or torch.float32) - zero_point) * scale


def _dequantize_channels(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    shape = [-1 if d == axis else 1 for d in range(x.dim())]
    shifted = x if zero_points is None else x.to(torch.int32) - zero_points.view(shape)
    return (shifted * scales.view(shape)).to(out_dtype or torch.float32)


DECOMPOSED = _register_decomposed()
quantize_per_tensor = DECOMPOSED.quantize_per_tensor.default
dequantize_per_tensor = DECOMPOSED.dequantize_per_tensor.default
dequantize_per_channel = DECOMPOSED.dequantize_per_channel.default


# ------------------------------------------------------------------------------------------------ four bits
def pack_int4(codes: Tensor) -> Tensor:
    """Two codes per byte, row-major, the lower half first: the layout of ONNX's INT4 and UINT4.

    Args:
        codes: integers of any shape, all in -8 … 7 or all in 0 … 15.

    Returns:
        ((n + 1) // 2,) uint8.
    """
    flat = codes.reshape(-1).to(torch.int16) & 15
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] | (flat[1::2] << 4)).to(torch.uint8)


@torch.library.custom_op("graphcomp::unpack_int4", mutates_args=())
def unpack_int4(packed: Tensor, shape: Sequence[int], signed: bool) -> Tensor:
    """The codes that `pack_int4` packed: int8 of `shape` where signed, else uint8."""
    n = int(torch.Size(shape).numel())
    halves = torch.stack([packed & 15, packed >> 4], dim=1).reshape(-1)[:n]
    if not signed:
        return halves.reshape(list(shape)).clone()
    return ((halves.to(torch.int8) ^ 8) - 8).reshape(list(shape))


@unpack_int4.register_fake
def _(packed: Tensor, shape: Sequence[int], signed: bool) -> Tensor:
    return packed.new_empty(list(shape), dtype=torch.int8 if signed else torch.uint8)


# ------------------------------------------------------------------------------------------------ groups
@torch.library.custom_op("graphcomp::dequantize_grouped", mutates_args=())
def dequantize_grouped(values: Tensor, scales: Tensor, zero_points: Tensor, groups: Tensor) -> Tensor:
    """Codes whose rows have one scale per group of the last dim.

    Args:
        values: (c, …, i) integers.
        scales, zero_points: (c, g) float and int32.
        groups: (i,) int64, the group of each index.

    Returns:
        (c, …, i) in the dtype of `scales`.
    """
    shape = [scales.shape[0], *[1] * (values.dim() - 2), groups.shape[0]]
    return (values.to(scales.dtype) - zero_points[:, groups].view(shape)) * scales[:, groups].view(shape)


@dequantize_grouped.register_fake
def _(values: Tensor, scales: Tensor, zero_points: Tensor, groups: Tensor) -> Tensor:
    return values.new_empty(values.shape, dtype=scales.dtype)
