"""Ranges at run time: the two ops of a lowered graph whose activations are quantized as they come.

    quantize_dynamic    floats -> codes, scale and zero point, of the values at hand
    matmul_dynamic      rows of codes times a matrix of codes -> floats: sums of products in 32 bits, then the scales

Importing this module registers `graphcomp::quantize_dynamic` and `graphcomp::matmul_dynamic`. On a CPU sums come from
torch's int8 kernel. ONNX has both ops: DynamicQuantizeLinear and MatMulInteger, which onnxruntime makes one kernel of.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphcomp.quantization.spec import DYNAMIC_BITS
from graphcomp.torch_compat import int_mm

HIGHEST = 2**DYNAMIC_BITS - 1
"""The highest code of a tensor with one range; the lowest is 0."""

MIDDLE = 2 ** (DYNAMIC_BITS - 1)
"""The code of 0 of a row with a range of its own; the lowest code is 1, so that levels are symmetric."""

SMALLEST = torch.finfo(torch.float32).tiny
"""The floor of a step: dividing by the step loses no precision."""


def levels(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of `x`, whose range always includes 0.

    Args:
        x: (…, c) float.
        per_token: one scale for each row of the last dim, symmetric about 0, zero point 128; else one scale for all
            elements and a zero point from 0 to 255, as ONNX's DynamicQuantizeLinear.

    Returns:
        Scale, () or (…, 1) in the dtype of `x`, > 0 (1 where all elements are 0; NaN where one of them is NaN); zero
        point, () whole, as floats.
    """
    if per_token:
        largest = x.abs().amax(-1, keepdim=True)
        scale = largest / (MIDDLE - 1)
        return _positive(scale), x.new_full((), MIDDLE)
    low, high = x.aminmax() if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    low, high = low.clamp(max=0), high.clamp(min=0)
    # halves, which are exact, lest the difference of large numbers overflow
    scale = _positive((high * 0.5 - low * 0.5) / (HIGHEST / 2))
    return scale, (0 - low / scale).round().clamp(0, HIGHEST)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale.clamp(min=SMALLEST))


def signed_codes(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes that are 128 lower, scale and zero point, see `levels`.

    A value that is not finite makes a scale of NaN for its row alone: with one range for all elements the range is that
    of the other rows, and the scale is then (…, 1).

    Args:
        x: (…, c) float.

    Returns:
        Codes (…, c) int8; scale () or (…, 1); zero point () whole, as floats, of the codes before they were lowered.
    """
    scale, zero = levels(x, per_token)
    if not per_token and not math.isfinite(float(scale.detach())):
        spoilt = ~x.isfinite().all(-1, keepdim=True)
        scale, zero = levels(x.masked_fill(spoilt, 0), per_token)
        return _signed(x, scale, zero, per_token), torch.where(spoilt, torch.nan, scale), zero
    return _signed(x, scale, zero, per_token), scale, zero


def _signed(x: Tensor, scale: Tensor, zero: Tensor, per_token: bool) -> Tensor:
    # as signed codes first: torch makes int8 of floats in a quarter of the time that uint8 takes
    return (x / scale).round_().add_(zero - MIDDLE).clamp_(int(per_token) - MIDDLE, HIGHEST - MIDDLE).to(torch.int8)


# ------------------------------------------------------------------------------------------------ ops
_LIBRARY = torch.library.Library("graphcomp", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(schema: str, function: Any, shapes: Any) -> Any:
    """Define an op of `graphcomp` by a function of tensors, and one that gives results of the same shapes.

    Without the checks of `torch.library.custom_op`, which take as long as a small layer.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"graphcomp::{name}", shapes, lib=_LIBRARY)
    return getattr(torch.ops.graphcomp, name).default


