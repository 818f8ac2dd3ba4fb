"""Answers about an op must fit the op: they are refused where they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graphcomp as gc
from graphcomp.ops.facts import Clip, Compute, Float, Lookup, Move
from graphcomp.ops.registry import facts_of, forget, known

FIRST = "graphcomp_fit::weight_first"


@torch.library.custom_op(FIRST, mutates_args=())
def weight_first(w: Tensor, x: Tensor, b: Tensor | None = None, *, gain: float = 1.0) -> Tensor:
    """A linear layer whose weight stands first."""
    return torch.nn.functional.linear(x, w, b) * gain


@weight_first.register_fake
def _(w: Tensor, x: Tensor, b: Tensor | None = None, *, gain: float = 1.0) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


RULE = "o i, ... i, o -> ... o"
RIGHT = Compute(("x",), "w", out=0, bias="b")


@pytest.mark.parametrize(
    ("integer", "message", "fix"),
    [
        (
            Move(),
            "operand of Move must be a tensor of graphcomp_fit.weight_first.default, got 'self'",
            "one of 'w', 'x', 'b'",
        ),
        (Compute(("x",), "nope"), "weight of Compute must be a tensor", "one of 'w', 'x', 'b'"),
        (Compute(("x",), "w", bias="bb"), "bias of Compute must be a tensor", "one of 'w', 'x', 'b'"),
        (Compute(("gain",), "w"), "data of Compute must be a tensor", "one of 'w', 'x', 'b'"),
        (Lookup("x"), "does not look rows up as aten::embedding does", "leave integer= out"),
        (Float("sums", rows="table"), "rows of Float must be a tensor", "one of 'w', 'x', 'b'"),
        (Clip("lowest"), "low of Clip must be an argument", "one of 'w', 'x', 'b', 'gain'"),
        (Compute(("x",), "w", out=7), "dim 7 of 'w' must count the output channels", "Compute(('x',), 'w', out=0)"),
        (Compute(("x",), "w", out=1), "dim 1 of 'w' must count the output channels", "Compute(('x',), 'w', out=0)"),
        ("like aten::linear", "dim 0 of 'x' must count the output channels", "Compute(('x',), 'w', out=0)"),
        ("like aten::nothing", "nothing is known of 'aten::nothing' on integers", "like aten::linear"),
    ],
)
def test_an_integer_form_that_does_not_fit_is_refused(integer: Any, message: str, fix: str) -> None:
    with pytest.raises(gc.RuleError) as error:
        gc.op(FIRST, RULE, integer=integer)
    assert message in error.value.what and fix in error.value.fix
    assert known(torch.ops.graphcomp_fit.weight_first.default).rule is None


def test_the_form_that_a_refusal_proposes_fits() -> None:
    gc.op(FIRST, RULE, integer=RIGHT)
    try:
        assert facts_of(torch.ops.graphcomp_fit.weight_first.default).integer == RIGHT
    finally:
        forget(FIRST)
