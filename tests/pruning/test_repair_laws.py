"""The laws of the repair, on random networks and random cuts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from graphcomp.capture.capture import capture
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.axis import kept_indices
from graphcomp.coupling.groups import Kept
from graphcomp.ir.graph import all_tensors, fetch
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.numerics.compare import relative_error
from graphcomp.pruning import repair as repair_module
from graphcomp.pruning.consumers import Consumer, Consumers, operands
from graphcomp.pruning.least_squares import Problem
from graphcomp.pruning.mask import InsertMasks, set_masks
from graphcomp.pruning.repair import Repaired, layer_influences, repair_cut
from graphcomp.pruning.slice import SliceGroups, by_factor, select
from graphcomp.testing import random_kept, random_model

ROUNDING = 1e-9
"""Relative, of float64."""


def drawn(seed: int, depth: int) -> tuple[Analysis, Kept, fx.GraphModule, list[list[Tensor]]]:
    """A random network in float64, a random cut of all groups, and calibration batches of three sizes."""
    model, (x,) = random_model(seed, depth)
    plan = analyze_captured(capture(model.double(), x.double()))
    generator = torch.Generator().manual_seed(seed)
    kept = random_kept(plan.groups, generator)
    batches = [[torch.randn(n, *x.shape[1:], generator=generator, dtype=torch.float64)] for n in (5, 2, 9)]
    return plan, kept, SliceGroups(plan.coupling, kept).rewrite(plan.captured.module), batches


def values(module: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    """Name of a node -> its values."""
    found: dict[str, list[Any]] = {}
    for batch in batches:
        run_tapped(module, batch, see=lambda node, value: found.setdefault(node.name, []).append(value))
    return found


def tensors(module: fx.GraphModule) -> dict[str, Tensor]:
    return dict(all_tensors(module))


def targets(plan: Analysis, kept: Kept, node: str, old: dict[str, list[Any]]) -> list[Tensor]:
    """What a node gave before the cut, at the indices that stay."""
    twin = next(n for n in plan.captured.module.graph.nodes if n.name == node)
    (axes,) = plan.coupling.axes[twin]
    dims = {dim: index for dim, axis in enumerate(axes) if (index := kept_indices(axis, by_factor(kept))) is not None}
    return [select(y, dims) if dims else y for y in old[node]]


def check_residuals(plan: Analysis, kept: Kept, small: fx.GraphModule, found: Repaired, batches: Any) -> int:
    """Compare the error of each layer with that of its sliced weights on the same inputs; return how many there are."""
    old, new = values(plan.captured.module, batches), values(found.graph, batches)
    counted = {node.name: rows for node, rows in layer_influences(plan, batches).rows.items()}
    checked = 0
    for consumer in Consumers(found.graph, sources(plan, found.graph)).at.values():
        layer = found.layers.get(consumer.name)
        added = repair_module._added_to(consumer.node, found.graph)
        if layer is None or math.isinf(layer.ridge) or added is not None:
            continue  # a layer that is added to a stream has another target
        wanted = targets(plan, kept, consumer.node.name, old)
        rows = counted.get(consumer.node.name)
        before, after = (residual(consumer, module, small, new, wanted, rows) for module in (small, found.graph))
        assert after <= before * (1 + ROUNDING), (consumer.name, before, after)
        assert layer.after == pytest.approx(after, rel=1e-6, abs=1e-7)
        assert layer.before == pytest.approx(before, rel=1e-6, abs=1e-7)
        checked += 1
    return checked


def sources(plan: Analysis, module: fx.GraphModule) -> dict[fx.Node, frozenset[str]]:
    twins = {node.name: node for node in plan.captured.module.graph.nodes}
    constant = plan.coupling.sources
    return {n: constant[t] for n in module.graph.nodes if (t := twins.get(n.name)) in constant}


def residual(
    consumer: Consumer,
    module: fx.GraphModule,
    small: fx.GraphModule,
    given: dict[str, list[Any]],
    wanted: Sequence[Tensor],
    rows: Sequence[Tensor] | None,
) -> float:
    """Relative error of one layer with the weights of `module`, on inputs that are given.

    Args:
        rows: what each row counts, per batch; None: all alike.
        small: the sliced graph, from whose running mean an intercept behind the layer is counted.
    """
    node = next(n for n in module.graph.nodes if n.name == consumer.node.name)
    constants = {n.name: fetch(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    moved = {n.name for n in consumer.moves}
    error = norm = 0.0
    for k, t in enumerate(wanted):
        known: dict[str, Any] = {name: found[k] for name, found in given.items()} | constants
        for other in [n for n in module.graph.nodes if n.name in moved]:
            known[other.name] = computed(other, known)
        y = computed(node, known)
        if consumer.sign < 0:  # the intercept stands in the running mean of the batch norm behind
            shape = (1, -1, *[1] * (y.dim() - 2))
            y = y - (fetch(module, consumer.bias) - fetch(small, consumer.bias)).view(shape)
        own = None if rows is None else rows[k]
        error += squares(t - y, consumer, node, known, own)
        norm += squares(t, consumer, node, known, own)
    return math.sqrt(error / norm) if norm else 0.0


def squares(y: Tensor, consumer: Consumer, node: fx.Node, known: dict[str, Any], rows: Tensor | None) -> float:
    """Return the sum of squares of a layer's result, each row by what the row counts."""
    if rows is None:
        return float(y.detach().square().sum())
    data, weight = (operands(node)[argument].name for argument in (consumer.data, consumer.weight))
    problem = Problem.between(node, (consumer.data, known[data]), (consumer.weight, known[weight]), False)
    assert isinstance(problem, Problem)
    every = problem.design.results(y.detach().square(), torch.arange(len(rows)))
    return float((every * rows[None, :, None]).sum())


