"""Ridge regression in float64, for many problems of one size at once: from sums over rows, or from the rows.

The solution is a change: with an infinite ridge nothing changes. An intercept is one more feature, the last, which is
always 1; no ridge is on it. Sums take features² of memory. Where there are more features than rows, the rows are
kept, and the dual problem of rows² is solved, whose solution is the same (Saunders et al. 1998, ridge regression in
dual variables).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges to choose from, in units of the mean second moment of the features."""
FEW_RIDGES = (1e-3, 1e-1)
"""Those of large problems, where each one takes seconds."""
LARGE = 2048
"""Order of the matrix of a large problem."""

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

    @property
    def order(self) -> int:
        """Order of the matrix that is factored, n."""
        return self.xx.shape[1]

    @property
    def no_change(self) -> Tensor:
        """Zeros, (g, n, o)."""
        return torch.zeros_like(self.xt)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of `g` problems with `n` features and `o` targets each, float64, where there are fewer rows than features.

    Attributes:
        x: (g, r, n).
        t: (g, r, o).
    """

    x: Tensor
    t: Tensor

    def __add__(self, other: Rows) -> Rows:
        return Rows(torch.cat([self.x, other.x], 1), torch.cat([self.t, other.t], 1))

    @property
    def tt(self) -> float:
        """Sum of all t²."""
        return float(self.t.square().sum())

    @property
    def rows(self) -> int:
        """How many rows, r."""
        return self.x.shape[1]

    def error(self, change: Tensor) -> float:
        """Return Σ (t - xᵀ d)² for a change d, (g, n, o)."""
        return float((self.t - self.x @ change).square().sum())

    @property
    def finite(self) -> bool:
        """Whether no row was NaN or infinite, or too large to be squared."""
        return math.isfinite(self.tt) and math.isfinite(float(self.x.square().sum()))

    @property
    def order(self) -> int:
        """Order of the matrix that is factored, r."""
        return self.rows

    @property
    def no_change(self) -> Tensor:
        """Zeros, (g, n, o)."""
        return self.x.new_zeros(len(self.x), self.x.shape[2], self.t.shape[2])


Evidence: TypeAlias = Moments | Rows
"""What a regression is solved from."""


def joined(a: Evidence, b: Evidence) -> Evidence:
    """Return what both hold; they are of one kind."""
    if isinstance(a, Moments) and isinstance(b, Moments):
        return a + b
    assert isinstance(a, Rows) and isinstance(b, Rows)
    return a + b


def solve(evidence: Evidence, ridge: float, intercept: bool = False) -> Tensor | None:
    """Return (Σ x xᵀ + λ · mean diag · I)⁻¹ Σ x tᵀ, (g, n, o); None where the sums are singular.

    Args:
        evidence: the rows, or sums of these.
        ridge: λ.
        intercept: whether the last feature is the constant 1, which has no ridge on it.
    """
    if math.isinf(ridge):
        return evidence.no_change
    return _primal(evidence, ridge, intercept) if isinstance(evidence, Moments) else _dual(evidence, ridge, intercept)


def _primal(moments: Moments, ridge: float, intercept: bool) -> Tensor | None:
    diagonal = moments.xx.diagonal(dim1=1, dim2=2)
    features = diagonal[:, :-1] if intercept else diagonal
    mean = features.mean(1, keepdim=True)
    added = (ridge * torch.where(mean > 0, mean, 1.0)).expand_as(diagonal).clone()
    if intercept:
        added[:, -1] = 0
    factor, failed = torch.linalg.cholesky_ex(moments.xx + torch.diag_embed(added))
    return None if bool(failed.any()) else torch.cholesky_solve(moments.xt, factor)


def _dual(rows: Rows, ridge: float, intercept: bool) -> Tensor | None:
    """Return xᵀ (x xᵀ + λ · mean diag · I)⁻¹ t; an intercept without a ridge is what centred rows leave over."""
    x, t = (rows.x[..., :-1], rows.t) if intercept else (rows.x, rows.t)
    mean = x.square().sum(1).mean(1).view(-1, 1, 1)
    of_x, of_t = (x.mean(1, keepdim=True), t.mean(1, keepdim=True)) if intercept else (x.new_zeros(()), t.new_zeros(()))
    x, t = x - of_x, t - of_t
    added = ridge * torch.where(mean > 0, mean, 1.0) * torch.eye(rows.rows, dtype=x.dtype, device=x.device)
    factor, failed = torch.linalg.cholesky_ex(x @ x.mT + added)
    if bool(failed.any()):
        return None
    change = x.mT @ torch.cholesky_solve(t, factor)
    return torch.cat([change, of_t - of_x @ change], 1) if intercept else change


def choose_ridge(fit: Evidence, held: Evidence, intercept: bool = False) -> float:
    """Return the ridge whose change by `fit` leaves the smallest error on `held`; infinite where no change is best."""
    best, least = math.inf, held.tt * (1 - MARGIN)
    for ridge in FEW_RIDGES if fit.order > LARGE else RIDGES:
        found = solve(fit, ridge, intercept)
        error = math.inf if found is None else held.error(found)
        if error < least:
            best, least = ridge, error
    return best
