"""GETA's quantizer: a learnable step, range and exponent, and so a learnable number of bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphcomp.errors import PlanError
from graphcomp.quantization.quantizers import blocked, recompute
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.gradients import bounded, inward, sum_of_product, where_inside
from graphcomp.quantization.quantizers.uniform import step_and_zero
from graphcomp.quantization.spec import QuantSpec
from graphcomp.quantization.stored import Affine, container
from graphcomp.torch_compat import get_unwrapped, is_functorch_wrapped_tensor, transforms_active

RANGE_LIMITS = (1e-15, 1e18)
"""Of q_m: with them q_m^t, for t up to 2, and its smallest step are normal float32 numbers."""

EXPONENT_LIMITS = (0.5, 2.0)
"""Of t."""

MOST_CODES = 2.0**23
"""q_m^t / d is at most this, so that float32 holds every code; 24 bits, where 16 is the most that is ever asked for."""

STEEPEST = 10.0
"""Ceiling of t a^(t-1), which has none at a = 0 for t < 1."""


class GetaQuantizer(Quantizer):
    """x̂ = sign(x) d round(c / d), with c = min(|x|, q_m)^t.

    Attributes:
        d: parameter (), the step, in units of the tensor to the power t.
        q_m: parameter (), the range: larger magnitudes saturate. Units of the tensor.
        t: parameter (), the exponent; 1 spaces the levels evenly. Where the spec's `learn_exponent` is False it is not
            trained, and counts as 1 whatever it holds: nothing is raised to a power.
        follow: note the largest magnitude of what is quantized in training, for whoever sets the range to it.
        peak: buffer (), that magnitude since it was last set to 0.
        steep: whether the gradient of x has the factor t a^(t-1), clamped to STEEPEST; else it is passed on as is.

    Before `set_range` the range is 1. Parameters that an optimizer drove out of their limits count as the limit, with
    a gradient that can bring them back, until `project` sets them to it.

    Raises:
        PlanError: the spec is of another kind.

    Source: GETA (Qu et al. 2025, arXiv 2502.16638), after DJPQ (Wang et al. 2020, arXiv 2007.10463) with its lower
    threshold at 0. The authors' code passes gradients of x where |x| < 2, whatever q_m is; here it is where
    |x| <= q_m, the elements whose output follows them.
    """

    d: Tensor
    q_m: Tensor
    t: Tensor
    peak: Tensor

    nearest: ClassVar[bool] = False

    def __init__(self, spec: QuantSpec, *, steep: bool = False) -> None:
        if spec.kind != "geta":
            raise PlanError(f"GetaQuantizer was given a spec of kind {spec.kind!r}", fix='QuantSpec(kind="geta")')
        super().__init__(spec)
        self.steep = steep
        self.follow = False
        self.register_buffer("peak", torch.tensor(0.0), persistent=False)
        self.d = nn.Parameter(torch.tensor(1.0 / spec.quant_max))
        self.q_m = nn.Parameter(torch.tensor(1.0))
        self.t = nn.Parameter(torch.tensor(1.0), requires_grad=spec.learn_exponent)

    def forward(self, x: Tensor) -> Tensor:
        """The nearest level of each element: shape and dtype of `x`."""
        if not self.enabled:
            return x
        dtype = self._wide(x)
        wide = x if x.dtype == dtype else x.to(dtype)
        peak = self.peak if self.follow and self.training else None
        levels = None if self.spec.learn_exponent or not blocked.fits(wide) else self._levels(dtype)
        result: Tensor
        make: Callable[[Tensor], Tensor]
        if levels is not None:
            result = _EvenInPieces.apply(wide, self.d, self.q_m, levels, peak)  # type: ignore[no-untyped-call]
            make = functools.partial(_in_pieces, levels=levels)
        else:
            if peak is not None:
                with torch.no_grad():
                    low, high = torch.aminmax(_plain(x.detach()))  # 20 times as fast as the norm
                    torch.maximum(peak, torch.maximum(high, -low).to(peak), out=peak)
            if self.spec.learn_exponent:
                d, q_m, t = self._valid(dtype)
                result = _Power.apply(wide, d, q_m, t, self.steep)  # type: ignore[no-untyped-call]
            else:
                d, q_m, t = self.d.to(dtype), self.q_m.to(dtype), None
                result = _Even.apply(wide, d, q_m)  # type: ignore[no-untyped-call]
            make = functools.partial(_whole, d=d.detach(), q_m=q_m.detach(), t=None if t is None else t.detach())
        if x.dtype != dtype:
            result, make = result.to(x.dtype), functools.partial(_narrow, make=make, dtype=dtype)
        recompute.note(result, make, x, (self.d, self.q_m, self.t))
        return result

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """q_m reaches the farther of `low` and `high`, t = 1, and d gives exactly the spec's bits.

        Where both are 0 the step is 1.
        """
        device = self.d.device
        step, _ = step_and_zero(low.to(device, torch.float64), high.to(device, torch.float64), self.spec)
        q_m = (step * self.spec.quant_max).clamp(*_storable(RANGE_LIMITS, self.q_m.dtype))
        self.q_m.copy_(q_m)
        self.t.fill_(1.0)
        self.d.copy_(self.q_m.double() / self.spec.quant_max)

    @torch.no_grad()
    def to_integers(self, x: Tensor) -> Affine:
        """The codes of `x`, whether or not the quantizer is enabled.

        The highest code is round(q_m^t / d), which need not be one less than a power of 2. For t != 1 the integers of
        a weight stand for it as well as ever, but those of an activation come from x^t, not from x.
        """
        dtype = self._wide(x)
        d, q_m, t = self._valid(dtype)
        codes = _codes(x.to(dtype), d, q_m, t)
        most = int(torch.cat([codes.abs().reshape(-1), _codes(q_m.view(1), d, q_m, t)]).amax())
        zero = torch.zeros_like(d, dtype=torch.int32)
        return Affine(codes.to(container(-most, most)), d, zero, -most, most)

    @property
    def bits(self) -> Tensor:
        """() float, differentiable: b = log2(q_m^t / d + 1) + 1."""
        d, q_m, t = self._valid(self._wide(self.d))
        return torch.log2(_power(q_m, t) / d + 1) + 1

    @property
    def exponent(self) -> float:
        """t."""
        t = self._valid(torch.float64)[2]
        return 1.0 if t is None else float(t.detach())

    @torch.no_grad()
    def project_bits(self, low: float, high: float) -> None:
        """Move d, and only d, so that low <= bits <= high; in place, without waiting for the device.

        For fixed q_m and t the bits allow one interval of d, d = q_m^t / (2^(bits - 1) - 1).

        Raises:
            PlanError: not 1 < low <= high.
        """
        if not 1 < low <= high:
            raise PlanError(f"bits from {low} to {high}", why="needs 1 < low <= high", fix="project_bits(4, 8)")
        d, q_m, t = self._valid(torch.float64)
        widest = _power(q_m, t)
        self.d.copy_(d.clamp(widest / (2.0 ** (high - 1) - 1), widest / (2.0 ** (low - 1) - 1)))

    @torch.no_grad()
    def project(self) -> None:
        """Clamp q_m and t to their limits (t to 1 where it is not learned), and d to what q_m^t allows."""
        self.q_m.clamp_(*_storable(RANGE_LIMITS, self.q_m.dtype))
        self.t.clamp_(*(EXPONENT_LIMITS if self.spec.learn_exponent else (1.0, 1.0)))
        self.d.copy_(self._valid(torch.float64)[0])

    def _wide(self, x: Tensor) -> torch.dtype:
        """The dtype to compute in: float32, or float64 where `x` or `d` has it. Half floats hold too few codes."""
        return torch.promote_types(torch.promote_types(x.dtype, self.d.dtype), torch.float32)

    def _levels(self, dtype: torch.dtype) -> blocked.Levels | None:
        """For t = 1, on a CPU; None where d or q_m is out of its limits."""
        step = self.d if self.d.dtype == dtype else self.d.to(dtype)
        d, q_m = step.item(), self.q_m.item()
        if not (RANGE_LIMITS[0] <= q_m <= RANGE_LIMITS[1] and q_m / MOST_CODES <= d <= q_m * MOST_CODES):
            return None
        return blocked.Levels.of(step.detach(), d, q_m)

    def _valid(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """d, q_m and t within their limits; those of d are constants to autograd. A t of None is 1."""
        q_m = bounded(self.q_m.to(dtype), *RANGE_LIMITS)
        t = bounded(self.t.to(dtype), *EXPONENT_LIMITS) if self.spec.learn_exponent else None
        widest = _power(q_m, t).detach()
        return bounded(self.d.to(dtype), widest / MOST_CODES, widest * MOST_CODES), q_m, t


def _plain(x: Tensor) -> Tensor:
    """All elements of `x`, out of torch.func's wrappers: a buffer cannot take what vmap holds one of."""
    if torch.compiler.is_compiling() or not transforms_active():
        return x
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def _storable(limits: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """`limits`, as far as `dtype` can hold them."""
    info = torch.finfo(dtype)
    return max(limits[0], info.tiny), min(limits[1], info.max)


def _in_limits(d: Tensor, q_m: Tensor) -> tuple[Tensor, Tensor]:
    """d and q_m as they count, for t = 1."""
    q_m = q_m.clamp(*RANGE_LIMITS)
    return torch.clamp(d, q_m / MOST_CODES, q_m * MOST_CODES), q_m


def _in_pieces(x: Tensor, levels: blocked.Levels) -> Tensor:
    """What `_EvenInPieces` returns."""
    return blocked.quantize(x, levels)[0]


def _whole(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Tensor:
    """What `_Even`, for a t of None, and `_Power` return."""
    if t is None:
        d, q_m = _in_limits(d, q_m)
    return _codes(x, d, q_m, t).mul_(d)


def _narrow(x: Tensor, make: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """`make` in `dtype`, of and to the dtype of `x`."""
    return make(x.to(dtype)).to(x.dtype)


def _power(magnitude: Tensor, t: Tensor | None) -> Tensor:
    return magnitude if t is None else magnitude.pow(t)


def _codes(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor | None) -> Tensor:
    """s round(c / d), halves to even; never -0, which integers do not have."""
    if t is not None:
        return torch.minimum(x.abs(), q_m).pow(t).div_(d).round_().mul_(x.sign()).add_(0.0)
    most = (q_m / d).round()  # clamped after it is rounded: the same number
    return x.div(d).round_().clamp_max_(most).clamp_min_(-most).add_(0.0)


class _Even(torch.autograd.Function):
    """The forward for t = 1, and the straight-through gradients, with c = x clamped to -q_m … q_m:

        dx̂/dd   = (x̂ - c) / d
        dx̂/dq_m = -1 below -q_m, 1 above q_m, else 0
        dx̂/dx   = 1 where |x| <= q_m, else 0

    d and q_m are brought into their limits here: in functions of their own, that took as long as a small layer.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, d: Tensor, q_m: Tensor) -> Tensor:
        return _whole(x, d, q_m, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return _even_gradients(ctx.needs_input_grad, grad, *ctx.saved_tensors)


class _EvenInPieces(torch.autograd.Function):
    """`_Even` where `blocked.fits` and d and q_m are within their limits; the largest magnitude goes into `peak`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, q_m: Tensor, levels: blocked.Levels, peak: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, d, q_m)
        result, ctx.beyond, largest = blocked.quantize(x, levels)
        ctx.levels = levels
        if peak is not None:
            peak.clamp_min_(largest)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, d, q_m = ctx.saved_tensors
        if torch.is_grad_enabled() or not blocked.fits(grad):  # derivatives of gradients, or of many at once
            own = d.to(x.dtype), q_m.to(x.dtype)
            grad_x, grad_d, grad_q_m = _even_gradients(ctx.needs_input_grad, grad, x, *own)
        else:
            grad_x, of_d, of_q_m = blocked.gradients(grad, x, ctx.levels, ctx.beyond)
            grad_d, grad_q_m = d.new_tensor(of_d), q_m.new_tensor(of_q_m)
        return grad_x, grad_d, grad_q_m, None, None


def _even_gradients(
    needed: Sequence[bool], grad: Tensor, x: Tensor, given_d: Tensor, given_q_m: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, d and q_m, as `_Even` has them, in ops on whole tensors."""
    d, q_m = _in_limits(given_d, given_q_m)
    c = x.clamp_max(q_m).clamp_min_(-q_m)
    beyond = (x - c).sign_()
    grad_x = grad_d = grad_q_m = None
    if needed[0]:
        grad_x = where_inside(grad, beyond)
    if needed[1]:
        exact = c.div_(d)
        grad_d = inward(sum_of_product(grad, exact.round() - exact, ()), given_d, d)
    if needed[2]:
        grad_q_m = inward(sum_of_product(grad, beyond, ()), given_q_m, q_m)
    return grad_x, grad_d, grad_q_m


class _Power(torch.autograd.Function):
    """The forward, and the straight-through gradients with R = round(c / d) - c / d:

        dx̂/dd   = s R
        dx̂/dq_m = s t q_m^(t-1) above q_m, else 0
        dx̂/dt   = s c ln min(a, q_m), 0 at x = 0
        dx̂/dx   = 1, or t a^(t-1), up to q_m, else 0

    where a = |x| and s = sign(x).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor, steep: bool) -> Tensor:
        return _whole(x, d, q_m, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
        *tensors, ctx.steep = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        x, d, q_m, t = ctx.saved_tensors
        clipped = x.abs().clamp_max_(q_m)
        c = clipped.pow(t)
        beyond = (x.abs() - clipped).sign_()
        signed = grad * x.sign()
        grad_x = grad_d = grad_q_m = grad_t = None
        if ctx.needs_input_grad[0]:
            slope = (t * clipped.pow(t - 1)).clamp_max_(STEEPEST) if ctx.steep else 1.0
            grad_x = where_inside(grad * slope, beyond)
        if ctx.needs_input_grad[1]:
            v = c / d
            grad_d = sum_of_product(signed, v.round() - v, ())
        if ctx.needs_input_grad[2]:
            grad_q_m = sum_of_product(signed, beyond, ()) * t * q_m.pow(t - 1)
        if ctx.needs_input_grad[3]:
            grad_t = sum_of_product(signed, torch.special.xlogy(c, clipped), ())
        return grad_x, grad_d, grad_q_m, grad_t, None
