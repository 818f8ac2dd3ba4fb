"""What every quantizer is: a module from floats to the nearest floats that integers stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from graphcomp.coupling.axis import Axes, Reason, couple
from graphcomp.quantization.spec import QuantSpec

TINY = torch.finfo(torch.float32).tiny
"""The smallest level: the smallest normal float32."""


@dataclass(frozen=True)
class Integers:
    """A tensor as integers: value = (values - zero_point) * scale, bit for bit what the quantizer's forward returns.

    Attributes:
        values: codes from quant_min to quant_max, in the smallest of uint8, int8, uint16, int16 that holds them.
        scale: () float, or (c,) along `dim`, or (c, groups) where `groups` is set. Units of the tensor per code.
        zero_point: as `scale`, int32; the code of 0.
        quant_min, quant_max: the lowest and highest code.
        dim: which dim of `values` has one scale per index; None: one scale for all.
        groups: (i,) int64, for each index of the dim after `dim` (the last) the column of `scale`; None without groups.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    dim: int | None = None
    groups: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The floats, in the dtype of `scale`."""
        scale, zero = (spread(t, self.values.dim(), self.dim, self.groups) for t in (self.scale, self.zero_point))
        return (self.values.to(self.scale.dtype) - zero) * scale


@dataclass(frozen=True)
class Codebook:
    """A tensor as codes of levels that need not be evenly spaced: -below, 0 and above, bit for bit.

    Attributes:
        values: -1, 0 or 1, int8.
        below, above: () float, or (c,) along `dim`: what -1 and 1 stand for, in magnitude. Units of the tensor.
        dim: which dim of `values` has levels of its own per index; None: one codebook for all.
    """

    values: Tensor
    below: Tensor
    above: Tensor
    dim: int | None = None

    quant_min: ClassVar[int] = -1
    quant_max: ClassVar[int] = 1

    def dequantize(self) -> Tensor:
        """The floats, in the dtype of the levels."""
        below, above = (spread(level, self.values.dim(), self.dim) for level in (self.below, self.above))
        codes = self.values.to(self.above.dtype)
        return codes.clamp(min=0) * above + codes.clamp(max=0) * below

    def times(self, factor: Tensor, dim: int) -> Codebook:
        """The codebook of the tensor times `factor`, (c,) along `dim`: a negative factor mirrors codes and levels, the
        factor 0 clears codes."""
        magnitude = torch.where(factor == 0, 1.0, factor.abs())
        swapped = factor < 0
        below, above = (torch.where(swapped, *pair) for pair in ((self.above, self.below), (self.below, self.above)))
        below, above = ((level.double() * magnitude).to(self.above.dtype) for level in (below, above))
        sign = spread(factor.sign().to(torch.int8), self.values.dim(), dim)
        return Codebook(self.values * sign, below.clamp(min=TINY), above.clamp(min=TINY), dim)


Stored: TypeAlias = Integers | Codebook
"""What a quantizer stores of a tensor: integers on an affine grid, or codes of levels."""


def spread(parameter: Tensor, rank: int, dim: int | None, groups: Tensor | None = None) -> Tensor:
    """A per-tensor (), per-channel (c,) or per-group (c, g) parameter, viewed to broadcast with a tensor of `rank`.

    Per group, `dim` is 0 and the groups divide the last dim.
    """
    if dim is None:
        return parameter
    if groups is not None:
        return parameter[:, groups].view(parameter.shape[0], *[1] * (rank - 2), groups.shape[0])
    return parameter.view([-1 if d == dim else 1 for d in range(rank)])


def container(quant_min: int, quant_max: int) -> torch.dtype:
    """The smallest integer dtype that holds the codes."""
    for dtype in (torch.uint8, torch.int8, torch.uint16, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= quant_min and quant_max <= info.max:
            return dtype
    return torch.int32


class Quantizer(nn.Module, ABC):
    """Fake quantization with exact straight-through gradients.

    A quantizer is elementwise: it couples nothing but its per-channel tensors with the channel (see `couple_axes`).

    Attributes:
        spec: bits, symmetry, granularity.
        dim: the dim with one step per index; None: one step for the whole tensor.
        enabled: False passes the tensor through unchanged (while ranges are being calibrated).
    """

    def __init__(self, spec: QuantSpec, dim: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.dim = dim
        self.enabled = True

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The floats nearest to `x` that the codes stand for; shape and dtype of `x`."""

    @abstractmethod
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Choose step (and zero point, range) so that the codes span `low` … `high`.

        Args:
            low, high: () or (c,) or (c, groups), in the units of the tensor. Degenerate ranges (all zero, empty of
                width) give a positive step all the same.
        """

    @abstractmethod
    def to_integers(self, x: Tensor) -> Integers:
        """The codes of `x`: `to_integers(x).dequantize()` equals `forward(x)` bit for bit."""

    def stored(self, x: Tensor) -> Stored:
        """What is stored of `x`, on an affine grid or not; dequantized, bit for bit what `forward` returns."""
        return self.to_integers(x)

    @property
    @abstractmethod
    def bits(self) -> Tensor:
        """() float: how many bits the codes take. Constant but for quantizers that learn it."""

    @property
    def exponent(self) -> float:
        """What is rounded is sign(x) |x|^exponent: 1 but for quantizers that learn it."""
        return 1.0

    def extra_repr(self) -> str:
        """What a printed model shows."""
        spec = self.spec
        size = f" of {spec.group_size}" if spec.granularity == "group" else ""
        where = "" if self.dim is None else f", dim={self.dim}"
        symmetry = "symmetric" if spec.symmetric else "affine"
        return f"{spec.bits} bits, {symmetry}, per {spec.granularity}{size}{where}"

    def project(self) -> None:
        """Bring parameters that an optimizer moved back to where they are valid; in place, without gradients."""

    def couple_axes(self, x: Axes, own: Mapping[str, Axes], why: Reason) -> Axes:
        """How the axes of the result follow from those of `x`.

        Args:
            x: axes of the operand.
            own: axes of the quantizer's parameters and buffers, by name.
            why: what to freeze with.
        """
        if self.dim is not None:
            for axes in own.values():
                if axes and self.spec.granularity != "tensor":
                    couple(x[self.dim], axes[0], why)
        return x
