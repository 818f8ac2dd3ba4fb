"""Levels about 0 with a learnable step: LSQ."""

from __future__ import annotations

import torch
from torch import Tensor

from graphcomp.quantization.quantizers import recompute
from graphcomp.quantization.quantizers.gradients import fake_quantize, multiples
from graphcomp.quantization.quantizers.uniform import UniformQuantizer
from graphcomp.quantization.stored import Affine, container


class SymmetricQuantizer(UniformQuantizer):
    """x̂ = clamp(round(x / scale), quant_min, quant_max) * scale. Arguments and attributes as UniformQuantizer.

    Raises:
        PlanError: the spec is not symmetric, or does not fit `shape` and `dim`.

    Source: LSQ (Esser et al. 2020, arXiv 1902.08153). The most negative code of two's complement is unused.
    """

    symmetric = True

    def forward(self, x: Tensor) -> Tensor:
        """The nearest level of each element: shape and dtype of `x`."""
        if not self.enabled:
            return x
        result = self._quantized(x)
        recompute.note(result, self._quantized, x, (self.scale,))
        return result

    def _quantized(self, x: Tensor) -> Tensor:
        wide = x.to(self._wide(x))
        return fake_quantize(wide, self._step(x), None, self.spec.quant_min, self.spec.quant_max).to(x.dtype)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """The step that reaches the farther of `low` and `high`; 1 where both are 0."""
        self.scale.copy_(self._step_and_zero(low, high)[0])

    @torch.no_grad()
    def to_integers(self, x: Tensor) -> Affine:
        """The codes of `x`, whether or not the quantizer is enabled.

        The scale is in the dtype the forward computes in; for half floats, cast what they dequantize to.
        """
        low, high = self.spec.quant_min, self.spec.quant_max
        codes = multiples(x.to(self._wide(x)), self._step(x), None, low, high)
        scale = self._valid(self.scale, self._wide(x))
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return Affine(codes.to(container(low, high)), scale, zero, low, high, self.dim, self.groups)
