"""Gradients that go straight through: what autograd is told instead of the derivative of a staircase.

Each forward is exact (no `x + (f(x) - x).detach()`, whose sum rounds), stays on the device, and takes any float dtype.
`torch.clamp` needs no place here: its gradient is already 1 inside and 0 outside.

On CPUs each op is a pass over memory, and PyTorch has vectorised some but not all: comparisons, `where`, `masked_fill`
and `clamp` between two scalar tensors take five to ten times as long as `clamp_max`, `sign` or `hardtanh_backward`,
so that large tensors go through the latter alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphcomp.quantization.quantizers import blocked

aten = torch.ops.aten


def round_through(x: Tensor) -> Tensor:
    """`x` to the nearest whole number, halves to even; the gradient is that of the identity.

    Source: Bengio et al. 2013 (arXiv 1308.3432), the straight-through estimator.
    """
    return _Round.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def straight_through(x: Tensor, level: Tensor) -> Tensor:
    """`level`, of the shape and dtype of `x`; both get its gradient."""
    return _Straight.apply(x, level)  # type: ignore[no-any-return, no-untyped-call]


def scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """`x` itself; its gradient times `factor`, a number or a constant of the shape of `x`.

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


def inward(grad: Tensor, x: Tensor, valid: Tensor) -> Tensor:
    """The gradient of `x`, whose value in bounds is `valid`, from that of `valid`: see `bounded`. One shape each."""
    return grad.masked_fill((x - valid) * grad < 0, 0)  # descent goes against the gradient


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int | Tensor, quant_max: int | Tensor
) -> Tensor:
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
        quant_min, quant_max: numbers, or tensors that broadcast to `x`, beside a scale per channel.

    Returns:
        The shape of `x`; never -0, so that integers can stand for it bit for bit.

    Source: LSQ (Esser et al. 2020, arXiv 1902.08153), equations 1 to 3; the zero point after LSQ+ (Bhalgat et al.
    2020, arXiv 2004.09576), equations 4 to 6, but whole, so that 0 is a code: its offset beta is -z * scale here.
    """
    alone = scale.dim() == 0 and (zero_point is None or zero_point.dim() == 0)
    how = _FakeQuantizeInPieces if alone and blocked.fits(x) else _FakeQuantize
    return how.apply(x, scale, zero_point, quant_min, quant_max)  # type: ignore[no-any-return, no-untyped-call]


def multiples(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int | Tensor, quant_max: int | Tensor
) -> Tensor:
    """Codes less their zero point, as floats: what `fake_quantize` multiplies `scale` with. Arguments as there."""
    low, high = _ends(zero_point, quant_min, quant_max)
    # Clamped before it is rounded: the same number, since the ends are whole. Adding 0 turns -0 into 0.
    return _clamp(x / scale, low, high).round_().add_(0.0)


def where_inside(x: Tensor, beyond: Tensor) -> Tensor:
    """`x` where `beyond` is 0, and 0 where it is -1 or 1; the same shape each."""
    return aten.hardtanh_backward(x, beyond, -1, 1)  # type: ignore[no-any-return]


def sum_of_product(a: Tensor, b: Tensor, shape: Sequence[int]) -> Tensor:
    """a * b, the same shape each, summed to `shape`; to () without the product in memory."""
    if shape or torch.compiler.is_compiling():  # which fuses these two with what comes before
        return (a * b).sum_to_size(shape)
    # Dense layouts other than the default, such as channels last, are read in the order they have.
    order = sorted(range(a.dim()), key=a.stride, reverse=True)
    return torch.dot(a.permute(order).reshape(-1), b.permute(order).reshape(-1))


def _clamp(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    return x.clamp_max(high).clamp_min_(low)


def _ends(zero_point: Tensor | None, quant_min: Any, quant_max: Any) -> tuple[Any, Any]:
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


class _Straight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, level: Tensor) -> Tensor:
        return level.view_as(level)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


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
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return inward(grad, *ctx.saved_tensors), None, None


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
        found = _whole_gradients(grad, x, scale, zero_point, ctx.quant_min, ctx.quant_max, ctx.needs_input_grad)
        return (*found, None, None)


def _whole_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    low, high = _ends(zero_point, quant_min, quant_max)
    v = x / scale
    clamped = _clamp(v, low, high)
    beyond = (v - clamped).sign_()
    grad_x = grad_scale = grad_zero = None
    if needed[0]:
        grad_x = where_inside(grad, beyond)
    if needed[1]:
        residual = clamped.round() - where_inside(v, beyond)
        grad_scale = sum_of_product(grad, residual, scale.shape)
    if zero_point is not None and needed[2]:
        grad_zero = sum_of_product(grad, beyond.abs(), scale.shape) * -scale
    return grad_x, grad_scale, grad_zero


class _FakeQuantizeInPieces(torch.autograd.Function):
    """`_FakeQuantize` with one step for all elements, on the host."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
    ) -> Tensor:
        ctx.quant_min, ctx.quant_max = quant_min, quant_max
        ctx.save_for_backward(x, scale, zero_point)
        return blocked.between_ends(x.detach(), scale.detach(), *_numbers(zero_point, quant_min, quant_max))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # gradients of gradients
            found = _whole_gradients(grad, x, scale, zero_point, ctx.quant_min, ctx.quant_max, needed)
            return (*found, None, None)
        ends = _numbers(zero_point, ctx.quant_min, ctx.quant_max)
        grad_x, of_scale, beyond = blocked.gradients_between_ends(grad, x, scale, *ends)
        grad_zero = scale * -beyond if zero_point is not None and needed[2] else None
        return grad_x if needed[0] else None, scale.new_tensor(of_scale) if needed[1] else None, grad_zero, None, None


def _numbers(zero_point: Tensor | None, quant_min: int, quant_max: int) -> tuple[float, float]:
    zero = 0.0 if zero_point is None else zero_point.detach().item()
    return quant_min - zero, quant_max - zero
