from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcomp.capture.capture import capture
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.numerics.compare import relative_error
from graphcomp.quantization.fold import FoldBatchNorm, FoldForTraining
from tests.quantization.models import random_norms, residual

X2 = torch.randn(3, 4, 6, 6)
CASES: dict[str, tuple[nn.Module, Tensor]] = {
    "conv": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), X2),
    "no bias": (nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), X2),
    "no affine": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), X2),
    "grouped": (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), X2),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), X2),
    "linear": (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.randn(5, 4)),
    "conv1d": (nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), torch.randn(2, 4, 9)),
}


def norms(module: Any) -> int:
    return len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default))


@pytest.mark.parametrize("name", CASES)
def test_fold_keeps_the_function(name: str) -> None:
    model, x = CASES[name]
    captured = capture(random_norms(model), x)
    folded = FoldBatchNorm()(captured.module)
    assert norms(captured.module) == 1 and norms(folded) == 0
    assert relative_error(model(x), folded(x)) < 1e-5


def test_folded_model_holds_no_statistics():
    model, x = residual()
    folded = FoldBatchNorm()(capture(model, x).module)
    assert norms(folded) == 0
    assert not [name for name, _ in folded.named_buffers()]
    assert {"stem.weight", "stem.bias", "block.conv1.bias"} <= set(dict(folded.named_parameters()))


def test_the_model_is_left_alone():
    model, x = residual()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    captured = capture(model, x)
    FoldBatchNorm()(captured.module)
    assert norms(captured.module) == 3
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),  # channels of all groups in one dim
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)),
    ],
)
def test_what_cannot_be_folded_stays(model: nn.Module) -> None:
    folded = FoldBatchNorm()(capture(random_norms(model), X2).module)
    assert norms(folded) == 1
    assert relative_error(model(X2), folded(X2)) < 1e-6


def test_a_convolution_called_twice_is_folded_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.conv(self.a(self.conv(x))))

    model = random_norms(Twice())
    folded = FoldBatchNorm()(capture(model, X2).module)
    assert norms(folded) == 0
    assert relative_error(model(X2), folded(X2)) < 1e-5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_training_form_keeps_the_function(name: str, training: bool) -> None:
    model, x = CASES[name]
    captured = capture(random_norms(model), x)
    scaled = FoldForTraining()(captured.module)
    assert norms(scaled) == 1
    captured.module.train(training)
    scaled.train(training)
    state = {name: t.clone() for name, t in captured.module.state_dict().items()}
    expected = captured.module(x)
    captured.module.load_state_dict(state)  # running statistics moved
    assert relative_error(expected, scaled(x)) < 1e-5


def test_training_form_with_a_dead_channel():
    model, x = CASES["conv"]
    random_norms(model)
    model[1].weight.data[2] = 0
    captured = capture(model, x)
    scaled = FoldForTraining()(captured.module)
    assert relative_error(model(x), scaled(x)) < 1e-5


def test_training_form_quantizes_the_folded_weight():
    model, x = CASES["no bias"]
    captured = capture(random_norms(model), x)
    scaled, folded = FoldForTraining()(captured.module), FoldBatchNorm()(captured.module)
    (conv,) = scaled.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    seen = {}
    run_tapped(scaled, [x], see=seen.__setitem__)
    assert torch.allclose(seen[conv.args[1]], folded.get_parameter("0.weight"), atol=1e-6)
