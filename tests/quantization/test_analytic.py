"""OPQ's steps and bits: the numbers of the equations, measured errors, and the search for whole bits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphcomp as gc
from graphcomp.quantization.analytic import closed_steps, rounding_error, step_errors, survivor_error, whole_bits
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.spec import QuantSpec

CHOICES = (2, 3, 4, 6, 8)


@pytest.mark.parametrize(("step", "error"), [(0.1, 0.00083284), (0.5, 0.0205274), (1.0, 0.0786266), (2.0, 0.2680903)])
def test_the_error_of_rounding_is_that_of_many_draws(step, error):
    draws = np.random.default_rng(0).laplace(0, 0.7, 1_000_000)
    assert rounding_error(step, 0.7) == pytest.approx(error, rel=1e-5)
    assert rounding_error(step, 0.7) == pytest.approx(((draws - step * np.rint(draws / step)) ** 2).mean(), rel=0.01)


@pytest.mark.parametrize(("step", "error"), [(0.2, 0.0033424), (0.6, 0.0307221), (1.2, 0.1309888)])
def test_the_error_beyond_a_threshold_is_that_of_many_draws(step, error):
    beyond = np.random.default_rng(0).exponential(0.7, 1_000_000)
    told = step * (np.floor(beyond / step) + 0.5)
    assert survivor_error(step, 0.7) == pytest.approx(error, rel=1e-5)
    assert survivor_error(step, 0.7) == pytest.approx(((beyond - told) ** 2).mean(), rel=0.01)


def test_small_steps_have_the_error_of_high_rates():
    assert rounding_error(1e-2, 0.7) == pytest.approx(1e-4 / 12, rel=1e-3)
    assert survivor_error(1e-2, 0.7) == pytest.approx(1e-4 / 12, rel=1e-2)


@pytest.mark.parametrize(("omegas", "expected"), [((200, 800), (0.287175, 0.287175)), ((1, 1), (0.164938, 0.329877))])
def test_steps_in_closed_form(omegas, expected):
    counts, ranges, budget = (200, 800), (2, 1), 3000
    steps = closed_steps(counts, ranges, budget, omegas)
    assert steps == pytest.approx(expected, abs=1e-6)
    rate = sum(n * (h - math.log2(d)) for n, h, d in zip(counts, ranges, steps, strict=True))
    assert rate == pytest.approx(budget, rel=1e-9)


# ------------------------------------------------------------------------------------------------ measured
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_step_has_the_error_that_is_said_and_no_other_step_a_much_smaller_one(bits):
    torch.manual_seed(0)
    weight = torch.randn(40, 50) * (torch.rand(40, 50) > 0.6)
    ((step, error),) = step_errors(weight, (bits,))
    quantizer = SymmetricQuantizer(QuantSpec(bits))

    def squared(own: float) -> float:
        with torch.no_grad():
            quantizer.scale.fill_(own)
            return float((quantizer(weight) - weight).square().sum())

    assert error == pytest.approx(squared(step), rel=0.02)
    assert error <= 1.02 * min(squared(float(own)) for own in step * torch.linspace(0.5, 2, 61))
    assert bits != 2 or step < 0.7 * float(weight.abs().max())  # few bits clip


def test_a_layer_of_zeros_has_no_error():
    assert step_errors(torch.zeros(5, 4), (2, 8)) == [(1.0, 0.0), (1.0, 0.0)]


# ------------------------------------------------------------------------------------------------ whole bits
def _errors(counts: tuple[int, ...], variances: tuple[float, ...]) -> list[list[float]]:
    return [[n * v * 4.0**-b for b in CHOICES] for n, v in zip(counts, variances, strict=True)]


def test_bits_of_three_layers():
    counts = (100, 400, 50)
    errors = _errors(counts, (1, 0.3, 4))
    found = whole_bits(counts, errors, CHOICES, 1900)
    assert found == (4, 3, 6)
    assert sum(own[CHOICES.index(b)] for own, b in zip(errors, found, strict=True)) == 2.314453125


@given(
    st.lists(st.tuples(st.integers(0, 400), st.floats(0.05, 20)), min_size=1, max_size=4),
    st.floats(2, 9),
)
@settings(max_examples=60, deadline=None)
def test_bits_are_within_the_budget_and_no_single_upgrade_fits(layers, mean):
    counts, variances = zip(*layers, strict=True)
    errors, budget = _errors(counts, variances), mean * sum(counts)
    found = whole_bits(counts, errors, CHOICES, budget)
    spent = sum(n * b for n, b in zip(counts, found, strict=True))
    assert spent <= budget
    for n, b in zip(counts, found, strict=True):
        above = [c for c in CHOICES if c > b]
        assert not n or not above or spent + n * (above[0] - b) > budget


def test_few_layers_are_near_the_best_of_all_choices():
    draws, ratios = np.random.default_rng(1), []
    for _ in range(60):
        counts = tuple(int(n) for n in draws.integers(50, 500, 4))
        errors = _errors(counts, tuple(10 ** draws.uniform(-1, 1, 4)))
        budget = sum(counts) * draws.uniform(2, 7)
        found = whole_bits(counts, errors, CHOICES, budget)
        own = sum(error[CHOICES.index(b)] for error, b in zip(errors, found, strict=True))
        fits = (
            chosen
            for chosen in itertools.product(range(5), repeat=4)
            if sum(n * CHOICES[k] for n, k in zip(counts, chosen, strict=True)) <= budget
        )
        ratios.append(own / min(sum(error[k] for error, k in zip(errors, chosen, strict=True)) for chosen in fits))
    assert np.median(ratios) < 1 + 1e-9 and np.mean(ratios) < 1.1


def test_a_budget_below_the_fewest_bits_is_refused():
    with pytest.raises(gc.BudgetError, match="2 bits for each of 150 weights are more than 200 bits"):
        whole_bits((100, 50), _errors((100, 50), (1, 1)), CHOICES, 200)
