"""Three levels with two learnable scales: a codebook, as -below, 0 and above are not evenly spaced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphcomp.errors import PlanError
from graphcomp.quantization.quantizers.base import TINY, Codebook, Integers, Quantizer, spread
from graphcomp.quantization.quantizers.gradients import bounded, fake_quantize, scale_gradient
from graphcomp.quantization.quantizers.uniform import channel_dim, parameter_shape
from graphcomp.quantization.spec import QuantSpec

LARGEST = torch.finfo(torch.float32).max / 2


class TernaryQuantizer(Quantizer):
    """x̂ = the nearest of -below, 0 and above.

    Attributes:
        below, above: parameters () per tensor, (c,) per channel, > 0; 1 until `set_range`.

    Raises:
        PlanError: the spec does not fit `shape` and `dim`.

    Source: two learned scales as in Trained Ternary Quantization (Zhu et al. 2016, arXiv 1612.01064). Here the
    thresholds are the midpoints between levels, and the gradients are those of LSQ on either side of 0.
    """

    below: Tensor
    above: Tensor

    def __init__(self, spec: QuantSpec, shape: Sequence[int] | None = None, dim: int | None = None) -> None:
        dim = channel_dim(spec, shape, dim)
        super().__init__(spec, dim)
        self.below = nn.Parameter(torch.ones(parameter_shape(spec, shape, dim)))
        self.above = nn.Parameter(torch.ones(parameter_shape(spec, shape, dim)))

    @classmethod
    def of(cls, codebook: Codebook, spec: QuantSpec) -> TernaryQuantizer:
        """Return the quantizer with the levels of a codebook."""
        found = cls(QuantSpec(spec.bits, kind="ternary", granularity="tensor" if codebook.dim is None else "channel"),
                    codebook.values.shape, codebook.dim)  # fmt: skip
        found.below, found.above = nn.Parameter(codebook.below.clone()), nn.Parameter(codebook.above.clone())
        return found

    def forward(self, x: Tensor) -> Tensor:
        """The nearest level of each element: shape and dtype of `x`."""
        if not self.enabled:
            return x
        wide = x.to(self._wide(x))
        below, above = (self._learned(level, wide) for level in (self.below, self.above))
        # relu has the gradient 0 at 0 and the clamp 1, so that both sides together have 1
        positive, negative = wide.relu(), wide.clamp(max=0)
        found = fake_quantize(positive, above, None, 0, 1) + fake_quantize(negative, below, None, -1, 0)
        return found.to(x.dtype)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Levels at `low` and `high`; where one end is 0 the other counts for both, and 1 where both are."""
        low, high = (end.to(self.above.device, torch.float64) for end in (-low, high))
        low, high = low.clamp(min=0), high.clamp(min=0)
        for level, own, other in ((self.below, low, high), (self.above, high, low)):
            chosen = torch.where(own > 0, own, other)
            level.copy_(torch.where(chosen > 0, chosen, 1.0).clamp(TINY, LARGEST))

    @torch.no_grad()
    def stored(self, x: Tensor) -> Codebook:
        """The codes of `x`, whether or not the quantizer is enabled."""
        dtype = self._wide(x)
        below, above = (level.to(dtype).clamp(TINY, LARGEST) for level in (self.below, self.above))
        wide = x.to(dtype)
        high = (wide.relu() / spread(above, x.dim(), self.dim)).clamp(max=1).round()
        low = (wide.clamp(max=0) / spread(below, x.dim(), self.dim)).clamp(min=-1).round()
        return Codebook((high + low).to(torch.int8), below, above, self.dim)

    def to_integers(self, x: Tensor) -> Integers:
        """Refused: no single scale stands for the levels.

        Raises:
            PlanError: always.
        """
        raise PlanError(
            "a ternary tensor with two scales is no tensor of integers with one",
            why="its levels -below, 0 and above are not evenly spaced",
            fix="quantizer.stored(x); or QuantSpec(2), whose three levels are evenly spaced",
        )

    @property
    def bits(self) -> Tensor:
        """() float32: 2."""
        return torch.full((), float(self.spec.bits), device=self.above.device)

    @torch.no_grad()
    def project(self) -> None:
        """Clamp the levels to positive, finite numbers."""
        for level in (self.below, self.above):
            level.clamp_(TINY, min(LARGEST, torch.finfo(level.dtype).max))

    def _wide(self, x: Tensor) -> torch.dtype:
        return torch.promote_types(torch.promote_types(x.dtype, self.above.dtype), torch.float32)

    def _learned(self, level: Tensor, x: Tensor) -> Tensor:
        """A level as the forward uses it: in range, its gradient scaled as LSQ's, spread to broadcast with `x`."""
        value = bounded(level.to(x.dtype), TINY, LARGEST)
        shared = max(1, x.numel() // max(1, level.numel()))
        return spread(scale_gradient(value, shared**-0.5), x.dim(), self.dim)
