"""Budgets that training ends within."""

import dataclasses

import pytest
import torch

import graphcomp as gc

from .runs import SCHEDULE, ready_of, train


def trained(name="residual", bits=(4, 8), schedule=SCHEDULE, **options):
    ready = ready_of(name, bits=bits)
    optimizer = gc.QASSO(ready, torch.optim.AdamW, lr=0.01, schedule=schedule, **options)
    train(optimizer, ready, name, schedule.steps)
    return optimizer, gc.finalize(ready).report


@pytest.mark.parametrize(("cost", "share"), [("params", 0.5), ("macs", 0.4), ("bops", 0.006)])
def test_the_budget_holds_for_the_result(cost, share):
    optimizer, report = trained(budget=gc.Budget(**{cost: share}))
    assert getattr(report, cost).ratio <= share
    assert optimizer.removed > 0
    bits = optimizer.bank.bits()
    assert bool((bits > 4 - 1e-4).all()) and bool((bits < 8 + 1e-4).all())


def test_bits_are_lowered_where_no_unit_may_go():
    free, _ = trained(sparsity=0.0, bits=(2, 16))
    optimizer, report = trained(sparsity=0.0, bits=(2, 16), budget=gc.Budget(bops=0.02))
    assert optimizer.removed == 0
    assert report.bops.ratio <= 0.02
    assert bool((optimizer.bank.bits() < free.bank.bits() - 0.5).any())


def test_with_a_sparsity_as_many_units_go_and_rather_those_that_cost():
    fixed, free = trained(sparsity=0.4)
    share = free.macs.ratio * 0.8
    optimizer, report = trained(sparsity=0.4, budget=gc.Budget(macs=share))
    assert optimizer.removed == fixed.removed
    assert 0.75 * share < report.macs.ratio <= share  # no more than was needed, but for the size of a unit


def test_a_budget_beside_a_sparsity_is_used_up_where_groups_are_normalized():
    options = {
        "sparsity": 0.4,
        "normalize": "mean",
        "saliency": "l1",
        "schedule": dataclasses.replace(SCHEDULE, pruning_periods=3),
    }
    _, free = trained(**options)
    share = free.macs.ratio * 0.8
    optimizer, report = trained(budget=gc.Budget(macs=share), **options)
    assert optimizer.removed == round(0.4 * optimizer.total)
    assert 0.85 * share < report.macs.ratio <= share


@pytest.mark.parametrize("periods", [2, 3])
def test_multiples_are_kept_in_every_period(periods):
    ready = ready_of("residual", bits=(4, 8))
    schedule = dataclasses.replace(SCHEDULE, pruning_periods=periods)
    options = {"sparsity": 0.5, "round_to": 4, "budget": gc.Budget(macs=0.5), "normalize": "mean"}
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=0.01, schedule=schedule, **options)
    for step in range(SCHEDULE.steps):
        train(optimizer, ready, "residual", range(step, step + 1))
        assert all(len(units) % 4 == 0 for units in optimizer.kept.values())
    assert optimizer.removed == 20


def test_bits_stay_where_they_cost_little():
    ready = ready_of("residual", bits=(2, 16))
    budget = gc.Budget(bops=0.02)
    target = gc.QASSO(ready, torch.optim.SGD, lr=0.1, sparsity=0.0, budget=budget, schedule=SCHEDULE).target
    kept, start = ready.kept(), [16] * len(target.low)
    assert target.excess(kept, start) > 0
    found, saves = target.lowered(kept, start), target.saves(kept)
    assert target.excess(kept, found) <= 0
    lowered = [k for k, bits in enumerate(found) if bits < 16]
    above = [k for k, bits in enumerate(found) if bits > 2]
    assert lowered and len(set(found)) > 1
    for k in lowered:  # the last bit that went was worth more than any that stayed
        assert all(saves[k] * 4 ** (found[k] + 1) >= saves[j] * 4 ** found[j] for j in above)


def test_a_budget_out_of_reach_is_refused_before_training():
    ready = ready_of("residual", bits=(4, 8))
    for options in ({}, {"sparsity": 0.1}):
        with pytest.raises(gc.BudgetError) as caught:
            gc.QASSO(ready, torch.optim.SGD, lr=0.1, schedule=SCHEDULE, budget=gc.Budget(bops=1e-6), **options)
        assert caught.value.fix
