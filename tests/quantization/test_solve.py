"""One layer, moved and rounded: what is reported is what the layer does, and no worse than without the regression."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.capture.capture import capture
from graphcomp.errors import CalibrationError
from graphcomp.ir.graph import bind
from graphcomp.ops.answers import compute_of, operands_of
from graphcomp.pruning.least_squares import Problem, Sums
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.solve import round_layer
from graphcomp.quantization.spec import QuantSpec


class Experts(nn.Module):
    """A matrix for each of four."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6, 5)), None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(12, 5), (200, 12), 0),
    "no bias": (lambda: nn.Linear(12, 5, bias=False), (200, 12), 0),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (8, 4, 10, 10), 0),
    "grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), (8, 4, 40), 0),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (8, 6, 10, 10), 0),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (8, 4, 6, 6), 1),
    "batched": (lambda: Experts(), (4, 200, 6), 2),
}


def smooth(shape: tuple[int, ...]) -> Tensor:
    """Values of few levels in float64 that follow each other along the last dim, with a mean."""
    x = torch.randn(shape, dtype=torch.float64)
    return ((x + x.roll(1, -1) + 0.5) * 1.5).round() / 1.5


def problem_of(name: str, rough: Tensor, exact: Tensor) -> tuple[nn.Module, Problem, Sums, Quantizer, Tensor]:
    """Return layer, problem, sums, quantizer and what the layer is to give."""
    make, _, dim = LAYERS[name]
    layer = make().double().requires_grad_(False)
    (node,) = (n for n in capture(layer, (exact,)).module.graph.nodes if compute_of(n))
    operands = operands_of(node)
    data = next(argument for argument in operands.data if argument != operands.weight)
    assert set(bind(node)) >= {data, operands.weight}
    weight = layer.weight.detach()
    assert isinstance(weight, Tensor)
    bias = layer.bias is not None
    problem = Problem.between(node, (data, rough), (operands.weight, weight), bias)
    assert isinstance(problem, Problem)
    wanted = layer(exact).detach()
    sums = problem.sums([rough], [wanted - layer(rough).detach()], [wanted], 10**6)
    quantizer = make_quantizer(QuantSpec(3, granularity="channel"), shape=weight.shape, dim=dim).double()
    calibrate_weight(quantizer, weight)
    return layer, problem, sums, quantizer, wanted


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_reported_error_is_that_of_the_layer(name: str, second_order: bool) -> None:
    torch.manual_seed(0)
    exact = smooth(LAYERS[name][1])
    rough = exact + 0.4 * exact.roll(2, -1) - 0.2
    layer, problem, sums, quantizer, wanted = problem_of(name, rough, exact)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    found = round_layer(problem, sums, weight.detach(), quantizer, regress=True, second_order=second_order)
    assert torch.equal(quantizer(found.weight), found.weight)
    assert found.repair is not None and found.repair.after <= found.repair.before
    small = copy.deepcopy(layer)
    with torch.no_grad():
        small.weight.copy_(found.weight)  # type: ignore[operator, union-attr]
        if small.bias is not None:
            assert found.shift is not None
            small.bias += found.shift  # type: ignore[operator]
    error = float((small(rough) - wanted).norm() / wanted.norm())
    assert error == pytest.approx(found.repair.after, rel=1e-6)
    assert math.isfinite(found.repair.ridge) and found.repair.after < found.repair.before


def test_with_sixteen_bits_nothing_moves_beyond_rounding() -> None:
    torch.manual_seed(0)
    exact = smooth((200, 12))
    layer, problem, sums, _, _ = problem_of("linear", exact, exact)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    quantizer = make_quantizer(QuantSpec(16, granularity="channel"), shape=weight.shape, dim=0).double()
    found = round_layer(problem, sums, weight.detach(), quantizer, regress=True, second_order=True)
    assert found.repair is not None and math.isinf(found.repair.ridge)
    steps = quantizer.get_parameter("scale").detach()[:, None]
    assert float(((found.weight - weight) / steps).abs().max()) < 8


def test_few_rows_move_nothing() -> None:
    torch.manual_seed(0)
    exact = smooth((20, 12))
    layer, problem, sums, quantizer, _ = problem_of("linear", exact * 0.8, exact)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    found = round_layer(problem, sums, weight.detach(), quantizer, regress=True, second_order=False)
    assert found.repair is None and found.shift is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_data_that_are_not_finite(bad: float) -> None:
    exact = smooth((200, 12))
    exact[3, 4] = bad
    layer, problem, sums, quantizer, _ = problem_of("linear", exact, exact)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with pytest.raises(CalibrationError, match="not finite"):
        round_layer(problem, sums, weight.detach(), quantizer, regress=True, second_order=True)


def test_the_rounded_layer_is_far_better_than_rounding_alone() -> None:
    """Of a depthwise layer behind a coarse input: the issue's case."""
    torch.manual_seed(0)
    exact = F.relu(torch.randn(16, 6, 12, 12, dtype=torch.float64)) + 1
    rough = (exact * 0.8).round()
    layer, problem, sums, quantizer, wanted = problem_of("depthwise", rough, exact)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    plain = quantizer(weight.detach())
    without = F.conv2d(rough, plain.detach(), layer.bias, padding=1, groups=6)  # type: ignore[arg-type]
    found = round_layer(problem, sums, weight.detach(), quantizer, regress=True, second_order=True)
    assert found.shift is not None and found.repair is not None
    nearest = (without - wanted).norm() / wanted.norm()
    assert found.repair.after < 0.75 * float(nearest)


def test_rows_count_as_their_weights_say() -> None:
    """Of a depthwise layer: weight 1 is no weight, and rows of weight 0 are not there."""
    torch.manual_seed(0)
    exact = smooth((8, 6, 10, 10))
    rough = exact + 0.4 * exact.roll(2, -1)
    layer, problem, sums, quantizer, wanted = problem_of("depthwise", rough, exact)
    rest = wanted - layer(rough)
    ones = problem.sums([rough], [rest], [wanted], 10**6, [torch.ones_like(wanted)])
    torch.testing.assert_close(ones.all.xx, sums.all.xx)  # type: ignore[union-attr]
    assert ones.norm == pytest.approx(sums.norm)
    some = torch.ones_like(wanted)
    some[:, :, 5:] = 0
    half = problem.sums([rough], [rest], [wanted], 10**6, [some])
    upper = rough[:, :, :6]  # all that the upper five rows of the result are made of
    padded = problem.sums([upper], [rest[:, :, :6]], [wanted[:, :, :6]], 10**6, [some[:, :, :6]])
    torch.testing.assert_close(half.all.xx, padded.all.xx)  # type: ignore[union-attr]
    weight = layer.weight
    assert isinstance(weight, Tensor)
    found = round_layer(problem, half, weight, quantizer, regress=True, second_order=True)
    assert found.repair is not None and found.shift is not None
    given = F.conv2d(rough, found.weight, layer.bias + found.shift, padding=1, groups=6)  # type: ignore[operator]
    error = ((given - wanted) * some).norm() / (wanted * some).norm()
    assert float(error.detach()) == pytest.approx(found.repair.after, rel=1e-6)
