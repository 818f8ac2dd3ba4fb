"""Scores of "repairable" are the errors that least squares leaves, computed anew for each set of units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import PlanError
from graphcomp.pruning.repairable import Repairable
from graphcomp.pruning.saliency import Magnitude, score

EXACT = Repairable(ridge=1e-12, steps=10_000)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


def error_left(rows: Tensor, weight: Tensor, gone: Sequence[int], *, intercept: bool) -> float:
    """Return the error of the best linear map from the features that stay to the outputs, over Σ y².

    Args:
        rows: (r, n).
        weight: (n, o).
        gone: features.
    """
    wanted = rows @ weight
    stay = [k for k in range(rows.shape[1]) if k not in gone]
    x = rows[:, stay]
    if intercept:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    rest = wanted - x @ torch.linalg.lstsq(x, wanted, driver="gelsd").solution
    return float(rest.square().sum() / wanted.square().sum())


def check(scores: Tensor, error: Callable[[list[int]], float]) -> None:
    """Check that each unit is the cheapest by brute force when it goes, and that its score is what its loss adds."""
    order = scores.argsort(stable=True).tolist()
    before = last = 0.0
    for k, unit in enumerate(order[:-1]):
        found = {other: error([*order[:k], other]) for other in order[k:]}
        assert found[unit] == pytest.approx(min(found.values()), rel=1e-3)
        last = max(found[unit] - before, last)
        before = found[unit]
        assert float(scores[unit]) == pytest.approx(last, rel=1e-3)


def scored(plan: Analysis, group: ChannelGroup, data: Sequence[Tensor]) -> Tensor:
    return score(EXACT, plan, [group], data=data)[group].double()


def test_a_linear_layer_with_an_intercept() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    data = [torch.randn(40, 6, dtype=torch.float64) for _ in range(3)]
    plan = gc.analyze(model, data[0])
    rows = torch.cat([model[1](model[0](x)) for x in data]).detach()
    weight = model[2].weight.detach().T
    check(scored(plan, plan.groups[0], data), lambda gone: error_left(rows, weight, gone, intercept=True))


def test_a_channel_of_a_convolution_is_all_of_its_taps() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=False), nn.Tanh(), nn.Flatten())
    )
    data = [torch.randn(6, 2, 9, 9, dtype=torch.float64) for _ in range(3)]
    plan = gc.analyze(model, data[0])
    group = next(g for g in plan.groups if g.size == 5)
    unfolded = torch.cat([F.unfold(model[1](model[0](x)), 3) for x in data]).detach()
    rows = unfolded.transpose(1, 2).flatten(0, 1)
    weight = model[2].weight.detach().flatten(1).T
    taps = lambda units: [9 * u + k for u in units for k in range(9)]  # noqa: E731
    check(scored(plan, group, data), lambda gone: error_left(rows, weight, taps(gone), intercept=False))


class Stream(nn.Module):
    """A residual stream that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.last = nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x + self.down(torch.relu(self.up(x))))


def test_relative_errors_of_all_readers_add_up() -> None:
    model = seeded(Stream)
    assert isinstance(model, Stream)
    data = [torch.randn(60, 4, dtype=torch.float64) for _ in range(2)]
    plan = gc.analyze(model, data[0])
    group = next(g for g in plan.groups if g.size == 6)
    x = torch.tanh(model.first(torch.cat(data))).detach()
    stream = (x + model.down(torch.relu(model.up(x)))).detach()
    weights = model.up.weight.detach().T, model.last.weight.detach().T

    def error(gone: list[int]) -> float:
        return sum(error_left(r, w, gone, intercept=True) for r, w in zip((x, stream), weights, strict=True))

    check(scored(plan, group, data), error)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 36), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).view(b, s, 3, 4, 3).unbind(2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, 12))


def test_a_head_is_a_block() -> None:
    model = seeded(Attention)
    assert isinstance(model, Attention)
    data = [torch.randn(8, 7, 5, dtype=torch.float64) for _ in range(3)]
    plan = gc.analyze(model, data[0])
    group = next(g for g in plan.groups if g.role == "head")
    read: list[Tensor] = []
    handle = model.out.register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))
    for x in data:
        model(x)
    handle.remove()
    rows = torch.cat(read).flatten(0, 1)
    heads = lambda units: [3 * u + k for u in units for k in range(3)]  # noqa: E731
    weight = model.out.weight.detach().T
    check(scored(plan, group, data), lambda gone: error_left(rows, weight, heads(gone), intercept=True))


def test_twins_do_not_both_count_as_free() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]
        model[0].bias[1] = model[0].bias[0]
    data = [torch.randn(40, 3, dtype=torch.float64)]
    plan = gc.analyze(model, data[0])
    scores = scored(plan, plan.groups[0], data)
    low, high = sorted(scores[:2].tolist())
    assert low < 1e-6 < 1e-3 < high


def test_it_goes_into_compress() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    data = [torch.randn(32, 6) for _ in range(3)]
    small = gc.compress(model, data[0], sparsity=0.25, saliency="repairable", data=data, progress=False)
    assert small.module[0].out_features == 12


def test_without_data_it_is_refused() -> None:
    plan = gc.analyze(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(2, 6))
    with pytest.raises(PlanError, match="there is no data"):
        score("repairable", plan, plan.groups)


def test_a_recorded_model_is_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x))) if float(x.sum()) > 0 else self.down(torch.tanh(self.up(x)))

    x = torch.ones(2, 4)
    plan = gc.analyze(Branching().eval(), x)
    assert plan.captured.producer == "record"
    with pytest.raises(PlanError, match="could only be recorded"):
        score("repairable", plan, plan.groups, data=[x])


def test_groups_without_a_closed_form_take_the_fallback() -> None:
    class Pairs(nn.Module):
        """Queries and keys meet: no layer sums the units."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) @ self.k(x).mT

    x = torch.randn(3, 5, 4)
    plan = gc.analyze(Pairs().eval(), x)
    with pytest.raises(PlanError, match="cannot score 1 of 1 groups"):
        score("repairable", plan, plan.groups, data=[x])
    found = score(Repairable(fallback=Magnitude()), plan, plan.groups, data=[x])
    assert torch.equal(found[plan.groups[0]], score("l2", plan, plan.groups)[plan.groups[0]])


def test_fewer_rows_than_features_and_a_small_ridge() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 4)))
    data = [torch.randn(8, 6, dtype=torch.float64)]
    plan = gc.analyze(model, data[0])
    scores = scored(plan, plan.groups[0], data)
    assert bool(scores.isfinite().all()) and len(scores.unique()) == 32
