"""What a user is told to paste: a rule proposed from shapes, in the notation, that fits the op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.ops.registry import forget

NAME = "graphcomp_teach::"


def define(name: str, function: Any) -> None:
    torch.library.custom_op(NAME + name, function, mutates_args=()).register_fake(
        lambda *args: torch.empty_like(function(*args))
    )


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return nn.functional.linear(x, w, b)


def scale(x: Tensor, s: Tensor) -> Tensor:
    return x * s[:, None, None]


def gate(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def row(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def total(xs: list[Tensor]) -> Tensor:
    return xs[0] + xs[1]


for _function in (linear, scale, gate, row, total):
    define(_function.__name__, _function)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    for function in (linear, scale, gate, row, total):
        forget(NAME + function.__name__)


class Between(nn.Module):
    """The op `name` behind a convolution or a linear layer, on own parameters of given shapes."""

    def __init__(self, name: str, first: nn.Module, *shapes: tuple[int, ...], twice: bool = False) -> None:
        super().__init__()
        self.name, self.first, self.twice = name, first, twice
        self.own = nn.ParameterList([nn.Parameter(torch.rand(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Any:
        """Return what the op returns."""
        op, y = getattr(torch.ops.graphcomp_teach, self.name), self.first(x)
        return op([y, y]) if self.name == "total" else op(y, *([y] if self.twice else []), *self.own)


CASES: dict[str, tuple[nn.Module, Tensor, str]] = {
    "linear": (Between("linear", nn.Linear(4, 8), (6, 8), (6,)), torch.randn(5, 4), "... a, b a, b -> ... b"),
    "square": (Between("linear", nn.Linear(4, 8), (8, 8)), torch.randn(5, 4), "... a, b a -> ... b"),
    "scale": (
        Between("scale", nn.Conv2d(3, 8, 1), (8,)), torch.randn(2, 3, 5, 6), "... a b c, a -> ... a b c"
    ),
    "gate": (Between("gate", nn.Linear(4, 8), twice=True), torch.randn(5, 3, 4), "... a, ... a -> ... a"),
    "row": (Between("row", nn.Linear(4, 8)), torch.randn(5, 4), "a *z -> a *y"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_proposal_is_a_rule_that_fits(case: str) -> None:
    model, x, rule = CASES[case]
    (unknown,) = gc.analyze(model, x).unknown_ops
    assert unknown.fix == f'graphcomp.rule("{NAME}{model.name}", "{rule}")'
    exec(unknown.fix, {"graphcomp": gc})
    assert gc.analyze(model, x).unknown_ops == ()


def test_tensors_in_a_list_take_a_rule_in_python() -> None:
    (unknown,) = gc.analyze(Between("total", nn.Linear(4, 8)), torch.randn(5, 4)).unknown_ops
    assert unknown.fix.startswith(f"@graphcomp.rule('{NAME}total') above a rule in Python")


@pytest.mark.parametrize("wrong", ["n c h, c -> n c h", None])
def test_a_rule_that_is_there_is_to_be_corrected(wrong: str | None) -> None:
    def failing(x: Any, s: Any) -> Any:
        raise ZeroDivisionError("oops")

    if wrong is None:
        gc.rule(NAME + "scale")(failing)
    else:
        gc.rule(NAME + "scale", wrong)
    model, x, _ = CASES["scale"]
    (unknown,) = gc.analyze(model, x).unknown_ops
    assert unknown.fix.startswith(f"correct the rule: graphcomp.ops.registry.forget('{NAME}scale'), then")
    with pytest.raises(gc.NothingToPrune) as error:
        gc.compress(model, x, sparsity=0.5, progress=False)
    assert error.value.fix == unknown.fix


def test_an_integer_result_is_not_to_be_cut_again() -> None:
    layers = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    model = nn.Sequential(*layers).eval()  # the first and the last layer have 8 bits and are not packed
    small = gc.compress(model, torch.randn(5, 4), sparsity=0, bits=3, activation_bits=None, progress=False)
    with pytest.raises(gc.NothingToPrune) as error:
        gc.compress(small, torch.randn(5, 4), sparsity=0.3, progress=False)
    assert error.value.fix.startswith("compress the float model") and "graphcomp.rule" not in error.value.fix
