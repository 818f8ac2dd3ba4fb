"""How wide the levels of each layer are, and how many bits they take, from the weights alone: OPQ's second step.

The levels of a layer are one step d_i apart, and all its channels share them (one codebook). With n_i weights left, an
error D_i(d_i), the range h_i in bits (log2 of twice the largest magnitude), and a budget of B bits:

    least sum omega_i D_i  with  sum n_i (h_i - log2 d_i) = B   =>   d_i = sqrt(kappa n_i / omega_i)

where D_i = d_i^2 / 12 (`closed_steps`). Bits are whole numbers: `whole_bits` takes a table of errors at each number of
bits, walks down the lower hull of each layer to the budget, and then spends what is left, best first. The errors in
the table are measured (`step_errors`): with five bits and fewer, steps that clip the largest weights are better, which
d^2 / 12 does not see.

Source: One-shot Pruning-Quantization (Hu et al. 2021, arXiv 2205.11141), reconstructed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from graphcomp.errors import BudgetError

STEPS = 64
"""Steps that a layer's errors are measured at, for each number of bits: from all of the range down to a tenth."""
SHORTEST = 0.1
"""Shortest range, in the largest magnitude."""
LEAST_GAIN = 1e-9
"""Share of what a move gains that an exchange has to gain, so that rounding errors start no endless exchanges."""
BINS = 4096
"""Bins of the histogram of magnitudes that errors are measured on: a plan takes time in bins, not in weights."""


# ------------------------------------------------------------------------------------------------ closed forms
def rounding_error(step: float, scale: float) -> float:
    """Return the mean squared error of rounding to multiples of `step`, of a Laplace density of mean |w| `scale`."""
    return 2 * scale**2 - scale * step / math.sinh(step / (2 * scale))


def survivor_error(step: float, scale: float) -> float:
    """Return the mean squared error beyond a threshold, of cells of one `step` from there on, each told as its centre.

    The density is Laplace's of mean |w| `scale`; by its lack of memory the threshold does not matter.
    """
    q, a = math.exp(-step / scale), 2 * scale**2 + step**2 / 4
    return (a * (1 - q) - step * scale * (1 + q)) / (1 - q)


def closed_steps(
    counts: Sequence[float], ranges: Sequence[float], budget: float, omegas: Sequence[float]
) -> list[float]:
    """Return the steps of least error whose codes take `budget` bits, as real numbers.

    Args:
        counts: n, weights left in each layer.
        ranges: h, log2 of twice the largest magnitude; of several channels the mean over weights.
        budget: bits of all codes.
        omegas: of each layer, see `graphcomp.pruning.analytic.OMEGAS`.
    """
    pairs = list(zip(counts, omegas, strict=True))
    whole = sum(n * h for n, h in zip(counts, ranges, strict=True))
    log_kappa = 2 * (whole - budget - 0.5 * sum(n * math.log2(n / w) for n, w in pairs)) / sum(counts)
    return [math.sqrt(2**log_kappa * n / w) for n, w in pairs]


# ------------------------------------------------------------------------------------------------ measured
@torch.no_grad()
def step_errors(weight: Tensor, bits: Sequence[int]) -> list[tuple[float, float]]:
    """Return for each number of bits the best step, and the squared error of all nonzero weights with the step.

    Levels are -(2^(b-1) - 1) … 2^(b-1) - 1 times the step; what lies beyond is clipped. A layer of zeros has step 1.

    Args:
        weight: any shape; zeros are pruned, and have no error.
    """
    magnitudes = weight.detach().abs().double().flatten()
    magnitudes = magnitudes[magnitudes > 0].cpu()
    if not len(magnitudes):
        return [(1.0, 0.0) for _ in bits]
    peak = float(magnitudes.max())
    place = (magnitudes / peak * (BINS - 1)).long().clamp(max=BINS - 1)
    count = torch.bincount(place, minlength=BINS).double()
    filled = count > 0
    count = count[filled]
    centre = torch.bincount(place, weights=magnitudes, minlength=BINS)[filled] / count
    inside = float((magnitudes.square().sum() - (count * centre.square()).sum()).clamp(min=0))  # beyond the centres
    found = []
    for own in bits:
        most = 2 ** (own - 1) - 1
        steps = peak / most * torch.linspace(1.0, SHORTEST, STEPS, dtype=torch.float64)[:, None]
        levels = (centre / steps).round().clamp(max=most)
        errors = (count * (centre - levels * steps).square()).sum(1)
        best = int(errors.argmin())
        found.append((float(steps[best]), float(errors[best]) + inside))
    return found


