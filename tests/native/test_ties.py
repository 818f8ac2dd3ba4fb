"""Lengths that a class can hold only as long as they are equal, and lengths that no attribute holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc


def _uneven(model: nn.Module) -> nn.Module:
    """Spread what matters unevenly over the rows of every weight."""
    torch.manual_seed(1)
    with torch.no_grad():
        for k, weight in enumerate(p for p in model.parameters() if p.dim() > 1):
            spread = torch.linspace(0, 1, weight.shape[0]) ** (4 * k + 1) * 3 + 0.05
            weight.mul_(spread.view(-1, *[1] * (weight.dim() - 1)))
    return model.eval()


class Thirds(nn.Module):
    """Cuts a dim in three parts, whose number alone stands in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 48)
        self.outs = nn.ModuleList(nn.Linear(16, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.up(x).relu().chunk(3, -1)
        result = torch.zeros(())
        for out, part in zip(self.outs, parts, strict=True):
            result = result + out(part)
        return result


class ByShape(Thirds):
    """Cuts a dim at a length that follows from another."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        n = h.shape[-1] // 3
        return self.outs[0](h[:, :n]) + self.outs[1](h[:, n : 2 * n]) + self.outs[2](h[:, 2 * n :])


class Recorded(Thirds):
    """The same as a model that export refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


class OneSize(nn.Module):
    """Two layers whose width one attribute holds."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 16
        self.a, self.b = nn.Linear(8, 16), nn.Linear(8, 16)
        self.c, self.d = nn.Linear(16, 4), nn.Linear(16, 4)
        nn.init.constant_(self.a.weight[:12], 1e-4)
        nn.init.constant_(self.c.weight[:, :12], 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = (layer(x).relu().view(x.shape[0], self.size) for layer in (self.a, self.b))
        return self.c(left) + self.d(right)


class Blocks(nn.Module):
    """Two instances of a block that splits its channels in halves."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.m, self.o = nn.Conv2d(12, 32, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(48, 12, 1)

        def forward(self, x: Tensor) -> Tensor:
            parts = list(self.a(x).relu().chunk(2, 1))
            parts.append(self.m(parts[-1]).relu())
            return self.o(torch.cat(parts, 1))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = nn.Conv2d(3, 12, 1), self.Block(), self.Block(), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(self.first(x))))


@pytest.mark.parametrize("kind", [Thirds, ByShape, Recorded, OneSize, Blocks])
@pytest.mark.slow
@pytest.mark.ci
def test_equal_counts_keep_the_class(kind: type[nn.Module]) -> None:
    model = _uneven(kind())
    x = torch.rand(2, 3, 6, 6) if kind is Blocks else torch.rand(3, 8)
    small = gc.compress(model, x, sparsity=0.5, progress=False)
    assert type(small.module) is kind, small.reason
    assert small.report.sparsity == 0.5
    assert any(note.startswith("equally many units") for note in small.report.notes)
    untied = gc.compress(model, x, sparsity=0.5, progress=False, prefer_native=False) if kind is not Recorded else None
    assert untied is None or untied.form == "graph"


def test_equal_counts_stay_within_a_budget() -> None:
    model = _uneven(Thirds())
    small = gc.compress(model, torch.rand(3, 8), budget=gc.Budget(params=0.6), progress=False)
    assert type(small.module) is Thirds, small.reason
    assert 0.45 < small.report.params.after / small.report.params.before <= 0.6


class Literal(nn.Module):
    """Holds a length as a number in the code; `other` can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(16, 4)
        self.other, self.last = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h[:, :16] * h[:, 16:]) + self.last(self.other(x).relu())


def test_the_reason_names_the_line_and_the_option_that_keeps_the_class() -> None:
    model = _uneven(Literal())
    small = gc.compress(model, torch.rand(3, 8), sparsity=0.5, prefer_native=False, progress=False)
    assert small.form == "graph"
    assert "no attribute holds" in small.reason
    assert "test_ties.py:" in small.reason
    assert "h[:, :16]" in small.reason
    assert "ignore='a'" in small.reason
    again = gc.compress(model, torch.rand(3, 8), sparsity=0.5, ignore="a", progress=False)
    assert type(again.module) is Literal


class Detector(nn.Module):
    """Keeps as many rows as have large scores, and computes with the width in a way that no cut survives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        scores = self.b(h).flatten()
        kept = scores[scores > 0.1]
        if len(kept) > 1000:
            return x
        return self.b(h) * (h.shape[1] / 16) + kept.sum()


def test_a_length_that_values_decide_is_not_blamed() -> None:
    with pytest.raises(gc.VerificationError) as caught:
        gc.compress(Detector().eval(), torch.rand(64, 8), sparsity=0.5, progress=False)
    assert "output '0' differs" in caught.value.why
    assert "scores > 0.1" not in caught.value.why and "kept" not in caught.value.why


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.attention(x, x, x, need_weights=False)[0]).relu())


def test_a_module_of_torch_that_cannot_hold_the_cut_is_named() -> None:
    torch.manual_seed(0)
    model, x = TorchAttention().eval(), torch.randn(2, 6, 32)
    small = gc.compress(model, x, sparsity=0.5, prefer_native=False, progress=False)
    assert small.form == "graph"
    assert "MultiheadAttention 'attention'" in small.reason
    assert "ignore='attention'" in small.reason


def test_few_groups_that_the_class_cannot_hold_cut_stay_whole_and_others_give_as_many() -> None:
    torch.manual_seed(0)
    model, x = TorchAttention().eval(), torch.randn(2, 6, 32)
    small = gc.compress(model, x, sparsity=0.5, progress=False)
    assert type(small.module) is TorchAttention, small.reason
    assert {g["role"]: g["units"]["kept"] for g in small.report.groups if g["role"] != "head_dim"} == {
        "head": 4, "hidden": 30,
    }  # fmt: skip
    assert small.report.sparsity == 0.5
    assert any("cannot hold them cut: attention/head (" in note for note in small.report.notes)
