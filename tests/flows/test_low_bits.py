"""Few bits without training: the repair of rounding through `compress`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.report.report import Report


class Inverted(nn.Module):
    """An inverted residual block with its head: pointwise, depthwise, pointwise, a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 24, 1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.project = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = nn.functional.relu6(self.norm(self.expand(x)))
        x = x + self.project(nn.functional.relu6(self.depthwise(y)))
        return self.head(x.mean((2, 3)))


def trained() -> tuple[nn.Module, list[Tensor]]:
    """The block, its norm on the statistics of smooth images, and those."""
    torch.manual_seed(0)
    model = Inverted()
    images = nn.functional.avg_pool2d(torch.randn(96, 3, 20, 20) + 0.5, 5, 1)
    with torch.no_grad():
        model.train()(images)
        model.norm.momentum = None
    return model.eval(), list(images.split(32))


def quantized(model: nn.Module, batches: list[Tensor], **options: Any) -> gc.CompressedModel:
    options = {"sparsity": 0, "bits": 3, "activation_bits": 8, "calibration": batches, **options}
    return gc.compress(model, batches[0], progress=False, **options)


def error(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - small(x)).norm() / model(x).norm())


@pytest.mark.parametrize("rounding", ["nearest", "second_order"])
@pytest.mark.slow
@pytest.mark.ci
def test_the_repair_of_rounding_is_reported_and_helps(rounding: Any) -> None:
    model, batches = trained()
    before = copy.deepcopy(model.state_dict())
    small, plain = (quantized(model, batches, rounding=rounding, repair=r) for r in ("least_squares", None))
    repairs = small.report.quantization_repairs
    assert set(repairs) == {"stem", "expand", "depthwise", "project", "head"}
    assert all(change.after <= change.before for change in repairs.values())
    assert sum(change.after for change in repairs.values()) < sum(c.before for c in repairs.values())
    assert "rounding repair" in str(small.report)
    assert not plain.report.quantization_repairs
    x = torch.cat(batches)
    assert error(model, small, x) < error(model, plain, x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert any("integers" in law for law in small.report.verified)
    again = Report.from_dict(small.report.to_dict())
    assert again.quantization_repairs == dict(repairs)


def test_without_calibration_nothing_is_repaired() -> None:
    model, batches = trained()
    small = quantized(model, batches, calibration=None)
    assert not small.report.quantization_repairs


def test_a_layer_called_twice_keeps_its_steps() -> None:
    """Both calls have the steps of one quantizer; each has weights of its own, set on what it reads."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.fc(torch.relu(self.fc(x)))))

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(64, 6)
    small, plain = (quantized(model, [x], bits=4, repair=repair) for repair in ("least_squares", None))
    assert set(small.report.quantization_repairs) == {"fc", "fc (linear_1)", "out"}
    assert error(model, small, x) < error(model, plain, x)


def test_a_weight_that_an_einsum_reads_is_moved_too() -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(6, 4, 5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(torch.einsum("bhi,iho->bo", x, self.w)))

    torch.manual_seed(0)
    model, x = Einsum().eval(), torch.randn(256, 4, 6)
    small, plain = (
        quantized(model, [x], bits=3, repair=repair, rounding="second_order") for repair in ("least_squares", None)
    )
    assert len(small.report.quantization_repairs) == 2
    assert not [note for note in small.report.notes if note.startswith("rounded to nearest")]
    assert error(model, small, x) <= error(model, plain, x) * 1.05


def test_sixteen_bits_change_nothing_but_by_rounding() -> None:
    model, batches = trained()
    small = quantized(model, batches, bits=16, activation_bits=16, rounding="second_order")
    assert error(model, small, torch.cat(batches)) < 1e-3
