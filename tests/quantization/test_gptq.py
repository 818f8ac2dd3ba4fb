"""Second-order rounding: smaller errors than nearest, on the quantizer's grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.capture.capture import capture
from graphcomp.errors import CalibrationError, PlanError
from graphcomp.ops.answers import compute_of
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.gptq import round_second_order, second_moments
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.spec import QuantSpec


def correlated(i: int, samples: int = 400, dtype: torch.dtype = torch.float64) -> Tensor:
    """(i, i) second moments of data in which every input follows a few others."""
    x = torch.randn(samples, i // 2, dtype=dtype) @ torch.randn(i // 2, i, dtype=dtype) + 0.3 * torch.randn(
        samples, i, dtype=dtype
    )
    return x.T @ x / samples


def quantizer_of(weight: Tensor, bits: int = 4, **options: Any) -> Quantizer:
    quantizer = make_quantizer(QuantSpec(bits, **options), shape=weight.shape, dim=0).to(weight.dtype)
    calibrate_weight(quantizer, weight)
    return quantizer


def error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    difference = (weight - rounded).detach().double().flatten(1)
    return float(((difference @ hessian.double()) * difference).sum())


GRIDS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"granularity": "channel"},
    "affine": {"granularity": "channel", "symmetric": False},
    "group": {"granularity": "group", "group_size": 8},
    "geta": {"kind": "geta"},
}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [False, True])
def test_smaller_error_than_nearest_and_on_the_grid(bits: int, grid: str, order: bool) -> None:
    weight, hessian = torch.randn(12, 36, dtype=torch.float64), correlated(36)
    quantizer = quantizer_of(weight, bits, **GRIDS[grid])
    rounded = round_second_order(weight, hessian, quantizer, order=order, block=16)
    assert torch.equal(quantizer(rounded), rounded)
    assert error(weight, rounded, hessian) < 0.75 * error(weight, quantizer(weight), hessian)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    weight, hessian = torch.randn(8, 20).to(dtype), correlated(20)
    quantizer = quantizer_of(weight.float(), granularity="channel").to(
        dtype if dtype is torch.float64 else torch.float32
    )
    rounded = round_second_order(weight, hessian, quantizer)
    assert rounded.dtype is dtype
    assert torch.equal(quantizer(rounded), rounded)


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight = torch.randn(6, 10)
    quantizer = quantizer_of(weight, granularity="channel")
    for order in (False, True):
        rounded = round_second_order(weight, torch.eye(10) * 2.5, quantizer, order=order)
        assert torch.equal(rounded, quantizer(weight))


def test_two_columns_by_hand() -> None:
    """The error of the first, 0.4, goes to the second by the regression of the first input on the second."""
    weight = torch.tensor([[1.4, 2.3]], dtype=torch.float64)
    quantizer = make_quantizer(QuantSpec(4)).double()
    hessian = torch.tensor([[1.0, 0.8], [0.8, 1.0]])  # 2.3 + 0.4 * 0.8 = 2.62
    assert round_second_order(weight, hessian, quantizer, damping=0.0).tolist() == [[1.0, 3.0]]


def test_never_worse_than_nearest() -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        weight, hessian = torch.randn(4, 3), correlated(4)[:3, :3]
        quantizer = quantizer_of(weight, 2)
        rounded = round_second_order(weight, hessian, quantizer)
        assert error(weight, rounded, hessian) <= error(weight, quantizer(weight), hessian) * (1 + 1e-9)


def test_dead_inputs_are_rounded_to_nearest_and_take_no_part() -> None:
    weight, hessian = torch.randn(6, 10), correlated(10)
    alive = torch.tensor([0, 1, 2, 4, 5, 6, 8, 9])
    dead = hessian.clone()
    dead[[3, 7]] = 0
    dead[:, [3, 7]] = 0
    quantizer = quantizer_of(weight)
    rounded = round_second_order(weight, dead, quantizer)
    assert torch.equal(rounded[:, [3, 7]], quantizer(weight)[:, [3, 7]])
    scaled_mean = 0.01 * (dead.diagonal().sum() + 2) / 10 / (dead.diagonal().sum() / 8)  # the same damping
    others = round_second_order(weight[:, alive], hessian[alive][:, alive], quantizer, damping=float(scaled_mean))
    assert torch.equal(rounded[:, alive], others)
    assert torch.equal(round_second_order(weight, torch.zeros(10, 10), quantizer), quantizer(weight))


def test_blocks_change_nothing() -> None:
    weight, hessian = torch.randn(5, 33, dtype=torch.float64), correlated(33)
    quantizer = quantizer_of(weight, 3, granularity="channel")
    results = [round_second_order(weight, hessian, quantizer, block=block) for block in (1, 7, 33, 128)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [5, 128])
def test_refit_reads_each_group_when_its_turn_comes(symmetric: bool, block: int) -> None:
    weight, hessian = torch.randn(6, 24, dtype=torch.float64), correlated(24)
    quantizer = quantizer_of(weight, 3, symmetric=symmetric, granularity="group", group_size=8)
    before = quantizer.get_parameter("scale").detach().clone()
    nearest = error(weight, quantizer(weight), hessian)
    rounded = round_second_order(weight, hessian, quantizer, refit=True, block=block)
    after = quantizer.get_parameter("scale")
    assert torch.equal(after[:, 0], before[:, 0])  # nothing came before the first group
    assert not torch.equal(after[:, 1:], before[:, 1:])
    assert torch.equal(quantizer(rounded), rounded)
    assert error(weight, rounded, hessian) < nearest


def test_groups_of_a_convolution_lie_along_its_last_dim() -> None:
    weight, hessian = torch.randn(4, 3, 3, 5), correlated(45)
    quantizer = quantizer_of(weight, 3, granularity="group", group_size=2)
    rounded = round_second_order(weight, hessian, quantizer)
    assert torch.equal(quantizer(rounded), rounded)
    assert torch.equal(round_second_order(weight.flatten(1), hessian, quantizer), rounded.flatten(1))
    assert error(weight, rounded, hessian) < error(weight, quantizer(weight), hessian)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_whose_outputs_are_dim_1(granularity: Any, symmetric: bool) -> None:
    """The transpose of what the transposed weight becomes."""
    weight, hessian = torch.randn(6, 24, dtype=torch.float64), correlated(24)
    options: dict[str, Any] = {"symmetric": symmetric, "granularity": granularity}
    rows = quantizer_of(weight, 3, **options)
    columns = make_quantizer(QuantSpec(3, **options), shape=(24, 6), dim=1).double()
    columns.load_state_dict(rows.state_dict())
    rounded = round_second_order(weight.T, hessian, columns, dim=1)
    assert rounded.shape == (24, 6) and rounded.is_contiguous()
    assert torch.equal(rounded.T, round_second_order(weight, hessian, rows))
    assert torch.equal(columns(rounded), rounded)


def test_refusals() -> None:
    weight, hessian = torch.randn(4, 6), correlated(6)
    grouped = quantizer_of(weight, granularity="group", group_size=3)
    with pytest.raises(PlanError, match="order=True with refit=True"):
        round_second_order(weight, hessian, grouped, order=True, refit=True)
    with pytest.raises(PlanError, match="6 inputs"):
        round_second_order(weight, correlated(8), grouped)
    bent = GetaQuantizer(QuantSpec(4, kind="geta", learn_exponent=True))
    nn.init.constant_(bent.t, 1.5)
    with pytest.raises(PlanError, match=r"\|w\|\^1\.5"):
        round_second_order(weight, hessian, bent)
    columns = make_quantizer(QuantSpec(4, granularity="channel"), shape=(4, 6), dim=1)
    with pytest.raises(PlanError, match="dim 1"):
        round_second_order(weight, hessian, columns)
    rows = make_quantizer(QuantSpec(4, granularity="channel"), shape=(4, 6), dim=0)
    with pytest.raises(PlanError, match="dim 0"):
        round_second_order(weight.T, hessian, rows, dim=1)
    with pytest.raises(CalibrationError, match="not finite"):
        round_second_order(weight, hessian * torch.nan, grouped)
    with pytest.raises(CalibrationError, match="positive semidefinite"):
        round_second_order(weight, torch.eye(6) - 3 * torch.eye(6).flip(0), grouped, damping=1e-6)


# ------------------------------------------------------------------------------------------------ moments
class Columns(nn.Module):
    """A weight (inputs, outputs), as GPT-2's Conv1D has it; `how` picks the op."""

    def __init__(self, how: str, inputs: int = 6, outputs: int = 4) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "matmul":
            return x @ self.weight
        rows = x.reshape(-1, x.shape[-1])
        y = torch.addmm(self.bias, rows, self.weight) if self.how == "addmm" else torch.mm(rows, self.weight)
        return y.reshape(*x.shape[:-1], -1)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (3, 5, 6)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 7, 8)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=2), (2, 3, 7, 8)),
    "valid": (nn.Conv1d(3, 4, 3, padding="valid"), (2, 3, 7)),
    "conv3d": (nn.Conv3d(2, 4, 2, padding=1), (2, 2, 4, 5, 3)),
    "addmm": (Columns("addmm"), (3, 5, 6)),
    "mm": (Columns("mm"), (3, 5, 6)),
    "matmul": (Columns("matmul"), (3, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_second_moments_are_those_of_what_the_weight_is_multiplied_with(name: str) -> None:
    """Rows of the weight times the moments are the mean square of the outputs, in whatever way they are computed."""
    layer, shape = LAYERS[name]
    layer = layer.double()
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    batches = [torch.randn(shape).double() for _ in range(2)]
    moments = second_moments(compute_node(layer, batches[0]), batches)
    assert moments is not None
    weight = layer.weight.detach().flatten(1)  # type: ignore[union-attr, operator]
    weight = weight.T if isinstance(layer, Columns) else weight
    channels = 1 if name.startswith("conv") or name in ("same", "valid") else -1
    outputs = torch.cat([layer(x).movedim(channels, 0).flatten(1) for x in batches], 1)
    torch.testing.assert_close(weight @ moments @ weight.T, outputs @ outputs.T / outputs.shape[1])


def compute_node(model: nn.Module, x: Tensor) -> Any:
    (node,) = (n for n in capture(model, (x,)).module.graph.nodes if compute_of(n))
    return node


class Batched(nn.Module):
    """A matrix for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize(
    "model",
    [nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3), Batched()],
    ids=["grouped", "transposed", "batched"],
)
def test_layers_that_are_no_single_product(model: nn.Module) -> None:
    x = torch.randn(2, 4, 5, 5)
    assert second_moments(compute_node(model, x), [x]) is None


def test_data_that_say_nothing() -> None:
    node = compute_node(nn.Linear(3, 2), torch.randn(2, 3))
    with pytest.raises(CalibrationError, match="no data"):
        second_moments(node, [])
    with pytest.raises(CalibrationError, match="not finite"):
        second_moments(node, [torch.full((2, 3), torch.inf)])


def test_output_error_of_a_layer_falls() -> None:
    torch.manual_seed(3)
    conv, x = nn.Conv2d(6, 8, 3, padding=1), F.avg_pool2d(torch.randn(8, 6, 20, 20), 3, 1, 1)
    weight = conv.weight.detach()
    quantizer = quantizer_of(weight, 3, granularity="channel")
    moments = second_moments(compute_node(conv, x), [x])
    assert moments is not None
    rounded = round_second_order(weight, moments, quantizer)
    errors = [(F.conv2d(x, w - weight, padding=1)).square().mean() for w in (rounded, quantizer(weight))]
    assert errors[0] < 0.5 * errors[1]
