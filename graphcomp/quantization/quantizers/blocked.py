"""Even levels on a CPU, piece by piece.

An op on a tensor larger than the cache waits for memory, and a quantizer takes several. Here all of them run on one
piece after another, which stays in the cache meanwhile, so that together they cost little more than one. Step and range
are numbers on the host, which on a CPU waits for nothing, and what no element of a piece needs is left out: most have
none beyond the range. Small layers are why there are few ops besides: each takes as long as some thousand elements.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphcomp.torch_compat import is_legacy_batchedtensor, number_of_dispatch_modes, transforms_active

PIECE = 1 << 17
"""Elements for each thread, 512 KiB in float32: of fewer, calling the ops takes longer than the ops. (PyTorch gives a
thread 32768 at least.)"""

aten = torch.ops.aten


def fits(x: Tensor) -> bool:
    """Whether `x` can be read in pieces: numbers in the memory of the host, dense, and nobody that records or
    transforms the ops that run on it, to whom the loop would show."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and x.layout is torch.strided
        and x.numel() > 0
        and number_of_dispatch_modes() == 0
        and not transforms_active()
        and not is_legacy_batchedtensor(x)  # many gradients at once
        and _in_order(x).is_contiguous()
    )


@dataclass(frozen=True)
class Levels:
    """Multiples of `d`, up to `most` times; numbers that the tensor's dtype holds. `step` is d as a () tensor."""

    step: Tensor
    d: float
    q_m: float
    most: float

    @classmethod
    def of(cls, step: Tensor, d: float, q_m: float) -> Levels:
        """Those of a valid step and range; `most` is round(q_m / d) as tensors of the step's dtype have it."""
        quotient = q_m / d
        if step.dtype == torch.float32:  # float64 in between changes nothing: it has more than twice the digits
            quotient = ctypes.c_float(quotient).value
        return cls(step, d, q_m, float(round(quotient)))

    @property
    def above(self) -> float:
        """The next number after q_m."""
        if self.step.dtype == torch.float64:
            return math.nextafter(self.q_m, math.inf)
        return ctypes.c_float(self.q_m * (1 + 0.75 * torch.finfo(torch.float32).eps)).value


def quantize(x: Tensor, levels: Levels) -> tuple[Tensor, list[bool], float]:
    """The nearest level of each element; for each piece, whether some element is beyond the range; the largest
    magnitude.

    Bit for bit what `round(x / d)`, clamped to -most … most, times d gives; never -0.
    """
    result = torch.empty_like(x)
    beyond, peak, zero = [], 0.0, _zero(x.dtype)
    for source, target in zip(_pieces(x), _pieces(result), strict=True):
        low, high = torch.aminmax(source)
        largest = max(high.item(), -low.item())
        torch.div(source, levels.step, out=target)
        target.round_()
        inside = largest <= levels.q_m  # not where it is nan
        if not inside:
            target.clamp_(-levels.most, levels.most)
        torch.add(zero, target, alpha=levels.d, out=target)  # times d, and 0 for -0
        beyond.append(not inside)
        peak = max(peak, largest)
    return result, beyond, peak


def gradients(grad: Tensor, x: Tensor, levels: Levels, beyond: Sequence[bool]) -> tuple[Tensor, float, float]:
    """Of x, of d and of q_m, from that of the result; `beyond` as `quantize` found it.

    With c = x clamped to -q_m … q_m: grad where |x| <= q_m, else 0; the sum of grad (round(c / d) - c / d); the sum of
    grad sign(x) where |x| > q_m. Codes are computed again, which in the cache is faster than to read them from memory.
    """
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    grad_x = torch.empty_like(x) if any(beyond) else grad
    grad_d = grad_q_m = 0.0
    exact = codes = x.new_empty(0)
    for upstream, source, passed, clipped in zip(_pieces(grad), _pieces(x), _pieces(grad_x), beyond, strict=True):
        if codes.shape != source.shape:
            exact, codes = torch.empty_like(source), torch.empty_like(source)
        if clipped:
            torch.clamp(source, -levels.q_m, levels.q_m, out=exact)
            exact.div_(levels.step)
        else:
            torch.div(source, levels.step, out=exact)
        torch.round(exact, out=codes)
        torch.sub(codes, exact, out=exact)
        grad_d += torch.dot(upstream, exact).item()
        if clipped:
            above = levels.above
            aten.hardtanh_backward.grad_input(upstream, source, -above, above, grad_input=passed)
            torch.sub(upstream, passed, out=exact)  # 0 inside; beyond, codes are -most or most
            signs = codes if levels.most else torch.sign(source, out=codes)
            grad_q_m += torch.dot(exact, signs).item()
        elif grad_x is not grad:
            passed.copy_(upstream)
    return grad_x, grad_d, grad_q_m / (levels.most or 1.0)


def between_ends(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """The nearest of the multiples `low` to `high`, whole numbers, of `scale`, a () tensor: what `fake_quantize` gives.

    Bit for bit `round(clamp(x / scale, low, high)) * scale`; never -0.
    """
    result = torch.empty_like(x)
    for source, target in zip(_pieces(x), _pieces(result), strict=True):
        torch.div(source, scale, out=target)
        target.clamp_(low, high).round_().add_(0.0).mul_(scale)
    return result


def gradients_between_ends(
    grad: Tensor, x: Tensor, scale: Tensor, low: float, high: float
) -> tuple[Tensor, float, float]:
    """Of x, of the scale, and the sum of `grad` beyond the ends; from the gradient of the result of `between_ends`.

    With v = x / scale: grad where low <= v <= high, else 0; the sum of grad (round(v) - v) there and of grad times the
    end beyond.
    """
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    grad_x = torch.empty_like(x)
    ends = torch.tensor([low, high], dtype=x.dtype)
    below, above = torch.nextafter(ends, ends.new_tensor([-math.inf, math.inf])).tolist()
    of_scale = beyond = 0.0
    v = codes = x.new_empty(0)
    for upstream, source, passed in zip(_pieces(grad), _pieces(x), _pieces(grad_x), strict=True):
        if v.shape != source.shape:
            v, codes = torch.empty_like(source), torch.empty_like(source)
        torch.div(source, scale, out=v)
        aten.hardtanh_backward.grad_input(upstream, v, below, above, grad_input=passed)
        v.clamp_(low, high)  # finite, and where it was beyond, no farther from its code
        torch.round(v, out=codes)
        torch.sub(codes, v, out=v)
        of_scale += torch.dot(passed, v).item()
        torch.sub(upstream, passed, out=v)  # 0 inside
        of_scale += torch.dot(v, codes).item()
        beyond += v.sum().item()
    return grad_x, of_scale, beyond


def _pieces(x: Tensor) -> Sequence[Tensor]:
    """Vectors that share the elements of `x`, in the order that they have in memory."""
    whole, size = _in_order(x).view(-1), PIECE * torch.get_num_threads()
    return torch.split(whole, size) if len(whole) > size else (whole,)


def _in_order(x: Tensor) -> Tensor:
    """`x` with its dims in the order of their strides; contiguous where its elements lie next to each other."""
    return x if x.is_contiguous() else x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))


@functools.cache
def _zero(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype)
