"""Ternary directions: the vectors of -1, 0 and 1 that point as a filter does, and the angle between the two.

Of a filter w, with v = w / ||w||, and k weights kept:

    T = sign(v) M / sqrt(k)           M: 1 where a weight is kept
    cos(v, T) = sum of kept |v| / sqrt(k)
    alpha = mean of kept |w|          the scale of least squared error of alpha sign(w) M

The best k has the largest (sum of kept |v|)^2 / k, of the k largest magnitudes.

Source: Ternary Weight Networks (Li et al. 2016, arXiv 1605.04711), where the threshold is approximate; exact here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(rows: Tensor) -> Tensor:
    """Return each row over its norm, (c, n); rows of zeros stay. Gradients are at right angles to the rows."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)


def directions(rows: Tensor, mask: Tensor) -> Tensor:
    """Return T of each row, (c, n), of norm 1; 0 where nothing is kept.

    Args:
        rows: (c, n).
        mask: (c, n) bool, True where a weight is kept.
    """
    signs = rows.sign() * mask
    return signs / signs.abs().sum(1, keepdim=True).clamp(min=1).sqrt()


def cosines(rows: Tensor, mask: Tensor) -> Tensor:
    """Return cos(v, T) of each row, (c,); 1 where a row is 0, which its direction is, too."""
    found = (unit_rows(rows) * directions(rows, mask)).sum(1)
    return torch.where((rows != 0).any(1), found, 1.0)


def kept_means(rows: Tensor, mask: Tensor) -> Tensor:
    """Return alpha of each row, (c,); 0 where nothing is kept."""
    return (rows.abs() * mask).sum(1) / mask.sum(1).clamp(min=1)


def best_masks(rows: Tensor) -> Tensor:
    """Return the mask of each row's best ternary direction, (c, n) bool; of a row of zeros the first element."""
    order = rows.abs().argsort(dim=1, descending=True, stable=True)
    totals = rows.abs().double().gather(1, order).cumsum(1)
    counts = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    best = (totals.square() / counts).argmax(1, keepdim=True)
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, counts - 1 <= best)


def largest_masks(rows: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` largest of all magnitudes over their rows' norms, (c, n) bool.

    Each row keeps one at least, its largest: `count` is met where it is not below the number of rows.
    """
    shares = unit_rows(rows.detach()).abs()
    first = rows.abs().argmax(1, keepdim=True)
    order = shares.scatter(1, first, torch.inf).flatten().argsort(descending=True, stable=True)
    found = torch.zeros(rows.numel(), dtype=torch.bool, device=rows.device)
    found[order[: max(count, len(rows))]] = True
    return found.view(rows.shape)
