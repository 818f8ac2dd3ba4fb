"""scope=: one part of a model is compressed, while the rest may read the part's layers and tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.numerics.compare import relative_error
from graphcomp.testing import randomize


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.mid, self.out = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        randomize(self)  # norms that differ from the identity

    def forward(self, x):
        y = self.norm(self.stem(x)).relu()
        return self.out(self.mid(y).relu())


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((-1, -2)) + self.extra(x))

    def extra(self, x) -> Any:
        return 0


class Calls(Whole):
    """Calls layers of the body, too."""

    def extra(self, x):
        return self.body.norm(self.body.stem(x)).mean((-1, -2))


class Reads(Whole):
    """Reads a weight of the body by position."""

    def extra(self, x):
        return F.conv2d(x, self.body.stem.weight[8:12]).mean((1, 2, 3))[:, None]


class Asks(Whole):
    """Computes with a length of the body."""

    def extra(self, x):
        return self.body.mid.out_channels / 16


class Hooked(Whole):
    """Takes features out of the body by a hook."""

    def __init__(self):
        super().__init__()
        self.seen: list[Tensor] = []
        self.body.mid.register_forward_hook(lambda _m, _i, out: self.seen.append(out))

    def forward(self, x):
        self.seen.clear()
        y = self.body(x).mean((-1, -2))
        return self.head(y) + self.seen[0][:, 8:12].mean((-1, -2))


class Pyramid(Whole):
    """Calls the body on images of several sizes."""

    def extra(self, x):
        return self.body(x[..., ::2, ::2]).amax((-1, -2)) + self.body(x.flip(-1)).amax((-1, -2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU()
        self.body = nn.Sequential(*layers, nn.Linear(24, 8))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.body[0].weight
        self.same = self.body[6]

    def forward(self, x):
        return self.head(self.body(x)).sum(-1, keepdim=True) + self.same(x[:, :1].expand(-1, 24))


def image() -> Tensor:
    return torch.rand(2, 3, 8, 8)


def compress(model: nn.Module, x: Tensor, **options: Any) -> gc.CompressedModel:
    return gc.compress(model.eval(), x, scope="body", progress=False, **options)


def masked(model: nn.Module, kept: Any) -> nn.Module:
    """A copy in which the units that are gone are zero: between convolutions with a ReLU."""
    twin = copy.deepcopy(model)
    tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())
    for name, dims in kept.items():
        for dim, indices in dims.items():
            gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
            gone[indices] = False
            tensors[name].detach().index_fill_(dim, gone.nonzero().flatten(), 0)
    return twin


@pytest.mark.parametrize("kind", [Whole, Calls, Reads, Pyramid])
def test_the_whole_model_computes_what_the_masked_one_does(kind: type[Whole]) -> None:
    model, x = kind().eval(), image()
    small = compress(model, x)
    assert small.form == "native" and small.report.units_removed > 0
    assert relative_error(masked(model, small.kept)(x), small(x)) < 1e-5
    assert "whole model around the submodule" in small.report.verified


@pytest.mark.parametrize(("kind", "held"), [(Calls, "body.norm"), (Reads, "body.stem")])
def test_what_the_rest_reads_keeps_its_width_and_is_named(kind: type[Whole], held: str) -> None:
    small = compress(kind(), image())
    assert "body.stem.weight" not in small.kept and "body.mid.weight" in small.kept
    assert any(held in note and "rest of the model" in note for note in small.report.notes)
    reasons = [str(f.reason) for f in small.report.frozen if f.name == "stem.weight"]
    assert any("test_whole.py" in reason for reason in reasons)


@pytest.mark.parametrize("kind", [Whole, Calls, Reads, Pyramid])
def test_a_quantized_part_can_be_called(kind: type[Whole]) -> None:
    model, x = kind().eval(), image()
    small = compress(model, x, sparsity=0, bits=8)
    assert relative_error(model(x), small(x)) < 0.1
    assert small.report.verified["whole model around the submodule"] == 0


@pytest.mark.parametrize(("kind", "error"), [(Asks, gc.VerificationError), (Hooked, gc.GraphcompError)])
def test_a_rest_that_computes_something_else_is_refused(kind: type[Whole], error: type[Exception]) -> None:
    with pytest.raises(error):
        compress(kind(), image())


def test_calls_of_other_sizes_are_named() -> None:
    report = compress(Pyramid(), image()).report
    assert set(report.unchecked) == {"masked == sliced, at call 2 of 'body'"}


def test_a_later_call_that_takes_another_path_is_refused() -> None:
    class Sides(Body):
        """Reads channels by position where the values are large, which the first call does not show."""

        def forward(self, x, flip=False):
            y = self.norm(self.stem(x)).relu()
            return self.out(self.mid(y.flip(1) if flip else y))

    class Twice(Whole):
        def __init__(self):
            super().__init__()
            self.body = Sides()

        def extra(self, x):
            return self.body(x, True).mean((-1, -2))

    report = compress(Twice(), image()).report
    assert set(report.unchecked) == {"masked == sliced, at call 2 of 'body'"}


@pytest.mark.parametrize("bits", [None, 8])
def test_tensors_and_modules_that_the_rest_holds_too_stay_one(bits: int | None) -> None:
    model, x = Tied().eval(), torch.rand(4, 8)
    small = compress(model, x, bits=bits)
    whole = small.module
    names = {name for name, p in whole.named_parameters(remove_duplicate=False) if p is whole.head.weight}
    assert names >= {"head.weight", "body.0.weight"}
    assert small.report.units_removed > 0 and "body.0.weight" not in small.kept
    assert relative_error(masked(model, small.kept)(x), small(x)) < (1e-5 if bits is None else 0.1)
    if bits is None:
        assert whole.same is whole.body[6]
    else:
        assert whole.same.weight is whole.body.get_submodule("6").weight


@pytest.mark.parametrize("bits", [None, 8])
def test_modules_that_the_rest_registers_and_never_calls(bits: int | None) -> None:
    class Registered(Whole):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([self.body.stem, self.body.mid])

    model, x = Registered().eval(), image()
    small = compress(model, x, bits=bits)
    assert small.report.units_removed > 0 and "body.stem.weight" in small.kept
    if bits is None:
        assert small.module.layers[0] is small.module.body.stem
    else:
        assert any("'layers.0' is no longer one module" in note for note in small.report.notes)


def test_a_recorded_part() -> None:
    class ByValue(Body):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    class Outer(Calls):
        def __init__(self):
            super().__init__()
            self.body = ByValue()

    model, x = Outer().eval(), image()
    small = compress(model, x)
    assert small.report.units_removed > 0 and "body.stem.weight" not in small.kept
    assert relative_error(masked(model, small.kept)(x), small(x)) < 1e-5


def test_training_a_part_that_the_rest_calls_is_refused() -> None:
    x = image()
    options = {"data": [x] * 4, "loss": lambda out, _: out.square().mean(), "steps": 8}
    with pytest.raises(gc.PlanError, match=r"calls 'body\.stem' itself"):
        compress(Calls(), x, **options)


def test_a_quantized_part_and_what_the_rest_calls_are_exported(tmp_path: Path) -> None:
    model, x = Calls().eval(), image()
    small = compress(model, x, bits=8)
    with pytest.raises(gc.CheckpointError, match=r"calls 'body\.stem'"):
        small.save(tmp_path / "small")
    small.export(tmp_path / "small.pt2")
    assert small.export_report.agreement.within_a_step
