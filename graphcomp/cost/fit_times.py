"""Times of a piece as a function of its widths: a non-negative combination of what the piece computes and moves.

No coefficient is negative, and few are used: a choice of widths then lives off what kernels do, and not off the noise
of single measurements, as with a table that is read entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

MOST = 4
"""Features that a fit uses at most."""


def fit_times(features: Sequence[Sequence[float]], times: Sequence[float]) -> tuple[float, ...]:
    """Return coefficients >= 0 with the least squared relative error; all subsets of MOST features are tried.

    Args:
        features: of each sample, all >= 0.
        times: milliseconds of each sample, > 0.

    Returns:
        One number for each feature, milliseconds each.
    """
    x = np.asarray(features, dtype=np.float64)
    t = np.asarray(times, dtype=np.float64)
    scale = np.maximum(x.max(axis=0), 1e-30)
    a = x / scale / t[:, None]
    best, least = np.zeros(x.shape[1]), np.inf
    for size in range(1, min(MOST, len(t), x.shape[1]) + 1):
        for chosen in combinations(range(x.shape[1]), size):
            own = a[:, chosen]
            found = np.linalg.lstsq(own, np.ones(len(t)), rcond=None)[0]
            error = float(np.square(own @ found - 1).sum())
            if (found >= 0).all() and error < least * 0.98:  # a feature more must be worth its while
                best, least = np.zeros(x.shape[1]), error
                best[list(chosen)] = found
    return tuple((best / scale).tolist())
