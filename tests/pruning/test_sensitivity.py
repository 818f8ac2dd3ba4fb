"""Groups that matter to the outputs keep their units, whatever their scores are relative to their own mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.errors import PlanError
from graphcomp.pruning.saliency import score
from graphcomp.pruning.sensitivity import Curve, marginal, probe


class Branches(nn.Module):
    """Two branches of equal shape, of which the second adds a thousandth of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + 1e-3 * self.b(x)


def branches() -> nn.Module:
    torch.manual_seed(0)
    return Branches().eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 6, generator=generator) for _ in range(4)]


def widths(small: gc.CompressedModel) -> tuple[int, int]:
    return small.module.a[0].out_features, small.module.b[0].out_features


def test_units_of_the_branch_that_matters_stay() -> None:
    data = batches()
    options: dict[str, Any] = {"sparsity": 0.4, "calibration": data, "progress": False}
    a, b = widths(gc.compress(branches(), data[0], ranking="sensitivity", **options))
    assert a == 16
    assert a + b == 32 - 13
    a, b = widths(gc.compress(branches(), data[0], **options))
    assert a < 16


def test_a_budget_is_met_by_the_branch_that_does_not_matter() -> None:
    data = batches()
    small = gc.compress(
        branches(), data[0], budget=gc.Budget(macs=0.7), ranking="sensitivity", calibration=data, progress=False
    )
    assert small.report.macs.ratio <= 0.7
    assert widths(small)[0] == 16


def test_the_error_is_of_the_outputs() -> None:
    model, data = branches(), batches()
    plan = gc.analyze(model, data[0])
    scores = score("l2", plan, plan.groups)
    curves = probe(plan, plan.groups, scores, [[batch] for batch in data])
    a, b = (curves[plan.group(f"{name}.0/hidden")] for name in "ab")
    assert a.removed == b.removed == (0, 2, 4, 8, 12)
    assert a.errors[0] == b.errors[0] == 0
    assert all(x > 1e3 * y for x, y in zip(a.errors[1:], b.errors[1:], strict=True))


def test_slopes_are_of_the_lower_hull_and_grow() -> None:
    slopes = Curve(8, (0, 2, 4, 6), (0.0, 4.0, 2.0, 8.0)).slopes()
    assert slopes.tolist()[:6] == [0.5, 0.5, 0.5, 0.5, 3.0, 3.0]
    assert slopes.shape == (8,)
    assert bool((slopes.diff() >= 0).all())


def test_scores_follow_the_order_within_a_group() -> None:
    plan = gc.analyze(branches(), batches()[0])
    group = plan.groups[0]
    scores = {group: torch.arange(16.0).flip(0)}
    found = marginal({group: Curve(16, (0, 8, 12), (0.0, 1.0, 4.0))}, scores, lambda _: 2.0)[group]
    assert set(found.topk(4).indices.tolist()) == {0, 1, 2, 3}
    assert float(found[15]) == 1 / 8 / 2


def test_without_data_it_is_refused() -> None:
    with pytest.raises(PlanError, match="needs calibration or data"):
        gc.compress(branches(), batches()[0], ranking="sensitivity", progress=False)


def test_outputs_without_floats_are_refused() -> None:
    class Classes(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    data = batches()
    with pytest.raises(PlanError, match="no output is of floats"):
        gc.compress(Classes().eval(), data[0], ranking="sensitivity", calibration=data, progress=False)