# ------------------------------------------------------------------------------------------------ whole bits
def whole_bits(
    counts: Sequence[int], errors: Sequence[Sequence[float]], choices: Sequence[int], budget: float
) -> tuple[int, ...]:
    """Return the bits of each layer, of least total error among those that an exchange of two layers leads to.

    Args:
        counts: n, weights of each layer whose bits count.
        errors: of each layer, at each of `choices`.
        choices: bits that a layer may have, ascending.
        budget: the largest sum of n * bits.

    Raises:
        BudgetError: the fewest bits of all layers are more.
    """
    chosen = [0] * len(counts)
    least = sum(counts) * choices[0]
    if least > budget:
        raise BudgetError(
            f"{choices[0]} bits for each of {sum(counts)} weights are more than {budget:.0f} bits",
            why=f"they take {least} bits",
            fix="a larger budget, a higher sparsity, or fewer bits",
        )
    low, high = 0.0, _steepest(counts, errors, choices)
    for _ in range(100):  # the price of a bit, on the lower hull of each layer
        price = (low + high) / 2
        found = [_at_price(n, own, choices, price) for n, own in zip(counts, errors, strict=True)]
        fits = sum(n * choices[k] for n, k in zip(counts, found, strict=True)) <= budget
        low, high, chosen = (low, price, found) if fits else (price, high, chosen)
    return tuple(choices[k] for k in _spent(counts, errors, choices, budget, chosen))


def _steepest(counts: Sequence[int], errors: Sequence[Sequence[float]], choices: Sequence[int]) -> float:
    """Return a price of a bit at which no layer takes more than the fewest."""
    gains = [(own[0] - min(own)) / max(n, 1) for n, own in zip(counts, errors, strict=True)]
    return max([*gains, 0.0]) + 1.0


def _at_price(count: int, errors: Sequence[float], choices: Sequence[int], price: float) -> int:
    return min(range(len(choices)), key=lambda k: (errors[k] + price * count * choices[k], k))


_Move: TypeAlias = tuple[float, tuple[tuple[int, int], ...], float]
"""What a move gains per bit (below 0), layer and choice of each layer that it changes, and the bits that it takes."""


def _spent(
    counts: Sequence[int], errors: Sequence[Sequence[float]], choices: Sequence[int], budget: float, chosen: list[int]
) -> list[int]:
    """Spend what is left of the budget: more bits for one layer, or for one at the cost of another, best first."""
    left = budget - sum(n * choices[k] for n, k in zip(counts, chosen, strict=True))
    while True:
        ups = [move for k in range(len(counts)) for move in _moves(k, counts, errors, choices, chosen, up=True)]
        best = min((move for move in ups if move[2] <= left), default=None)
        if best is None:
            downs = [move for k in range(len(counts)) for move in _moves(k, counts, errors, choices, chosen, up=False)]
            best = min(_exchanges(ups, downs, left), default=None)
        if best is None:
            return chosen
        for k, choice in best[1]:
            chosen[k] = choice
        left -= best[2]


def _moves(
    layer: int,
    counts: Sequence[int],
    errors: Sequence[Sequence[float]],
    choices: Sequence[int],
    chosen: Sequence[int],
    *,
    up: bool,
) -> Iterator[_Move]:
    """Yield the choices of a layer above its own that lower its error, or the next one below."""
    now, own = chosen[layer], errors[layer]
    for choice in range(now + 1, len(choices)) if up else range(max(now - 1, 0), now):
        error, cost = own[choice] - own[now], counts[layer] * (choices[choice] - choices[now])
        if error < 0 or not up:
            yield error / max(abs(cost), 1), ((layer, choice),), cost


def _exchanges(ups: Sequence[_Move], downs: Sequence[_Move], left: float) -> Iterator[_Move]:
    """Yield pairs of a move up and a move down of another layer that fit, and lower the error of both together."""
    for gain, up, cost in ups:
        for loss, down, saved in downs:
            error = gain * max(cost, 1) + loss * max(-saved, 1)
            if up[0][0] != down[0][0] and cost + saved <= left and error < LEAST_GAIN * gain * max(cost, 1):
                yield error, (*up, *down), cost + saved
