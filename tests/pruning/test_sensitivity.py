"""Groups that matter to the outputs keep their units, whatever their scores are relative to their own mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.errors import CalibrationError, PlanError
from graphcomp.ir.module import tensor_leaves
from graphcomp.pruning import sensitivity
from graphcomp.pruning.allocation import allocate
from graphcomp.pruning.repair import repair_cut
from graphcomp.pruning.repairable import Repairable
from graphcomp.pruning.rounds import in_rounds
from graphcomp.pruning.saliency import score
from graphcomp.pruning.sensitivity import Curve, marginal, probe, sensitivities
from graphcomp.pruning.slice import SliceGroups


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
    slopes = Curve(torch.arange(8), (0, 2, 4, 6), (0.0, 4.0, 2.0, 8.0)).slopes()
    assert slopes.tolist()[:6] == [0.5, 0.5, 0.5, 0.5, 3.0, 3.0]
    assert slopes.shape == (8,)
    assert bool((slopes.diff() >= 0).all())


def test_scores_follow_the_order_within_a_group() -> None:
    plan = gc.analyze(branches(), batches()[0])
    group = plan.groups[0]
    found = marginal({group: Curve(torch.arange(16).flip(0), (0, 8, 12), (0.0, 1.0, 4.0))}, lambda _: 2.0)[group]
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


# ------------------------------------------------------------------------------------------------ probes
@torch.no_grad()
def the_slow_way(plan: Any, group: Any, order: Tensor, count: int, data: list[list[Tensor]]) -> float:
    """Return the error of a cut that is sliced, repaired and run as a whole."""
    kept = {group: order[count:].sort().values}
    small = SliceGroups(plan.coupling, kept).rewrite(plan.captured.module)
    graph = repair_cut(plan, kept, small, data[::2], direct=True, rows=sensitivity.ROWS).graph
    (found, wanted) = ([tensor_leaves(m(*x))[0].double() for x in data[1::2]] for m in (graph, plan.captured.module))
    pairs = list(zip(found, wanted, strict=True))
    return float(sum((y - t).square().sum() for y, t in pairs) / sum(t.square().sum() for _, t in pairs))


def network() -> nn.Module:
    """A depthwise block with batch norms, whose expansion one layer reads, on a stream that three layers read."""
    return Block().eval()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up, self.up_norm = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.mid, self.mid_norm = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.down, self.down_norm = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.next, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        for norm in (self.up_norm, self.mid_norm, self.down_norm):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.nn.functional.relu6(self.up_norm(self.up(x)))
        y = torch.nn.functional.relu6(self.mid_norm(self.mid(y)))
        x = x + self.down_norm(self.down(y))
        x = x + self.next(torch.relu(x))
        return self.last(x.mean((2, 3)))


def images() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(16, 3, 8, 8, generator=generator)] for _ in range(4)]


def test_a_probe_is_the_repaired_cut() -> None:
    """Up to rounding where one layer reads the group; where several do, of the same order."""
    data = images()
    plan = gc.analyze(network(), data[0][0])
    scores = score("l2", plan, plan.groups)
    curves = probe(plan, plan.groups, scores, data)
    expansion, stream = sorted(plan.groups, key=lambda group: -group.size)
    for group in (expansion, stream):
        curve = curves[group]
        assert torch.equal(curve.order, scores[group].argsort(stable=True))
        for count, error in list(zip(curve.removed, curve.errors, strict=True))[1:]:
            slow = the_slow_way(plan, group, curve.order, count, data)
            if group is expansion:
                assert error == pytest.approx(slow, rel=1e-4)
            else:
                assert 0.5 * slow < error < 4 * slow


def test_units_that_no_layer_sums_are_probed_as_a_whole() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) @ self.k(x).mT

    data = [[torch.randn(8, 5, 4)] for _ in range(4)]
    plan = gc.analyze(Pairs().eval(), data[0][0])
    (group,) = plan.groups
    curve = probe(plan, [group], None, data)[group]
    assert curve.steps is None
    assert torch.equal(curve.order, score("l2", plan, [group])[group].argsort(stable=True))
    assert curve.errors[1] == pytest.approx(the_slow_way(plan, group, curve.order, curve.removed[1], data))
    (*_, note) = sensitivities(plan, [group], None, data)[1]
    assert "by the norms of their weights" in note and group.name in note


def test_without_scores_units_go_in_the_order_of_what_is_repairable() -> None:
    data = images()
    plan = gc.analyze(network(), data[0][0])
    curves = probe(plan, plan.groups, None, data)
    own = score(Repairable(rows=sensitivity.ROWS), plan, plan.groups, data=[x for (x,) in data[::2]])
    for group in plan.groups:
        assert torch.equal(curves[group].order, own[group].argsort(stable=True))


def test_the_curve_has_the_shape_of_what_readers_lose() -> None:
    steps = torch.tensor([0.0, 1.0, 2.0, 5.0])
    curve = Curve(torch.arange(4), (0, 2), (0.0, 0.3), steps)
    assert torch.allclose(curve.slopes()[:2], torch.tensor([0.0, 0.3], dtype=torch.float64), rtol=0.5)
    assert bool((curve.slopes().diff() > 0).all())
    assert Curve(torch.arange(4), (0, 2), (0.0, 0.3), torch.zeros(4)).slopes()[0] == pytest.approx(0.15)


def test_a_graph_with_outputs_of_its_own_starts_above_zero() -> None:
    data = [[batch] for batch in batches()]
    plan = gc.analyze(branches(), data[0][0])
    torch.manual_seed(5)
    other = gc.analyze(Branches().eval(), data[0][0])
    curves = probe(plan, plan.groups, None, data, other.captured.module)
    assert all(curve.errors[0] > 0 for curve in curves.values())


# ------------------------------------------------------------------------------------------------ rounds
@pytest.mark.slow
@pytest.mark.ci
def test_rounds_meet_the_goal_and_cut_what_is_left() -> None:
    data = images()
    flat = [x for (x,) in data]
    options: dict[str, Any] = {"calibration": flat, "ranking": "sensitivity", "progress": False}
    for rounds in (1, 3):
        small = gc.compress(network(), flat[0], sparsity=0.4, rounds=rounds, **options)
        assert small.module.stem.out_channels + small.module.up.out_channels == round(24 * 0.6)
    small = gc.compress(network(), flat[0], budget=gc.Budget(macs=0.5), rounds=2, **options)
    assert small.report.macs.ratio <= 0.5


@pytest.mark.slow
@pytest.mark.ci
def test_later_rounds_score_the_repaired_model() -> None:
    """Two equal units: each is free as long as the other stays; a second round knows that one is gone."""
    data = images()
    plan = gc.analyze(network(), data[0][0])
    seen: list[tuple[int, ...]] = []

    def rank(own: Any, groups: Any, order: Any) -> Any:
        seen.append(tuple(group.size for group in groups))
        return sensitivities(own, groups, order, data, wanted=plan.captured.module)[0]

    def choose(scores: Any, kept: Any, share: float) -> Any:
        return allocate(plan.groups, scores, sparsity=0.5 * share, scope="sensitivity", already=kept, nearest=True)

    scores, kept = in_rounds(plan, plan.groups, None, rank, choose, data, 2)
    assert seen[0] == tuple(group.size for group in plan.groups)
    assert seen[1] == tuple(len(kept[group]) for group in plan.groups)
    for group in plan.groups:
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[kept[group]] = False
        assert bool((scores[group][gone] == -1).all()) and bool((scores[group][~gone] >= 0).all())


def test_rounds_follow_the_order_that_is_given() -> None:
    data = images()
    plan = gc.analyze(network(), data[0][0])
    order = {group: torch.arange(float(group.size)).flip(0) for group in plan.groups}
    found: list[Any] = []

    def rank(own: Any, groups: Any, scores: Any) -> Any:
        found.append([scores[group] for group in groups])
        return sensitivities(own, groups, scores, data, wanted=plan.captured.module)[0]

    def choose(scores: Any, kept: Any, share: float) -> Any:
        return allocate(plan.groups, scores, sparsity=0.5 * share, scope="sensitivity", already=kept, nearest=True)

    _, kept = in_rounds(plan, plan.groups, order, rank, choose, data, 2)
    assert all(torch.equal(own, order[group][kept[group]]) for own, group in zip(found[1], plan.groups, strict=True))


# ------------------------------------------------------------------------------------------------ what is said
def test_notes_say_which_batches_judged() -> None:
    data = batches()
    options: dict[str, Any] = {"sparsity": 0.4, "ranking": "sensitivity", "progress": False}
    small = gc.compress(branches(), data[0], calibration=data, **options)
    assert any("repaired on 2 and judged on 2 others of 4 batches" in note for note in small.report.notes)
    small = gc.compress(branches(), data[0], calibration=data[:1], **options)
    assert any("the only batch repaired the probes and judged them" in note for note in small.report.notes)
    many = [torch.randn(200, 6) for _ in range(8)]
    small = gc.compress(branches(), data[0], calibration=many, **options)
    assert any("on 2 and judged on 2 others of 8 batches, 256 samples of each kind" in n for n in small.report.notes)


def test_a_ranking_of_zeros_is_refused() -> None:
    data = batches()
    for option in ({"ranking": "local"}, {"ranking": "sensitivity", "calibration": data}):
        with pytest.raises(PlanError, match='ranking with saliency="zeros"'):
            gc.compress(branches(), data[0], saliency="zeros", progress=False, **option)  # type: ignore[arg-type]


def test_rounds_of_another_ranking_are_refused() -> None:
    with pytest.raises(PlanError, match="rounds=2 with ranking='global'"):
        gc.compress(branches(), batches()[0], sparsity=0.3, rounds=2, progress=False)
    with pytest.raises(PlanError, match="rounds=2 with a budget of time"):
        gc.compress(branches(), batches()[0], budget=gc.Budget(speedup=2), ranking="sensitivity", rounds=2)


def test_a_batch_that_does_not_fit_is_named() -> None:
    data = [[batch] for batch in batches()]
    plan = gc.analyze(branches(), data[0][0])
    for bad in (1, 2):
        wrong = [*data]
        wrong[bad] = [torch.randn(4, 5)]
        with pytest.raises(CalibrationError, match=f"batch {bad} "):
            probe(plan, plan.groups, None, wrong)
