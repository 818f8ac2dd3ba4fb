"""Gradients of a prepared module are those of the model, also where a user wrote the backward."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import graphcomp as gc
from graphcomp.capture.backward import calls_in
from graphcomp.capture.capture import capture
from graphcomp.training.same_gradients import other_gradients

X = torch.randn(4, 8)


class Round(Function):
    """Straight-through rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Reverse(Function):
    """Gradient reversal, with a number beside the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


class Both(Function):
    """Two operands, two results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x * w, x + 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * gradient * w + other, 3 * (gradient * x).sum(0)


class Product(Function):
    """A matrix product whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 5 * gradient @ w, gradient.t() @ x


class Noise(Function):
    """Stochastic rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x + 1e-9 * torch.rand_like(x)).round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Model(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(8, 32), nn.Linear(32, 4), function
        self.w, self.m = nn.Parameter(torch.rand(32)), nn.Parameter(torch.randn(32, 32) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self, self.a(x).relu()))  # type: ignore[no-any-return]


def both(model: Any, x: Tensor) -> Tensor:
    y, z = Both.apply(x, model.w)
    return y + z  # type: ignore[no-any-return]


def hooked(_model: Any, x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: -gradient)
    return x * 1


KEPT: dict[str, Callable[[Any, Tensor], Any]] = {
    "straight through": lambda m, x: Round.apply(x),
    "reversal": lambda m, x: Reverse.apply(x, 0.5),
    "two operands": both,
    "of a weight": lambda m, x: x * Round.apply(m.w),
    "detached": lambda m, x: x + (x.round() - x).detach(),
    "matrix product": lambda m, x: Product.apply(x, m.m),
}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    module.zero_grad()
    module(X).square().mean().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", KEPT)
def test_gradients_are_those_of_the_model(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Model(KEPT[name])
    with caplog.at_level(logging.WARNING, "graphcomp"):
        ready = gc.prepare(model, X, bits=None).train()
    assert not [r for r in caplog.records if "gradient" in r.getMessage()]
    wanted, got = gradients(model), gradients(ready)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(got[parameter], gradient)


def test_units_are_masked_shrunk_and_cut_around_a_function() -> None:
    model = Model(KEPT["straight through"])
    ready = gc.prepare(model, X, bits=(4, 8)).train()
    (group,) = ready.session.groups
    ready.keep({group: torch.arange(0, 32, 2)})
    first = gradients(ready)["a.weight"]
    assert first[::2].any()
    assert not first[1::2].any()
    small = gc.shrink(ready)
    torch.testing.assert_close(gradients(small)["a.weight"], first[::2])
    assert gc.finalize(ready).report.units_removed == 16


def test_what_is_lost_is_named_with_its_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graphcomp"):
        ready = gc.prepare(Model(KEPT["matrix product"]), X, bits=(4, 8))  # quantizers stand inside of the forward
    (message,) = [r.getMessage() for r in caplog.records if "gradient" in r.getMessage()]
    assert message.startswith(
        "Model: the gradient of a.weight, a.bias is not that of the model: the backward of Product"
    )
    assert "test_same_gradients.py" in message
    assert any("the backward of Product" in note for note in gc.finalize(ready).report.notes)


@pytest.mark.parametrize(
    ("function", "reason"),
    [(lambda m, x: Noise.apply(x), "the backward of Noise"), (hooked, "a hook or other code of eager mode")],
)
def test_what_a_graph_cannot_keep_is_warned_of(function: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graphcomp"):
        gc.prepare(Model(function), X, bits=None)
    assert any(reason in r.getMessage() for r in caplog.records)


def test_a_graph_for_inference_says_that_it_is_one() -> None:
    class Fixed(Model):
        """Its class cannot hold another width."""

        def forward(self, x: Tensor) -> Tensor:
            assert self.a.weight.shape[0] == 32
            return super().forward(x)

    small = gc.compress(Fixed(KEPT["straight through"]).eval(), X, sparsity=0.5)
    assert small.form == "graph"
    assert any("the graph is for inference: the gradient of a.weight" in note for note in small.report.notes)


def test_a_trained_graph_keeps_the_backward_and_files_go_without(tmp_path: Path) -> None:
    graph = capture(Model(KEPT["reversal"]).eval(), X, training=True).module
    assert len(calls_in(graph.graph)) == 1
    again = copy.deepcopy(graph)
    assert torch.equal(gradients(again)["a.weight"], gradients(graph)["a.weight"])
    stored = pickle.loads(pickle.dumps(graph))
    assert torch.equal(stored(X), graph(X))
    ready = gc.prepare(Model(KEPT["reversal"]), X, bits=None)
    small = gc.finalize(ready)
    small.module = graph
    small.export(tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert "backward_of" not in str(loaded.graph)


def test_a_model_without_gradients_is_prepared() -> None:
    model = Model(KEPT["straight through"]).requires_grad_(False)
    assert other_gradients(capture(model, X, training=True)) == ""


def test_functions_of_others_run_as_they_are() -> None:
    before = vars(Function)["apply"]
    capture(Model(KEPT["straight through"]).eval(), X, training=True)
    assert vars(Function)["apply"] is before
