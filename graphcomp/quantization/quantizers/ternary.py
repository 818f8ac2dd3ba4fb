"""Weights of three levels: -s, 0 and s (TWN), or -n, 0 and p (TTQ)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphcomp.quantization.quantizers import recompute
from graphcomp.quantization.quantizers.gradients import sum_of_product
from graphcomp.quantization.quantizers.uniform import StepQuantizer
from graphcomp.quantization.spec import Kind, QuantSpec
from graphcomp.quantization.stored import Affine, Codebook, Stored, spread

SHARE_OF_MEAN = 0.7
"""Threshold of TWN, in mean magnitudes."""


class TernaryQuantizer(StepQuantizer):
    """x̂ = scale where x > threshold, -scale where x < -threshold, else 0. Arguments as StepQuantizer.

    Of a spec that is not symmetric the lower level is -scale_below. Scales are learned; the threshold stays as it was
    fitted, so that an element is quantized the same whatever else is in the tensor.

    Attributes:
        scale: parameter () per tensor, (c,) per channel: s, or p.
        scale_below: as `scale`: n; None where the spec is symmetric.
        threshold: buffer, as `scale`, >= 0.

    Raises:
        PlanError: the spec is of another kind, or does not fit `shape` and `dim`.

    Source: TWN (Li et al. 2016, arXiv 1605.04711): threshold 0.7 mean |w|, s the mean of |w| beyond, straight-through
        gradients. TTQ (Zhu et al. 2017, arXiv 1612.01064): two learned scales, whose gradients are sums over the
        weights of each. Otherwise here: s is learned, too, and starts from TWN's; thresholds are not computed again
        from the weights of each step; TTQ's threshold and first scales are TWN's; and the gradient of a weight is not
        multiplied by the weight's scale, which TTQ does for weights that are normalised to 1.
    """

    kind: ClassVar[Kind] = "ternary"
    nearest: ClassVar[bool] = False
    threshold: Tensor
    scale_below: nn.Parameter | None

    def __init__(
        self,
        spec: QuantSpec,
        shape: Sequence[int] | None = None,
        dim: int | None = None,
        *,
        gradient_scale: bool = True,
    ) -> None:
        super().__init__(spec, shape, dim, gradient_scale=gradient_scale)
        self.register_buffer("threshold", torch.full_like(self.scale.detach(), 0.5))
        self.scale_below = None if spec.symmetric else nn.Parameter(torch.ones_like(self.scale))

    @property
    def multiples(self) -> bool:
        """Whether both sides have one scale."""
        return self.scale_below is None

    def steps(self) -> Sequence[nn.Parameter]:
        """`scale`, and `scale_below` where there is one."""
        return (self.scale,) if self.scale_below is None else (self.scale, self.scale_below)

    def forward(self, x: Tensor) -> Tensor:
        """The level of each element: shape and dtype of `x`."""
        if not self.enabled:
            return x
        result = self._quantized(x)
        recompute.note(result, self._quantized, x, self.steps())
        return result

    def _quantized(self, x: Tensor) -> Tensor:
        below = None if self.scale_below is None else self._step(x, self.scale_below)
        found: Tensor = _Ternary.apply(x.to(self._wide(x)), self._threshold(x), self._step(x), below)  # type: ignore[no-untyped-call]
        return found.to(x.dtype)

    @torch.no_grad()
    def fit(self, x: Tensor) -> bool:
        """Set the threshold to 0.7 mean |x|, and scales to the mean magnitude of what lies beyond.

        Args:
            x: finite, of the shape that the quantizer was made for. Where a tensor or channel is all 0 the scale is 1.
                Where one side has nothing beyond the threshold, the scale of that side is the scale of the other.
        """
        rows = x.reshape(1, -1) if self.dim is None else x.movedim(self.dim, 0).reshape(x.shape[self.dim], -1)
        rows = rows.double()
        threshold = SHARE_OF_MEAN * rows.abs().mean(1)
        signs = signs_of(rows, threshold[:, None])
        both, above, below = (_mean(rows.abs(), signs.to(torch.bool) & side) for side in (True, rows > 0, rows < 0))
        self._set(threshold, both if self.spec.symmetric else above, below)
        return True

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Outer levels at `low` and `high`, those of a symmetric spec at the farther one; the threshold half way."""
        low, high = (
            end.to(self.scale.device, torch.float64).expand(self.scale.shape).reshape(-1) for end in (low, high)
        )
        below, above = -low.clamp(max=0), high.clamp(min=0)
        if self.spec.symmetric:
            above = torch.maximum(above, below)
        self._set(torch.where(above > 0, above, below) / 2, above, below)

    def _set(self, threshold: Tensor, above: Tensor, below: Tensor) -> None:
        """Store levels, (r,) float64 each; a level of 0 is none."""
        limits = self._step_limits()
        above, below = torch.where(above > 0, above, below), torch.where(below > 0, below, above)
        pairs = ((self.scale, above), (self.scale_below, below))
        for parameter, level in pairs:
            if parameter is not None:
                parameter.copy_(torch.where(level > 0, level.clamp(*limits), 1.0).view(parameter.shape))
        least = torch.minimum(above, below) * (1 - 2.0**-20)  # levels are their own, where parameters are rounded, too
        threshold = torch.where(least > 0, torch.minimum(threshold, least).clamp(max=limits[1]), 0.5)
        self.threshold.copy_(threshold.view(self.scale.shape))

    @torch.no_grad()
    def to_integers(self, x: Tensor) -> Stored:
        """The codes of `x`, whether or not the quantizer is enabled: -1, 0, 1 of one scale, else 0, 1, 2 of a table.

        Parameters are in the dtype the forward computes in; for half floats, cast what they dequantize to.
        """
        dtype = self._wide(x)
        signs = signs_of(x.to(dtype), self._threshold(x)).to(torch.int8)
        scale = self._valid(self.scale, dtype)
        if self.scale_below is None:
            return Affine(signs, scale, torch.zeros_like(scale, dtype=torch.int32), -1, 1, self.dim)
        table = torch.stack([-self._valid(self.scale_below, dtype), torch.zeros_like(scale), scale], -1)
        return Codebook((signs + 1).to(torch.uint8), table, self.dim)

    def _threshold(self, x: Tensor) -> Tensor:
        return spread(self.threshold.to(self._wide(x)), x.dim(), self.dim)

    def extra_repr(self) -> str:
        """What a printed model shows."""
        where = "" if self.dim is None else f", dim={self.dim}"
        return f"ternary, {'one scale' if self.multiples else 'two scales'}, per {self.spec.granularity}{where}"


