"""How the other operand of a product with a weight of integers is quantized, by kernels or in floats."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from graphcomp.quantization import ops
from graphcomp.quantization.dynamic import MIDDLE, signed_codes


@dataclass(frozen=True)
class Operand:
    """How the other operand of a product is quantized.

    Attributes:
        per_token: with a range at run time for each row; else one range.
        levels: scale, zero point, lowest and highest code, from 0 to 255; None: ranges are known at run time.
    """

    per_token: bool = False
    levels: tuple[float, int, int, int] | None = None

    def signed(self, rows: Tensor) -> tuple[Tensor, Tensor | float, Tensor | int]:
        """Return codes that are 128 lower, scale and zero point.

        A row with NaN has the scale NaN. Values beyond known levels get the lowest or the highest code.

        Args:
            rows: (n, i) float32 or float64.

        Returns:
            Codes (n, i) int8; scale () or (n, 1), or a number; zero point of the codes before they were lowered.
        """
        if self.levels is None:
            return signed_codes(rows, self.per_token)
        scale, zero, low, high = self.levels
        wide = torch.round(rows * (1.0 / scale)).add_(zero - MIDDLE).clamp_(low - MIDDLE, high - MIDDLE)
        codes = wide.to(torch.int8)
        if math.isnan(float(wide.sum())):  # one sum is all that rows without NaN cost
            spoilt = wide.isnan().any(-1, keepdim=True)
            return codes, torch.where(spoilt, torch.nan, torch.full_like(wide[:, :1], scale)), zero
        return codes, scale, zero

    def floats(self, rows: Tensor) -> Tensor:
        """Return the floats that the codes stand for, of levels that are known."""
        assert self.levels is not None
        arguments = (*self.levels, torch.uint8)
        found: Tensor = ops.dequantize_per_tensor(ops.quantize_per_tensor(rows, *arguments), *arguments)
        return torch.where(rows.isnan(), rows, found.to(rows.dtype))


_EXACT: ContextVar[bool] = ContextVar("exact products", default=False)


@contextmanager
def exact_products() -> Iterator[None]:
    """Within, products are computed in floats, as a graph computes them: the codes of weights, and of operands whose
    levels are known, are made floats first. What the kernels are compared with."""
    token = _EXACT.set(True)
    try:
        yield
    finally:
        _EXACT.reset(token)


def are_exact() -> bool:
    """Return whether `exact_products` holds."""
    return _EXACT.get()
