"""Widths that an op takes only as multiples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.coupling.axis import Factor
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.pruning.multiples import in_multiples, step_of


def group(size: int, multiple: int = 1, name: str = "g") -> ChannelGroup:
    return ChannelGroup(name, size, "hidden", (), Factor(size), False, multiple, "mylib.op")


@pytest.mark.parametrize(
    ("left", "multiple", "options", "expected"),
    [
        (5, 4, {}, 4),
        (7, 4, {}, 8),
        (7, 4, {"at_most": True}, 4),
        (3, 4, {"at_most": True}, 4),  # one block stays, whatever the budget
        (9, 4, {"round_to": 3}, 10),  # a multiple of 12 there is none of, so all
        (10, 4, {}, 10),
        (8, 4, {}, 8),
        (7, 1, {}, 7),
    ],
)
def test_the_nearest_number_that_an_op_can_take(
    left: int, multiple: int, options: dict[str, Any], expected: int
) -> None:
    own, scores = group(10, multiple), torch.tensor([3.0, 1, 4, 1.5, 9, 2.6, 5, 3.5, 8, 9.7])
    best = scores.argsort(descending=True)
    kept, notes = in_multiples({own: best[:left].sort().values}, {own: scores}, **options)
    assert kept[own].tolist() == best[:expected].sort().values.tolist()
    assert bool(notes) == (expected != left)


def test_the_rounding_of_one_group_makes_up_for_another() -> None:
    groups = [group(16, 4, f"g{k}") for k in range(4)]
    scores = {g: torch.arange(16.0) for g in groups}
    kept, (note,) = in_multiples({g: torch.arange(6, 16) for g in groups}, scores)
    assert sorted(len(units) for units in kept.values()) == [8, 8, 12, 12]
    assert note.startswith("g0, g1, g2 and others: the number of units kept is a multiple of 4 (mylib.op)")
    assert step_of(groups[0], 6) == 12


class Experts(nn.Module):
    """Two experts by torch's grouped product, whose operands have rows of multiples of 16 bytes."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.inner = nn.Linear(8, 24)
        self.up = nn.Parameter(torch.randn(2, 80 if gated else 40, 24) / 4)
        self.down = nn.Parameter(torch.randn(2, 8, 40) / 4)

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([2, 4], dtype=torch.int32)
        h = F.grouped_mm(self.inner(x), self.up.mT, offs=ends)
        if self.gated:
            gate, h = h.chunk(2, -1)
            h = h * gate.sigmoid()
        return F.grouped_mm(h.relu().contiguous(), self.down.mT, offs=ends)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_widths_of_experts_follow_from_the_grouped_product(gated: bool, dtype: torch.dtype, multiple: int) -> None:
    model = Experts(gated).eval().to(dtype)
    x = torch.randn(4, 8, dtype=dtype)
    plan = gc.analyze(model, x)
    assert {g.multiple for g in plan.groups if g.role == "hidden"} == {multiple}
    small = gc.compress(model, x, sparsity=0.45)
    assert small.form == "native"
    assert small.kept["down"][2].numel() % multiple == 0
    assert small.kept["inner.weight"][0].numel() % multiple == 0
    assert any("_grouped_mm" in note and f"a multiple of {multiple}" in note for note in small.report.notes)
