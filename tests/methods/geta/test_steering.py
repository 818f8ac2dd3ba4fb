"""Budgets that training ends within."""

import dataclasses

import pytest
import torch

import graphcomp as gc
from tests.marks import in_ci, slow
from tests.training.runs import MODELS, SCHEDULE, ready_of, train


def trained(name="residual", bits=(4, 8), schedule=SCHEDULE, **options):
    ready = ready_of(name, bits=bits)
    optimizer = gc.QASSO(ready, torch.optim.AdamW, lr=0.01, schedule=schedule, **options)
    train(optimizer, ready, name, schedule.steps)
    return optimizer, gc.finalize(ready).report


@pytest.mark.parametrize(("cost", "share"), [("params", 0.5), ("macs", 0.4), ("bops", 0.006), ("bytes", 0.15)])
@pytest.mark.slow
@pytest.mark.ci
def test_the_budget_holds_for_the_result(cost, share):
    optimizer, report = trained(budget=gc.Budget(**{cost: share}))
    assert getattr(report, cost).ratio <= share
    assert optimizer.removed > 0
    bits = optimizer.bank.bits()
    assert bool((bits > 4 - 1e-4).all()) and bool((bits < 8 + 1e-4).all())


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        *in_ci("encoder", "experts"),
        *slow(*(n for n in MODELS if n not in ("encoder", "experts", "residual", "mlp"))),
    ],
)
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


@pytest.mark.slow
@pytest.mark.ci
def test_bits_are_lowered_where_no_unit_may_go():
    free, _ = trained(sparsity=0.0, bits=(2, 16))
    optimizer, report = trained(sparsity=0.0, bits=(2, 16), budget=gc.Budget(bops=0.02))
    assert optimizer.removed == 0
    assert report.bops.ratio <= 0.02
    assert bool((optimizer.bank.bits() < free.bank.bits() - 0.5).any())


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_the_bits_that_a_budget_leaves_are_come_to_in_the_projection(sparsity):
    """Not at once when the cool-down begins, which training does not come back from as well."""
    ready = ready_of("residual", bits=(2, 16))
    budget = gc.Budget(bops=0.005)
    optimizer = gc.QASSO(ready, torch.optim.AdamW, lr=0.01, schedule=SCHEDULE, sparsity=sparsity, budget=budget)
    train(optimizer, ready, "residual", 3)
    assert torch.equal(optimizer.most_bits(), optimizer.bank.high)
    train(optimizer, ready, "residual", range(3, 9))
    after_projection = optimizer.most_bits()
    # two thirds of the range would leave 7 everywhere; where bits cost little they stay
    assert bool((after_projection <= 7).all()) and int((after_projection < 7).sum()) > len(after_projection) // 2
    train(optimizer, ready, "residual", range(9, SCHEDULE.steps))
    apart = (optimizer.bank.bits() - after_projection).abs()
    assert float(apart.max()) < 1 + 1e-3  # other units than foreseen may have gone
    assert gc.finalize(ready).report.bops.ratio <= 0.005


@pytest.mark.slow
@pytest.mark.ci
def test_a_budget_of_bits_is_used_up():
    """Bits that the descent rule took in the joint stage are given back, as far as the budget reaches."""
    free, without = trained(sparsity=0.4, bits=(2, 8))
    share = without.bops.ratio * 1.5
    optimizer, report = trained(sparsity=0.4, bits=(2, 8), budget=gc.Budget(bops=share))
    assert 0.9 * share < report.bops.ratio <= share
    assert float(optimizer.bank.bits().mean()) > float(free.bank.bits().mean())
    assert bool((optimizer.bank.bits() < 4 + 1e-4).all())  # what the projection leaves


def test_a_budget_without_bits_gives_none_back():
    ready = ready_of("residual", bits=(2, 8))
    budget = gc.Budget(macs=0.9)
    optimizer = gc.QASSO(ready, torch.optim.AdamW, lr=0.01, schedule=SCHEDULE, sparsity=0.4, budget=budget)
    train(optimizer, ready, "residual", SCHEDULE.ends[2])
    joint = optimizer.bank.bits().round()
    train(optimizer, ready, "residual", range(SCHEDULE.ends[2], SCHEDULE.steps))
    assert torch.equal(optimizer.bank.bits().round(), joint) and bool((joint < optimizer.most_bits()).any())


@pytest.mark.slow
@pytest.mark.ci
def test_with_a_sparsity_as_many_units_go_and_rather_those_that_cost():
    fixed, free = trained(sparsity=0.4)
    share = free.macs.ratio * 0.8
    optimizer, report = trained(sparsity=0.4, budget=gc.Budget(macs=share))
    assert optimizer.removed == fixed.removed
    assert 0.75 * share < report.macs.ratio <= share  # no more than was needed, but for the size of a unit


@pytest.mark.slow
@pytest.mark.ci
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
