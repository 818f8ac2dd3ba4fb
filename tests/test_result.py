"""CompressedModel: copied, pickled, exported by suffix."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphcomp as gc
from graphcomp.result import CompressedModel

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def compress(**options: object) -> CompressedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    return gc.compress(model, X, **{"sparsity": 0.5, **options})


@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"bits": 4, "activation_bits": None}])
def test_pickled_it_computes_the_same(options: dict[str, object]) -> None:
    small = compress(**options)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(X), small(X))
    assert (again.form, again.report.to_dict()) == (small.form, small.report.to_dict())
    assert not again.training
    for one in (again, copy.deepcopy(small)):
        assert (one.quantized is not None) == bool(options)


def test_a_pickled_graph_switches_modes() -> None:
    graph = gc.analyze(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).train(), X).captured.module
    again = pickle.loads(pickle.dumps(graph.train()))
    assert again.training and bool((again(X) == 0).any())
    assert torch.equal(again.eval()(X), graph.eval()(X))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0, mode: str | None = None, sizes: tuple[int, ...] = ()) -> Any:
        return self.down(torch.relu(self.up(x * scale) if mode is None else self.up(x)))


def test_constants_of_a_graph_are_those_it_was_captured_with(tmp_path: Path) -> None:
    """Another number would change nothing, and give the answer for the old one."""
    fixed = {"scale": 2.0, "mode": None, "sizes": (3, 4)}
    small = gc.compress(Scaled().eval(), X, fixed, sparsity=0.5, bits=8)
    small.save(tmp_path / "small")
    ready = gc.prepare(Scaled(), X, fixed, bits=(4, 8))
    for called in (small, gc.load(tmp_path / "small"), copy.deepcopy(small), ready, copy.deepcopy(ready)):
        expected = called(X, **fixed)
        assert torch.equal(called(X, 2, None, sizes=(3, 4)), expected)
        for changed, says in (
            ({"scale": 3.0}, "scale is 3.0, and the graph was captured with 2.0"),
            ({"mode": "wide"}, "mode is 'wide'"),
            ({"mode": X}, "mode is a tensor of shape"),
            ({"sizes": (3, 5)}, "is 5, and the graph was captured with 4"),
        ):
            with pytest.raises(gc.InputError, match=says):
                called(X, **{**fixed, **changed})


def test_a_copy_has_tensors_of_its_own() -> None:
    small = compress(bits=8)
    twin = copy.deepcopy(small)
    expected = small(X)
    with torch.no_grad():
        for buffer in twin.buffers():
            buffer.zero_()
    assert torch.equal(small(X), expected) and not torch.equal(twin(X), expected)


def test_what_is_being_trained_is_not_pickled() -> None:
    ready = gc.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), X, bits=(4, 8))
    with pytest.raises(gc.CheckpointError, match=r"state_dict\(\)"):
        pickle.dumps(ready)


@pytest.mark.parametrize("name", ["m.onx", "m.pt", "v1.2"])
def test_another_suffix_is_no_folder(tmp_path: Path, name: str) -> None:
    small = compress()
    with pytest.raises(gc.ExportError, match=r"no format(.|\n)*\.onnx, \.pt2, or small\.save"):
        small.export(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    small.save(tmp_path / name)
    assert torch.equal(gc.load(tmp_path / name)(X), small(X))


class Labelled(nn.Module):
    """Of a library whose trainers read names off signatures, and which has a config and a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.config = {"labels": 3}

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.down(self.up(x).relu())
        return {"logits": logits} if labels is None else {"loss": logits.sum() - labels.sum(), "logits": logits}

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)["logits"].argmax(-1)


def test_the_wrapper_has_what_the_class_has() -> None:
    small = gc.compress(Labelled().eval(), X, sparsity=0.5)
    assert small.form == "native" and small.config == {"labels": 3}
    assert list(inspect.signature(small.forward).parameters) == ["x", "labels"]
    assert torch.equal(small.generate(X), small(X)["logits"].argmax(-1))
    assert small.device == torch.device("cpu")
    again = pickle.loads(pickle.dumps(small))
    assert list(inspect.signature(again.forward).parameters) == ["x", "labels"]
    assert torch.equal(torch.compile(small, backend="eager")(X)["logits"], small(X)["logits"])
    assert not hasattr(small, "nothing")


def test_a_graph_says_what_it_has_not() -> None:
    labels = torch.zeros(4)
    small = gc.compress(Labelled().eval(), X, {"labels": labels}, sparsity=0.5, bits=8)
    assert "labels" in inspect.signature(small.forward).parameters
    with pytest.raises(gc.FormError, match="generate"):
        small.generate(X)
    assert not hasattr(small, "config") and small.device == torch.device("cpu")
    assert torch.equal(small(X)["logits"], small(X, labels=labels)["logits"])
