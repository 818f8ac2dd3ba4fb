"""Quantizers of every kind and granularity, ranges set, for the tests that hold for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.quantizers.mixed import MixedQuantizer
from graphcomp.quantization.spec import QuantSpec
from graphcomp.quantization.stored import Affine, Codebook, Stored

SHAPE = (4, 3, 6)

SPECS = {
    "symmetric": QuantSpec(4),
    "symmetric channel": QuantSpec(4, granularity="channel"),
    "symmetric group": QuantSpec(4, granularity="group", group_size=4),
    "affine": QuantSpec(4, symmetric=False),
    "affine channel": QuantSpec(4, symmetric=False, granularity="channel"),
    "affine group": QuantSpec(4, symmetric=False, granularity="group", group_size=4),
    "ternary": QuantSpec(kind="ternary"),
    "ternary channel": QuantSpec(kind="ternary", granularity="channel"),
    "ternary, two scales": QuantSpec(kind="ternary", symmetric=False),
    "ternary, two scales, channel": QuantSpec(kind="ternary", symmetric=False, granularity="channel"),
    "mixed": QuantSpec(4, kind="mixed", granularity="channel"),
    "geta": QuantSpec(4, kind="geta"),
    "geta exponent": QuantSpec(4, kind="geta", learn_exponent=True),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Quantizer:
    """The quantizer of that name for tensors of SHAPE, range -1.5 … 2: some of `data` saturates."""
    quantizer = make_quantizer(SPECS[name], shape=SHAPE, dim=0).to(dtype)
    if isinstance(quantizer, MixedQuantizer):
        quantizer.set_widths(torch.tensor([2, 3, 4, 4]))
    quantizer.set_range(torch.tensor(-1.5), torch.tensor(2.0))
    return quantizer


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return (2 * torch.randn(SHAPE, dtype=torch.float64)).to(dtype)


def pattern(x: Tensor) -> Tensor:
    """The bits of `x`: tells -0 from 0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def check_integers(quantizer: Quantizer, x: Tensor) -> Any:
    """That the integers of `x` stand for what the quantizer returns, bit for bit; and lie where they say."""
    integers = quantizer.to_integers(x)
    back = integers.dequantize().to(x.dtype)
    assert torch.equal(pattern(back), pattern(quantizer(x).detach()))
    codes = integers.values.to(torch.int64)
    if codes.numel():
        assert integers.quant_min <= codes.min() and codes.max() <= integers.quant_max
    if isinstance(integers, Affine):
        assert integers.zero_point.dtype == torch.int32
        assert integers.zero_point.shape == integers.scale.shape
    return integers


def steps_of(stored: Stored) -> Tensor:
    """The steps of evenly spaced levels; of ternary levels with two scales the scales."""
    if isinstance(stored, Affine):
        return stored.scale
    assert isinstance(stored, Codebook)
    return stored.table[..., [0, 2]] * torch.tensor([-1, 1])


def straight(x: Tensor) -> Tensor:
    """Rounding with a straight-through gradient, as it is usually written."""
    return x + (x.round() - x).detach()


def gradients(result: Tensor, upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((result * upstream).sum(), inputs)
