"""Ridge regression from sums: exact where rows are exact, nothing at an infinite ridge, never a larger error."""

from __future__ import annotations

import math

import pytest
import torch

from graphcomp.numerics.regression import RIDGES, Moments, Rows, choose_ridge, joined, solve


def problem(rows: int = 200, noise: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two problems of 5 features and 3 targets: rows, targets, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, 5, generator=generator, dtype=torch.float64)
    truth = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    t = x @ truth + noise * torch.randn(2, rows, 3, generator=generator, dtype=torch.float64)
    return x, t, truth


def test_the_truth_is_found_where_there_is_no_noise() -> None:
    x, t, truth = problem()
    found = solve(Moments.of(x, t), 1e-12)
    assert found is not None
    assert torch.allclose(found, truth, atol=1e-9)


def test_error_is_that_of_the_rows() -> None:
    x, t, truth = problem(noise=0.3)
    moments = Moments.of(x, t)
    for change in (torch.zeros_like(truth), truth, truth * 0.5):
        assert math.isclose(moments.error(change), float((t - x @ change).square().sum()), rel_tol=1e-9)


def test_sums_of_parts_are_those_of_all_rows() -> None:
    x, t, _ = problem(noise=0.1)
    whole, parts = Moments.of(x, t), Moments.of(x[:, :50], t[:, :50]) + Moments.of(x[:, 50:], t[:, 50:])
    assert torch.allclose(whole.xx, parts.xx)
    assert torch.allclose(whole.xt, parts.xt)
    assert math.isclose(whole.tt, parts.tt)
    assert whole.rows == parts.rows


@pytest.mark.parametrize("ridge", [*RIDGES, 1e6])
def test_no_ridge_makes_the_error_larger(ridge: float) -> None:
    x, t, _ = problem(rows=7, noise=5.0)
    moments = Moments.of(x, t)
    found = solve(moments, ridge)
    assert found is not None
    assert moments.error(found) <= moments.tt


def test_an_infinite_ridge_changes_nothing() -> None:
    x, t, _ = problem()
    found = solve(Moments.of(x, t), math.inf)
    assert found is not None
    assert not bool(found.any())


def test_the_intercept_has_no_ridge() -> None:
    x, _, _ = problem()
    ones = torch.ones(2, 200, 1, dtype=torch.float64)
    found = solve(Moments.of(torch.cat([x - x.mean(1, keepdim=True), ones], 2), 7 * ones), 1e9, intercept=True)
    assert found is not None
    assert torch.allclose(found[:, -1], torch.full((2, 1), 7.0, dtype=torch.float64))


def test_features_that_are_always_0_are_left_alone() -> None:
    x, t, _ = problem()
    x[:, :, 0] = 0
    found = solve(Moments.of(x, t), 1e-3)
    assert found is not None
    assert not bool(found[:, 0].any())


def test_noise_that_does_not_repeat_is_not_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 40, 30, generator=generator).double(), torch.randn(1, 40, 3, generator=generator).double()
    assert choose_ridge(Moments.of(x[:, :32], t[:, :32]), Moments.of(x[:, 32:], t[:, 32:])) >= RIDGES[-1]


def test_rows_that_are_not_finite_are_seen() -> None:
    x, t, _ = problem()
    assert Moments.of(x, t).finite
    x[0, 0, 0] = torch.nan
    assert not Moments.of(x, t).finite


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0, math.inf])
def test_rows_give_what_their_sums_give(ridge: float, intercept: bool) -> None:
    x, t, _ = problem(rows=4, noise=1.0)
    x = torch.cat([x, torch.ones_like(x[..., :1])], 2) if intercept else x
    sums, rows = Moments.of(x, t), joined(Rows(x[:, :3], t[:, :3]), Rows(x[:, 3:], t[:, 3:]))
    a, b = solve(sums, ridge, intercept), solve(rows, ridge, intercept)
    assert a is not None
    assert b is not None
    assert torch.allclose(a, b, atol=1e-6)
    assert math.isclose(sums.error(a), rows.error(b), rel_tol=1e-6, abs_tol=1e-9)
    assert rows.rows == sums.rows
    assert math.isclose(rows.tt, sums.tt)
    assert rows.finite


def test_more_features_than_rows_generalise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 60, 200, generator=generator, dtype=torch.float64) * torch.linspace(3, 0.01, 200)
    t = x[..., :2] @ torch.randn(1, 2, 3, generator=generator, dtype=torch.float64)
    fit, held = Rows(x[:, :40], t[:, :40]), Rows(x[:, 40:], t[:, 40:])
    ridge = choose_ridge(fit, held)
    found = solve(fit, ridge)
    assert found is not None
    assert held.error(found) < 0.5 * held.tt
