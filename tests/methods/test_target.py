"""Budgets that training ends within."""

import pytest
import torch

import graphcomp as gc
from tests.marks import slow

from .runs import MODELS, SCHEDULE, ready_of, train


def trained(name="residual", bits=(4, 8), **options):
    ready = ready_of(name, bits=bits)
    optimizer = gc.QASSO(ready, torch.optim.AdamW, lr=0.01, schedule=SCHEDULE, **options)
    train(optimizer, ready, name, SCHEDULE.steps)
    return optimizer, gc.finalize(ready).report


@pytest.mark.parametrize(("cost", "share"), [("params", 0.5), ("macs", 0.4), ("bops", 0.006), ("bytes", 0.15)])
def test_the_budget_holds_for_the_result(cost, share):
    optimizer, report = trained(budget=gc.Budget(**{cost: share}))
    assert getattr(report, cost).ratio <= share
    assert optimizer.removed > 0
    bits = optimizer.bank.bits()
    assert bool((bits > 4 - 1e-4).all()) and bool((bits < 8 + 1e-4).all())


@pytest.mark.parametrize("name", ["encoder", *slow(*(name for name in MODELS if name not in ("encoder", "residual")))])
@pytest.mark.parametrize("bits", [(4, 8), *slow((2, 4), (9, 16))])
def test_bytes_are_those_of_the_report(name, bits):
    """Packed codes, steps, zero points, biases that batch norms leave, embeddings: to the byte, before training."""
    ready = ready_of(name, bits=bits)
    options = {"lr": 0.01, "schedule": SCHEDULE, "sparsity": 0.4}
    optimizer = gc.QASSO(ready, torch.optim.AdamW, budget=gc.Budget(bytes=1.0), **options)
    target = optimizer.target
    train(optimizer, ready, name, SCHEDULE.steps)
    counts = {target.in_floats[group].factor: len(units) for group, units in optimizer.kept.items()}
    bits_in_the_end = [round(b) for b in optimizer.bank.bits().tolist()]
    assert target.stored_at(bits_in_the_end)(counts) == gc.finalize(ready).report.bytes.after


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


def test_a_budget_out_of_reach_is_refused_before_training():
    ready = ready_of("residual", bits=(4, 8))
    for options in ({}, {"sparsity": 0.1}):
        with pytest.raises(gc.BudgetError) as caught:
            gc.QASSO(ready, torch.optim.SGD, lr=0.1, schedule=SCHEDULE, budget=gc.Budget(bops=1e-6), **options)
        assert caught.value.fix
