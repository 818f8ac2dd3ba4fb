"""Models that a folder alone builds again: what constructors keep, what they do not, and what forward passes leave."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.checkpoint.folder import read, write
from graphcomp.errors import CheckpointError

X = torch.randn(3, 8)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Net(nn.Module):
    """A constructor that keeps none of its arguments, and a function."""

    def __init__(self, width: int, act: Callable[[Tensor], Tensor], *, classes: int) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, width), nn.Linear(width, classes), act

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class Referring(nn.Module):
    """Lists and tuples of modules and parameters that are registered elsewhere."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(dims))
        self.pairs = [(layer, k) for k, layer in enumerate(self.layers)]
        self.weights = {"first": self.layers[0].weight, "table": torch.rand(dims[-1])}

    def forward(self, x: Tensor) -> Tensor:
        for layer, k in self.pairs:
            x = torch.relu(layer(x)) * (k + 1)
        return x * self.weights["table"] + self.weights["first"].sum()


class Kind(Enum):
    RELU = "relu"


@dataclass
class Config:
    width: int
    kind: Kind = Kind.RELU


class Configured(nn.Module):
    """A dataclass, an enum, a class, a set, an ordered dict, a dtype."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.norm, self.dtype = config, nn.LayerNorm, torch.float32
        self.names, self.order, self.steps = {"a", "b"}, OrderedDict(x=(1, None)), range(3)
        self.a, self.b = nn.Linear(8, config.width), nn.Linear(config.width, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert self.order["x"] == (1, None) and self.names == {"b", "a"} and len(self.steps) == 3
        h = getattr(F, self.config.kind.value)(self.a(x.to(self.dtype)))
        return self.b(h) if self.norm is nn.LayerNorm else h


class Layers(nn.Module):
    """Layers of torch with states of their own, one of them under two names."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, widths[0], batch_first=True)
        self.attention = nn.MultiheadAttention(widths[0], 2, batch_first=True)
        self.same = self.head = nn.Linear(widths[0], widths[0])
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(widths[0]))])
        self.norm = nn.BatchNorm1d(widths[0])
        self.register_buffer("offset", torch.rand(1), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(x[:, None])[0]
        h = self.attention(h, h, h)[0][:, 0]
        return self.norm(self.same(self.head(h)) * self.scales[0]) + self.offset


class Caching(nn.Module):
    """Keeps tensors, containers of tensors and a shape on itself, as detectors keep their anchors."""

    grid = torch.empty(0)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Linear(8, width)
        self.shape: Any = None
        self.levels: list[Tensor] = []
        self.memory: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.shape != y.shape:
            self.shape, self.grid = y.shape, torch.arange(float(y.shape[1]))
            self.levels = [self.grid + 1, self.grid * 2]
            self.memory[tuple(y.shape)] = torch.full((y.shape[1],), 2.0)
        return y + self.levels[0] * self.levels[1] + self.memory[tuple(y.shape)] + self.grid


class Ours(nn.Sequential):
    """A container of torch with a constructor of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "function of torch": lambda: Net(6, F.relu, classes=3),
    "op of torch": lambda: Net(6, torch.tanh, classes=3),
    "function of the module": lambda: Net(6, swish, classes=3),
    "partial": lambda: Net(6, functools.partial(F.leaky_relu, negative_slope=0.3), classes=3),
    "references": lambda: Referring([8, 6, 3]),
    "records": lambda: Configured(Config(6)),
    "layers": lambda: Layers(6),
    "caches": lambda: Caching(6),
    "container": lambda: Ours(6),
    "inside": lambda: nn.Sequential(Ours(6), nn.Linear(2, 2)),
}


def saved(model: nn.Module, folder: Path) -> tuple[str, ...]:
    return write(folder, model, form="native", kept={}, report={})


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_enough(name: str, ran: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if ran:
        model(X)
    assert saved(model, tmp_path / "m") == ()
    state = torch.get_rng_state()
    found = read(tmp_path / "m").module
    assert torch.equal(torch.get_rng_state(), state)
    assert type(found) is type(model)
    expected = model(X)
    assert torch.equal(found(X), expected)
    assert torch.equal(found(X[:2]), model(X[:2]))
    assert saved(found, tmp_path / "again") == ()
    assert torch.equal(read(tmp_path / "again").module(X), expected)
    for parameter in found.parameters():  # what the containers hold are the parameters that are trained
        parameter.data.zero_()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(found(X), model(X))


def test_modules_and_tensors_with_two_names_are_one(tmp_path: Path) -> None:
    saved(Layers(6), tmp_path / "m")
    found = read(tmp_path / "m").module
    assert found.same is found.head
    saved(Referring([8, 6, 3]), tmp_path / "n")
    found = read(tmp_path / "n").module
    assert found.pairs[0][0] is found.layers[0]
    assert found.weights["first"] is found.layers[0].weight
    assert [name for name, _ in found.named_buffers()] == []


def shifted(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + by


class Act:
    """An object that is called."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.relu()


class Hooked(Net):
    def __init__(self, width: int) -> None:
        super().__init__(width, F.relu, classes=2)
        self.a.register_forward_hook(lambda module, inputs, output: output * 2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Net(6, shifted(1), classes=2), "its attribute act is no plain data"),
        (lambda: Net(6, Act(), classes=2), "its attribute act"),
        (lambda: Hooked(6), "cannot be built"),
        (lambda: type("Local", (Net,), {"__module__": "nowhere"})(6, F.relu, classes=2), "cannot be built"),
    ],
)
def test_what_needs_a_factory_is_said_at_once(
    make: Callable[[], nn.Module], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    (need,) = saved(model, tmp_path / "m")
    assert "needs model_factory=" in need and said in need
    assert need in caplog.text
    assert json.loads((tmp_path / "m" / "graphcomp.json").read_text())["report"]["notes"] == [need]
    with pytest.raises(CheckpointError, match="model_factory"):
        read(tmp_path / "m")
    assert torch.equal(read(tmp_path / "m", make).module(X), model(X))


def test_a_result_notes_what_load_will_need(tmp_path: Path) -> None:
    small = gc.compress(Net(6, shifted(1), classes=2).eval(), X, sparsity=0.5, progress=False)
    for _ in range(2):
        small.save(tmp_path / "m")
        assert sum("model_factory=" in note for note in small.report.notes) == 1
    found = gc.load(tmp_path / "m", model_factory=lambda: Net(6, shifted(1), classes=2))
    assert found.report.notes == small.report.notes
    assert torch.equal(found(X), small(X))


def test_a_class_of_the_main_script_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import __main__

    kind = type("Script", (Ours,), {"__module__": "__main__"})
    monkeypatch.setattr(__main__, "Script", kind, raising=False)
    model = kind(6)
    (need,) = saved(model, tmp_path / "m")
    assert "in every program but this script" in need
    assert torch.equal(read(tmp_path / "m").module(X), model(X))
    monkeypatch.delattr(__main__, "Script")
    with pytest.raises(CheckpointError, match="cannot be imported"):
        read(tmp_path / "m")


def test_a_cache_that_the_factory_has_not_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Caching(6)
    expected = model(X)
    saved(model, tmp_path / "m")
    with caplog.at_level(logging.WARNING, "graphcomp.checkpoint"):
        found = read(tmp_path / "m", lambda: Caching(6)).module
    assert "grid: left out" in caplog.text
    assert "grid" not in vars(found)
    assert torch.equal(found(X), expected)


def test_a_cache_that_the_factory_has_is_as_it_was_saved(tmp_path: Path) -> None:
    saved(Caching(6), tmp_path / "m")
    ran = Caching(6)
    ran(X)
    assert torch.equal(read(tmp_path / "m", lambda: ran).module(X[:2]), read(tmp_path / "m").module(X[:2]))


def test_shapes_and_numbers_need_not_be_those_of_the_constructor(tmp_path: Path) -> None:
    model = Net(6, F.relu, classes=3).eval()
    small = gc.compress(model, X, sparsity=0.5, progress=False)
    small.save(tmp_path / "m")
    found = gc.load(tmp_path / "m")
    assert found.module.a.out_features == small.module.a.weight.shape[0] == 3
    assert torch.equal(found(X), small(X))
