"""All GETA quantizers of a module as vectors: their bits are bounded, frozen and read in a few operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphcomp.quantization.quantizers.geta import EXPONENT_LIMITS, RANGE_LIMITS, GetaQuantizer
from graphcomp.torch_compat import foreach_add_, foreach_clamp_max_, foreach_clamp_min_, foreach_copy_, foreach_zero_

FEWEST_LEVELS, MOST_LEVELS = 2.0**0.5 - 1, 2.0**23 - 1
"""Of a step before bits are bounded, those of 1.5 and of 24 bits: it stays positive, and float32 holds all codes."""

DECAY = 0.99
"""Per step, of a range that follows what is quantized: one outlier does not widen it for long."""


class Bank:
    """Step d, range q_m and exponent t of l quantizers, each read and written as one (l,) float64 vector.

    Nothing here waits for the device, and nothing loops over quantizers but torch's own `_foreach` kernels.

    Attributes:
        quantizers: of one device, in the order of all vectors.
        low, high: (l,) float64, the bits each may have.
    """

    def __init__(self, quantizers: Sequence[GetaQuantizer], low: Sequence[float], high: Sequence[float]) -> None:
        self.quantizers = tuple(quantizers)
        self.steps = [q.d for q in quantizers]
        self.ranges = [q.q_m for q in quantizers]
        self.exponents = [q.t for q in quantizers]
        self.powers = any(t.requires_grad for t in self.exponents)
        self.device = self.steps[0].device if self.steps else torch.device("cpu")
        self.low, self.high = (torch.tensor(bits, dtype=torch.float64, device=self.device) for bits in (low, high))

    def __len__(self) -> int:
        return len(self.quantizers)

    def parameters(self) -> list[Tensor]:
        """d, q_m and t of every quantizer."""
        return [*self.steps, *self.ranges, *self.exponents]

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring q_m and t, which an optimizer moved, back into their limits, and d to what gives 1.5 to 24 bits."""
        if not self.quantizers:
            return
        foreach_clamp_min_(self.ranges, RANGE_LIMITS[0])
        foreach_clamp_max_(self.ranges, RANGE_LIMITS[1])
        if self.powers:
            foreach_clamp_min_(self.exponents, EXPONENT_LIMITS[0])
            foreach_clamp_max_(self.exponents, EXPONENT_LIMITS[1])
        widest = self.widest()
        self.set_d(torch.clamp(self.d(), widest / MOST_LEVELS, widest / FEWEST_LEVELS))

    def follow(self, on: bool) -> None:
        """Whether the ranges follow what is quantized (see `set_ranges`)."""
        for quantizer in self.quantizers:
            quantizer.follow = on
            quantizer.peak.zero_()

    @torch.no_grad()
    def set_ranges(self) -> None:
        """Let each range be the largest magnitude seen since the last call, or a little less than before where that is
        larger; steps give `high` bits. Processes that train together agree on the largest."""
        if not self.quantizers:
            return
        peaks = torch.stack([quantizer.peak for quantizer in self.quantizers]).double()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(peaks, torch.distributed.ReduceOp.MAX)
        old = self.q_m()
        q_m = torch.where(peaks > 0, torch.maximum(peaks, DECAY * old), old)
        foreach_copy_(self.ranges, list(q_m.to(self.ranges[0].dtype).unbind()))
        foreach_zero_([quantizer.peak for quantizer in self.quantizers])
        self.clamp()
        self.fix(self.high)

    def d(self) -> Tensor:
        """(l,) the steps."""
        return self._stacked(self.steps)

    def q_m(self) -> Tensor:
        """(l,) the ranges."""
        return self._stacked(self.ranges)

    def t(self) -> Tensor:
        """(l,) the exponents."""
        return self._stacked(self.exponents)

    def _stacked(self, values: Sequence[Tensor]) -> Tensor:
        if not values:
            return torch.zeros(0, dtype=torch.float64)
        return torch.stack([value.detach() for value in values]).double()

    def widest(self) -> Tensor:
        """(l,) q_m^t, the largest magnitude that is rounded."""
        return self.q_m().pow(self.t()) if self.powers else self.q_m()

    def bits(self) -> Tensor:
        """(l,) b = log2(q_m^t / d + 1) + 1."""
        return torch.log2(self.widest() / self.d() + 1) + 1

    def limits(self, most: Tensor) -> tuple[Tensor, Tensor]:
        """(l,) the smallest and the largest step that give `low` to `most` bits; `most` is (l,)."""
        widest = self.widest()
        return widest / levels(most), widest / levels(self.low)

    @torch.no_grad()
    def set_d(self, d: Tensor) -> None:
        """Write the steps."""
        foreach_copy_(self.steps, list(d.to(self.steps[0].dtype).unbind()))

    def project(self, most: Tensor) -> None:
        """Move d, and only d, so that low <= bits <= `most` (PPSG)."""
        self.set_d(torch.clamp(self.d(), *self.limits(most)))

    def fix(self, bits: Tensor) -> None:
        """Set d to what gives exactly `bits` (l,)."""
        self.set_d(self.widest() / levels(bits))

    @torch.no_grad()
    def tie(self, bits: Tensor) -> None:
        """Where `fix` sets d = q_m^t / levels(bits) after each step: add to the gradients of q_m and t what the loss
        owes them through d. Without it a range that nothing exceeds has no gradient, and stays as wide as it is."""
        having = [k for k, d in enumerate(self.steps) if d.grad is not None and self.ranges[k].grad is not None]
        if not having:
            return
        at = torch.tensor(having, device=self.device)
        of_d = self._stacked([self.steps[k].grad for k in having])  # type: ignore[misc]
        q_m, t = self.q_m()[at], self.t()[at] if self.powers else torch.ones_like(of_d)
        slope = t * q_m.pow(t - 1) / levels(bits)[at]
        _add([self.ranges[k].grad for k in having], of_d * slope)
        learned = [k for k in having if self.exponents[k].grad is not None]
        if learned:
            at = torch.tensor([having.index(k) for k in learned], device=self.device)
            slope = q_m.pow(t) * q_m.log() / levels(bits)[torch.tensor(having, device=self.device)]
            _add([self.exponents[k].grad for k in learned], (of_d * slope)[at])


def _add(gradients: Sequence[Tensor | None], more: Tensor) -> None:
    """Add to each gradient () its part of (l,) `more`."""
    found = [gradient for gradient in gradients if gradient is not None]
    foreach_add_(found, list(more.to(found[0].dtype).unbind()))


def levels(bits: Tensor) -> Tensor:
    """Positive levels of a symmetric code: 2^(bits - 1) - 1."""
    return torch.exp2(bits - 1) - 1
