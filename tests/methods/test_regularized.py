"""Regularised training: gradients of the penalties, the cut, runs by name, resumption, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.methods.base import Goal
from graphcomp.methods.regularized import KINDS, STEEPNESS, Regularized, RegularizedRun
from tests.methods.learning import Stop, batches, compress, net

UNITS = {"first": 8, "second": 8}
"""Units of the layers of `net()`."""


def run_of(kind: Any, **options: Any) -> RegularizedRun:
    ready = gc.prepare(net(), batches()[0][0], bits=None)
    return RegularizedRun(ready, Regularized(kind, **options), Goal(sparsity=0.25), 10, None)


def slices(model: nn.Module, layer: str, unit: int) -> list[Tensor]:
    """All parameters of one unit of `net()`: what makes the unit, norms, and what reads the unit."""
    find = dict(model.named_parameters())
    norm, reader = {"first": ("one", "second"), "second": ("two", "head")}[layer]
    made = [find[f"{layer}.weight"][unit], find[f"{layer}.bias"][unit]]
    return [*made, find[f"{norm}.weight"][unit], find[f"{norm}.bias"][unit], find[f"{reader}.weight"][:, unit]]


def penalty(model: nn.Module, kind: str, leaving: dict[str, list[int]], share: float) -> Tensor:
    """R of the file, written unit by unit."""
    total = torch.zeros(())
    for layer, size in UNITS.items():
        units = [torch.cat([t.flatten() for t in slices(model, layer, u)]) for u in range(size)]
        norms = torch.stack([unit.norm() for unit in units])
        if kind == "lasso":
            total = total + sum(len(unit) ** 0.5 * unit.norm() for unit in units)
        elif kind == "weighted":
            own = norms.detach()
            factors = 2 ** (STEEPNESS * (own.max() - own) / (own.max() - own.min()))
            total = total + (factors * norms.square()).sum()
        elif kind == "growing":
            total = total + share * sum(0.5 * units[u].square().sum() for u in leaving[layer])
        else:
            norm = {"first": "one", "second": "two"}[layer]
            total = total + dict(model.named_parameters())[f"{norm}.weight"].abs().sum()
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_to_gradients_is_the_gradient_of_the_penalty(kind):
    run = run_of(kind, strength=0.3)
    by_layer = {next(m.name for m in g.members if not m.consumes).split(".")[0]: g for g in run.groups}
    leaving = {layer: run.leaving[group].tolist() for layer, group in by_layer.items()}
    assert sum(map(len, leaving.values())) == 4
    reference = copy.deepcopy(net())
    (0.3 * penalty(reference, kind, leaving, share=4 / 10)).backward()
    added = {id(p): torch.zeros_like(p) for p in run.ready.parameters()}
    for parameter, gradient in run.gradients(3):
        added[id(parameter)] += gradient
    for name, parameter in reference.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(added[id(run.ready.get_parameter(name))], wanted, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_by_name_meets_the_sparsity_and_draws_to_zero_what_goes(kind):
    strong = {"lasso": 0.1, "weighted": 0.02, "growing": 20.0, "scales": 0.5}[kind]
    small = compress(Regularized(kind, strength=strong), sparsity=0.5, training={"steps": 40})
    assert small.report.units_removed == 8
    assert small.form == "native"
    drawn, free = (norm_of_the_smallest(kind, strength) for strength in (strong, 0.0))
    assert drawn < 0.8 * free


def norm_of_the_smallest(kind: Any, strength: float) -> float:
    """The norm of the half of the units that are smallest just before the cut."""
    ready = gc.prepare(net(), batches()[0][0], bits=None)
    run = RegularizedRun(ready, Regularized(kind, strength=strength), Goal(sparsity=0.5), 20, None)
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.05)
    for step in range(19):
        images, labels = batches()[step % 4]
        optimizer.zero_grad()
        nn.functional.cross_entropy(ready(images), labels).backward()
        with torch.no_grad():
            run.before_step(step)
            optimizer.step()
            run.after_step(step)
    if kind == "scales":
        norms = torch.cat([ready.get_parameter(f"{norm}.weight").abs() for norm in ("one", "two")])
    else:
        units = [torch.cat([t.flatten() for t in slices(ready, layer, u)]) for layer in UNITS for u in range(8)]
        norms = torch.stack([unit.norm() for unit in units])
    return float(norms.detach().sort().values[:8].sum())


@pytest.mark.parametrize("kind", ["lasso", "growing"])
@pytest.mark.slow
@pytest.mark.ci
def test_a_run_that_was_cut_short_goes_on_bit_for_bit(kind, tmp_path):
    whole = compress(Regularized(kind), sparsity=0.5)
    for calls in (5, 18):  # before the cut, and after it
        folder = tmp_path / str(calls)
        with pytest.raises(Stop):
            compress(Regularized(kind), sparsity=0.5, folder=folder, calls=calls)
        resumed = compress(Regularized(kind), sparsity=0.5, folder=folder)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_budget_alone_says_how_many_units_go():
    small = compress("regularized", budget=gc.Budget(macs=0.5))
    assert 0.35 < small.report.macs.ratio <= 0.5
    with pytest.raises(gc.BudgetError):
        compress("regularized", sparsity=0.1, budget=gc.Budget(macs=0.2))


def test_shares_by_module_and_integers_behind():
    small = compress(["regularized", "qat"], sparsity={"second": 0.5}, bits=8)
    assert [group["units"]["kept"] for group in small.report.groups if group["units"]["kept"] < 8] == [4]
    assert {layer.weight_bits for layer in small.report.layers} == {8}


def test_a_cut_at_the_last_step_and_at_once():
    for until in (1.0, 0.01):
        small = compress(Regularized(until=until), sparsity=0.5)
        assert small.report.units_removed == 8


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Regularized("ridge"), "kind"),
        (lambda: Regularized(strength=-1.0), "strength must be a number, 0 at least, got -1.0"),
        (lambda: Regularized(until=0.0), "until must be above 0 and at most 1, got 0.0"),
        (lambda: compress("regularized", bits=8, sparsity=0.5), "bits"),
        (lambda: compress(Regularized("scales"), model=bare(), sparsity=0.5), "no norm with a weight scales"),
        (lambda: compress("regularized", model=bare().requires_grad_(False), sparsity=0.5), "frozen|requires_grad"),
        (
            lambda: compress("regularized", sparsity=0.5, training={"steps": None, "schedule": gc.Schedule(30)}),
            "Schedule",
        ),
        (lambda: compress("regularized", sparsity=1.5), "sparsity"),
    ],
)
def test_bad_input_is_refused_with_a_way_out(make, words):
    with pytest.raises(gc.PlanError, match=words) as caught:
        make()
    assert caught.value.fix


def bare() -> nn.Module:
    """(n, 1, 6, 6) -> (n, 3), without norms."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
