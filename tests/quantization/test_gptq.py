"""Second-order rounding: smaller errors than nearest, on the quantizer's grid, for all products of a layer at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcomp.errors import CalibrationError, PlanError
from graphcomp.ops.design import Contraction, Design, Patches
from graphcomp.quantization import gptq
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.gptq import Levels, damped, output_error, round_second_order, search_steps
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.spec import QuantSpec


def correlated(i: int, samples: int = 400) -> Tensor:
    """(i, i) float64: damped second moments of data in which every input follows a few others."""
    x = torch.randn(samples, i // 2, dtype=torch.float64) @ torch.randn(i // 2, i, dtype=torch.float64)
    x += 0.3 * torch.randn(samples, i, dtype=torch.float64)
    return damped((x.T @ x / samples)[None])[0]


def linear(outputs: int, inputs: int) -> Contraction:
    sizes = {"o": outputs, "i": inputs}
    return Contraction(("r", "i"), ("o", "i"), ("r", "o"), sizes, (outputs, inputs))


def patches(*shape: int, groups: int = 1, transposed: bool = False) -> Patches:
    ones = (1,) * (len(shape) - 2)
    return Patches(tuple(shape), groups, ones, ones, ((0, 0),) * len(ones), ones, transposed)


def quantizer_of(weight: Tensor, bits: int = 4, dim: int = 0, **options: Any) -> Quantizer:
    quantizer = make_quantizer(QuantSpec(bits, **options), shape=weight.shape, dim=dim).to(weight.dtype)
    calibrate_weight(quantizer, weight)
    return quantizer


def rounded_matrix(weight: Tensor, hessian: Tensor, quantizer: Quantizer, **options: Any) -> Tensor:
    """(o, i) of (o, i)."""
    levels = Levels.of(quantizer, weight, linear(*weight.shape))
    return round_second_order(weight[None], hessian[None], levels, **options)[0].to(weight.dtype)


def error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    return float(output_error((weight - rounded)[None].detach(), hessian[None]).sum())


GRIDS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"granularity": "channel"},
    "affine": {"granularity": "channel", "symmetric": False},
    "group": {"granularity": "group", "group_size": 8},
    "geta": {"kind": "geta"},
}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_smaller_error_than_nearest_and_on_the_grid(bits: int, grid: str) -> None:
    weight, hessian = torch.randn(12, 36, dtype=torch.float64), correlated(36)
    quantizer = quantizer_of(weight, bits, **GRIDS[grid])
    rounded = rounded_matrix(weight, hessian, quantizer)
    assert torch.equal(quantizer(rounded), rounded)
    assert error(weight, rounded, hessian) < 0.75 * error(weight, quantizer(weight), hessian)


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight = torch.randn(6, 10)
    quantizer = quantizer_of(weight, granularity="channel")
    rounded = rounded_matrix(weight, 2.5 * torch.eye(10, dtype=torch.float64), quantizer)
    assert torch.equal(rounded, quantizer(weight))


def test_two_columns_by_hand() -> None:
    """The error of the first, 0.4, goes to the second by the regression of the first input on the second."""
    weight = torch.tensor([[1.4, 2.3]], dtype=torch.float64)
    quantizer = make_quantizer(QuantSpec(4)).double()
    hessian = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)  # 2.3 + 0.4 * 0.8 = 2.62
    assert rounded_matrix(weight, hessian, quantizer, sweeps=0).tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize("sweeps", [0, 4])
def test_no_row_is_worse_than_nearest(sweeps: int) -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        weight, hessian = torch.randn(4, 3, dtype=torch.float64), correlated(4)[:3, :3]
        quantizer = quantizer_of(weight, 2)
        rounded = rounded_matrix(weight, hessian, quantizer, sweeps=sweeps)
        found, nearest = (output_error((w - weight)[None], hessian[None]) for w in (rounded, quantizer(weight)))
        assert bool((found <= nearest * (1 + 1e-9)).all())


@pytest.mark.parametrize("block", [5, 128])
def test_after_the_descent_no_single_weight_lowers_the_error(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "BLOCK", block)
    weight, hessian = torch.randn(3, 12, dtype=torch.float64), correlated(12)
    quantizer = quantizer_of(weight, 3, granularity="channel")
    rounded = rounded_matrix(weight, hessian, quantizer, sweeps=100)
    step = quantizer.get_parameter("scale").detach()
    least = output_error((rounded - weight)[None], hessian[None])[0]
    for k in range(12):
        for sign in (-1, 1):
            other = rounded.clone()
            other[:, k] += sign * step
            other = quantizer(other)
            assert bool((output_error((other - weight)[None], hessian[None])[0] >= least * (1 - 1e-9)).all())


def test_dead_inputs_are_rounded_to_nearest_and_take_no_part() -> None:
    weight, hessian = torch.randn(6, 10, dtype=torch.float64), correlated(10)
    dead = hessian.clone()
    dead[[3, 7]] = 0
    dead[:, [3, 7]] = 0
    dead[[3, 7], [3, 7]] = 0.01
    alive = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9])
    quantizer = quantizer_of(weight)
    rounded = rounded_matrix(weight, dead, quantizer)
    assert torch.equal(rounded[:, [3, 7]], quantizer(weight)[:, [3, 7]])
    others = rounded_matrix(weight[:, alive], hessian[alive][:, alive], quantizer)
    assert torch.equal(rounded[:, alive], others)
    nothing = damped(torch.zeros(1, 10, 10, dtype=torch.float64))[0]
    assert torch.equal(rounded_matrix(weight, nothing, quantizer), quantizer(weight))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = torch.randn(5, 33, dtype=torch.float64), correlated(33)
    quantizer = quantizer_of(weight, 3, granularity="channel")
    results = []
    for block in (1, 7, 33, 128):
        monkeypatch.setattr(gptq, "BLOCK", block)
        results.append(rounded_matrix(weight, hessian, quantizer))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_products_at_once_are_each_alone() -> None:
    """Depthwise: one product per channel, each with a matrix of its own."""
    weight = torch.randn(6, 1, 3, 3, dtype=torch.float64)
    hessians = torch.stack([correlated(9) for _ in range(6)])
    quantizer = quantizer_of(weight, 3, granularity="channel")
    design = patches(6, 1, 3, 3, groups=6)
    levels = Levels.of(quantizer, weight, design)
    rounded = round_second_order(design.matrices(weight).mT, hessians, levels)
    for k in range(6):
        own = quantizer_of(weight[k : k + 1], 3, granularity="channel")
        alone = rounded_matrix(weight[k].flatten(1), hessians[k], own)
        assert torch.equal(rounded[k], alone)


# ------------------------------------------------------------------------------------------------ steps
DESIGNS: dict[str, tuple[Design, tuple[int, ...], int]] = {
    "linear": (linear(8, 18), (8, 18), 0),
    "convolution": (patches(8, 2, 3, 3), (8, 2, 3, 3), 0),
    "grouped": (patches(8, 2, 3, 3, groups=4), (8, 2, 3, 3), 0),
    "depthwise": (patches(8, 1, 3, 3, groups=8), (8, 1, 3, 3), 0),
    "transposed": (patches(8, 4, 3, 3, groups=2, transposed=True), (8, 4, 3, 3), 1),
}


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", DESIGNS)
def test_searched_steps_are_no_worse_than_the_widest(name: str, granularity: Any, second_order: bool) -> None:
    design, shape, dim = DESIGNS[name]
    weight = torch.randn(shape, dtype=torch.float64)
    weight.view(-1)[::7] *= 3  # a few far out
    matrices = design.matrices(weight).mT
    hessian = torch.stack([correlated(matrices.shape[2]) for _ in matrices])
    quantizer = quantizer_of(weight, 3, dim, granularity=granularity)
    levels = Levels.of(quantizer, weight, design)
    widest = round_second_order(matrices, hessian, levels) if second_order else levels.nearest(matrices)
    before = quantizer.get_parameter("scale").detach().clone()
    found = search_steps(quantizer, weight, design, hessian, second_order=second_order)
    assert torch.equal(quantizer(found), found) and found.shape == weight.shape
    errors = [output_error(m - matrices, hessian).sum() for m in (design.matrices(found).mT, widest)]
    assert errors[0] < errors[1]
    assert bool((quantizer.get_parameter("scale") <= before * (1 + 1e-12)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 20).to(dtype)
    wide = dtype if dtype is torch.float64 else torch.float32
    quantizer = quantizer_of(weight.to(wide), granularity="channel")
    rounded = search_steps(quantizer, weight, linear(8, 20), correlated(20)[None], second_order=True)
    assert rounded.dtype is dtype
    assert torch.equal(quantizer(rounded), rounded)


def test_sixteen_bits_move_nothing_beyond_rounding() -> None:
    weight, hessian = torch.randn(8, 20, dtype=torch.float64), correlated(20)[None]
    quantizer = quantizer_of(weight, 16, granularity="channel")
    rounded = search_steps(quantizer, weight, linear(8, 20), hessian, second_order=True)
    steps = quantizer.get_parameter("scale").detach()[:, None]
    assert float(((rounded - weight).abs() / steps).max()) < 8


@pytest.mark.parametrize("second_order", [False, True])
def test_steps_per_group_are_the_observers(second_order: bool) -> None:
    weight, hessian = torch.randn(4, 24, dtype=torch.float64), correlated(24)
    quantizer, other = (quantizer_of(weight, 3, granularity="group", group_size=8) for _ in range(2))
    quantizer.get_parameter("scale").detach().mul_(2)
    rounded = search_steps(quantizer, weight, linear(4, 24), hessian[None], second_order=second_order)
    assert torch.equal(quantizer.get_parameter("scale"), other.get_parameter("scale"))
    assert torch.equal(quantizer(rounded), rounded)
    assert torch.equal(rounded, other(weight)) is not second_order


def test_groups_of_a_convolution_lie_along_its_last_dim() -> None:
    weight, hessian = torch.randn(4, 3, 3, 5, dtype=torch.float64), correlated(45)
    quantizer = quantizer_of(weight, 3, granularity="group", group_size=2)
    design = patches(4, 3, 3, 5)
    found = round_second_order(design.matrices(weight).mT, hessian[None], Levels.of(quantizer, weight, design))
    rounded = design.weight(found.mT)
    assert torch.equal(quantizer(rounded), rounded)
    assert error(weight.flatten(1), rounded.flatten(1), hessian) < error(
        weight.flatten(1), quantizer(weight).flatten(1), hessian
    )


# ------------------------------------------------------------------------------------------------ refusals
def test_refusals() -> None:
    weight, hessian = torch.randn(4, 6, dtype=torch.float64), correlated(6)
    quantizer = quantizer_of(weight)
    bent = GetaQuantizer(QuantSpec(4, kind="geta", learn_exponent=True))
    nn.init.constant_(bent.t, 1.5)
    with pytest.raises(PlanError, match=r"\|w\|\^1\.5"):
        Levels.of(bent, weight, linear(4, 6))
    tabled = quantizer_of(weight, 2, kind="ternary", symmetric=False, granularity="channel")
    with pytest.raises(PlanError, match="evenly spaced"):
        search_steps(tabled, weight, linear(4, 6), hessian[None], second_order=True)
    with pytest.raises(CalibrationError, match="second moments are not finite"):
        rounded_matrix(weight, hessian * torch.nan, quantizer)
    with pytest.raises(CalibrationError, match="weight is not finite"):
        levels = Levels.of(quantizer, weight, linear(4, 6))
        round_second_order(weight[None] * torch.nan, hessian[None], levels)
    with pytest.raises(CalibrationError, match="positive semidefinite"):
        rounded_matrix(weight, torch.eye(6).double() - 3e3 * torch.eye(6).double().flip(0), quantizer)
