"""Levels from a table of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from graphcomp.coupling.axis import Axes, Reason, couple, freeze
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.gradients import straight_through
from graphcomp.quantization.spec import MIN_BITS, QuantSpec
from graphcomp.quantization.stored import Codebook, spread


class CodebookQuantizer(Quantizer):
    """x̂ = the value of the table that is nearest to x; of two as near, the one of the lower code.

    The gradient of x passes straight through; a value of the table gets the sum over the elements that have the value.

    Attributes:
        table: parameter (levels,), or (c, levels) along `dim`; 2 to 256 levels.
    """

    def __init__(self, spec: QuantSpec, table: Tensor, dim: int | None = None) -> None:
        super().__init__(spec, dim)
        self.table = nn.Parameter(table.clone())

    def forward(self, x: Tensor) -> Tensor:
        """The level of each element: shape and dtype of `x`."""
        if not self.enabled:
            return x
        return straight_through(x, self._codebook(x).dequantize().to(x.dtype))

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Values that are evenly spaced from `low` to `high`, 0 included in the range."""
        low, high = (end.to(self.table).expand(self.table.shape[:-1])[..., None] for end in (low, high))
        low, high = low.clamp(max=0), high.clamp(min=0)
        share = torch.linspace(0, 1, self.table.shape[-1]).to(self.table)
        self.table.copy_(low + (high - low) * share)

    @torch.no_grad()
    def to_integers(self, x: Tensor) -> Codebook:
        """The codes of `x`, whether or not the quantizer is enabled."""
        found = self._codebook(x)
        return replace(found, table=found.table.detach().clone())

    def _codebook(self, x: Tensor) -> Codebook:
        table = self.table.to(torch.promote_types(torch.promote_types(x.dtype, self.table.dtype), torch.float32))
        wide = x.detach().to(table.dtype)
        best = torch.full_like(wide, torch.inf)
        codes = torch.zeros_like(wide, dtype=torch.uint8)
        for code, level in enumerate(table.detach().unbind(-1)):
            distance = (wide - spread(level, x.dim(), self.dim)).abs()
            codes = torch.where(distance < best, code, codes)
            best = torch.minimum(distance, best)
        return Codebook(codes, table, self.dim)

    @property
    def bits(self) -> Tensor:
        """() float32: as many as the codes are stored in."""
        return torch.full((), float(max((self.table.shape[-1] - 1).bit_length(), MIN_BITS)), device=self.table.device)

    def couple_axes(self, x: Axes, own: Mapping[str, Axes], why: Reason) -> Axes:
        """Tables go with their channel; which values there are is not up for pruning."""
        *channels, levels = own["table"]
        for axis in channels:
            assert self.dim is not None
            couple(x[self.dim], axis, why)
        freeze(levels, Reason("values are looked up by number", why.op, why.source))
        return x

    def extra_repr(self) -> str:
        """What a printed model shows."""
        where = "" if self.dim is None else f", dim={self.dim}"
        return f"{self.table.shape[-1]} levels, per {self.spec.granularity}{where}"
