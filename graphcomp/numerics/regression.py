"""Ridge regression from sums over rows, in float64, for many problems of one size at once.

The solution is a change: with an infinite ridge nothing changes. An intercept is one more feature, the last, which is
always 1; no ridge is on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges to choose from, in units of the mean second moment of the features."""
FEW_RIDGES = (1e-3, 1e-1)
"""Those of large problems, where each one takes seconds."""
LARGE = 2048
"""Features of a large problem."""

MARGIN = 1e-3
"""Share of the error on held-out rows that a change must take away."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over rows of `g` problems with `n` features and `o` targets each, float64.

    Attributes:
        xx: (g, n, n), of x xᵀ.
        xt: (g, n, o), of x tᵀ.
        tt: of all t².
        rows: how many rows.
    """

    xx: Tensor
    xt: Tensor
    tt: float
    rows: int

    @classmethod
    def of(cls, x: Tensor, t: Tensor) -> Moments:
        """Return the sums over the rows of `x` (g, r, n) and `t` (g, r, o), float64."""
        return cls(x.mT @ x, x.mT @ t, float(t.square().sum()), x.shape[1])

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.xx + other.xx, self.xt + other.xt, self.tt + other.tt, self.rows + other.rows)

    def error(self, change: Tensor) -> float:
        """Return Σ (t - xᵀ d)² for a change d, (g, n, o)."""
        explained = 2 * (change * self.xt).sum() - (change * (self.xx @ change)).sum()
        return max(self.tt - float(explained), 0.0)

    @property
    def finite(self) -> bool:
        """Whether no row was NaN or infinite, or too large to be squared."""
        return math.isfinite(self.tt) and bool(self.xx.isfinite().all() & self.xt.isfinite().all())


def solve(moments: Moments, ridge: float, intercept: bool = False) -> Tensor | None:
    """Return (Σ x xᵀ + λ · mean diag · I)⁻¹ Σ x tᵀ, (g, n, o); None where the sums are singular.

    Args:
        moments: of the rows.
        ridge: λ.
        intercept: whether the last feature is the constant 1, which has no ridge on it.
    """
    if math.isinf(ridge):
        return torch.zeros_like(moments.xt)
    diagonal = moments.xx.diagonal(dim1=1, dim2=2)
    features = diagonal[:, :-1] if intercept else diagonal
    mean = features.mean(1, keepdim=True)
    added = (ridge * torch.where(mean > 0, mean, 1.0)).expand_as(diagonal).clone()
    if intercept:
        added[:, -1] = 0
    factor, failed = torch.linalg.cholesky_ex(moments.xx + torch.diag_embed(added))
    return None if bool(failed.any()) else torch.cholesky_solve(moments.xt, factor)


def choose_ridge(fit: Moments, held: Moments, intercept: bool = False) -> float:
    """Return the ridge whose change by `fit` leaves the smallest error on `held`; infinite where no change is best."""
    best, least = math.inf, held.tt * (1 - MARGIN)
    for ridge in FEW_RIDGES if fit.xx.shape[1] > LARGE else RIDGES:
        found = solve(fit, ridge, intercept)
        error = math.inf if found is None else held.error(found)
        if error < least:
            best, least = ridge, error
    return best
