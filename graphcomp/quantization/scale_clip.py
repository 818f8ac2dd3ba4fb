"""Scale-Clip: weights clipped at a multiple of their mean magnitude; and steps that groups of filters share.

    T = k mean |w|,   w <- min(max(w, -T), T)

A uniform density on [-T, T] has mean |w| = T / 2: k = 2 leaves the density as it is, a larger k clips tails alone.
Uniform weights have the least error when they are rounded to evenly spaced levels:

    relative error = ||w - Q(w)|| / ||w||          uniform < Gaussian < Laplace, each with the step of least error

Source: GDRQ (Yu et al. 2019, arXiv 1908.01477), reconstructed. Ours: weights of exactly 0, which were pruned before, do
not count in the mean.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Grouping: TypeAlias = Literal["contiguous", "sorted"]
"""Which filters make a group: neighbours, or those of nearly the same largest magnitude."""

COARSE, FINE, ROUNDS = 32, 9, 4
"""Steps tried at first, from all of the range down to `SHORTEST`; steps tried around the best, and how often."""
SHORTEST = 0.05
"""Shortest range tried, in the largest magnitude."""


def filter_rows(weight: Tensor, dim: int | None) -> Tensor:
    """Return one row per filter: (c, n) of a weight whose filters are the indices of `dim`; (1, n) for None."""
    return weight.reshape(1, -1) if dim is None else weight.movedim(dim, 0).flatten(1)


def filter_groups(rows: Tensor, count: int, grouping: Grouping) -> Tensor:
    """Return the group of each filter, (c,) int64, in groups whose sizes differ by 1 at most.

    Args:
        rows: (c, n), one row per filter.
        count: groups; with more groups than filters each filter is a group.
        grouping: which filters make a group.
    """
    filters = len(rows)
    found = torch.arange(filters, device=rows.device) * min(count, filters) // max(filters, 1)
    if grouping == "contiguous":
        return found
    order = rows.abs().amax(1).argsort(stable=True)
    return torch.empty_like(found).index_copy_(0, order, found)


def clip_levels(rows: Tensor, k: float, group_of: Tensor) -> Tensor:
    """Return T of the group of each filter: k times the mean magnitude of the group's nonzero weights, (c,).

    Args:
        rows: (c, n), one row per filter.
        k: what mean magnitudes are multiplied by.
        group_of: (c,) the group of each filter.
    """
    magnitudes = rows.abs()
    totals = torch.stack([magnitudes.sum(1), (magnitudes != 0).sum(1).to(magnitudes)])
    sums = totals.new_zeros(2, len(rows)).index_add_(1, group_of, totals)
    return (k * sums[0] / sums[1].clamp(min=1))[group_of]


def scale_clip(weight: Tensor, k: float, group_of: Tensor | None = None, dim: int | None = None) -> Tensor:
    """Return the weight clipped at k times its mean magnitude.

    Args:
        weight: any shape, float.
        k: see above.
        group_of: (c,) the group of each filter, each with a mean of its own; None: one mean.
        dim: of the filters; needed with `group_of`.
    """
    if group_of is None or dim is None:
        level = clip_levels(weight.reshape(1, -1), k, torch.zeros(1, dtype=torch.int64, device=weight.device))
    else:
        spread = [1] * weight.dim()
        spread[dim] = -1
        level = clip_levels(filter_rows(weight, dim), k, group_of).view(spread)
    return torch.minimum(torch.maximum(weight, -level), level)


def relative_error(weight: Tensor, rounded: Tensor, p: float = 2.0) -> float:
    """Return the quantized loss ||w - Q(w)||_p / ||w||_p of a weight and its levels; 0 where the weight is 0."""
    whole = float(torch.linalg.vector_norm(weight.double(), p))
    return float(torch.linalg.vector_norm((weight - rounded).double(), p)) / whole if whole else 0.0


def group_steps(rows: Tensor, group_of: Tensor, most: int) -> Tensor:
    """Return the step of least squared error of the group of each filter, (c,) in the dtype of `rows`.

    Levels are -most ... most times the step. A group of zeros has step 1.

    Args:
        rows: (c, n), one row per filter.
        group_of: (c,) the group of each filter.
        most: positive levels.
    """
    wide = rows.double()
    peaks = wide.new_zeros(len(rows)).scatter_reduce_(0, group_of, wide.abs().amax(1), "amax")
    best, width = torch.full_like(peaks, (1 + SHORTEST) / 2), (1 - SHORTEST) / 2
    for count in (COARSE, *[FINE] * ROUNDS):
        shares = best + width * torch.linspace(-1, 1, count, dtype=torch.float64, device=rows.device)[:, None]
        shares = shares.clamp(SHORTEST / 2, 1)
        tried = [torch.where(peaks > 0, peaks * share / most, 1.0) for share in shares]
        errors = torch.stack([_errors(wide, group_of, steps, most) for steps in tried])
        best = shares.gather(0, errors.argmin(0, keepdim=True))[0]
        width = 2 * width / (count - 1)
    return torch.where(peaks > 0, peaks * best / most, 1.0)[group_of].to(rows.dtype)


def _errors(rows: Tensor, group_of: Tensor, steps: Tensor, most: int) -> Tensor:
    """Return the squared error of each group, by the group's number, of levels that are multiples of steps."""
    own = steps[group_of][:, None]
    lost = (rows - (rows / own).round_().clamp_(-most, most) * own).square_().sum(1)
    return torch.zeros_like(steps).index_add_(0, group_of, lost)