def computed(node: fx.Node, known: dict[str, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: known[operand.name])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def check_repair(seed: int, depth: int) -> int:
    plan, kept, small, batches = drawn(seed, depth)
    found = repair_cut(plan, kept, small, batches)
    # what is repaired is a cut of the plan that holds the repaired values, and masked equals sliced there, too
    again = SliceGroups(found.plan.coupling, kept).rewrite(found.plan.captured.module)
    assert all(torch.equal(t, tensors(again)[name]) for name, t in tensors(found.graph).items())
    masked = InsertMasks(found.plan.coupling, tuple(kept))(found.plan.captured.module)
    set_masks(masked, tuple(kept), kept)
    with torch.no_grad():
        assert all(relative_error(masked(*batch), again(*batch)) < 1e-9 for batch in batches)
    # every tensor that moved belongs to a layer, or to a batch norm, that is named
    named = {*found.layers, *found.reestimated}
    moved = {n for n, t in tensors(small).items() if not torch.equal(t, tensors(found.graph)[n])}
    assert moved <= set(found.changed)
    assert bool(moved) <= bool(named)
    assert not set(found.layers) & set(found.left)
    assert all(layer.after <= layer.before for layer in found.layers.values())
    return check_residuals(plan, kept, small, found, batches)


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=6)
def test_random_networks(seed: int, depth: int) -> None:
    """No layer is further from its old output than with the sliced weights; the laws of a cut hold as before."""
    check_repair(seed, depth)


@pytest.mark.slow
@pytest.mark.ci
def test_the_laws_are_checked_on_layers() -> None:
    """The check above sees layers in most networks."""
    assert sum(check_repair(seed, 3) > 0 for seed in range(4)) >= 3


@pytest.mark.slow
@given(st.integers(0, 10**6), st.integers(1, 10))
@settings(max_examples=150)
def test_many_random_networks(seed: int, depth: int) -> None:
    check_repair(seed, depth)


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=4)
def test_an_infinite_ridge_gives_the_slice_bit_for_bit(seed: int, depth: int) -> None:
    plan, kept, small, batches = drawn(seed, depth)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair_module, "choose_ridge", lambda *_, **__: math.inf)
        found = repair_cut(plan, kept, small, batches)
    moved = [n for n, t in tensors(small).items() if not torch.equal(t, tensors(found.graph)[n])]
    norms = {f"{name}.{kind}" for name in found.reestimated for kind in ("running_mean", "running_var")}
    assert set(moved) <= norms
    assert all(layer.after == layer.before for layer in found.layers.values())


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(max_examples=4)
def test_a_cut_that_keeps_all_units_moves_nothing(seed: int, depth: int) -> None:
    plan, kept, _, batches = drawn(seed, depth)
    whole = {group: torch.arange(group.size) for group in kept}
    small = SliceGroups(plan.coupling, whole).rewrite(plan.captured.module)
    found = repair_cut(plan, whole, small, batches)
    for name, tensor in tensors(small).items():
        assert relative_error(tensor, tensors(found.graph)[name]) < ROUNDING
