"""OPQ's shares in closed form: the numbers of the equations, the exact budget, and units."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphcomp as gc
from graphcomp.pruning.allocation import allocate
from graphcomp.pruning.analytic import (
    OMEGAS,
    ByErrors,
    analytic_masks,
    errors_of,
    omegas,
    pruned_counts,
    pruned_energy,
    thresholds,
    unit_errors,
)
from graphcomp.pruning.saliency import score

SIZES, SCALES = (1000, 4000), (1.0, 0.5)


# ------------------------------------------------------------------------------------------------ closed forms
@pytest.mark.parametrize(("threshold", "energy"), [(0.3, 0.0093558), (1.0, 0.1699795), (2.0, 0.5331742)])
def test_the_pruned_energy_is_that_of_many_draws(threshold, energy):
    draws = np.random.default_rng(0).laplace(0, 0.7, 2_000_000)
    assert pruned_energy(threshold, 0.7) == pytest.approx(energy, abs=1e-7)
    found = np.where(np.abs(draws) < threshold, draws**2, 0).mean()
    assert pruned_energy(threshold, 0.7) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(
    ("omega", "expected", "ratios"),
    [
        ("total", (0.940614, 0.940614), (0.609612, 0.847597)),
        ("mean", (0.558703, 1.117405), (0.428049, 0.892988)),
        ("size_energy", (1.609438, 0.804719), (0.8, 0.8)),
    ],
)
def test_thresholds_of_two_layers(omega, expected, ratios):
    price, found = thresholds(SIZES, SCALES, 0.8, omega)
    assert found == pytest.approx(expected, abs=1e-6)
    shares = [-math.expm1(-b / t) for b, t in zip(found, SCALES, strict=True)]
    assert shares == pytest.approx(ratios, abs=1e-6)
    assert sum(n * share for n, share in zip(SIZES, shares, strict=True)) == pytest.approx(4000, abs=1e-6)
    if omega == "mean":
        assert price == pytest.approx(3.1214874e-4, rel=1e-6)


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-3, 10)), min_size=1, max_size=9),
    st.floats(0.01, 0.99),
    st.sampled_from(list(OMEGAS)),
)
@settings(max_examples=60, deadline=None)
def test_the_gain_of_the_next_weight_is_the_same_in_each_layer(layers, sparsity, omega):
    sizes, scales = zip(*layers, strict=True)
    price, found = thresholds(sizes, scales, sparsity, omega)
    for size, own, b in zip(sizes, omegas(sizes, scales, omega), found, strict=True):
        assert own * b * b / size == pytest.approx(price, rel=1e-9)


# ------------------------------------------------------------------------------------------------ exact budgets
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.floats(0, 1),
    st.sampled_from(list(OMEGAS)),
    st.sampled_from(["laplace", "empirical"]),
    st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_the_share_is_met_to_the_weight(sizes, sparsity, omega, density, seed):
    draws = torch.Generator().manual_seed(seed)
    weights = {str(k): (k + 1) * torch.randn(size, generator=draws) for k, size in enumerate(sizes)}
    masks = analytic_masks(weights, sparsity, omega, density)
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * sum(sizes))
    for name, weight in weights.items():
        gone, stays = weight[~masks[name]].abs(), weight[masks[name]].abs()
        assert not len(gone) or not len(stays) or float(gone.max()) <= float(stays.min())


@pytest.mark.parametrize("density", ["laplace", "empirical"])
def test_masks_are_nested_and_a_layer_of_zeros_goes_first(density):
    draws = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(400, generator=draws), "b": torch.randn(90, generator=draws), "c": torch.zeros(10)}
    before = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for sparsity in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0):
        masks = analytic_masks(weights, sparsity, density=density)
        assert not any(bool((masks[name] & ~before[name]).any()) for name in weights)
        before = masks
        if sparsity >= 0.1:
            assert not bool(masks["c"].any())


def test_the_closed_form_is_near_the_best_counts():
    draws = np.random.default_rng(0)
    weights = {"a": torch.from_numpy(draws.laplace(0, 1, 1000)), "b": torch.from_numpy(draws.laplace(0, 0.5, 4000))}
    counts = {
        density: [int((~mask).sum()) for mask in analytic_masks(weights, 0.8, "mean", density).values()]
        for density in ("laplace", "empirical")
    }
    assert counts == {"laplace": [436, 3564], "empirical": [438, 3562]}
    errors = errors_of(weights)
    lost = {
        name: sum(float(own.sort().values[:k].sum()) for own, k in zip(errors, counts[name], strict=True))
        for name in counts
    }
    assert lost["empirical"] <= lost["laplace"] < 1.001 * lost["empirical"]


def test_omegas_of_known_allocations():
    """Of all weights: global magnitude; relative to the size: the same share of each layer."""
    torch.manual_seed(0)
    weights = {"a": torch.randn(300), "b": 0.1 * torch.randn(700)}
    flat = torch.cat([weight.abs() for weight in weights.values()])
    masks = analytic_masks(weights, 0.5, "total", "empirical")
    assert torch.equal(torch.cat(list(masks.values())), flat > flat.sort().values[499])
    assert pruned_counts((300, 700), (1.0, 0.1), 0.6, "size_energy") == (180, 420)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.5,), "sparsity"), ((0.5, "l2"), "omega must be"), ((0.5, "mean", "normal"), "density must be")],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(gc.PlanError, match=message):
        analytic_masks({"a": torch.randn(9)}, *arguments)


# ------------------------------------------------------------------------------------------------ units
def _plan() -> gc.Analysis:
    torch.manual_seed(0)
    return gc.analyze(
        nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4)
    )


def test_errors_of_units_are_energies_by_the_size_of_the_group():
    plan = _plan()
    errors = unit_errors(plan, plan.groups)
    norms = score("l2", plan, plan.groups)
    for group in plan.groups:
        torch.testing.assert_close(errors[group], norms[group].double().square() / group.size)


def test_another_saliency_chooses_units_and_errors_how_many():
    plan = _plan()
    errors = unit_errors(plan, plan.groups)
    scores = score(ByErrors("random"), plan, plan.groups, seed=3)
    order = score("random", plan, plan.groups, seed=3)
    for group in plan.groups:
        torch.testing.assert_close(scores[group].sort().values, errors[group].float().sort().values)
        assert torch.equal(scores[group].argsort(), order[group].argsort())
    kept, same = (allocate(plan.groups, own, sparsity=0.5, normalize="none") for own in (scores, errors))
    assert [len(kept[group]) for group in plan.groups] == [len(same[group]) for group in plan.groups]
    assert len({len(own) / group.size for group, own in kept.items()}) > 1
