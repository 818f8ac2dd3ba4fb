"""How many weights of each layer go, in closed form from the weights alone: OPQ's first step.

Layer i has N_i weights of a Laplace density with mean magnitude t_i. With a threshold b_i the layer loses the share
P_i = 1 - exp(-b_i / t_i) of its weights and the mean energy psi_i. The sum of omega_i psi_i is least, with the number
of all pruned weights given, where

    omega_i b_i^2 / N_i = lambda                    the same in each layer, whatever the (symmetric) density

so that one number, lambda, is left to find by bisection. `omega` says what the sum is of; see `OMEGAS`.

Source: One-shot Pruning-Quantization (Hu et al. 2021, arXiv 2205.11141), reconstructed: the paper's weights omega could
not be read, and no code is public. The exact budget (largest remainders) and the density of the weights themselves in
place of Laplace's are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from graphcomp.arguments import check_number, check_word
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.pruning.evidence import Evidence, Scores
from graphcomp.pruning.saliency import Magnitude, Saliency, named, score

Omega: TypeAlias = Literal["mean", "total", "energy", "size_energy"]
"""Names of `OMEGAS`."""

Density: TypeAlias = Literal["laplace", "empirical"]
"""What is known of the weights of a layer: their mean magnitude, or all of them."""

OMEGAS: Mapping[Omega, Callable[[float, float], float]] = {
    "mean": lambda size, scale: 1.0,
    "total": lambda size, scale: size,
    "energy": lambda size, scale: 1 / (2 * scale * scale),
    "size_energy": lambda size, scale: size / (2 * scale * scale),
}
"""omega of a layer of `size` weights and mean magnitude `scale`. The sum is of: mean squared errors of layers (large
layers are pruned more); squared errors of weights (one threshold for all: global magnitude); relative errors of layers;
relative errors of weights (the same share of each layer)."""

TINY = 1e-30
"""Mean magnitude of a layer of zeros."""

BISECTIONS = 200
"""Halvings of the range of lambda: more than a float64 has bits, so that the range is down to one number."""


# ------------------------------------------------------------------------------------------------ closed forms
def pruned_energy(threshold: float, scale: float) -> float:
    """Return psi, the mean over a layer of w^2 where |w| < `threshold`, of a Laplace density of mean |w| `scale`."""
    b, t = threshold, scale
    return 2 * t * t - (b * b + 2 * t * b + 2 * t * t) * math.exp(-b / t)


def omegas(sizes: Sequence[float], scales: Sequence[float], omega: Omega) -> list[float]:
    """Return omega of each layer, of `sizes` weights and mean magnitudes `scales`.

    Raises:
        PlanError: no such omega.
    """
    check_word("omega", omega, get_args(Omega))
    return [OMEGAS[omega](size, max(scale, TINY)) for size, scale in zip(sizes, scales, strict=True)]


def thresholds(
    sizes: Sequence[float], scales: Sequence[float], sparsity: float, omega: Omega = "mean"
) -> tuple[float, list[float]]:
    """Return lambda, and the threshold sqrt(lambda N / omega) of each layer.

    Args:
        sizes: weights of each layer.
        scales: mean magnitude of each layer.
        sparsity: share of all weights below the thresholds, 0 <= sparsity < 1.
        omega: see `OMEGAS`.
    """
    roots = [math.sqrt(n / w) for n, w in zip(sizes, omegas(sizes, scales, omega), strict=True)]
    scales = [max(scale, TINY) for scale in scales]

    def share(root: float) -> float:
        return sum(n * -math.expm1(-root * r / t) for n, r, t in zip(sizes, roots, scales, strict=True)) / sum(sizes)

    low, high = 0.0, 1.0
    while share(high) < sparsity:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < sparsity else (low, middle)
    root = 0.0 if not sparsity else high
    return root * root, [root * r for r in roots]


# ------------------------------------------------------------------------------------------------ whole numbers
def whole_counts(shares: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """Return whole numbers near `shares` whose sum is `total`: what is left goes to the largest remainders.

    Args:
        shares: real numbers, whose sum is within their number of `total`.
        most: of each.
    """
    floors = [min(int(share), limit) for share, limit in zip(shares, most, strict=True)]
    order = sorted(range(len(shares)), key=lambda k: floors[k] - shares[k])
    missing = total - sum(floors)
    while missing:
        step = 1 if missing > 0 else -1
        for k in order if step > 0 else reversed(order):
            if missing and 0 <= floors[k] + step <= most[k]:
                floors[k] += step
                missing -= step
    return floors


def pruned_counts(
    sizes: Sequence[int], scales: Sequence[float], sparsity: float, omega: Omega = "mean"
) -> tuple[int, ...]:
    """Return how many weights each layer loses, round(sparsity * all) together.

    Args:
        sizes, scales, omega: see `thresholds`.
        sparsity: 0 to 1.
    """
    check_number("sparsity", sparsity, 0, 1)
    total = round(sparsity * sum(sizes))
    if total in (0, sum(sizes)):
        return tuple(size if total else 0 for size in sizes)
    _, found = thresholds(sizes, scales, sparsity, omega)
    shares = [n * -math.expm1(-b / max(t, TINY)) for n, b, t in zip(sizes, found, scales, strict=True)]
    return tuple(whole_counts(shares, total, sizes))


@torch.no_grad()
def analytic_masks(
    weights: Mapping[str, Tensor], sparsity: float, omega: Omega = "mean", density: Density = "laplace"
) -> dict[str, Tensor]:
    """Return bool masks, False for the weights that go: round(sparsity * all), of each layer the smallest.

    Args:
        weights: of each layer, any shapes.
        sparsity: 0 to 1.
        omega: see `OMEGAS`.
        density: "laplace" knows the mean magnitude of a layer; "empirical" each weight, and is the least sum of errors.

    Raises:
        PlanError: an argument out of range.
    """
    check_word("density", density, get_args(Density))
    sizes = [weight.numel() for weight in weights.values()]
    scales = [float(weight.detach().abs().double().mean()) for weight in weights.values()]
    if density == "laplace":
        gone = pruned_counts(sizes, scales, sparsity, omega)
    else:
        check_number("sparsity", sparsity, 0, 1)
        gone = least_errors(errors_of(weights, omega), round(sparsity * sum(sizes)))
    return {name: _without_smallest(weight, k) for (name, weight), k in zip(weights.items(), gone, strict=True)}


def errors_of(weights: Mapping[str, Tensor], omega: Omega = "mean") -> list[Tensor]:
    """Return omega / N w^2 of each weight, what the sum gains by it: (N,) float64 per layer."""
    sizes = [weight.numel() for weight in weights.values()]
    scales = [float(weight.detach().abs().double().mean()) for weight in weights.values()]
    factors = [w / n for w, n in zip(omegas(sizes, scales, omega), sizes, strict=True)]
    own = zip(weights.values(), factors, strict=True)
    return [weight.detach().double().flatten().square() * factor for weight, factor in own]


def unit_errors(analysis: Analysis, groups: Sequence[ChannelGroup], omega: Omega = "mean") -> Scores:
    """Return omega / N ||w||^2 of each unit, N the units of its group: (size,) float64 per group.

    Args:
        analysis: of the model with the groups.
        omega: see `OMEGAS`; the scale of a group is the mean norm of its units.
    """
    norms = {group: own.double() for group, own in score("l2", analysis, groups).items()}
    factors = omegas([g.size for g in groups], [float(norms[g].mean()) for g in groups], omega)
    return {g: norms[g].square() * (factor / g.size) for g, factor in zip(groups, factors, strict=True)}


@dataclass(frozen=True)
class ByErrors:
    """Ranks units within a group by a saliency, and groups against each other by OPQ's errors, `unit_errors`.

    The k-th unit of a group, in the order of the saliency, gets the k-th smallest error of the group.

    Attributes:
        saliency: which units of a group go first.
        omega: see `OMEGAS`.
    """

    saliency: str | Saliency = "l2"
    omega: Omega = "mean"

    def __call__(self, evidence: Evidence) -> Scores:
        """(size,) per group, to be compared as they are."""
        ranked = (named(self.saliency) if isinstance(self.saliency, str) else self.saliency)(evidence)
        norms = {g: own.double() for g, own in Magnitude()(evidence).items()}
        sizes, scales = [g.size for g in norms], [float(own.mean()) for own in norms.values()]
        found = {}
        for (group, own), factor in zip(norms.items(), omegas(sizes, scales, self.omega), strict=True):
            errors = own.square().sort().values * (factor / group.size)
            place = ranked[group].argsort(stable=True)
            found[group] = torch.empty_like(errors).index_copy_(0, place.to(errors.device), errors)
        return found


def least_errors(errors: Sequence[Tensor], count: int) -> tuple[int, ...]:
    """Return how many of each tensor are among the `count` smallest errors of all; ties in order."""
    order = torch.cat(list(errors)).argsort(stable=True)[:count]
    ends = torch.tensor([len(error) for error in errors]).cumsum(0)
    layer = torch.bucketize(order.cpu(), ends, right=True)
    return tuple(torch.bincount(layer, minlength=len(errors)).tolist())


def _without_smallest(weight: Tensor, count: int) -> Tensor:
    """Return a bool mask without the `count` smallest magnitudes."""
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.detach().abs().flatten().argsort(stable=True)[:count]] = False
    return mask.view(weight.shape)
