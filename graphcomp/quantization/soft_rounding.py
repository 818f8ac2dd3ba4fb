"""Rounding up or down, relaxed: a place between two neighbouring levels of each weight is learned, and pulled to one.

Source: Nagel et al. 2020 (AdaRound, arXiv 2004.10568), equations 22 to 24. Difference: the place begins at the level
that the weight has, drawn towards the weight before rounding, so that what no gradient moves is rounded as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.gradients import straight_through
from graphcomp.quantization.stored import Affine, spread

LOW, HIGH = -0.1, 1.1
"""Ends of the stretched sigmoid, ζ and γ of equation 23: whole levels are reached, not only approached."""
DRAWN = 0.45
"""Share of the way from a weight's level to the weight before rounding, or to the next level, where learning begins."""


class SoftRounding:
    """The levels that one weight is rounded to, as far as they are learned.

    Attributes:
        free: V of equation 22, in the shape of the weight.

    Args:
        stored: codes of the weight as it is rounded, evenly spaced.
        floats: the weight before rounding, in that shape.
        dtype: of the weight.
    """

    def __init__(self, stored: Affine, floats: Tensor, dtype: torch.dtype) -> None:
        rank = stored.values.dim()
        self.scale, zero = (spread(t, rank, stored.dim, stored.groups) for t in (stored.scale, stored.zero_point))
        self.dtype = dtype
        code = stored.values.to(self.scale.dtype) - zero
        place = floats.to(self.scale.dtype) / self.scale
        # the level and its neighbour towards the float weight, inside the range of the codes
        below = torch.where(place >= code, code, code - 1)
        self.below = below.clamp(stored.quant_min - zero, stored.quant_max - zero - 1)
        level = code - self.below
        share = level + ((place - self.below).clamp(0, 1) - level) * DRAWN
        self.free = torch.logit((share - LOW) / (HIGH - LOW)).requires_grad_(True)

    @classmethod
    def of(cls, quantizer: Quantizer, weight: Tensor, floats: Tensor) -> SoftRounding | None:
        """Return the rounding of a weight that `floats` was rounded to; None where its levels are not evenly spaced."""
        if quantizer.exponent != 1.0:
            return None
        stored = quantizer.to_integers(weight)
        return cls(stored, floats, weight.dtype) if isinstance(stored, Affine) else None

    def share(self) -> Tensor:
        """Return h(V), from 0 at the lower level to 1 at the upper one."""
        return (torch.sigmoid(self.free) * (HIGH - LOW) + LOW).clamp(0, 1)

    def soft(self) -> Tensor:
        """Return the weight between its levels."""
        return ((self.below + self.share()) * self.scale).to(self.dtype)

    def between(self, share: float) -> Tensor:
        """Return `share` of the way from the hard weight to the soft one, with the gradient of the soft one."""
        soft = self.soft()
        return straight_through(soft, soft.detach() * share + self.hard() * (1 - share))

    @torch.no_grad()
    def hard(self) -> Tensor:
        """Return the weight on its levels."""
        return ((self.below + (self.free >= 0)) * self.scale).to(self.dtype)

    def undecided(self, exponent: float) -> Tensor:
        """Return Σ 1 - |2 h - 1|^exponent, equation 24: 0 where all weights are on a level."""
        return (1 - (2 * self.share() - 1).abs().pow(exponent)).sum()
