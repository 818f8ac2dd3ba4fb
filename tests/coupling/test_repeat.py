"""A table repeated for every sample of a dynamic batch keeps its features prunable (as DETR's queries are)."""

import torch
from torch import nn

import graphcomp as gc
from graphcomp.testing import check_law


class Queries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 12))
        self.mix = nn.Linear(12, 12)
        self.inward, self.out = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x):
        queries = self.table.unsqueeze(0).repeat(x.shape[0], 1, 1)
        return self.out(torch.relu(self.mix(queries)) + self.inward(x))


def test_repeated_for_a_dynamic_batch():
    result = check_law(Queries().eval(), torch.randn(2, 5, 4))
    sizes = {frozenset(m.name for m in group.members): group.size for group in result.groups}
    assert sizes[frozenset({"table", "mix.weight"})] == 12
    assert result.moved > 0.01


class Tiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, x):
        return self.b(torch.tile(self.a(x), (2,)))


def test_tile_that_names_the_last_dim_only():
    result = check_law(Tiled().eval(), torch.randn(2, 5, 4))
    (group,) = result.groups
    assert {m.name for m in group.members} == {"a.weight", "a.bias", "b.weight"}
    assert result.moved > 0.01


def test_copies_are_no_units_of_their_own():
    """No parameter makes them, and the model's own class says how many there are."""
    plan = gc.analyze(Tiled().eval(), torch.randn(2, 5, 4))
    assert [(group.size, group.role) for group in plan.groups] == [(6, "hidden")]
    assert [(f.name, f.dim) for f in plan.frozen if "copies" in f.reason.text] == [("b.weight", 1)]
    small = gc.compress(Tiled().eval(), torch.randn(2, 5, 4), sparsity=0.5, progress=False)
    assert small.form == "native"
    assert small.module.b.weight.shape == (3, 6)
