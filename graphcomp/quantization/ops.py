"""The ops of a lowered graph: `quantized_decomposed` from torch, and three of our own that it lacks.

Importing this module registers `graphcomp::unpack`, `graphcomp::dequantize_grouped` and `graphcomp::look_up`, and makes
sure that `quantized_decomposed` is there: torch registers it in a place that may move, so it is imported here and
nowhere else.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphcomp.quantization.dynamic import matmul_dynamic, quantize_dynamic
from graphcomp.torch_compat import DECOMPOSED_HOMES


def _register_decomposed() -> Any:
    """The namespace `quantized_decomposed`, from wherever this torch keeps it, else by definitions of ours."""
    for home in DECOMPOSED_HOMES:
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


# ------------------------------------------------------------------------------------------------ few bits
PACKED_BITS = (2, 3, 4)
"""Widths below a byte that weights are packed in; codes of more bits have a byte or two of their own."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes end to end, row-major, the lowest bit first: for 2 and 4 bits as in ONNX's INT2, UINT2, INT4 and UINT4.

    Args:
        codes: integers of any shape, all in -2^(bits-1) … 2^(bits-1) - 1 or all in 0 … 2^bits - 1.
        bits: of each code, one of PACKED_BITS.

    Returns:
        (ceil(n bits / 8),) uint8.
    """
    dtype, shifts, places = _run(bits, codes.device)
    flat = codes.reshape(-1).to(torch.int16) & (1 << bits) - 1
    whole = F.pad(flat, (0, -flat.numel() % len(shifts))).to(dtype)
    runs = (whole.view(-1, len(shifts)) << shifts).sum(1, dtype=dtype)
    data = ((runs[:, None] >> places) & 255).to(torch.uint8)
    return data.reshape(-1)[: -(-flat.numel() * bits // 8)].clone()


@torch.library.custom_op("graphcomp::unpack", mutates_args=())
def unpack(packed: Tensor, shape: Sequence[int], bits: int, signed: bool, shift: int = 0) -> Tensor:
    """The codes that `pack` packed, times 2^shift: int8 of `shape` where signed, else uint8."""
    return unpacked(packed, shape, bits, signed) << shift


def unpacked(packed: Tensor, shape: Sequence[int], bits: int, signed: bool) -> Tensor:
    """Return the codes that `pack` packed: int8 of `shape` where signed, else uint8."""
    n = int(torch.Size(shape).numel())
    if 8 % bits == 0:  # no code lies in two bytes
        codes = torch.stack([packed >> place & (1 << bits) - 1 for place in range(0, 8, bits)], -1)
    else:
        dtype, shifts, bytes_of = _run(bits, packed.device)
        whole = F.pad(packed, (0, -packed.numel() % len(bytes_of))).to(dtype)
        runs = (whole.view(-1, len(bytes_of)) << bytes_of).sum(1, dtype=dtype)
        codes = ((runs[:, None] >> shifts) & (1 << bits) - 1).to(torch.uint8)
    codes = codes.reshape(-1)[:n].reshape(list(shape))
    half = 1 << (bits - 1)
    return codes.view(torch.int8).bitwise_xor(half).sub_(half) if signed else codes


@unpack.register_fake
def _(packed: Tensor, shape: Sequence[int], bits: int, signed: bool, shift: int = 0) -> Tensor:
    return packed.new_empty(list(shape), dtype=torch.int8 if signed else torch.uint8)


def _run(bits: int, device: torch.device) -> tuple[torch.dtype, Tensor, Tensor]:
    """The shortest run of codes that ends at a byte: a dtype for all of it, where each code and each byte begins."""
    length = math.lcm(bits, 8)
    dtype = torch.uint8 if length == 8 else torch.int32
    codes, data = (torch.arange(0, length, step, device=device).to(dtype) for step in (bits, 8))
    return dtype, codes, data


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


# ------------------------------------------------------------------------------------------------ tables of values
def in_table(values: Tensor, table: Tensor, axis: int | None = None) -> Tensor:
    """The values that codes have in a table; differentiable by the table.

    Args:
        values: integers from 0 to levels - 1, any shape.
        table: (levels,) float; with `axis` (c, levels).
        axis: dim of `values` that has one table per index.

    Returns:
        The shape of `values`, in the dtype of `table`.
    """
    index = values.to(torch.int32)
    if axis is not None:
        first = torch.arange(table.shape[0], dtype=torch.int32, device=table.device) * table.shape[1]
        index = index + first.view([-1 if d == axis else 1 for d in range(values.dim())])
    return table.reshape(-1)[index]


@torch.library.custom_op("graphcomp::look_up", mutates_args=())
def look_up(values: Tensor, table: Tensor, axis: int | None = None) -> Tensor:
    """As `in_table`, one node of a graph."""
    return in_table(values, table, axis)


@look_up.register_fake
def _(values: Tensor, table: Tensor, axis: int | None = None) -> Tensor:
    return values.new_empty(values.shape, dtype=table.dtype)


LOOK_UP = torch.ops.graphcomp.look_up.default

DEQUANTIZE = frozenset({dequantize_per_tensor, dequantize_per_channel, torch.ops.graphcomp.dequantize_grouped.default})
"""Ops from codes to floats."""

OF_INTEGERS = frozenset(
    {
        quantize_per_tensor, dequantize_per_tensor, dequantize_per_channel,
        torch.ops.graphcomp.unpack.default, torch.ops.graphcomp.dequantize_grouped.default,
        LOOK_UP, quantize_dynamic, matmul_dynamic,
    }
)  # fmt: skip
"""What tells a lowered graph."""
