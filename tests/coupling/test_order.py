"""The groups do not depend on the order of the walk."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from graphcomp.capture import Captured, capture
from graphcomp.coupling.groups import find_groups
from graphcomp.coupling.propagate import propagate
from graphcomp.testing import random_model, tiny_models

Fingerprint = frozenset[frozenset[tuple[str, int, tuple[int, ...]]]]


def groups_of(captured: Captured, order: list[fx.Node] | None = None) -> Fingerprint:
    """Each group as the set of its (tensor, dim, unit of every index)."""
    coupling = propagate(captured.module, captured.output_names, order)
    return frozenset(
        frozenset((m.name, m.dim, tuple(sorted(map(tuple, m.unit_of.tolist())))) for m in group.members)  # type: ignore[misc]
        for group in find_groups(coupling)
    )


def another_order(graph: fx.Graph, rng: random.Random) -> list[fx.Node]:
    """A random topological order of the nodes."""
    waiting = {node: len(node.all_input_nodes) for node in graph.nodes}
    ready = [(rng.random(), k, node) for k, node in enumerate(graph.nodes) if not waiting[node]]
    heapq.heapify(ready)
    order: list[fx.Node] = []
    while ready:
        _, _, node = heapq.heappop(ready)
        order.append(node)
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (rng.random(), -len(order), user))
    assert len(order) == len(waiting)
    return order


def check(model: nn.Module, inputs: object, shuffles: int) -> None:
    captured = capture(model, inputs)
    expected = groups_of(captured)
    for seed in range(shuffles):
        order = another_order(captured.module.graph, random.Random(seed))
        assert groups_of(captured, order) == expected


@pytest.mark.parametrize("name", list(tiny_models()))
def test_tiny_models(name: str) -> None:
    check(*tiny_models()[name], shuffles=4)


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=8)
def test_random_models(seed: int, depth: int) -> None:
    check(*random_model(seed, depth), shuffles=4)


@pytest.mark.slow
@given(st.integers(0, 10**6), st.integers(1, 8))
@settings(max_examples=200)
def test_many_random_models(seed: int, depth: int) -> None:
    check(*random_model(seed, depth), shuffles=6)
