"""What is pruned is what lies below a threshold that is trained: forward exactly, backward by a surrogate of the step.

    mask M = 1 where |W| > t, else 0        levels Q = the quantized weight        the model sees M Q

With the gradient g of M Q, and H the surrogate of the step's derivative at u = |W| - t, the threshold gets -g V H(u),
summed over the weights that share the threshold. Three routes of gradients differ in V and in what the weight gets:

    dense     V = W     the weight gets g, also where it is pruned: pruned weights learn, and can return
    latent    V = W     the weight gets g M + g V H(u) sign(W)
    literal   V = Q     the same with the literal derivative of M Q; a pruned weight that rounds to 0 stays pruned

Source: QST (Park, Kim, Lee 2022, 10.1145/3524066), reconstructed; H of Dynamic Sparse Training (Liu et al. 2020, arXiv
2005.06870).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Route: TypeAlias = Literal["dense", "latent", "literal"]
"""How gradients reach weights and thresholds."""

NEAR, FAR, TAIL = 0.4, 1.0, 0.4
"""H falls from 2 to `TAIL` at distance `NEAR`, stays there up to `FAR`, and is 0 beyond."""


def surrogate(u: Tensor) -> Tensor:
    """Return H(u): 2 - 4 |u| where |u| <= 0.4, 0.4 where |u| <= 1, 0 beyond; its integral is 1.44."""
    distance = u.abs()
    near = torch.where(distance <= NEAR, 2 - 4 * distance, TAIL)
    return torch.where(distance <= FAR, near, 0.0)


def _sum_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    return gradient.sum_to_size(shape) if gradient.shape != shape else gradient


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, levels: Tensor, threshold: Tensor, inside: Tensor | None, route: Route
    ) -> Tensor:
        ctx.save_for_backward(weight, levels, threshold, inside)
        ctx.route = route
        return levels.masked_fill(weight.abs() <= threshold, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, levels, threshold, inside = ctx.saved_tensors
        u = weight.abs() - threshold
        mask = u > 0
        stays = grad * mask
        pull = grad * (levels if ctx.route == "literal" else weight) * surrogate(u)
        to_weight = grad if ctx.route == "dense" else stays
        if inside is not None:
            to_weight = to_weight * inside
        if ctx.route != "dense":
            to_weight = to_weight + pull * weight.sign()
        return to_weight, stays, _sum_to(-pull, threshold.shape), None, None


def sparse(weight: Tensor, levels: Tensor, threshold: Tensor, inside: Tensor | None, route: Route) -> Tensor:
    """Return `levels` where the weight is above the threshold, 0 elsewhere.

    Args:
        weight: any shape.
        levels: of the same shape, what the weight is quantized to, constant to the weight: gradients reach what else
            the levels are computed of, the step, where the weight stays.
        threshold: broadcasts with the weight.
        inside: bool, of the shape of the weight: where the quantizer clips nothing, and lets gradients through to the
            weight; None: everywhere.
        route: of gradients.
    """
    return _Sparse.apply(weight, levels, threshold, inside, route)  # type: ignore[no-any-return, no-untyped-call]


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grad * surrogate(u)


def step(u: Tensor) -> Tensor:
    """Return 1 where u > 0, else 0, in the dtype of u; the derivative is H."""
    return _Step.apply(u)  # type: ignore[no-any-return, no-untyped-call]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, gate: Tensor, dense: bool) -> Tensor:
        ctx.save_for_backward(weight, gate)
        ctx.dense = dense
        return weight.masked_fill(gate == 0, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, gate = ctx.saved_tensors
        return grad if ctx.dense else grad * gate, _sum_to(grad * weight, gate.shape), None


def gated(weight: Tensor, gate: Tensor, dense: bool) -> Tensor:
    """Return the weight where the gate is 1, 0 elsewhere.

    Args:
        weight: any shape.
        gate: 0 or 1, broadcasts with the weight; gets the gradient of a product.
        dense: whether the weight gets the gradient also where the gate is 0.
    """
    return _Gated.apply(weight, gate, dense)  # type: ignore[no-any-return, no-untyped-call]
