"""The groups do not depend on the order of the walk."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from graphcomp.capture.capture import Captured, capture
from graphcomp.coupling.groups import find_groups
from graphcomp.coupling.propagate import propagate
from graphcomp.testing import check_law, random_model, tiny_models

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


class Views(nn.Module):
    """The hidden units of several branches, added up, each branch grouped in its own way: (n, 5) -> (n, 3)."""

    def __init__(self, width: int, boundaries: Sequence[int]) -> None:
        super().__init__()
        self.boundaries = boundaries
        self.up, self.down = nn.Linear(5, width), nn.Linear(width, 3)
        self.scales = nn.ParameterList(nn.Parameter(torch.randn(n, width // n)) for n in boundaries)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        parts = [(h.view(-1, *scale.shape) * scale).tanh().flatten(1) for scale in self.scales]
        return self.down(sum(parts[1:], parts[0]))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("width", "boundaries"), [(12, (2, 4, 6)), (12, (4, 6)), (24, (4, 6, 2)), (36, (4, 6, 9, 12)), (36, (2, 12, 18))]
)
def test_views_that_do_not_nest(width: int, boundaries: tuple[int, ...]) -> None:
    model = Views(width, boundaries)
    check(model, torch.randn(2, 5), shuffles=24)
    check_law(model.double(), torch.randn(2, 5).double(), rounds=2)


@pytest.mark.parametrize("name", list(tiny_models()))
def test_tiny_models(name: str) -> None:
    check(*tiny_models()[name], shuffles=4)


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=8)
@pytest.mark.slow
@pytest.mark.ci
def test_random_models(seed: int, depth: int) -> None:
    check(*random_model(seed, depth), shuffles=4)


@pytest.mark.slow
@given(st.integers(0, 10**6), st.integers(1, 8))
@settings(max_examples=200)
def test_many_random_models(seed: int, depth: int) -> None:
    check(*random_model(seed, depth), shuffles=6)
