"""Levels about 0 with a learnable step per channel, and as many of them in each channel as the channel has bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphcomp.errors import PlanError
from graphcomp.quantization.quantizers.gradients import bounded, fake_quantize, multiples, scale_gradient
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.quantizers.uniform import largest_step
from graphcomp.quantization.spec import MIN_BITS, QuantSpec
from graphcomp.quantization.stored import SMALLEST_STEP, Affine, container, spread


class MixedQuantizer(SymmetricQuantizer):
    """x̂ = clamp(round(x / scale), -L, L) * scale, with L = 2^(width - 1) - 1 of each channel's own width.

    Attributes:
        widths: (c,) int64 buffer: bits of each channel, from 2 to `spec.bits`, which all channels begin with.

    Codes are stored in as many bits as the spec says; those of a channel lie within the channel's own.

    Raises:
        PlanError: the spec is not of kind "mixed", or does not fit `shape` and `dim`.

    Source: bits per kernel as in AJPQ (Tang, Wei and Li 2020, arXiv 2011.06231); the step is LSQ's (arXiv 1902.08153).
    """

    kind = "mixed"
    widths: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: Sequence[int] | None = None,
        dim: int | None = None,
        *,
        gradient_scale: bool = True,
    ) -> None:
        super().__init__(spec, shape, dim, gradient_scale=gradient_scale)
        self.register_buffer("widths", torch.full(self.scale.shape, spec.bits, dtype=torch.int64))

    @property
    def bits(self) -> Tensor:
        """() float32: the mean over channels."""
        return self.widths.double().mean().float()

    @torch.no_grad()
    def set_widths(self, widths: Tensor) -> None:
        """Give each channel so many bits.

        Raises:
            PlanError: not one number from 2 to `spec.bits` for each channel.
        """
        fits = widths.shape == self.widths.shape and not widths.is_floating_point()
        if not fits or bool(((widths < MIN_BITS) | (widths > self.spec.bits)).any()):
            raise PlanError(
                f"bits of channels must be {self.widths.numel()} whole numbers from {MIN_BITS} to {self.spec.bits}, "
                f"got {widths.dtype} of shape {tuple(widths.shape)}",
                fix="quantizer.widths, with other numbers in it",
            )
        self.widths.copy_(widths)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """The step of each channel that reaches the farther of `low` and `high`; 1 where both are 0."""
        reach = torch.maximum(-low, high).to(self.scale.device, torch.float64).expand_as(self.scale)
        step = torch.where(reach > 0, reach / self._levels(torch.float64), 1.0)
        self.scale.copy_(step.clamp(*self._step_limits()))

    @torch.no_grad()
    def to_integers(self, x: Tensor) -> Affine:
        """The codes of `x`, whether or not the quantizer is enabled."""
        wide = self._wide(x)
        most = self._spread(self._levels(wide), x)
        codes = multiples(x.to(wide), self._step(x), None, -most, most)
        low, high = self.spec.quant_min, self.spec.quant_max
        scale = self._valid(self.scale, wide)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return Affine(codes.to(container(low, high)), scale, zero, low, high, self.dim, None, self.widths.clone())

    def extra_repr(self) -> str:
        """What a printed model shows."""
        return f"{super().extra_repr()}, {float(self.bits):.3g} bits on average"

    def _quantized(self, x: Tensor) -> Tensor:
        wide = x.to(self._wide(x))
        most = self._spread(self._levels(wide.dtype), x)
        return fake_quantize(wide, self._step(x), None, -most, most).to(x.dtype)

    def _levels(self, dtype: torch.dtype) -> Tensor:
        """(c,) the highest code of each channel."""
        return 2.0 ** (self.widths.to(dtype) - 1) - 1

    def _spread(self, parameter: Tensor, x: Tensor) -> Tensor:
        return spread(parameter, x.dim(), self.dim)

    def _step(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        """The step as the forward uses it; LSQ's scale of the gradient is that of the channel's own highest code."""
        own = self.scale if step is None else step
        value = bounded(own.to(self._wide(x)), SMALLEST_STEP, largest_step(self.spec))
        if self.gradient_scale:
            shared = max(1, x.numel() // max(1, own.numel()))
            value = scale_gradient(value, (shared * self._levels(value.dtype)) ** -0.5)
        return self._spread(value, x)
