"""A result keeps its own tensors alive, and nothing of the model that it was made of."""

from __future__ import annotations

import copy
import gc as collector
import weakref
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import graphcomp as gc
from graphcomp.result import CompressedModel
from graphcomp.testing.memory import held_bytes
from graphcomp.torch_compat import FakeTensor, forget_shape_environments

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
@pytest.mark.slow
@pytest.mark.ci
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


@pytest.mark.slow
@pytest.mark.ci
def test_a_capture_leaves_no_shape_environment_and_no_source_behind() -> None:
    """torch keeps such an environment, with all its symbols, in caches and in a cycle that no collector sees."""
    environments, sources = [], []
    for _ in range(3):
        plan = gc.analyze(net(), X)
        fakes = [node.meta["val"] for node in plan.captured.graph.find_nodes(op="placeholder")]
        environments.append(weakref.ref(fakes[0].fake_mode.shape_env))
        del plan, fakes
        collector.collect()
        sources.append(len(fx.graph_module._loader.eval_cache))
    forget_shape_environments()
    collector.collect()
    assert [environment() for environment in environments[:-1]] == [None, None]  # torch may hold its latest export
    assert sources[1] == sources[2]


def alive() -> dict[str, int]:
    """Return how many graphs, fake tensors and shape environments live, and how many sources torch.fx keeps."""
    collector.collect()
    types = [type(held) for held in collector.get_objects()]
    kinds = (fx.GraphModule, fx.Graph, FakeTensor, ShapeEnv)
    counts = {kind.__name__: sum(issubclass(own, kind) for own in types) for kind in kinds}
    return {**counts, "sources": len(fx.graph_module._loader.eval_cache)}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", ["native", "int8", "trained", "scope"])
def test_compressions_in_a_row_leave_as_much_behind_as_few(name: str) -> None:
    collector.collect()
    collector.freeze()  # what is there already is not looked at again
    try:
        counts = []
        for _ in range(6):
            RESULTS[name]()
            counts.append(alive())
    finally:
        collector.unfreeze()
    assert counts[5] == counts[2]
