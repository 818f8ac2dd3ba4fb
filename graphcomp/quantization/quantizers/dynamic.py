"""Levels that span the values at hand: ranges at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from graphcomp.errors import PlanError
from graphcomp.quantization.dynamic import HIGHEST, levels
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.gradients import fake_quantize, multiples
from graphcomp.quantization.spec import QuantSpec
from graphcomp.quantization.stored import Affine


class DynamicQuantizer(Quantizer):
    """x̂ = (clamp(round(x / s) + z, lowest, 255) - z) * s, where s and z are those of `x` itself.

    Per tensor, s spans the values and 0 in 255 steps, and z is a whole number from 0 to 255 (ONNX's
    DynamicQuantizeLinear); per token, each row of the last dim has an s of 127 steps on each side of z = 128. No
    parameters: nothing is calibrated, and the levels of one sample depend on what lies beside the sample in a tensor.
    The gradient is straight through; s and z count as constants.

    Raises:
        PlanError: the spec is of ranges that are known beforehand.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        if not spec.dynamic:
            raise PlanError("DynamicQuantizer was given a static spec", fix="make_quantizer(spec, …)")

    @property
    def per_token(self) -> bool:
        """Whether each row of the last dim has levels of its own."""
        return self.spec.granularity == "token"

    @property
    def bits(self) -> Tensor:
        """() float32: as many as the spec says."""
        return torch.full((), float(self.spec.bits))

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return int(self.per_token)

    def forward(self, x: Tensor) -> Tensor:
        """The nearest level of each element: shape and dtype of `x`."""
        if not self.enabled:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale, zero = levels(wide.detach(), self.per_token)
        return fake_quantize(wide, scale, zero, self.lowest, HIGHEST).to(x.dtype)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Change nothing: the range is that of the values at hand."""

    @torch.no_grad()
    def to_integers(self, x: Tensor) -> Affine:
        """The codes of `x`, from 0 (per token 1) to 255, with a scale () or (…, 1) that broadcasts."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale, zero = levels(wide, self.per_token)
        codes = multiples(wide, scale, zero, self.lowest, HIGHEST) + zero
        whole = zero.to(torch.int32).expand_as(scale).contiguous()
        return Affine(codes.to(torch.uint8), scale, whole, self.lowest, HIGHEST)
