"""A result keeps its own tensors alive, and nothing of the model that it was made of."""

from __future__ import annotations

import copy
import gc as collector
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import graphcomp as gc
from graphcomp.result import CompressedModel
from graphcomp.testing.memory import held_bytes
from graphcomp.torch_compat import forget_shape_environments

X = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
ALLOWED = 1.1
"""Bytes that a result may hold, in those of its own module."""


class Square(nn.Module):
    """Holds its width in a closure, so that the class cannot be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)).view(len(x), 16, 16).flatten(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128)).eval()


def trained(**options: Any) -> CompressedModel:
    ready = gc.prepare(net(), X, **options)
    ready.keep({group: torch.arange(group.size // 2) for group in ready.session.groups})
    return gc.finalize(ready)


RESULTS = {
    "native": lambda: gc.compress(net(), X),
    "graph": lambda: gc.compress(Square(), X),
    "int8": lambda: gc.compress(net(), X, bits=8),
    "int8, whole": lambda: gc.compress(net(), X, sparsity=0, bits=8),
    "int4 in groups": lambda: gc.compress(net(), X, bits=4, activation_bits=None, group_size=32),
    "scope": lambda: gc.compress(nn.Sequential(net(), net()), X, bits=8, scope="0"),
    "trained": lambda: trained(bits=(4, 8)),
    "trained in floats": lambda: trained(bits=None),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_holds_little_more_than_its_module(name: str) -> None:
    small = RESULTS[name]()
    own = held_bytes([*small.module.parameters(), *small.module.buffers()])
    assert (small.form == "native") == (name in ("native", "trained in floats"))
    assert own <= held_bytes(small) <= ALLOWED * own
    assert held_bytes(copy.deepcopy(small)) <= ALLOWED * own


@pytest.mark.parametrize("options", [{}, {"bits": 8}])
def test_a_result_lets_go_of_the_model(options: dict[str, Any]) -> None:
    model = net()
    gone = weakref.ref(model)
    small = gc.compress(model, X, **options)
    del model
    collector.collect()
    assert gone() is None and small(X).shape == X.shape


def test_example_inputs_are_copies() -> None:
    """A batch may be a window on all data."""
    data = torch.randn(10_000, 128)
    for scope in ("", "0"):
        small = gc.compress(nn.Sequential(net(), net()), data[:2], scope=scope)
        assert held_bytes(small.example_args) == 2 * 128 * 4


def test_held_bytes_count_a_storage_once() -> None:
    tensor = torch.zeros(10)
    assert held_bytes({"a": [tensor, tensor[2:]], "b": nn.Parameter(tensor)}) == 40


def test_a_capture_leaves_no_shape_environment_behind() -> None:
    """torch keeps such an environment, with all its symbols, in caches and in a cycle that no collector sees."""
    environments = []
    for _ in range(3):
        plan = gc.analyze(net(), X)
        fakes = [node.meta["val"] for node in plan.captured.graph.find_nodes(op="placeholder")]
        environments.append(weakref.ref(fakes[0].fake_mode.shape_env))
        del plan, fakes
    forget_shape_environments()
    collector.collect()
    assert [environment() for environment in environments[:-1]] == [None, None]  # torch may hold its latest export
