"""Quantizers as people write them into their own models: chains of ops on a weight or on an activation.

`quantize_in_place(model, weight, activation)` gives every convolution and linear layer of a model the two, as attached
branch (on the weight) and inserted branch (on what the layer reads).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def through(x: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` with the gradient of `x`."""
    return x + (quantized - x).detach()


def rounded(x: Tensor) -> Tensor:
    return through(x, x.round())


class Geta(nn.Module):
    """Step, range and exponent, written out: log and exp for the power, a mask of truth values for the clip."""

    def __init__(self, like: Tensor, dim: int) -> None:
        super().__init__()
        self.d, self.q_m, self.t = (nn.Parameter(torch.tensor([v])) for v in (0.03, 1.0, 1.1))

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.le(x.abs(), self.q_m)
        power = torch.exp(self.t * torch.log(x.abs() + 1e-6))
        clipped = torch.where(inside, power, torch.exp(self.t * torch.log(self.q_m)))
        return torch.sign(x) * self.d * rounded(clipped / self.d)


class Power(nn.Module):
    """The same with pow and clamp, and parameters reshaped to the rank of the operand."""

    def __init__(self, like: Tensor, dim: int) -> None:
        super().__init__()
        self.step, self.exponent = nn.Parameter(torch.tensor(0.05)), nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        step, exponent = self.step.reshape(shape), self.exponent.reshape(shape)
        levels = x.abs().clamp(max=2.0).pow(exponent).div(step)
        return x.sign() * (rounded(levels) * step).pow(1 / exponent)


class Lsq(nn.Module):
    """Esser et al. 2020, one step, with the scaled gradient written as people write it."""

    def __init__(self, like: Tensor, dim: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.full(self.shape(like, dim), 0.07))

    def shape(self, like: Tensor, dim: int) -> tuple[int, ...]:
        return (1,)

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.step * 0.01
        step = (self.step - scaled).detach() + scaled
        return rounded(torch.clamp(x / step, -7, 7)) * step


class ChannelLsq(Lsq):
    """One step per channel, (c, 1, 1, 1) on a weight and (1, c, 1, 1) or (c,) on an activation."""

    def shape(self, like: Tensor, dim: int) -> tuple[int, ...]:
        return tuple(n if d == dim % like.dim() else 1 for d, n in enumerate(like.shape))


class Pact(nn.Module):
    """Choi et al. 2018: 0.5 (|x| - |x - alpha| + alpha), here of both signs."""

    def __init__(self, like: Tensor, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        clipped = 0.5 * ((x + self.alpha).abs() - (x - self.alpha).abs())
        scale = 15 / self.alpha
        return torch.round(clipped * scale) / scale + (clipped - clipped.detach())


class DoReFa(nn.Module):
    """Zhou et al. 2016, equation 9: tanh, normalised by the largest of the whole tensor."""

    def __init__(self, like: Tensor, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        bounded = torch.tanh(x)
        unit = bounded / (2 * bounded.abs().max()) + 0.5
        return 2 * rounded(unit * 15) / 15 - 1


class MinMax(nn.Module):
    """The range of each tensor, taken anew on each run."""

    def __init__(self, like: Tensor, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.min(), x.max()
        step = (high - low) / 15
        return through(x, torch.clamp(torch.round((x - low) / step), 0, 15) * step + low)


class ChannelMax(nn.Module):
    """The largest magnitude of each channel, taken anew on each run."""

    def __init__(self, like: Tensor, dim: int) -> None:
        super().__init__()
        self.others = [d for d in range(like.dim()) if d != dim % like.dim()]

    def forward(self, x: Tensor) -> Tensor:
        step = (x.detach().abs().amax(self.others, keepdim=True) / 7).clamp(min=1e-8)
        return through(x, (x / step).round().clamp(-7, 7) * step)


class Statistics(nn.Module):
    """A clip at a multiple of the mean magnitude, as in SAWB or ternary weights."""

    def __init__(self, like: Tensor, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        clip = 2 * x.abs().mean() + 0.5 * x.std()
        return rounded(torch.clamp(x / clip, -1, 1) * 7) / 7 * clip


class HalfPrecision(nn.Module):
    """Casts on the way: the codes are whole numbers for a moment."""

    def __init__(self, like: Tensor, dim: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.06))

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.clamp(torch.round(x.double() / self.step.double()), -8, 7).to(torch.int8)
        return through(x, codes.to(x.dtype) * self.step)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class OwnFunction(nn.Module):
    """Straight through by an autograd function, the zero point learned."""

    def __init__(self, like: Tensor, dim: int) -> None:
        super().__init__()
        self.step, self.zero = nn.Parameter(torch.tensor(0.08)), nn.Parameter(torch.tensor(6.4))

    def forward(self, x: Tensor) -> Tensor:
        zero = _Round.apply(self.zero)
        return (torch.clamp(_Round.apply(x / self.step) + zero, 0, 15) - zero) * self.step


class FakeQuantizeOps(nn.Module):
    """torch's own op, one scale per channel."""

    def __init__(self, like: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("scale", torch.full((like.shape[dim],), 0.06))
        self.register_buffer("zero_point", torch.zeros(like.shape[dim], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(x, self.scale.float(), self.zero_point, self.dim % x.dim(), -8, 7)


Make = Callable[[Tensor, int], nn.Module]
"""(a tensor of the operand's shape, its channel dim) -> the quantizer."""

WRITTEN: dict[str, Make] = {
    kind.__name__: kind
    for kind in (
        Geta, Power, Lsq, ChannelLsq, Pact, DoReFa, MinMax, ChannelMax, Statistics, HalfPrecision, OwnFunction,
        FakeQuantizeOps,
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ in a model
class QuantConv2d(nn.Conv2d):
    """A convolution that quantizes its weight and what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.of_input(x), self.of_weight(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """A linear layer that quantizes its weight and what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.of_input(x), self.of_weight(self.weight), self.bias)


def quantize_in_place(model: nn.Module, weight: Make, activation: Make) -> nn.Module:
    """Every Conv2d and Linear of `model` becomes the quantizing one, its tensors under their names; returns `model`."""
    for layer in list(model.modules()):
        if type(layer) is nn.Conv2d:
            layer.__class__ = QuantConv2d
            layer.of_weight = weight(layer.weight, 0)
            layer.of_input = activation(torch.empty(1, layer.in_channels, 1, 1), 1)
        elif type(layer) is nn.Linear:
            layer.__class__ = QuantLinear
            layer.of_weight = weight(layer.weight, 0)
            layer.of_input = activation(torch.empty(layer.in_features), -1)
    return model
