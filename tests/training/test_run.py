"""What a run must be, and what may stand in for tensors of its module."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphcomp as gc
from tests.methods.learning import compress, net


class Plain(gc.Run):
    name = "plain"


class Nameless(gc.Run):
    pass


class Elsewhere(Plain):
    def __init__(self, ready: gc.Prepared) -> None:
        super().__init__(gc.prepare(net(), torch.randn(2, 1, 6, 6), bits=None))


class Begun(Plain):
    def __init__(self, ready: gc.Prepared) -> None:
        """Without that of the base."""


class Own(gc.Method):
    name = "own"

    def __init__(self, begin: Any) -> None:
        self._begin = begin

    def begin(self, ready: gc.Prepared, goal: gc.Goal, training: gc.Training, steps: int) -> gc.Run:
        return self._begin(ready)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (lambda ready: None, r"what begin returns must be a graphcomp\.Run, got None"),
        (Nameless, "a Nameless must have a name, got None"),
        (Elsewhere, "a Elsewhere must train the module that begin is called with"),
        (Begun, "a Begun must train the module that begin is called with"),
    ],
)
@pytest.mark.slow
@pytest.mark.ci
def test_what_is_no_run_of_the_module(begin, message, folder, tmp_path):
    with pytest.raises(gc.PlanError, match=message) as caught:
        compress(Own(begin), folder=tmp_path if folder else None)
    assert caught.value.fix


def test_a_method_without_a_name_is_refused():
    class Unnamed(Own):
        name = ""

    with pytest.raises(gc.PlanError, match="method is a Unnamed without a name"):
        compress(Unnamed(Plain))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"frist.weight": torch.zeros(8, 1, 3, 3)}, "'frist.weight' is no parameter or buffer"),
        ({"nowhere": torch.zeros(1)}, "'nowhere' is no parameter or buffer"),
        ({"head.wait": torch.zeros(3, 8)}, "'head.wait' is no parameter or buffer"),
        ({"head.weight": torch.zeros(8, 3)}, r"'head.weight' must be a tensor of shape \(3, 8\), got \(8, 3\)"),
        ({"head.weight": 0}, r"'head.weight' must be a tensor of shape \(3, 8\), got 0"),
    ],
)
def test_what_cannot_stand_in_is_refused(tensors, message):
    class Other(Plain):
        def loss(self, forward: Any, batch: Any, task: Any) -> torch.Tensor:
            return task(forward(batch, tensors), batch)

    with pytest.raises(gc.PlanError, match=message) as caught:
        compress(Own(Other))
    if "first.weight" in caught.value.fix:
        assert "frist" in message


def test_metrics_without_bits_are_shown(capsys):
    class Few(Plain):
        def metrics(self) -> dict[str, Any]:
            return {"own": 1.0}

    from graphcomp.training.loop import _Loop

    run = Few(gc.prepare(net(), torch.randn(2, 1, 6, 6), bits=None))
    loop = _Loop.__new__(_Loop)
    loop.run, loop.step, loop.total, loop.last_loss = run, 1, 2, 0.5
    assert "bits -/-" in loop._line()