def _quantize(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    signed, scale, zero = signed_codes(x, per_token)
    return signed.view(torch.uint8).bitwise_xor(MIDDLE), scale, zero.to(torch.uint8)


def _matmul(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    turned: bool,
    per_token: bool,
) -> Tensor:
    matrix = weight.t() if turned else weight
    rows = codes.reshape(-1, codes.shape[-1])
    sums = _symmetric(rows, matrix) if per_token else integer_products(rows, zero_point, matrix)
    found = sums.to(weight_scale.dtype).view(*codes.shape[:-1], matrix.shape[1])
    factor = weight_scale
    if scale.dim():  # for each row; of one range for all elements, where a row has none (`signed_codes`)
        found = found.mul_(scale)
    else:
        factor = scale * weight_scale
    return found.mul_(factor) if bias is None else torch.addcmul(bias, found, factor)


def _symmetric(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return the sums of `integer_products` for a zero point of 128, which is 0 of the kernel's signed codes."""
    if rows.device.type != "cpu":
        return integer_products(rows, rows.new_full((), MIDDLE), matrix)
    return integer_sums(rows.bitwise_xor(MIDDLE).view(torch.int8), matrix)


def integer_products(rows: Tensor, zero_point: Tensor, matrix: Tensor) -> Tensor:
    """Return (n, o) int32, the sums of (rows - zero_point) times `matrix`.

    Args:
        rows: (n, i) uint8.
        zero_point: () uint8.
        matrix: (i, o) int8.
    """
    if rows.device.type != "cpu":  # int8 kernels of other devices refuse some shapes; float64 holds each sum
        return ((rows.double() - zero_point.double()) @ matrix.double()).to(torch.int32)
    # torch's kernel multiplies signed codes, so that all move by 128; a row of ones gives the sums of the columns, by
    # which the zero point is made up for
    signed = torch.cat([rows.bitwise_xor(MIDDLE).view(torch.int8), rows.new_ones(1, rows.shape[1], dtype=torch.int8)])
    sums = integer_sums(signed, matrix)
    return sums[:-1].add_((MIDDLE - zero_point.to(torch.int32)) * sums[-1])


def integer_sums(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return (n, o) int32, the exact sums of products of codes (n, i) and (i, o), int8, on a CPU.

    CPUs without VNNI add two products in 16 bits, which saturate: there products are computed in floats, as many inputs
    at a time as float32 holds the sums of.
    """
    if not kernel_saturates():
        found: Tensor = int_mm(rows, matrix)
        return found
    sums = rows.new_zeros(rows.shape[0], matrix.shape[1], dtype=torch.int32)
    for first in range(0, rows.shape[1], EXACT_INPUTS):
        part = slice(first, first + EXACT_INPUTS)
        sums += (rows[:, part].float() @ matrix[part].float()).to(torch.int32)
    return sums


EXACT_INPUTS = 2**24 // MIDDLE**2
"""Most inputs whose products of codes float32 adds exactly."""


@cache
def kernel_saturates() -> bool:
    """Return whether torch's int8 kernel gives wrong sums of large codes on this CPU."""
    rows = torch.full((2, 64), MIDDLE - 1, dtype=torch.int8)
    rows[1] = -MIDDLE
    matrix = torch.full((64, 2), MIDDLE - 1, dtype=torch.int8)
    matrix[:, 1] = 1 - MIDDLE
    wanted = rows.long() @ matrix.long()
    return not torch.equal(int_mm(rows, matrix).long(), wanted)


def _quantized_shapes(x: Tensor, per_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty((*x.shape[:-1], 1) if per_token else ())
    return x.new_empty(x.shape, dtype=torch.uint8), scale, x.new_empty((), dtype=torch.uint8)


def _product_shapes(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    turned: bool,
    per_token: bool,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[1 - turned]), dtype=weight_scale.dtype)


quantize_dynamic = _define(
    "quantize_dynamic(Tensor input, bool per_token) -> (Tensor codes, Tensor scale, Tensor zero_point)",
    _quantize,
    _quantized_shapes,
)
"""(…, c) float -> codes (…, c) uint8, scale () or (…, 1), zero point () uint8: see `levels`."""

matmul_dynamic = _define(
    "matmul_dynamic(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, bool turned, bool per_token) -> Tensor",
    _matmul,
    _product_shapes,
)
"""Codes (…, i), scale and zero point as of `quantize_dynamic`; weight (i, o) int8, or (o, i) where turned; scale of the
weight () or (o,); bias (o,) or None -> (…, o) in the dtype of the weight's scale."""
