"""A small model and data that training methods run on in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc


class Net(nn.Module):
    """(n, 1, 6, 6) -> (n, 3): two convolutions with batch norms, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(self.first(x)))
        return self.head(F.relu(self.two(self.second(x))).mean((2, 3)))


class Outer(nn.Module):
    """`Net` inside of a model: (n, 1, 6, 6) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = net(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batches(count: int = 4, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Images of noise whose class is the third that is brighter."""
    draws = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        labels = torch.randint(3, (size,), generator=draws)
        images = torch.randn(size, 1, 6, 6, generator=draws)
        for k, label in enumerate(labels.tolist()):
            images[k, 0, :, 2 * label : 2 * label + 2] += 1.5
        found.append((images, labels))
    return found


def loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


class Stop(Exception):
    """Ends a run where it is raised."""


def compress(
    method: Any, *, folder: Path | None = None, calls: int | None = None, **options: Any
) -> gc.CompressedModel:
    """Compress `net()` in 24 steps; with `calls`, the run is cut short when the loss was computed so often."""
    done = 0

    def counted(output: Tensor, batch: Any) -> Tensor:
        nonlocal done
        done += 1
        if calls is not None and done > calls:
            raise Stop
        return loss(output, batch)

    training = {"lr": 0.05, "steps": 24, "folder": folder, "save_every": 1, **options.pop("training", {})}
    data = options.pop("data", None) or batches()
    model = options.pop("model", None) or net()
    return gc.compress(
        model, data[0][0], method=method, data=data, loss=counted, training=gc.Training(**training), progress=False,
        **options,
    )  # fmt: skip


def weight_of(small: gc.CompressedModel, name: str) -> Tensor:
    """The float weight of a layer of a compressed model, dequantized."""
    found = {str(node.target): node for node in small.module.graph.nodes if node.op == "get_attr"}
    codes = next(target for target in found if name in target and target.endswith("_codes"))
    scale, zero = (small.module.get_buffer(codes.replace("_codes", f"_{what}")) for what in ("scale", "zero_point"))
    values = small.module.get_buffer(codes)
    assert values.dtype in (torch.int8, torch.uint8)
    shape = [-1, *[1] * (values.dim() - 1)] if scale.dim() else []
    return (values.float() - zero.view(shape)) * scale.view(shape)


def check_saved_and_exported(small: gc.CompressedModel, folder: Path) -> None:
    """Compare a loaded folder with the model bit for bit, and an .onnx file with the model in onnxruntime."""
    inputs = batches()[0][0]
    expected = small(inputs)
    small.save(folder / "folder")
    assert torch.equal(gc.load(folder / "folder").eval()(inputs), expected)
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    small.export(folder / "model.onnx")
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected.detach(), rtol=1e-5, atol=1e-5)