def signs_of(x: Tensor, threshold: Tensor) -> Tensor:
    """-1, 0 and 1, in the dtype of `x`: on which side of the thresholds each element lies; a NaN is 0."""
    return (x > threshold).to(x.dtype) - (x < -threshold).to(x.dtype)


def _mean(x: Tensor, chosen: Tensor) -> Tensor:
    """(r,): the mean of the chosen elements of each row; 0 where there are none."""
    return (x * chosen).sum(1) / chosen.sum(1).clamp(min=1)


class _Ternary(torch.autograd.Function):
    """Levels of signs. The gradient of `x` passes straight through; those of scales are exact where x is no threshold:
    the sum over the elements of each level, with the sign of the level."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, threshold: Tensor, above: Tensor, below: Tensor | None) -> Tensor:
        signs = signs_of(x, threshold)
        if below is None:
            return signs * above
        return signs.clamp_min(0) * above + signs.clamp_max(0) * below

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        x, threshold, above, below = ctx.saved_tensors
        signs = signs_of(x, threshold)
        if below is None:
            return grad, None, sum_of_product(grad, signs, above.shape), None
        grad_above = sum_of_product(grad, signs.clamp_min(0), above.shape)
        return grad, None, grad_above, sum_of_product(grad, signs.clamp_max(0), below.shape)
