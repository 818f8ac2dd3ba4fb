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
from graphcomp.pruning.multiples import in_multiples, step_of, with_group_sizes


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
    assert note.endswith("so others of the 40 are kept")
    assert step_of(groups[0], 6) == 12


class Attention(nn.Module):
    """Four heads of 8 dims, then 64 hidden units."""

    def __init__(self, head_dim: int = 8) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v = (nn.Linear(16, 4 * head_dim) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(4 * head_dim, 16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, 16) -> (n, t, 16)."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.down(self.up(self.out(found.transpose(1, 2).flatten(2))).relu())
        return result


@pytest.mark.parametrize(("head_dim", "round_to"), [(8, 8), (8, 16), (8, 64), (6, 4)])
@pytest.mark.parametrize("ranking", ["local", "global"])
def test_round_to_is_of_lengths_and_costs_no_head(head_dim: int, round_to: int, ranking: Any) -> None:
    torch.manual_seed(0)
    model = Attention(head_dim).eval()
    with torch.no_grad():
        model.v.weight[: 2 * head_dim] *= 0.01
        model.out.weight[:, : 2 * head_dim] *= 0.01
    x = torch.randn(2, 5, 16)
    small = gc.compress(model, x, sparsity=0.5, round_to=round_to, ranking=ranking, progress=False)
    kept = {group["role"]: group["units"]["kept"] for group in small.report.groups}
    assert kept["hidden"] % round_to == 0
    assert kept["head"] < 4
    assert kept["head"] * head_dim % round_to == 0 or round_to == 64
    assert small.report.verified


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


# ------------------------------------------------------------------------------------------------ group_size
def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40), nn.Linear(40, 4)
    )


@pytest.mark.parametrize(("options", "step"), [({}, 16), ({"round_to": 24}, 48)])
def test_widths_are_multiples_of_the_group_size(options, step):
    x = torch.randn(4, 32)
    small = gc.compress(mlp().eval(), x, sparsity=0.3, bits=4, activation_bits=None, group_size=16, **options)
    first = len(small.kept.get("0.weight", {0: torch.arange(64)})[0])
    assert first % step == 0 or first == 64
    assert any("group_size=16 of 2.weight" in note for note in small.report.notes) or options


def test_rows_that_end_in_a_smaller_group_can_have_any_length():
    groups = gc.analyze(mlp().eval(), torch.randn(4, 32)).groups
    found = with_group_sizes(groups, {"2.weight": 16, "4.weight": 32, "5.weight": 16})
    assert [group.multiple for group in found] == [16, 1, 1]  # of 64, 48 and 40 inputs


def test_zeros_leave_whole_groups():
    model, x = mlp().eval(), torch.randn(4, 32)
    with torch.no_grad():
        model[0].weight[:20] = 0
        model[0].bias[:20] = 0
    small = gc.compress(model, x, saliency="zeros", bits=4, activation_bits=None, group_size=16)
    assert len(small.kept["0.weight"][0]) == 48


def test_without_groups_widths_are_free():
    small = gc.compress(mlp().eval(), torch.randn(4, 32), sparsity=0.3, bits=4, activation_bits=None)
    assert sum(len(dims[0]) for name, dims in small.kept.items() if name.endswith("weight") and 0 in dims) == 106


# ------------------------------------------------------------------------------------------------ elements re-read
class Rotary(nn.Module):
    """Two heads of 6 dims beside 4 dims that turn: complex numbers, in a slice of what the projection makes."""

    def __init__(self, first: int = 6) -> None:
        super().__init__()
        self.first = first
        self.q, self.k = nn.Linear(16, 2 * (first + 4)), nn.Linear(16, 2 * first)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, t, 16) -> (n, 2, t, t), (n, 2, t, 3)."""
        q = self.q(x).view(*x.shape[:2], 2, -1).transpose(1, 2)
        k = self.k(x).view(*x.shape[:2], 2, -1).transpose(1, 2)
        plain, turning = torch.split(q, [self.first, 4], -1)
        numbers = torch.view_as_complex(turning.float().reshape(*turning.shape[:-1], -1, 2))
        return plain @ k.mT, self.out(torch.view_as_real(numbers * numbers.abs()).flatten(3))


@pytest.mark.parametrize(("sparsity", "left"), [(0.5, 4), (0.7, 2)])
def test_what_stands_before_complex_numbers_goes_in_pairs(sparsity: float, left: int) -> None:
    """Of 6 units, 3 would leave rows of 7 numbers: no complex number begins at each."""
    x, model = torch.randn(2, 5, 16), Rotary().eval()
    small = gc.compress(model, x, sparsity=sparsity, prune=("head_dim",), progress=False)
    assert small.form == "native"
    assert small.module.k.weight.shape[0] == 2 * left
    assert any("view_as_complex" in note and "a multiple of 2" in note for note in small.report.notes) or left == 2
    assert small.report.verified
    again = gc.compress(small.module, x, sparsity=0.4, prune=("head_dim",), progress=False)
    assert again.module.k.weight.shape[0] in (4, 2 * left)


class Bytes(nn.Module):
    """Pairs of halves read as floats, behind a part that is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 8) -> (n, 3), (n, 2)."""
        h = self.up(x).half()
        return self.down(h[:, :8].float()), h[:, 8:].view(torch.float32)


def test_what_stands_before_re_read_bytes_goes_in_whole_elements() -> None:
    model, x = Bytes().eval(), torch.randn(4, 8)
    (group,) = gc.analyze(model, x).groups
    assert (group.size, group.multiple) == (8, 2)
    small = gc.compress(model, x, sparsity=0.375, progress=False)  # 3 of 8
    assert len(small.kept["down.weight"][1]) == 6
    assert small.report.verified
