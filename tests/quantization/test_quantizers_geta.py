"""GetaQuantizer: forward, bits, gradients and projections."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphcomp.errors import PlanError
from graphcomp.quantization.quantizers.geta import EXPONENT_LIMITS, STEEPEST, GetaQuantizer
from graphcomp.quantization.spec import QuantSpec

from .cases import check_integers, gradients, straight

GRID = torch.linspace(-3, 3, 241, dtype=torch.float64)


def build(
    d: float, q_m: float, t: float | None = None, *, steep: bool = False, dtype: torch.dtype = torch.float64
) -> GetaQuantizer:
    """Without t, one that does not learn it."""
    quantizer = GetaQuantizer(QuantSpec(kind="geta", learn_exponent=t is not None), steep=steep).to(dtype)
    with torch.no_grad():
        for parameter, value in zip((quantizer.d, quantizer.q_m, quantizer.t), (d, q_m, t), strict=True):
            parameter.fill_(1.0 if value is None else value)
    return quantizer


def with_bits(bits: float, q_m: float, t: float | None = None) -> GetaQuantizer:
    return build(q_m ** (t or 1.0) / (2 ** (bits - 1) - 1), q_m, t)


def by_hand(x: float, d: float, q_m: float, t: float = 1.0) -> float:
    c = abs(x) ** t if abs(x) < q_m else q_m**t
    return math.copysign(1, x) * d * round(c / d)  # halves to even, as torch


# ------------------------------------------------------------------------------------------------ forward
@pytest.mark.parametrize("t", [None, 0.7, 1.0, 1.4])
def test_forward(t: float | None) -> None:
    d, q_m, power = 0.13, 1.9, t or 1.0
    result = build(d, q_m, t)(GRID).detach()
    torch.testing.assert_close(result, torch.tensor([by_hand(x, d, q_m, power) for x in GRID.tolist()]).double())
    assert result[120] == 0
    assert torch.equal(result.flip(0), -result)
    c = GRID.abs().clamp(max=q_m).pow(power)
    assert (result - GRID.sign() * c).abs().max() <= d / 2 + 1e-12


@pytest.mark.parametrize("t", [None, 1.0])
def test_linear_levels_quantize_to_themselves(t: float | None) -> None:
    quantizer = with_bits(5, 1.7, t)
    once = quantizer(GRID)
    assert torch.equal(quantizer(once), once)


def test_an_exponent_that_is_not_learned_is_1() -> None:
    """Whatever the parameter holds, as after the state of a quantizer that learned it was loaded."""
    quantizer, expected = build(0.13, 1.9), build(0.13, 1.9)(GRID)
    quantizer.load_state_dict(build(0.13, 1.9, 1.4).state_dict())
    assert torch.equal(quantizer(GRID), expected)
    assert quantizer.exponent == 1 and quantizer.bits == build(0.13, 1.9).bits
    check_integers(quantizer, GRID)
    assert not quantizer.t.requires_grad
    quantizer.project()
    assert quantizer.t == 1


# ------------------------------------------------------------------------------------------------ bits
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("t", [None, 0.5, 1.0, 2.0])
def test_number_of_levels(bits: int, t: float | None) -> None:
    quantizer = with_bits(bits, 1.3, t)
    codes = torch.arange(2 ** (bits - 1), dtype=torch.float64)
    inputs = (codes * quantizer.d.item()).pow(1 / (t or 1.0))
    assert len(quantizer(torch.cat([inputs, -inputs, torch.tensor([99.0])])).unique()) == 2**bits - 1


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("t", [None, 0.5, 0.9, 1.0, 2.0])
@pytest.mark.parametrize("q_m", [0.01, 1.0, 30.0])
def test_bits_of_the_step_of_bits(bits: int, t: float | None, q_m: float) -> None:
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
        quantizer = GetaQuantizer(QuantSpec(bits, kind="geta", learn_exponent=True))
        quantizer.t.data.fill_(1.5)
        quantizer.set_range(torch.tensor(low), torch.tensor(high))
        assert quantizer.bits.item() == pytest.approx(bits, abs=1e-5)
        assert quantizer.t == 1
        assert quantizer.q_m.item() == pytest.approx(max(-low, high))
        assert check_integers(quantizer, torch.tensor([low, high, 99.0])).quant_max == 2 ** (bits - 1) - 1


# ------------------------------------------------------------------------------------------------ gradients
def learned(quantizer: GetaQuantizer) -> list[Tensor]:
    return [p for p in (quantizer.d, quantizer.q_m, quantizer.t) if p.requires_grad]


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
@pytest.mark.parametrize("t", [None, 0.6, 1.0, 1.7])
def test_gradients_are_those_of_the_straight_through_expression(batch: str, t: float | None) -> None:
    quantizer, x = build(0.11, 1.6, t, steep=True), BATCHES[batch]().requires_grad_()
    upstream, power = torch.randn_like(x), t or 1.0
    inputs = learned(quantizer)
    assert len(inputs) == (2 if t is None else 3)
    ours, expected = quantizer(x), reference(quantizer, x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for mine, other in zip(gradients(ours, upstream, *inputs), gradients(expected, upstream, *inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)
    (to_x,), (wanted,) = gradients(quantizer(x), upstream, x), gradients(reference(quantizer, x), upstream, x)
    calm = (power * x.abs().pow(power - 1) < STEEPEST) & (x != 0)
    torch.testing.assert_close(to_x[calm], wanted[calm])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("values", [(0.11, 1.6), (0.11, 1.6, 0.8)])
def test_gradients_are_finite_differences_with_the_rounding_held(batch: str, values: tuple[float, ...]) -> None:
    """d with the codes held, as the loss sees it; q_m and t with the residual held."""
    quantizer, x = build(*values), BATCHES[batch]()
    upstream = torch.randn_like(x)
    c = x.abs().clamp(max=values[1]).pow(quantizer.exponent)
    residual = (c / values[0]).round() - c / values[0]

    def smooth(d: float, q_m: float, t: float = 1.0) -> float:
        clipped = x.abs().clamp(max=q_m).pow(t)
        return (x.sign() * (clipped + residual * d) * upstream).sum().item()

    analytic = gradients(quantizer(x), upstream, *learned(quantizer))
    assert len(analytic) == len(values)
    for i, grad in enumerate(analytic):
        up, down = ([v + sign * 1e-6 * (i == k) for k, v in enumerate(values)] for sign in (1, -1))
        assert grad.item() == pytest.approx((smooth(*up) - smooth(*down)) / 2e-6, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("t", [None, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("steep", [False, True])
def test_gradient_of_x(t: float | None, steep: bool) -> None:
    """Cut off at q_m, not at 2; inside 1, or the slope where asked for."""
    quantizer, t = build(0.1, 2.5, t, steep=steep), t or 1.0
    x = torch.tensor([-2.6, -2.5, -1.0, -0.3, 0.0, 0.3, 2.2, 2.51, 100.0], dtype=torch.float64, requires_grad=True)
    (grad,) = gradients(quantizer(x), torch.full((9,), 3.0, dtype=torch.float64), x)
    slope = (t * x.detach().abs().pow(t - 1)).clamp(max=STEEPEST) if steep else torch.ones(9).double()
    inside = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0, 0])
    torch.testing.assert_close(grad, 3 * slope * inside)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("q_m", [-1.0, 0.0, 1e-15, 1.0])
@pytest.mark.parametrize("steep", [False, True])
def test_nothing_is_nan_at_zero(dtype: torch.dtype, q_m: float, steep: bool) -> None:
    for t in (None, -3.0, 0.5, 1.0, 9.0):
        quantizer = build(0.1, q_m, t, steep=steep, dtype=dtype)
        x = torch.tensor([0.0, -0.0, 1e-7, -1e-30, 1.0, -60000.0, math.inf], dtype=dtype, requires_grad=True)
        result = quantizer(x)
        assert result.isfinite().all() and (result[:2] == 0).all()
        result.sum().backward()
        for tensor in (x, *learned(quantizer)):
            assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("t", [None, 1.0])
@pytest.mark.parametrize("layout", ["channels last", "permuted", "every other", "gradient of a mean"])
def test_layouts(t: float | None, layout: str) -> None:
    """Gradients do not depend on where the elements of x and of the upstream gradient lie."""
    x, upstream = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = None
    for arrange in (lambda t: t, LAYOUTS[layout]):
        quantizer = build(0.1, 1.0, t)
        given, above = arrange(x).requires_grad_(), arrange(upstream)
        if layout == "gradient of a mean":
            above = torch.ones(()).double().expand(x.shape)
        result = quantizer(given)
        found = torch.autograd.grad(result, [given, *learned(quantizer)], above)
        expected = expected or (result, *found)
        torch.testing.assert_close((result, *found), expected, rtol=1e-12, atol=1e-12)


LAYOUTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "every other": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "gradient of a mean": lambda t: t.clone(),
}


@pytest.mark.parametrize("t", [None, 1.0])
def test_gradients_of_many_elements_in_float32(t: float | None) -> None:
    """Rounding errors do not add up: a million small terms about a large mean, as after a ReLU."""
    x = 0.0625 * (torch.randint(0, 130, (1 << 20,)) + 0.8 * torch.rand(1 << 20) - 0.4)  # no ties, which would flip
    upstream = 1 + torch.randn(1 << 20)
    found = {}
    for dtype in (torch.float32, torch.float64):
        quantizer = build(0.0625, 5.875, t, dtype=dtype)
        found[dtype] = gradients(quantizer(x.to(dtype)), upstream.to(dtype), *learned(quantizer))
    for rough, exact in zip(found[torch.float32], found[torch.float64], strict=True):
        assert rough.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("t", [None, 1.0])
def test_second_derivatives_do_not_break(t: float | None) -> None:
    """Hessian-vector products see the straight-through gradient as piecewise linear."""
    quantizer = build(0.25, 1.75, t)
    x = torch.tensor([0.3, 2.0], dtype=torch.float64)
    _, product = torch.autograd.functional.hvp(lambda x: quantizer(x).pow(2).sum(), x, torch.ones_like(x))
    assert product.tolist() == [2, 0]


class Ops(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.add(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("steep", [False, True])
def test_no_powers_without_an_exponent(steep: bool) -> None:
    powers = {"pow", "log", "exp", "xlogy", "special_xlogy"}
    for t in (None, 1.0):
        quantizer, x = build(0.1, 1.0, t, steep=steep), torch.randn(9).double().requires_grad_()
        with Ops() as ops:
            quantizer(x).sum().backward()
        assert "hardtanh_backward" in ops.seen, "the backward pass was not seen"
        assert bool(powers & ops.seen) == (t is not None)


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
    quantizer = build(-1.0, -2.0)
    quantizer.project()
    assert quantizer.q_m > 0 and quantizer.d > 0
    quantizer = build(-1.0, -2.0, 7.0)
    quantizer.project()
    assert quantizer.q_m > 0 and quantizer.d > 0
    assert quantizer.t == EXPONENT_LIMITS[1]
    quantizer = build(0.1, 1.0, -7.0)
    quantizer.project()
    assert (quantizer.d.item(), quantizer.q_m.item(), quantizer.t.item()) == (0.1, 1.0, EXPONENT_LIMITS[0])


# ------------------------------------------------------------------------------------------------ integers
@pytest.mark.parametrize("bits", [2.0, 3.7, 7.5, 8.0, 11.2, 16.0])
@pytest.mark.parametrize("t", [None, 0.5, 1.0, 1.6])
def test_the_highest_code_is_where_the_range_ends(bits: float, t: float | None) -> None:
    quantizer = with_bits(bits, 1.3, t)
    integers = check_integers(quantizer, torch.tensor([-99.0, 99.0, 0.0], dtype=torch.float64))
    most = round(2 ** (bits - 1) - 1)
    assert (integers.quant_min, integers.quant_max) == (-most, most)
    assert integers.values.tolist() == [-most, most, 0]
    assert integers.scale == quantizer.d


@pytest.mark.parametrize("t", [None, 1.0])
def test_no_elements(t: float | None) -> None:
    quantizer, x = build(0.1, 1.0, t), torch.empty(0, 3, requires_grad=True)
    assert check_integers(quantizer, x).quant_max == 10
    quantizer(x).sum().backward()
    assert quantizer.d.grad == 0 and quantizer.q_m.grad == 0
