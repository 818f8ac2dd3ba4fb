"""GetaQuantizer: forward, bits, gradients and projections."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graphcomp.errors import PlanError
from graphcomp.quantization.quantizers.geta import EXPONENT_LIMITS, STEEPEST, GetaQuantizer
from graphcomp.quantization.spec import QuantSpec

from .cases import check_integers, gradients, straight

GRID = torch.linspace(-3, 3, 241, dtype=torch.float64)


def build(d: float, q_m: float, t: float, *, steep: bool = False, dtype: torch.dtype = torch.float64) -> GetaQuantizer:
    quantizer = GetaQuantizer(QuantSpec(kind="geta"), steep=steep).to(dtype)
    with torch.no_grad():
        for parameter, value in zip((quantizer.d, quantizer.q_m, quantizer.t), (d, q_m, t), strict=True):
            parameter.fill_(value)
    return quantizer


def with_bits(bits: float, q_m: float, t: float) -> GetaQuantizer:
    return build(q_m**t / (2 ** (bits - 1) - 1), q_m, t)


def by_hand(x: float, d: float, q_m: float, t: float) -> float:
    c = abs(x) ** t if abs(x) < q_m else q_m**t
    return math.copysign(1, x) * d * round(c / d)  # halves to even, as torch


# ------------------------------------------------------------------------------------------------ forward
@pytest.mark.parametrize("t", [0.7, 1.0, 1.4])
def test_forward(t: float) -> None:
    d, q_m = 0.13, 1.9
    result = build(d, q_m, t)(GRID).detach()
    torch.testing.assert_close(result, torch.tensor([by_hand(x, d, q_m, t) for x in GRID.tolist()]).double())
    assert result[120] == 0
    assert torch.equal(result.flip(0), -result)
    c = GRID.abs().clamp(max=q_m).pow(t)
    assert (result - GRID.sign() * c).abs().max() <= d / 2 + 1e-12


def test_linear_levels_quantize_to_themselves() -> None:
    quantizer = with_bits(5, 1.7, 1.0)
    once = quantizer(GRID)
    assert torch.equal(quantizer(once), once)


# ------------------------------------------------------------------------------------------------ bits
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("t", [0.5, 1.0, 2.0])
def test_number_of_levels(bits: int, t: float) -> None:
    quantizer = with_bits(bits, 1.3, t)
    codes = torch.arange(2 ** (bits - 1), dtype=torch.float64)
    inputs = (codes * quantizer.d.item()).pow(1 / t)
    assert len(quantizer(torch.cat([inputs, -inputs, torch.tensor([99.0])])).unique()) == 2**bits - 1


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("t", [0.5, 0.9, 1.0, 2.0])
@pytest.mark.parametrize("q_m", [0.01, 1.0, 30.0])
def test_bits_of_the_step_of_bits(bits: int, t: float, q_m: float) -> None:
    assert abs(with_bits(bits, q_m, t).bits.item() - bits) < 1e-9


def test_bits_can_be_learned() -> None:
    quantizer = build(0.1, 2.0, 1.2)
    numeric = [
        (build(*(v + e for v, e in zip((0.1, 2.0, 1.2), unit, strict=True))).bits - quantizer.bits).item() / 1e-7
        for unit in ((1e-7, 0, 0), (0, 1e-7, 0), (0, 0, 1e-7))
    ]
    analytic = torch.autograd.grad(quantizer.bits, [quantizer.d, quantizer.q_m, quantizer.t])
    assert [g.item() for g in analytic] == pytest.approx(numeric, rel=1e-4)


@pytest.mark.parametrize("bits", range(2, 17))
def test_a_range_starts_at_exactly_the_bits_asked_for(bits: int) -> None:
    for low, high in ((-0.02, 0.01), (0.0, 37.0)):
        quantizer = GetaQuantizer(QuantSpec(bits, kind="geta"))
        quantizer.t.data.fill_(1.5)
        quantizer.set_range(torch.tensor(low), torch.tensor(high))
        assert quantizer.bits.item() == pytest.approx(bits, abs=1e-5)
        assert quantizer.t == 1
        assert quantizer.q_m.item() == pytest.approx(max(-low, high))
        assert check_integers(quantizer, torch.tensor([low, high, 99.0])).quant_max == 2 ** (bits - 1) - 1


# ------------------------------------------------------------------------------------------------ gradients
def reference(quantizer: GetaQuantizer, x: Tensor) -> Tensor:
    """The formula with `straight` rounding; autograd does the rest. a = 0 is kept out of the power, whose slope at 0
    for t < 1 is infinite."""
    inside = x.abs() <= quantizer.q_m
    a = torch.where(inside & (x != 0), x.abs(), 1.0)
    c = torch.where(inside, torch.where(x != 0, a.pow(quantizer.t), 0.0), quantizer.q_m.pow(quantizer.t))
    return x.sign() * quantizer.d * straight(c / quantizer.d)


BATCHES = {
    "ordinary": lambda: 2 * torch.randn(400, dtype=torch.float64),
    "with zeros": lambda: torch.randn(400, dtype=torch.float64) * torch.randint(0, 2, (400,)),
    "all zeros": lambda: torch.zeros(10, dtype=torch.float64),
    "all saturated": lambda: 9 * torch.randn(400, dtype=torch.float64).sign(),
    "none saturated": lambda: torch.rand(400, dtype=torch.float64) - 0.5,
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("t", [0.6, 1.0, 1.7])
def test_gradients_are_those_of_the_straight_through_expression(batch: str, t: float) -> None:
    quantizer, x = build(0.11, 1.6, t, steep=True), BATCHES[batch]().requires_grad_()
    upstream = torch.randn_like(x)
    inputs = (quantizer.d, quantizer.q_m, quantizer.t)
    ours, expected = quantizer(x), reference(quantizer, x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for mine, other in zip(gradients(ours, upstream, *inputs), gradients(expected, upstream, *inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)
    (to_x,), (wanted,) = gradients(quantizer(x), upstream, x), gradients(reference(quantizer, x), upstream, x)
    calm = (t * x.abs().pow(t - 1) < STEEPEST) & (x != 0)
    torch.testing.assert_close(to_x[calm], wanted[calm])


@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_are_finite_differences_with_the_rounding_held(batch: str) -> None:
    """d with the codes held, as the loss sees it; q_m and t with the residual held."""
    values, x = [0.11, 1.6, 0.8], BATCHES[batch]()
    upstream = torch.randn_like(x)
    quantizer = build(*values)
    c = x.abs().clamp(max=values[1]).pow(values[2])
    residual = (c / values[0]).round() - c / values[0]

    def smooth(d: float, q_m: float, t: float) -> float:
        clipped = x.abs().clamp(max=q_m).pow(t)
        return (x.sign() * (clipped + residual * d) * upstream).sum().item()

    analytic = gradients(quantizer(x), upstream, quantizer.d, quantizer.q_m, quantizer.t)
    for i, grad in enumerate(analytic):
        up, down = ([v + sign * 1e-6 * (i == k) for k, v in enumerate(values)] for sign in (1, -1))
        assert grad.item() == pytest.approx((smooth(*up) - smooth(*down)) / 2e-6, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("steep", [False, True])
def test_gradient_of_x(t: float, steep: bool) -> None:
    """Cut off at q_m, not at 2; inside 1, or the slope where asked for."""
    quantizer = build(0.1, 2.5, t, steep=steep)
    x = torch.tensor([-2.6, -2.5, -1.0, -0.3, 0.0, 0.3, 2.2, 2.51, 100.0], dtype=torch.float64, requires_grad=True)
    (grad,) = gradients(quantizer(x), torch.full((9,), 3.0, dtype=torch.float64), x)
    slope = (t * x.detach().abs().pow(t - 1)).clamp(max=STEEPEST) if steep else torch.ones(9).double()
    inside = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0, 0])
    torch.testing.assert_close(grad, 3 * slope * inside)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("q_m", [-1.0, 0.0, 1e-15, 1.0])
@pytest.mark.parametrize("steep", [False, True])
def test_nothing_is_nan_at_zero(dtype: torch.dtype, q_m: float, steep: bool) -> None:
    for t in (-3.0, 0.5, 1.0, 9.0):
        quantizer = build(0.1, q_m, t, steep=steep, dtype=dtype)
        x = torch.tensor([0.0, -0.0, 1e-7, -1e-30, 1.0, -60000.0], dtype=dtype, requires_grad=True)
        result = quantizer(x)
        assert result.isfinite().all() and (result[:2] == 0).all()
        result.sum().backward()
        for tensor in (x, *quantizer.parameters()):
            assert tensor.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ projections
def test_project_bits_moves_only_the_step() -> None:
    for bits, expected in ((2.3, 4.0), (5.5, 5.5), (13.0, 8.0)):
        for q_m in (0.1, 1.0, 40.0):
            quantizer = with_bits(bits, q_m, 1.3)
            quantizer.project_bits(4, 8)
            assert quantizer.bits.item() == pytest.approx(expected, abs=1e-9)
            assert (quantizer.q_m, quantizer.t) == (q_m, 1.3)
            assert quantizer.d.requires_grad and quantizer.d.grad_fn is None
    quantizer = with_bits(5.4, 2.0, 1.1)
    quantizer.project_bits(5, 5)
    assert quantizer.bits.item() == pytest.approx(5, abs=1e-9)


def test_project_bits_in_float32() -> None:
    quantizer = build(-1.0, 0.3, 0.7, dtype=torch.float32)
    quantizer.project_bits(4, 16)
    assert 4 - 1e-4 <= quantizer.bits.item() <= 16 + 1e-4


@pytest.mark.parametrize(("low", "high"), [(1, 8), (0, 4), (8, 4), (math.nan, 8)])
def test_project_bits_of_no_interval(low: float, high: float) -> None:
    with pytest.raises(PlanError, match="low <= high"):
        build(0.1, 1.0, 1.0).project_bits(low, high)


def test_project_brings_each_parameter_back() -> None:
    quantizer = build(-1.0, -2.0, 7.0)
    quantizer.project()
    assert quantizer.q_m > 0 and quantizer.d > 0
    assert quantizer.t == EXPONENT_LIMITS[1]
    quantizer = build(0.1, 1.0, -7.0)
    quantizer.project()
    assert (quantizer.d.item(), quantizer.q_m.item(), quantizer.t.item()) == (0.1, 1.0, EXPONENT_LIMITS[0])


# ------------------------------------------------------------------------------------------------ integers
@pytest.mark.parametrize("bits", [2.0, 3.7, 7.5, 8.0, 11.2, 16.0])
@pytest.mark.parametrize("t", [0.5, 1.0, 1.6])
def test_the_highest_code_is_where_the_range_ends(bits: float, t: float) -> None:
    quantizer = with_bits(bits, 1.3, t)
    integers = check_integers(quantizer, torch.tensor([-99.0, 99.0, 0.0], dtype=torch.float64))
    most = round(2 ** (bits - 1) - 1)
    assert (integers.quant_min, integers.quant_max) == (-most, most)
    assert integers.values.tolist() == [-most, most, 0]
    assert integers.scale == quantizer.d


def test_no_elements() -> None:
    assert check_integers(build(0.1, 1.0, 1.0), torch.empty(0, 3)).quant_max == 10
