"""Groups of recurrent layers are there with quantizers that correct the model's tensors, as without any."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.g = kind(6, 24, batch_first=True)
        self.o = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.g(x)[0][:, -1])
        return out


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN, nn.LSTM])
@pytest.mark.slow
@pytest.mark.ci
def test_a_recurrent_group_is_in_the_quantized_graph(kind: type[nn.RNNBase]) -> None:
    model, x = Recurrent(kind), torch.randn(4, 5, 6)
    ready = gc.prepare(model, x, bits=4, quantizer="lsq")
    assert [group.name for group in ready.session.groups] == ["g/hidden"]
    assert {group.name for group in ready.session.quantized.groups} == {
        group.name for group in gc.analyze(model, x).groups
    }
