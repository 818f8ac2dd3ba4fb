"""Averages of scores, rounds, scores per cost, and bits that go down (spec of methods, 7)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcomp as gc
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.methods.base import Goal
from graphcomp.methods.taylor2.bits import Progressive, changes_at, levels_of
from graphcomp.methods.taylor2.method import Taylor2
from graphcomp.methods.taylor2.plan import Plan, left_after, rounds_at
from graphcomp.methods.taylor2.run import Taylor2Run
from graphcomp.methods.taylor2.scores import Averages
from graphcomp.training.prepared import Prepared
from tests.methods.learning import batches, net


def run_of(method: Taylor2, steps: int = 24, **goal: Any) -> Taylor2Run:
    ready = gc.prepare(net(), batches()[0][0], bits=None)
    return method.begin(ready, Goal(**goal), gc.Training(steps=steps), steps)


def plan_of(method: Taylor2, **goal: Any) -> tuple[Plan, tuple[ChannelGroup, ...]]:
    plan = run_of(method, **goal).plan
    assert plan is not None
    return plan, plan.units.groups


# ------------------------------------------------------------------------------------------------ averages
def test_averages_forget_old_minibatches_and_begin_with_those_that_there_were():
    ready = gc.prepare(net(), batches()[0][0], bits=None)
    groups = ready.session.groups
    averages = Averages(groups, torch.device("cpu"), 0.75)
    with pytest.raises(gc.PlanError, match="before a minibatch"):
        averages.scores("squares", {})
    mean = squares = torch.zeros(8)
    draws = torch.Generator().manual_seed(0)
    for k in range(1, 9):
        own = torch.randn(8, generator=draws)
        averages.add({groups[0]: own, groups[1]: 2 * own})
        kept = 1 - max(0.25, 1 / k)
        mean, squares = kept * mean + (1 - kept) * own, kept * squares + (1 - kept) * own.square()
    for kind, wanted in (("squares", squares), ("mean", mean.abs()), ("signed", -mean)):
        found = averages.scores(kind, {group: torch.arange(8) for group in groups})
        assert torch.allclose(found[groups[0]], wanted, atol=1e-6)
        assert torch.allclose(found[groups[1]], (4 if kind == "squares" else 2) * wanted, atol=1e-6)


def test_a_derivative_that_is_not_finite_leaves_the_average_as_it_is():
    group = gc.prepare(net(), batches()[0][0], bits=None).session.groups[0]
    averages = Averages([group], torch.device("cpu"), 0.5)
    averages.add({group: torch.ones(8)})
    averages.add({group: torch.tensor([torch.inf, torch.nan, *[0.0] * 6])})
    assert averages.scores("squares", {group: torch.arange(8)})[group].tolist() == [1.0, 1.0, *[0.5] * 6]


def test_a_closed_unit_counts_only_where_opening_its_gate_lowers_the_loss():
    group = gc.prepare(net(), batches()[0][0], bits=None).session.groups[0]
    averages = Averages([group], torch.device("cpu"), 0.5)
    averages.add({group: torch.tensor([3.0, -3.0, 2.0, -2.0, 1.0, -1.0, 0.5, -0.5])})
    chosen = {group: torch.tensor([0, 1, 2, 3])}
    assert averages.scores("squares", chosen)[group].tolist() == [9.0, 9.0, 4.0, 4.0, 0.0, 1.0, 0.0, 0.25]
    assert averages.scores("mean", chosen)[group].tolist() == [3.0, 3.0, 2.0, 2.0, 0.0, 1.0, 0.0, 0.5]
    assert averages.scores("signed", chosen)[group].tolist() == [-3.0, 3.0, -2.0, 2.0, -1.0, 1.0, -0.5, 0.5]


# ------------------------------------------------------------------------------------------------ rounds
def test_every_round_takes_the_same_share_of_the_survivors():
    assert rounds_at(20, 6, 30) == (2, 8, 14, 20) and rounds_at(12, None, 4) == (3, 6, 9, 12)
    assert rounds_at(5, None, 30) == (1, 2, 3, 4, 5) and rounds_at(3, 10, 30) == (3,)
    left = [1000]
    for k in range(1, 11):
        left.append(left_after(k, 10, 1000, left[-1], 400, None))
    shares = [1 - after / before for before, after in itertools.pairwise(left)]
    assert left[-1] == 400 and max(shares) - min(shares) < 3e-3
    assert [left_after(k, 3, 100, n, 60, 0.1) for k, n in ((1, 100), (2, 90), (3, 81))] == [90, 81, 60]


def scores_of(groups: tuple[ChannelGroup, ...], *lowest: tuple[int, int]) -> dict[ChannelGroup, Tensor]:
    """Scores of 1, and of 0 for the units (group, unit) that are to go."""
    found = {group: torch.ones(group.size) for group in groups}
    for position, unit in lowest:
        found[groups[position]][unit] = 0.0
    return found


@pytest.mark.parametrize(("tune", "returns"), [("dense", True), ("masked", False)])
def test_7_5_dense_lets_a_unit_return_and_masked_never_does(tune, returns):
    plan, groups = plan_of(Taylor2(tune=tune, every=6), sparsity=0.25)
    assert plan.at == (6, 12)
    first = plan.choose(1, scores_of(groups, (0, 3), (1, 5)), plan.base)
    assert [own.tolist() for own in first.values()] == [[0, 1, 2, 4, 5, 6, 7], [0, 1, 2, 3, 4, 6, 7]]
    last = plan.choose(2, scores_of(groups, (0, 1), (0, 2), (0, 4), (1, 6)), first)
    assert (3 in last[groups[0]].tolist()) is returns and (5 in last[groups[1]].tolist()) is returns
    assert sum(map(len, last.values())) == 12


@pytest.mark.parametrize("tune", ["dense", "masked"])
@pytest.mark.parametrize("cost", [None, "budget"])
def test_7_5_a_budget_is_met_within_one_unit(tune, cost):
    plan, groups = plan_of(Taylor2(tune=tune, cost=cost, rounds=4), budget=gc.Budget(macs=0.5))
    draws, chosen, target = torch.Generator().manual_seed(0), plan.base, plan.units.target
    assert target is not None
    for k in range(1, 5):
        scores = {group: torch.rand(group.size, generator=draws) for group in groups}
        before, chosen = chosen, plan.choose(k, scores, chosen)
        assert sum(map(len, chosen.values())) <= sum(map(len, before.values()))
    assert target.excess(chosen, ()) <= 0
    whole = {group: torch.arange(min(len(own) + 1, group.size)) for group, own in chosen.items()}
    assert target.excess(whole, ()) > 0


def test_a_score_per_cost_takes_units_that_cost_more_first():
    plan, groups = plan_of(Taylor2(cost="macs"), sparsity=0.25)
    scores = {group: torch.ones(group.size) for group in groups}
    ranked = plan.per_cost(scores, plan.base)
    # a unit of `first` saves 8 * 9 products behind it and 9 of its own; one of `second` 8 * 9, and 3 of the head
    per_pixel = {groups[0]: 8 * 9 + 9, groups[1]: 8 * 9 + 3 / 36}
    costs = [float(1 / ranked[group][0]) / per_pixel[group] for group in groups]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)
    chosen = plan.choose(len(plan.at), scores, plan.base)
    assert len(chosen[groups[0]]) == 4 and len(chosen[groups[1]]) == 8
    below = {group: torch.linspace(-1, 1, group.size) for group in groups}
    assert all(bool((own.diff() > 0).all()) for own in plan.per_cost(below, plan.base).values())


# ------------------------------------------------------------------------------------------------ bits
def test_bits_go_down_and_the_last_have_half_of_the_steps():
    assert levels_of((8, 4), 2) == (8, 4, 2) and levels_of((4, 8, 8), 3) == (8, 4, 3) and levels_of((8, 4), 8) == (8,)
    assert changes_at(10, 30, 3) == (10, 15, 20) and changes_at(0, 10, 1) == (0,) and changes_at(7, 10, 3) == (7, 8, 9)


def test_steps_are_set_anew_at_each_change_of_bits():
    ready = prepared()
    images = batches()[0][0]
    progressive = Progressive(ready, (8, 4, 2))
    before = {name: buffer.clone() for name, buffer in ready.named_buffers()}
    seen, errors = [], []
    for stage in range(3):
        progressive.fit(stage, lambda: ready(images))
        own = dict(ready.quantizers())
        seen.append({site.layer: round(float(q.bits)) for site, q in own.items() if site.is_weight})
        site, quantizer = next((s, q) for s, q in own.items() if s.parameter == "second.weight")
        weight = ready.get_parameter(site.parameter)
        errors.append(float((quantizer(weight) - weight).detach().square().mean()))
        fitted = quantizer.scale.detach().clone()
        for factor in (0.8, 1.25):  # of least error
            quantizer.scale.data.copy_(factor * fitted)
            assert float((quantizer(weight) - weight).detach().square().mean()) > errors[-1]
        quantizer.scale.data.copy_(fitted)
    assert seen == [
        {"first": 8, "second": 8, "head": 8},
        {"first": 8, "second": 4, "head": 8},
        {"first": 8, "second": 2, "head": 8},
    ]
    assert errors[0] < 0.05 * errors[1] < 0.05 * errors[2]
    assert all(torch.equal(buffer, before[name]) for name, buffer in ready.named_buffers() if "running" in name)
    assert all(quantizer.spec == site.spec for site, quantizer in ready.quantizers())


def prepared() -> Prepared:
    """`net()` with the quantizers of the method at 2 bits."""
    seen: dict[str, Any] = {}

    class Watched(Taylor2):
        def begin(self, *args: Any) -> Taylor2Run:
            seen["ready"] = args[0]
            raise StopHere

    class StopHere(Exception):
        pass

    with pytest.raises(StopHere):
        gc.compress(
            net(), batches()[0][0], method=Watched(), bits=2, data=batches(), loss=lambda y, b: y.sum(), steps=12,
            progress=False, sparsity=0.0,
        )  # fmt: skip
    return seen["ready"]
