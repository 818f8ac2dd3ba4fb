"""An op without a gradient is named, with the line of the user's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.training.no_gradient import without_gradient
from tests.methods.learning import net


@torch.library.custom_op("nogradient::lin", mutates_args=())
def lin(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.t()


@lin.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.w, self.o = nn.Linear(8, 16), nn.Parameter(torch.randn(12, 16)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.i(x))
        return self.o(torch.ops.nogradient.lin(x, self.w))


def loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def test_an_op_without_a_gradient_is_named():
    data = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 3]))] * 4
    with pytest.raises(gc.TrainingError, match="an op has no gradient") as caught:
        gc.compress(Net(), data[0][0], method="qat", bits=8, data=data, loss=loss, steps=4, progress=False)
    assert caught.value.at.startswith("nogradient.lin.default test_no_gradient.py:")
    assert "torch.ops.nogradient.lin(x, self.w)" in caught.value.at and caught.value.why


def test_a_module_whose_ops_have_gradients_names_none():
    assert without_gradient(gc.prepare(net(), torch.randn(2, 1, 6, 6))) == ""
