"""`report.verified` holds only what was compared; what could not be checked is named, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp import testing
from graphcomp.report.report import Report


@torch.library.custom_op("tests::reversed", mutates_args=())
def reverse(x: Tensor) -> Tensor:
    return x.flip(-1).clone()


@reverse.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tests::picky", mutates_args=())
def picky(x: Tensor) -> Tensor:
    if not x[:, 0].eq(x[0, 0]).all():
        raise ValueError("the first column must be one number")
    return x.clone()


@picky.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


gc.rule("tests::reversed", "n c -> n c")  # wrong on purpose: the op reverses the channels
gc.rule("tests::picky", "n *c -> n *c")


class Net(nn.Module):
    def __init__(self, last: Callable[[Tensor], Any] = lambda y: y, inside: Callable[[Tensor], Tensor] = torch.relu):
        super().__init__()
        self.a, self.b, self.inside, self.last = nn.Linear(8, 16), nn.Linear(16, 4), inside, last

    def forward(self, x):
        return self.last(self.b(self.inside(self.a(x))))


SILENT: dict[str, Callable[[Tensor], Any]] = {
    "classes": lambda y: y.argmax(-1),
    "flags": lambda y: y > 0,
    "order": lambda y: y.sort(-1).indices + 1,
    "rounded": lambda y: y.mul(10).round().long().clamp(0, 3),
    "nan": lambda y: (-y.abs() - 1).log(),
    "zero": lambda y: (-y.abs()).relu(),
    "one number": lambda y: (y.abs() + 1).sign(),
    "empty": lambda y: y[:, :0],
    "one hot": lambda y: nn.functional.one_hot(y.argmax(-1), 4).float(),
    "some": lambda y: {"classes": y.argmax(-1), "zeros": y * 0},
}


def compress(model: nn.Module, x: Any, **options: Any) -> gc.CompressedModel:
    return gc.compress(model.eval(), x, progress=False, **options)


@pytest.mark.parametrize("last", SILENT)
def test_a_wrong_cut_is_refused_whatever_is_returned(last: str) -> None:
    with pytest.raises(gc.VerificationError):
        compress(Net(SILENT[last], torch.ops.tests.reversed), torch.randn(8, 8))


@pytest.mark.parametrize("last", SILENT)
def test_the_floats_before_are_compared(last: str) -> None:
    report = compress(Net(SILENT[last]), torch.randn(8, 8)).report
    assert 0 < report.verified["masked == sliced"] < 1e-5
    assert 0 <= report.verified["native == sliced"] < 1e-5
    assert report.unchecked == {}
    assert last == "one hot" or any("floats" in note and "compared" in note for note in report.notes)


def test_outputs_that_depend_on_no_float_are_not_checked() -> None:
    class Passes(Net):
        """The graph holds the layers, as they write into an input that nobody compares where it is NaN."""

        def forward(self, x, h):
            h.copy_(super().forward(x) * torch.nan)
            return x.argmax(-1)

    small = compress(Passes(), (torch.randn(8, 8), torch.zeros(8, 4)))
    report = small.report
    assert report.verified == {}
    assert set(report.unchecked) == {"masked == sliced", "native == sliced"}
    assert "output '0' holds integers" in report.unchecked["native == sliced"]
    assert "not checked     masked == sliced: output '0' holds integers" in str(report)
    assert Report.from_dict(report.to_dict()) == report


def test_a_wrong_cut_that_the_example_does_not_show_is_refused() -> None:
    model = Net(inside=torch.ops.tests.reversed)
    nn.init.zeros_(model.a.bias)
    with pytest.raises(gc.VerificationError, match="on other values"):
        compress(model, torch.zeros(8, 8))


def test_inputs_that_the_model_refuses_are_named() -> None:
    class Picky(Net):
        def forward(self, x):
            return super().forward(torch.ops.tests.picky(x))

    x = torch.randn(8, 8)
    x[:, 0] = 1
    report = compress(Picky(), x).report
    assert report.verified["masked == sliced"] < 1e-5
    assert set(report.unchecked) == {"masked == sliced, on other values", "masked == sliced, on another batch size"}
    assert "the first column must be one number" in report.unchecked["masked == sliced, on other values"]


def test_without_values_nothing_is_checked() -> None:
    with torch.device("meta"):
        model, x = Net(), torch.randn(8, 8)
    report = compress(model, x, saliency="random").report
    assert report.verified == {} and "meta" in report.unchecked["masked == sliced"]


def test_a_trained_model_that_returns_classes() -> None:
    ready = gc.prepare(Net(SILENT["classes"]), torch.randn(8, 8))
    ready.keep({group: torch.arange(8) for group in ready.session.groups})
    report = gc.finalize(ready).report
    assert report.verified["trained == sliced"] < 1e-9 and report.verified["sliced == folded"] < 1e-6
    wrong = gc.prepare(Net(SILENT["classes"], torch.ops.tests.reversed), torch.randn(8, 8), bits=None)
    wrong.keep({group: torch.arange(8) for group in wrong.session.groups})
    with pytest.raises(gc.VerificationError):
        gc.finalize(wrong)


def test_integers_are_not_verified_where_nothing_was_quantized() -> None:
    class Written(nn.Module):
        def forward(self, x):
            return x.sin()

    report = compress(Written(), torch.randn(4, 8), sparsity=0, bits=8).report
    assert report.verified == {} and report.unchecked == {"integers == fake-quant, in steps": "nothing was quantized"}


def test_the_public_law_looks_before_classes() -> None:
    with pytest.raises(gc.VerificationError):
        testing.check_law(Net(SILENT["classes"], torch.ops.tests.reversed).eval(), torch.randn(8, 8))
    found = testing.check_law(Net(SILENT["classes"]).eval(), torch.randn(8, 8))
    assert 0 < found.max_relative_error < 1e-5 and not found.unchecked
