"""Runs of QST: reductions to LSQ, guards, pressure, pruned weights that return, and a mask that stays."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import graphcomp as gc
from graphcomp.api import _prepared
from graphcomp.methods.qst.method import Qst, QstRun
from graphcomp.methods.qst.units import UnitGates
from graphcomp.methods.qst.weights import WeightGates
from graphcomp.training.optimizer import MethodOptimizer
from graphcomp.training.run import Run
from tests.methods.learning import batches, loss, net

STEPS = 20


class Plain(Run):
    """LSQ, and nothing else."""

    name = "plain"


def begun(method: Qst | None = None, steps: int = STEPS, **asked: Any) -> tuple[MethodOptimizer, QstRun]:
    method = method or Qst()
    source = partial(
        _prepared, net(), batches()[0][0], None, ignore=(), keep_inputs=(), prune=None, scope="", outputs=None
    )
    goal = gc.Goal(**{"sparsity": 0.6, "bits": (4, 4), "activation_bits": None, **asked})
    run = method.begin(method.prepare(source, goal).train(), goal, gc.Training(steps=steps), steps)
    return optimizer_of(run), run


def optimizer_of(run: Run, momentum: float = 0.9) -> MethodOptimizer:
    return MethodOptimizer(run, torch.optim.SGD, 0.05, {"momentum": momentum, "weight_decay": 1e-2})


def forward_of(run: Run) -> Any:
    def forward(batch: Any, tensors: Any = None) -> Any:
        return run.ready(batch[0]) if tensors is None else functional_call(run.ready, dict(tensors), (batch[0],))

    return forward


def train(optimizer: MethodOptimizer, run: Run, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        run.loss(forward_of(run), batches()[optimizer.steps % 4], loss).backward()
        optimizer.step()


def gates(run: QstRun) -> WeightGates:
    assert isinstance(run.gates, WeightGates)
    return run.gates


# ------------------------------------------------------------------------------------------------ reductions
def test_thresholds_of_zero_that_stay_there_are_plain_lsq():
    _, run = begun(Qst(warmup=0.0, freeze=None), sparsity=0.0)
    for threshold in run.parameters():
        threshold.requires_grad_(False)
    plain = Plain(copy.deepcopy(run.ready))
    train(optimizer_of(run), run, 9)
    train(optimizer_of(plain), plain, 9)
    assert run.stage(run.step) == "thresholds"
    for (name, own), other in zip(run.ready.state_dict().items(), plain.ready.state_dict().values(), strict=True):
        if "progress" not in name:
            torch.testing.assert_close(own, other, rtol=0, atol=1e-6)


def test_the_pressure_lifts_each_threshold_by_its_gradient():
    found = []
    for pressure in (0.0, 0.01):
        _, run = begun(Qst(warmup=0.0, pressure=pressure, every=100), sparsity=None if pressure else 0.5)
        with torch.no_grad():
            for threshold in run.parameters():
                threshold.fill_(0.02)
        train(optimizer_of(run, momentum=0.0), run, 1)
        found.append([threshold.detach().clone() for threshold in run.parameters()])
    for without, lifted in zip(*found, strict=True):
        free = without > 0  # not held at 0
        expected = 0.05 * 0.01 * torch.exp(torch.tensor(-0.02))
        assert bool(free.any())
        torch.testing.assert_close((lifted - without)[free], expected.expand_as(without[free]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("per", ["element", "unit"])
def test_gradients_of_thresholds_are_scaled_by_the_weights_that_share_one(per):
    found = []
    for scaled in (True, False):
        _, run = begun(Qst(per=per, scaled=scaled, warmup=0.0))
        run.loss(forward_of(run), batches()[0], loss).backward()
        found.append({name: threshold.grad for name, threshold in run.gates.parameters().items()})
    name = next(name for name in found[0] if name.startswith("second"))
    shared = 72 if per == "element" else 72 + 3  # a filter; with its bias, and the scale and shift of a norm
    assert bool(found[1][name].any())
    torch.testing.assert_close(found[0][name] * shared**0.5, found[1][name])


def test_without_pruning_thresholds_stay_zero():
    optimizer, run = begun(Qst(every=1, warmup=0.0), sparsity=0.0)
    train(optimizer, run, 5)
    assert not any(bool(threshold.any()) for threshold in run.parameters())


def test_thresholds_are_not_decayed():
    optimizer, run = begun()
    own = {id(threshold) for threshold in run.parameters()}
    groups = [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]
    assert groups and all(group["weight_decay"] == 0 for group in groups)
    steps = {id(q.scale) for q in gates(run).quantizers.values()}
    assert all(g["weight_decay"] == 0 for g in optimizer.param_groups if any(id(p) in steps for p in g["params"]))


# ------------------------------------------------------------------------------------------------ guards
@pytest.mark.parametrize("guard", ["floor", "reset"])
def test_a_layer_is_not_lost(guard):
    _, run = begun(Qst(guard=guard, least=0.1))
    own, name = gates(run), "second.weight"
    with torch.no_grad():
        own.thresholds[name].fill_(float(own.weights[name].abs().max()) + 1)
    assert not bool(own.views(False)[name].any())
    own.hold(1.0)
    left = int((own.views(False)[name] != 0).sum())
    if guard == "reset":
        assert not bool(own.thresholds[name].any()) and left == own.weights[name].numel()
    else:
        assert left == 58  # a tenth of 576


def test_thresholds_are_never_below_zero():
    optimizer, run = begun(Qst(every=3))
    for _ in range(9):
        train(optimizer, run, 1)
        assert all(float(threshold.detach().min()) >= 0 for threshold in run.parameters())


def test_each_layer_keeps_a_weight():
    _, run = begun()
    own = gates(run)
    with torch.no_grad():
        own.weights["first.weight"].mul_(1e-3)
    masks = own.masks(5)
    assert sum(int(mask.sum()) for mask in masks.values()) == 5
    assert all(bool(mask.any()) for mask in masks.values())


# ------------------------------------------------------------------------------------------------ what returns
@pytest.mark.parametrize("gradient", ["dense", "latent", "literal"])
def test_a_pruned_weight_returns_but_by_the_literal_gradient(gradient):
    """With a gradient that pushes a weight up which lies below the threshold, and below half a step."""
    _, run = begun(Qst(gradient=gradient, warmup=0.0))
    own, name = gates(run), "second.weight"
    weight, threshold = own.weights[name], own.thresholds[name]
    with torch.no_grad():
        threshold.fill_(0.1)
        weight[0, 0, 0, 0] = 0.02
        own.quantizers[name].scale.fill_(0.3)
    for _ in range(40):
        view = own.views(True)[name]
        (gradient_of,) = torch.autograd.grad(-view[0, 0, 0, 0], weight)
        with torch.no_grad():
            weight -= 0.05 * gradient_of
    with torch.no_grad():
        assert (float(weight[0, 0, 0, 0]) > 0.1) == (gradient != "literal")
        if gradient == "literal":
            assert float(weight[0, 0, 0, 0]) == pytest.approx(0.02)


def test_weights_return_before_the_mask_is_fixed_and_not_after():
    optimizer, run = begun(Qst(every=1, warmup=0.0))
    pruned: list[dict[str, Tensor]] = []
    while not run.fixed:
        pruned.append({name: margin <= 0 for name, margin in gates(run).margins().items()})
        train(optimizer, run, 1)
    ever = {name: torch.stack([own[name] for own in pruned]).any(0) for name in run.masks}
    assert any(bool((ever[name] & run.masks[name]).any()) for name in run.masks)
    masks = {name: mask.clone() for name, mask in run.masks.items()}
    thresholds = [threshold.detach().clone() for threshold in run.parameters()]
    train(optimizer, run, STEPS - optimizer.steps)
    for name, mask in masks.items():
        weight = run.ready.get_parameter(name)
        assert torch.equal(run.masks[name], mask) and not bool(weight[~mask].any())
    assert all(torch.equal(own, old) for own, old in zip(run.parameters(), thresholds, strict=True))


# ------------------------------------------------------------------------------------------------ targets
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95])
def test_what_stays_follows_a_cubic_schedule_and_ends_exactly(sparsity):
    optimizer, run = begun(Qst(every=2, warmup=0.0), sparsity=sparsity)
    total, shares = gates(run).total, []
    while not run.fixed:
        train(optimizer, run, 1)
        if optimizer.steps % 2 == 0 and not run.fixed:
            shares.append(gates(run).stays() / total)
            expected = 1 - sparsity * (1 - (1 - optimizer.steps / run.settles) ** 3)
            assert shares[-1] == pytest.approx(expected, abs=0.02)
    assert optimizer.steps == run.settles == STEPS // 2
    assert sum(int((~mask).sum()) for mask in run.masks.values()) == round(sparsity * total)


@pytest.mark.parametrize("convention", ["C0", "C1", "C2", "C3", "C4", "C5"])
def test_a_budget_is_met_at_the_end_by_each_convention(convention):
    limit = {"C0": 120, "C1": 300, "C2": 600, "C3": 190, "C4": 130, "C5": 220}[convention]
    optimizer, run = begun(Qst(convention=convention), sparsity=None, budget=gc.Budget(bytes=limit))
    train(optimizer, run, STEPS)
    choice = run.choice()
    assert 0.8 * limit < gates(run).bytes_of(choice.elements, convention) <= limit
    if convention == "C0":
        assert sum(int(mask.sum()) for mask in choice.elements.values()) == limit * 8 // 4


def test_where_weights_move_to_longer_codes_more_of_them_go_in_the_end():
    optimizer, run = begun(Qst(convention="C4"), sparsity=None, budget=gc.Budget(bytes=130))
    train(optimizer, run, STEPS - 1)
    before = run.masks
    with torch.no_grad():
        for weight in gates(run).weights.values():
            weight.copy_(torch.randn_like(weight) * (weight != 0))
    after = run.choice().elements
    assert gates(run).bytes_of(after, "C4") <= 130
    assert all(not bool((after[name] & ~before[name]).any()) for name in before)


def test_what_is_trained_is_what_the_quantizers_then_compute():
    """Levels times masks in training are codes times steps of the pruned weights, bit for bit."""
    optimizer, run = begun(Qst(warmup=0.0, every=2))
    train(optimizer, run, 7)
    run.ready.eval()
    inputs = batches()[2][0]
    views = gates(run).views(True)
    assert not torch.equal(views["second.weight"], gates(run).views(False)["second.weight"])
    with torch.no_grad():
        with run._quantizers(True):
            trained = functional_call(run.ready, views, (inputs,))
        for name, margin in gates(run).margins().items():
            gates(run).weights[name].masked_fill_(margin <= 0, 0)
        assert torch.equal(run.ready(inputs), trained)
        assert all(q.enabled for _, q in run.ready.quantizers())


# ------------------------------------------------------------------------------------------------ units
def unit_run(method: Qst | None = None, **asked: Any) -> tuple[MethodOptimizer, QstRun, UnitGates]:
    optimizer, run = begun(method or Qst(per="unit", warmup=0.0, every=2), **asked)
    assert isinstance(run.gates, UnitGates)
    return optimizer, run, run.gates


def test_norms_of_units_are_root_mean_squares_of_their_filters():
    _, run, own = unit_run()
    for group in own.groups:
        name = group.name.partition("/")[0]
        weight = run.ready.get_parameter(f"{name}.weight").detach()
        torch.testing.assert_close(own.norms(group).detach(), weight.square().flatten(1).mean(1).sqrt())


def test_a_unit_below_its_threshold_is_as_if_the_unit_did_not_exist():
    _, run, own = unit_run(bits=None)
    with torch.no_grad():
        for group in own.groups:
            own.thresholds[group.name][::2] = 1e3
    views, inputs = own.views(False), batches()[0][0]
    run.ready.eval()
    found = functional_call(run.ready, views, (inputs,))
    other = copy.deepcopy(run.ready)
    other.keep({group: torch.arange(1, group.size, 2) for group in other.session.groups})
    torch.testing.assert_close(found, other(inputs))
    found.sum().backward()
    assert all(own.thresholds[group.name].grad is not None for group in own.groups)


@pytest.mark.parametrize("gradient", ["dense", "latent"])
def test_units_go_on_schedule_and_stay_gone(gradient):
    optimizer, run, _ = unit_run(Qst(per="unit", gradient=gradient, warmup=0.0, every=1), sparsity=0.5)
    while not run.fixed:
        train(optimizer, run, 1)
    assert run.removed == 8
    kept = run.kept
    train(optimizer, run, 5)
    assert run.kept is kept and all(float(t.detach().min()) >= 0 for t in run.parameters())
    weight = run.ready.get_parameter("second.weight")
    units = next(units for group, units in kept.items() if group.name.startswith("second"))
    gone = torch.ones(8, dtype=torch.bool).index_fill_(0, units, False)
    assert not bool(weight[gone].any())
