"""Levels with a learnable step and zero point: LSQ+."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphcomp.quantization.quantizers import recompute
from graphcomp.quantization.quantizers.gradients import fake_quantize, multiples, round_through
from graphcomp.quantization.quantizers.uniform import UniformQuantizer
from graphcomp.quantization.spec import QuantSpec
from graphcomp.quantization.stored import Affine, container


class AffineQuantizer(UniformQuantizer):
    """x̂ = (clamp(round(x / scale) + z, quant_min, quant_max) - z) * scale, z the rounded `zero_point`.

    Attributes:
        zero_point: parameter in the shape of `scale`, float, in codes; quant_min until `set_range`. Rounded and clamped
            to the code range where it is used, so 0 is always a level. The others as UniformQuantizer, as arguments.

    Raises:
        PlanError: the spec is symmetric, or does not fit `shape` and `dim`.

    Source: LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576), with a whole zero point in place of its float offset.
    """

    symmetric = False
    zero_point: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: Sequence[int] | None = None,
        dim: int | None = None,
        *,
        gradient_scale: bool = True,
    ) -> None:
        super().__init__(spec, shape, dim, gradient_scale=gradient_scale)
        self.zero_point = nn.Parameter(torch.full_like(self.scale, spec.quant_min))

    def forward(self, x: Tensor) -> Tensor:
        """The nearest level of each element: shape and dtype of `x`."""
        if not self.enabled:
            return x
        result = self._quantized(x)
        recompute.note(result, self._quantized, x, (self.scale, self.zero_point))
        return result

    def _quantized(self, x: Tensor) -> Tensor:
        low, high = self.spec.quant_min, self.spec.quant_max
        return fake_quantize(x.to(self._wide(x)), self._step(x), self._zero(x), low, high).to(x.dtype)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Levels from `low` to `high`, widened to reach 0. Where both are 0 the step is 1; low = 0 gives quant_min."""
        step, zero = self._step_and_zero(low, high)
        self.scale.copy_(step)
        self.zero_point.copy_(zero)

    @torch.no_grad()
    def to_integers(self, x: Tensor) -> Affine:
        """The codes of `x`, whether or not the quantizer is enabled.

        The scale is in the dtype the forward computes in; for half floats, cast what they dequantize to.
        """
        low, high = self.spec.quant_min, self.spec.quant_max
        dtype, zero = self._wide(x), self._zero(x)
        codes = multiples(x.to(dtype), self._step(x), zero, low, high) + zero
        whole = self.zero_point.to(dtype).clamp(low, high).round().to(torch.int32)
        return Affine(
            codes.to(container(low, high)), self._valid(self.scale, dtype), whole, low, high, self.dim, self.groups
        )

    @torch.no_grad()
    def project(self) -> None:
        """Clamp `scale` to the steps that are valid and `zero_point` to the codes."""
        super().project()
        self.zero_point.clamp_(self.spec.quant_min, self.spec.quant_max)

    def _zero(self, x: Tensor) -> Tensor:
        return round_through(self._learned(self.zero_point, self.spec.quant_min, self.spec.quant_max, x))
