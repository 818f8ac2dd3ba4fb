"""Weights that are standardized before use: statistics over a weight's inputs keep no unit from leaving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.testing import check_law


class Standardized(nn.Conv2d):
    """A convolution with standardized filters, in one of the ways in which networks without norms do so."""

    def __init__(self, how: str, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.how, self.gain = how, nn.Parameter(torch.rand(self.out_channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        if self.how == "batch norm":
            weight = F.batch_norm(rows, None, None, weight=self.gain, training=True, momentum=0.0, eps=1e-6)
        elif self.how == "instance norm":
            weight = F.instance_norm(rows, eps=1e-6)
        elif self.how == "layer norm":
            weight = F.layer_norm(self.weight, self.weight.shape[1:])
        else:
            variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
            weight = (self.weight - mean) / (variance + 1e-6).sqrt()
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, 1, self.groups)


def net(how: str, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        Standardized(how, 3, 8, 3, padding=1), nn.ReLU(), Standardized(how, 8, 16, 3, padding=1, groups=groups),
        nn.ReLU(), Standardized(how, 16, 4, 1),
    ).eval()  # fmt: skip


X = torch.randn(2, 3, 6, 6)
WAYS = ["batch norm", "instance norm", "layer norm", "written out"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.slow
@pytest.mark.ci
def test_units_of_standardized_weights_are_cut(how: str) -> None:
    model = net(how)
    plan = gc.analyze(model, X)
    assert [(group.role, group.size, group.normalized) for group in plan.groups] == [
        ("channel", 8, False), ("channel", 16, False)
    ]  # fmt: skip
    found = check_law(model, X)
    assert found.max_relative_error < 1e-5 and found.moved > 1e-3
    small = gc.compress(model, X, sparsity=0.5)
    assert small.form == "native" and small.module[2].weight.shape == (8, 4, 3, 3)


def test_grouped_standardized_weights() -> None:
    assert check_law(net("batch norm", groups=4), X).max_relative_error < 1e-5


def test_standardized_weights_are_trained_and_quantized() -> None:
    ready = gc.prepare(net("batch norm"), X, bits=8).train()
    ready(X).square().sum().backward()
    assert ready.get_parameter("2.weight").grad is not None
    ready.keep({group: torch.arange(1, group.size, 2) for group in ready.session.groups})
    small = gc.finalize(ready)
    assert small.report.verified["trained == sliced"] < 1e-9
    assert {row.weight_bits for row in small.report.layers if not row.name.endswith("gain")} == {8}


def test_batch_statistics_of_activations_freeze_as_before() -> None:
    class Activations(nn.Module):
        """The hidden units stand where a norm of channels has space."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.batch_norm(self.a(x), None, None, training=True))

    plan = gc.analyze(Activations().eval(), torch.randn(2, 3, 4))
    assert not plan.groups and any("batch statistics" in str(axis.reason) for axis in plan.frozen)
