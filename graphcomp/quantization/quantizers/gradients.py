"""Gradients that go straight through: what autograd is told instead of the derivative of a staircase.

Each forward is exact (no `x + (f(x) - x).detach()`, whose sum rounds), stays on the device, and takes any float dtype.
`torch.clamp` needs no place here: its gradient is already 1 inside and 0 outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def round_through(x: Tensor) -> Tensor:
    """`x` to the nearest whole number, halves to even; the gradient is that of the identity.

    Source: Bengio et al. 2013 (arXiv 1308.3432), the straight-through estimator.
    """
    return _Round.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself; its gradient times `factor`.

    Source: `gradscale` in LSQ (Esser et al. 2020, arXiv 1902.08153), appendix A.
    """
    return _ScaleGradient.apply(x, factor)  # type: ignore[no-any-return, no-untyped-call]


def bounded(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """`x` clamped to `low` … `high`, with a gradient that can bring it back.

    Inside, the gradient is that of the identity. Outside it passes only where a descent step moves `x` towards the
    bounds, so a parameter that an optimizer threw out of its range is neither stuck nor drawn further away.

    Args:
        x: any shape, float.
        low, high: numbers or tensors that broadcast with `x`; constants to autograd.
    """
    return _Bounded.apply(x, low, high)  # type: ignore[no-any-return, no-untyped-call]


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """The multiple of `scale` nearest to `x` among the codes: (clamp(round(x / scale) + z, min, max) - z) * scale.

    With v = x / scale, lowest and highest multiple l = quant_min - z and h = quant_max - z, the gradients are

        dx̂/dx = 1 where l <= v <= h, else 0
        dx̂/dscale = round(v) - v there; l below, h above
        dx̂/dz = 0 there; -scale below and above

    They are written out rather than composed: autograd of x / scale meets 0 * inf where the step is near its floor.

    Args:
        x: float32 or float64.
        scale: in the dtype of `x`, broadcasts to it, > 0. Units of `x` per code.
        zero_point: as `scale`, whole numbers; None is 0.

    Returns:
        The shape of `x`; never -0, so that integers can stand for it bit for bit.

    Source: LSQ (Esser et al. 2020, arXiv 1902.08153), equations 1 to 3; the zero point after LSQ+ (Bhalgat et al.
    2020, arXiv 2004.09576), equations 4 to 6, but whole, so that 0 is a code: its offset beta is -z * scale here.
    """
    return _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max)  # type: ignore[no-any-return, no-untyped-call]


def multiples(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """Codes less their zero point, as floats: what `fake_quantize` multiplies `scale` with. Arguments as there."""
    low, high = _ends(zero_point, quant_min, quant_max)
    # Clamped before it is rounded: the same number, since the ends are whole. Adding 0 turns -0 into 0.
    return torch.clamp(x / scale, low, high).round() + 0.0


def _ends(zero_point: Tensor | None, quant_min: int, quant_max: int) -> tuple[Any, Any]:
    if zero_point is None:
        return quant_min, quant_max
    return quant_min - zero_point, quant_max - zero_point


class _Round(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _ScaleGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _Bounded(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        return x.clamp(min=low).clamp(max=high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any, Any], output: Tensor) -> None:
        x, low, high = inputs
        ctx.save_for_backward(x < low, x > high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        below, above = ctx.saved_tensors
        away = (below & (grad > 0)) | (above & (grad < 0))  # descent goes against the gradient
        return grad.masked_fill(away, 0), None, None


class _FakeQuantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
        return multiples(x, scale, zero_point, quant_min, quant_max) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int, int], output: Tensor) -> None:
        x, scale, zero_point, ctx.quant_min, ctx.quant_max = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        low, high = _ends(zero_point, ctx.quant_min, ctx.quant_max)
        v = x / scale
        inside = (v >= low) & (v <= high)
        clamped = v.clamp(low, high)
        grad_x = grad_scale = grad_zero = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.masked_fill(~inside, 0)
        if ctx.needs_input_grad[1]:
            residual = clamped.round() - torch.where(inside, v, 0.0)
            grad_scale = (grad * residual).sum_to_size(scale.shape)
        if zero_point is not None and ctx.needs_input_grad[2]:
            grad_zero = (-grad * scale).masked_fill(inside, 0).sum_to_size(zero_point.shape)
        return grad_x, grad_scale, grad_zero, None, None
