"""SymmetricQuantizer and AffineQuantizer: their gradients, against autograd and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.quantizers.uniform import UniformQuantizer
from graphcomp.quantization.spec import QuantSpec
from graphcomp.quantization.stored import spread

from .cases import SHAPE, SPECS, check_integers, gradients, make, straight

UNIFORM = [name for name, spec in SPECS.items() if spec.kind == "uniform"]
every_uniform = pytest.mark.parametrize("name", UNIFORM)
BATCHES = {
    "ordinary": lambda: 2 * torch.randn(SHAPE, dtype=torch.float64),
    "all saturated": lambda: 50 * torch.randn(SHAPE, dtype=torch.float64).sign(),
    "none saturated": lambda: torch.rand(SHAPE, dtype=torch.float64) - 0.5,
    "with zeros": lambda: torch.randn(SHAPE, dtype=torch.float64) * torch.randint(0, 2, SHAPE),
}


def jittered(name: str) -> UniformQuantizer:
    """float64, every step and zero point a little different, so that none can stand for another."""
    quantizer = make(name, torch.float64)
    assert isinstance(quantizer, UniformQuantizer)
    quantizer.gradient_scale = False
    with torch.no_grad():
        quantizer.scale.mul_(torch.rand_like(quantizer.scale) + 0.5)
        if hasattr(quantizer, "zero_point"):
            quantizer.zero_point.add_(2 * torch.rand_like(quantizer.zero_point) - 1)
    return quantizer


def surrogate(quantizer: UniformQuantizer, x: Tensor, parameters: list[Tensor], rounding: bool = True) -> Tensor:
    """The quantizer as it is usually written, with `straight` rounding; or without any rounding."""
    low, high = quantizer.spec.quant_min, quantizer.spec.quant_max
    scale, *zeros = (spread(p, x.dim(), quantizer.dim, quantizer.groups) for p in parameters)
    zero = straight(zeros[0]) if zeros else torch.zeros(())
    codes = (x / scale + zero).clamp(low, high) - zero
    return (straight(codes) if rounding else codes) * scale


@every_uniform
@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_are_those_of_the_straight_through_expression(name: str, batch: str) -> None:
    quantizer, x = jittered(name), BATCHES[batch]().requires_grad_()
    upstream = torch.randn(SHAPE, dtype=torch.float64)
    parameters = list(quantizer.parameters())
    ours, expected = quantizer(x), surrogate(quantizer, x, parameters)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for mine, other in zip(
        gradients(ours, upstream, x, *parameters), gradients(expected, upstream, x, *parameters), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


@every_uniform
@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_are_finite_differences_with_the_rounding_held(name: str, batch: str) -> None:
    """Of (clamp(x / scale, …) + R) * scale with R the rounding residual as it was."""
    quantizer, x = jittered(name), BATCHES[batch]()
    upstream = torch.randn(SHAPE, dtype=torch.float64)
    parameters = [p.detach().clone() for p in quantizer.parameters()]
    # The zero point is whole where it acts, and its rounding is held too: moved, it acts unrounded.
    acting = [parameters[0], *(p.round() for p in parameters[1:])]
    spreads = spread(acting[0], x.dim(), quantizer.dim, quantizer.groups)
    residual = (quantizer(x) - smooth(quantizer, x, acting)).detach() / spreads
    analytic = gradients(quantizer(x), upstream, *quantizer.parameters())
    for which, grad in enumerate(analytic):
        for index in range(grad.numel()):
            moved = []
            for sign in (1, -1):
                changed = [p.clone() for p in acting]
                changed[which].view(-1)[index] += sign * 1e-6
                width = spread(changed[0], x.dim(), quantizer.dim, quantizer.groups)
                moved.append(((smooth(quantizer, x, changed) + residual * width) * upstream).sum())
            numeric = (moved[0] - moved[1]) / 2e-6
            torch.testing.assert_close(grad.view(-1)[index], numeric, rtol=1e-5, atol=1e-6)


def smooth(quantizer: UniformQuantizer, x: Tensor, parameters: list[Tensor]) -> Tensor:
    low, high = quantizer.spec.quant_min, quantizer.spec.quant_max
    scale, *zeros = (spread(p, x.dim(), quantizer.dim, quantizer.groups) for p in parameters)
    zero = zeros[0] if zeros else torch.zeros(())
    return ((x / scale + zero).clamp(low, high) - zero) * scale


@every_uniform
def test_gradient_scale(name: str) -> None:
    """1 / sqrt(n * quant_max), n elements to a step; on by default, for the quantizer's parameters only."""
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    plain = jittered(name)
    upstream = torch.randn(SHAPE, dtype=torch.float64)
    assert make(name).gradient_scale is True
    expected = gradients(plain(x), upstream, x, *plain.parameters())
    plain.gradient_scale = True
    scaled = gradients(plain(x), upstream, x, *plain.parameters())
    factor = 1 / math.sqrt(x.numel() // plain.scale.numel() * plain.spec.quant_max)
    assert torch.equal(scaled[0], expected[0])
    for mine, other in zip(scaled[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, other * factor)


def test_gradient_scale_can_be_left_out() -> None:
    assert SymmetricQuantizer(QuantSpec(), gradient_scale=False).gradient_scale is False


# ------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_number_of_levels(bits: int) -> None:
    """2^bits - 1 about 0; 2^bits with a zero point."""
    x = torch.linspace(-2, 2, 10_001)
    for symmetric, levels in ((True, 2**bits - 1), (False, 2**bits)):
        quantizer = make_quantizer(QuantSpec(bits, symmetric))
        quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
        assert len(quantizer(x).unique()) == levels


@every_uniform
def test_quantizing_twice_changes_nothing(name: str) -> None:
    quantizer = make(name)
    once = quantizer(3 * torch.randn(SHAPE))
    assert torch.equal(quantizer(once), once)


@pytest.mark.parametrize("bits", range(2, 17))
def test_after_a_relu_the_zero_point_is_the_lowest_code(bits: int) -> None:
    quantizer = make_quantizer(QuantSpec(bits, symmetric=False))
    quantizer.set_range(torch.tensor(0.0), torch.tensor(3.7))
    assert quantizer.zero_point == quantizer.spec.quant_min
    integers = check_integers(quantizer, torch.tensor([0.0, 3.7, 99.0]))
    assert integers.values.tolist() == [0, 2**bits - 1, 2**bits - 1]


@pytest.mark.parametrize(("low", "high"), [(1.0, 3.0), (-3.0, -1.0), (-1e-3, 5.0), (-0.37, 0.91), (-1e38, 1e38)])
def test_zero_is_exact_and_in_range(low: float, high: float) -> None:
    """Also where the data lie on one side, also for a zero point that is learned and not whole."""
    quantizer = make_quantizer(QuantSpec(8, symmetric=False))
    quantizer.set_range(torch.tensor(low), torch.tensor(high))
    for shift in (0.0, 0.3, 1e6, -1e6):
        with torch.no_grad():
            quantizer.zero_point.add_(shift)
        assert quantizer(torch.zeros(1)) == 0
        integers = check_integers(quantizer, torch.zeros(1))
        assert integers.values == integers.zero_point
        with torch.no_grad():
            quantizer.zero_point.sub_(shift)
    x = torch.tensor([low, high])
    assert ((quantizer(x) - x).abs() <= quantizer.scale * 0.51).all()


def test_ranges_per_channel_and_group() -> None:
    low = torch.tensor([[-1.0, 0.0], [0.0, -4.0]])
    high = torch.tensor([[0.5, 2.0], [0.0, 1.0]])
    quantizer = make_quantizer(QuantSpec(4, granularity="group", group_size=2), shape=(2, 4), dim=0)
    quantizer.set_range(low, high)
    torch.testing.assert_close(quantizer.scale.detach(), torch.tensor([[1 / 7, 2 / 7], [1.0, 4 / 7]]))
    affine = make_quantizer(QuantSpec(4, False, "channel"), shape=(2, 4), dim=0)
    affine.set_range(torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(affine.scale.detach(), torch.tensor([0.2, 0.2]))
    assert affine.zero_point.tolist() == [5, 0]
