"""Files of models with outputs, lengths and dtypes out of the ordinary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnxruntime")

import onnx_ir as ir

import graphcomp as gc
from graphcomp.capture.resized import OPEN
from graphcomp.errors import ExportError
from graphcomp.targets.runtime import run

pytestmark = [pytest.mark.slow, pytest.mark.ci]


@dataclass
class Result:
    logits: Tensor
    hidden: Tensor
    classes: int = 4


class Net(nn.Module):
    """(n, 8) -> whatever a test makes of input and logits."""

    def __init__(self, out: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 16), nn.Linear(16, 4), out

    def forward(self, x: Tensor) -> Any:
        return self.out(x, self.b(self.a(x).relu()))


def names(path: Path) -> tuple[list[str], list[str]]:
    """Of the inputs and outputs of a file."""
    graph = ir.load(path).graph
    return [str(value.name) for value in graph.inputs], [str(value.name) for value in graph.outputs]


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (lambda x, y: Result(y, y * 2), ["logits", "hidden"]),
        (lambda x, y: {"logits": y, "classes": 4, "name": "net", "none": None}, ["logits"]),
        (lambda x, y: (y, y.shape[0], y.shape), ["output_0"]),
        (lambda x, y: (y, x), ["output_0", "output_1"]),
        (lambda x, y: {"x": x, "y": y, "again": y}, ["output_x", "y", "again"]),
    ],
    ids=["dataclass", "numbers and words", "sizes", "input", "twice"],
)
def test_the_tensors_among_the_outputs_have_names_of_their_own(tmp_path: Path, out: Any, expected: list[str]) -> None:
    model, x = Net(out).eval(), torch.randn(2, 8)
    gc.compress(model, x, sparsity=0.5).export(tmp_path / "m.onnx")
    assert names(tmp_path / "m.onnx") == (["x"], expected)


def test_an_op_without_a_form_in_onnx_is_named_with_its_line(tmp_path: Path) -> None:
    model = Net(lambda x, y: torch.special.bessel_j0(y))
    small = gc.compress(model.eval(), torch.randn(2, 8), sparsity=0.5)
    with pytest.raises(ExportError, match=r"replace .*bessel_j0") as caught:
        small.export(tmp_path / "m.onnx")
    assert "test_files.py" in caught.value.at and "self.out(" in caught.value.at


class PerSample(nn.Module):
    """A convolution with as many groups as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.style, self.last = nn.Parameter(torch.randn(8, 3, 3, 3) / 5), nn.Linear(4, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernels = self.w[None] * self.style(z)[:, None, :, None, None]
        y = F.conv2d(x.view(1, b * c, h, w), kernels.view(b * 8, c, 3, 3), padding=1, groups=b)
        return self.last(y.view(b, 8, h, w).relu())


def test_a_file_for_one_shape_alone_says_so(tmp_path: Path) -> None:
    small = gc.compress(PerSample().eval(), (torch.rand(2, 3, 8, 8), torch.randn(2, 4)), sparsity=0.5)
    small.export(tmp_path / "m.onnx")
    assert small.export_report is not None
    (note,) = small.export_report.notes
    assert note.startswith("holds for inputs of the example's shapes alone: aten.conv2d")


# ------------------------------------------------------------------------------------------------ lengths
class Images(nn.Module):
    """(n, 3, h, w) through two convolutions, and something between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x).relu()))


IMAGES, OTHER = torch.rand(2, 3, 12, 12), torch.rand(1, 3, 20, 16)
HEIGHT_AND_WIDTH = {"x": {2: "height", 3: "width"}}


def constant(h: Tensor) -> Tensor:
    """Depends on the size by a number alone."""
    return h / (h.shape[2] * h.shape[3])


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("named", [False, True])
def test_other_image_sizes(tmp_path: Path, bits: int | None, named: bool) -> None:
    model = Images(lambda h: F.max_pool2d(h, 2)).eval()
    small = gc.compress(model, IMAGES, sparsity=0 if bits else 0.5, bits=bits, calibration=[IMAGES] if bits else None)
    small.export(tmp_path / "m.onnx", dynamic=HEIGHT_AND_WIDTH if named else None)
    (found,) = run(tmp_path / "m.onnx", (OTHER,))
    with torch.no_grad():
        assert torch.allclose(found, small(OTHER), atol=2e-2 if bits else 1e-5)
    (given,) = ir.load(tmp_path / "m.onnx").graph.inputs
    assert given.shape is not None
    sizes = [getattr(size, "value", size) for size in given.shape]
    assert sizes[1] == 3 and (not named or sizes[2:] == ["height", "width"])


def test_what_a_model_of_a_class_computes_from_sizes_is_computed_in_the_file(tmp_path: Path) -> None:
    small = gc.compress(Images(constant).eval(), IMAGES, sparsity=0.5)
    small.export(tmp_path / "m.onnx", dynamic=HEIGHT_AND_WIDTH)
    (found,) = run(tmp_path / "m.onnx", (OTHER,))
    assert small.form == "native" and torch.allclose(found, small(OTHER).detach(), atol=1e-6)


def test_a_graph_that_holds_sizes_as_constants_stays_at_the_examples_size(tmp_path: Path) -> None:
    small = gc.compress(Images(constant).eval(), IMAGES, sparsity=0, bits=8, calibration=[IMAGES])
    assert small.module.meta[OPEN] == {"x": ()}
    small.export(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="invalid dimensions"):
        run(tmp_path / "m.onnx", (OTHER,))
    with pytest.raises(ExportError, match="cannot be met along dim 2, 3"):
        small.export(tmp_path / "m.onnx", dynamic=HEIGHT_AND_WIDTH)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [({"images": {2: "h"}}, "no input of the model"), ({"x": {4: "h"}}, "dims from 0 to 3, got 4")],
)
def test_names_and_dims_that_do_not_exist(tmp_path: Path, dynamic: Any, message: str) -> None:
    small = gc.compress(Images(torch.tanh).eval(), IMAGES, sparsity=0.5)
    with pytest.raises(ExportError, match=message):
        small.export(tmp_path / "m.onnx", dynamic=dynamic)


class Sequences(nn.Module):
    """(n, t, 8) vectors, no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        return self.b((hidden @ hidden.transpose(1, 2)).softmax(-1) @ hidden)


@pytest.mark.parametrize("bits", [None, 8])
def test_lengths_of_sequences_of_vectors(tmp_path: Path, bits: int | None) -> None:
    x, other = torch.randn(2, 5, 8), torch.randn(3, 9, 8)
    small = gc.compress(
        Sequences().eval(),
        x,
        sparsity=0 if bits else 0.5,
        prune=None if bits else ("head_dim",),
        bits=bits,
        calibration=[x] if bits else None,
    )
    small.export(tmp_path / "m.onnx", dynamic={"x": {1: "time"}})
    (found,) = run(tmp_path / "m.onnx", (other,))
    with torch.no_grad():
        expected = small(other)
    assert float((found - expected).norm() / expected.norm()) < 0.05


class Cached(nn.Module):
    """Keeps a grid of the size that it saw last on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.size = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), None
        self.grid = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.size != x.shape[2:]:
            self.size, self.grid = x.shape[2:], torch.arange(x.shape[3]) / x.shape[3]
        return self.b(self.a(x).relu() + self.grid)


def test_a_model_that_ran_on_another_size_before(tmp_path: Path) -> None:
    small = gc.compress(Cached().eval(), IMAGES, sparsity=0.5)
    small(OTHER)
    small.export(tmp_path / "m.onnx")
    (found,) = run(tmp_path / "m.onnx", (IMAGES,))
    assert torch.allclose(found, small(IMAGES).detach(), atol=1e-5)


# ------------------------------------------------------------------------------------------------ float64
@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 16}], ids=str)
def test_weights_of_a_model_in_float64(tmp_path: Path, options: dict[str, int]) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).double().eval()
    small = gc.compress(model, torch.randn(2, 32).double(), sparsity=0, activation_bits=None, **options)
    small.export(tmp_path / "m.onnx")
    assert small.export_report is not None and small.export_report.agreement.error < 1e-12
    held = ir.load(tmp_path / "m.onnx").graph.initializers.values()
    weights = {value.dtype for value in held if value.shape is not None and value.shape.numpy() in ((32, 32), (4, 32))}
    assert weights and weights <= {ir.DataType.INT8, ir.DataType.INT4}
