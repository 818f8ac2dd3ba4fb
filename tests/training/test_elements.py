"""Which parameters single weights are pruned of: all that the rules of the ops multiply."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.methods.opq import Opq
from graphcomp.methods.qst.method import Qst
from graphcomp.training.elements import multiplied
from tests.methods.learning import compress


class Net(nn.Module):
    """Weights of layers, of an einsum, of a recurrent layer, one weight of two layers; a scale and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(5, 8), nn.Parameter(torch.rand(8) + 1)
        self.first, self.heads = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 8, 4))
        self.cells, self.twice, self.again = nn.GRU(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.twice.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x)) * self.scale + self.table.weight[:1]
        x, _ = self.cells(torch.einsum("tbc,hcd->tbhd", x, self.heads).flatten(2))
        return self.again(self.twice(x))


X = torch.randn(3, 2, 8)
WEIGHTS = ["first.weight", "heads", "cells.weight_ih_l0", "cells.weight_hh_l0", "twice.weight"]


def test_all_that_is_multiplied_takes_part_once():
    ready = gc.prepare(Net(), X, bits=None)
    assert list(multiplied(ready)) == WEIGHTS
    assert list(multiplied(gc.prepare(Net(), X, bits=None, ignore=["cells"]))) == [*WEIGHTS[:2], "twice.weight"]


@pytest.mark.slow
@pytest.mark.ci
def test_methods_prune_the_same_weights_but_for_the_last_of_pqk():
    data = [(X, torch.randn(3, 2, 8))] * 3
    count = {name: parameter.numel() for name, parameter in Net().named_parameters() if name in WEIGHTS}
    for method, names in (("psgd", WEIGHTS), ("opq", WEIGHTS), ("qst", WEIGHTS), ("pqk", WEIGHTS[:-1])):
        notes = gc.compress(
            Net(), X, method=method, data=data, sparsity=0.6, loss=lambda out, batch: F.mse_loss(out, batch[1]),
            steps=3, lr=0.01, progress=False,
        ).report.notes  # fmt: skip
        assert any(
            f" of {sum(count[name] for name in names)} weights in {len(names)} tensors" in note for note in notes
        )
        assert any("'twice.weight' is not pruned" in note for note in notes) == (method == "pqk")


def test_without_a_sparsity_nothing_is_said_of_the_last_weights():
    assert not any("is not pruned" in note for note in compress("pqk", sparsity=0, bits=4).report.notes)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("method", "asked"),
    [
        (Opq(mean_bits=4), {"bits": (2, 8), "sparsity": 0.6}),
        (Opq(per="unit"), {"bits": 4, "sparsity": 0.4}),
        (Qst(convention="C4"), {"bits": 4, "budget": gc.Budget(bytes=80)}),
        (Qst(per="unit"), {"bits": 4, "sparsity": 0.4}),
    ],
)
def test_planned_and_trained_masks_on_recurrent_tied_and_bare_weights(method, asked):
    """A weight of two layers has one number of bits, and a parameter of the model itself one, too."""
    report = gc.compress(
        Net(), X, method=method, data=[(X, torch.randn(3, 2, 8))] * 3, steps=12, lr=0.01, progress=False,
        activation_bits=None, loss=lambda out, batch: F.mse_loss(out, batch[1]), **asked,
    ).report  # fmt: skip
    assert max(report.verified.values()) < 1e-6 and not any("not what the result has" in n for n in report.notes)
    assert not any("not as planned" in note for note in report.notes)
    if isinstance(method, Opq) and method.mean_bits:
        total = sum(p.numel() for name, p in Net().named_parameters() if name in WEIGHTS)
        assert report.sizes["C0"] <= (total - round(0.6 * total)) * 4 / 8
