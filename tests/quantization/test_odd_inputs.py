"""Inputs that are out of the ordinary: one image without a batch, padding with -inf, tensors that are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphcomp as gc
from tests.quantization.test_placement import placed, quantizers


def images(count: int = 16) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 8, 8) * torch.linspace(0.2, 3, 8)[:, None] for _ in range(count)]


def convnet() -> nn.Module:
    """With as many channels as rows, so that one dim can be taken for the other."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)
    ).eval()


PER_TENSOR = gc.QuantConfig(gc.QuantSpec(4))


@torch.no_grad()
def off(small: nn.Module, model: nn.Module, x: Tensor) -> float:
    """The relative error of a quantized model."""
    exact = model(x)
    return float((small(x) - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "options",
    [gc.PostTraining(PER_TENSOR), gc.PostTraining(PER_TENSOR, rounding="second_order")],
    ids=["per tensor", "second order"],
)
@pytest.mark.slow
@pytest.mark.ci
def test_one_image_is_quantized_like_a_batch_of_one(options: gc.PostTraining) -> None:
    """Bias correction and equalization go by the channels, which are the first dim of an image."""
    given = {"sparsity": 0, "quantization": options}
    one = gc.compress(convnet(), images()[0], calibration=images(), **given)
    many = gc.compress(convnet(), torch.stack(images()[:2]), calibration=[x[None] for x in images()], **given)
    assert torch.allclose(one(images()[1]), many(images()[1][None])[0], atol=1e-4)


def test_a_norm_behind_one_image_is_not_folded() -> None:
    """What the norm takes for channels are the rows of the image."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    model = Rows().eval()
    assert model.norm.running_mean is not None
    model.norm.running_mean.normal_()
    x = torch.randn(3, 8)
    small = gc.compress(model, x, sparsity=0, bits=16, calibration=[x])
    assert torch.allclose(small(x), model(x), atol=1e-2)


class SamePool(nn.Module):
    """Max pooling behind a padding, as in ports of TensorFlow models."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.a, self.o, self.value = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3), value

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(self.a(x).relu(), (0, 1, 0, 1), value=self.value)
        return self.o(functional.max_pool2d(padded, 3, 2))


@pytest.mark.parametrize("value", [-float("inf"), torch.finfo(torch.float32).min, -1.0])
def test_padding_below_all_values_is_no_part_of_the_range(value: float) -> None:
    model, x = SamePool(value).eval(), torch.randn(8, 3, 8, 8)
    small = gc.compress(model, x, sparsity=0, bits=8, calibration=[x])
    assert off(small, model, x) < 0.05
    assert {row.activation_bits for row in small.report.layers} == {8}


def test_masked_elements_in_front_of_a_pooling() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x).masked_fill(x[:, :1] > 1, -float("inf"))
            return self.o(functional.max_pool1d(hidden, 8))

    model, x = Masked().eval(), torch.rand(4, 3, 16)
    small = gc.compress(model, x, sparsity=0, bits=8, calibration=[x])
    assert off(small, model, x) < 0.05


def test_padding_that_repeats_elements_keeps_the_scale() -> None:
    class Reflected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(functional.pad(self.a(x).relu(), (1, 1, 1, 1), mode="reflect"))

    shared = quantizers(placed(Reflected(), torch.randn(2, 3, 8, 8)))
    assert shared["relu"] == shared["pad"]


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_var", "3.weight"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_tensor_that_is_not_finite_is_blamed(name: str, trained: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    model.state_dict()[name].flatten()[0] = float("nan")
    x = torch.randn(16, 8)
    with pytest.raises(gc.CalibrationError, match=f"'{name}' is not finite"):
        if trained:
            gc.prepare(model, x[:2], calibration=[x])
        else:
            gc.compress(model, x[:2], sparsity=0, bits=8, calibration=[x])


def test_second_order_rounding_on_the_example_inputs_alone_is_named() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    small = gc.compress(model, torch.randn(1, 16), sparsity=0, bits=4, activation_bits=None, rounding="second_order")
    assert small.report.notes[0] == "rounded to second order on the example inputs alone, as no calibration= was given"
