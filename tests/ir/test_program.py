"""Program and Inputs: bound to other tensors, the graph is the same and nothing changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.ir.graph import clone
from graphcomp.ir.module import tensor_names

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """Two names for one weight, a buffer and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.register_buffer("shift", torch.ones(6))
        self.scale = torch.full((6,), 2.0)

    def forward(self, x: torch.Tensor, *, more: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) + self.shift) * self.scale + more


def test_bound_programs_compute_with_their_own_tensors() -> None:
    model = Tied().eval()
    program = capture(model, X, {"more": X})
    before = {name: tensor.clone() for name, tensor in tensor_names(model).items()}
    other = Tied().eval()
    with torch.no_grad():
        other.shift.mul_(3)
    other.scale = torch.full((6,), 5.0)
    bound = program.bind(tensor_names(other))
    assert bound.graph is program.graph and type(bound) is type(program)
    torch.testing.assert_close(bound.module(X, more=X), other(X, more=X))
    torch.testing.assert_close(bound.original(X, more=X), other(X, more=X))
    torch.testing.assert_close(program.module(X, more=X), model(X, more=X))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensor_names(model).items())
    assert program.original is model and bound.original.a.weight is bound.original.b.weight is other.a.weight


def test_a_bound_analysis_is_cut_like_the_first() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval() for _ in range(2)]
    plan = gc.analyze(models[0], X)
    bound = plan.bind(tensor_names(models[1]))
    small = gc.slice_groups(bound, {bound.groups[0]: range(5)})
    assert bound.groups is plan.groups and small.form == "native"
    masked = models[1]
    with torch.no_grad():
        masked[2].weight[:, 5:] = 0
    torch.testing.assert_close(small(X), masked(X))


def test_axes_are_shared_by_bound_programs_and_unknown_after_a_rewriting() -> None:
    program = replace(gc.analyze(Tied().eval(), X, {"more": X}).captured, stages={"earlier": capture(nn.ReLU(), X)})
    bound = program.bind(tensor_names(Tied()))
    assert program.coupling is not None and bound.coupling is program.coupling and not bound.stages
    copied, _ = clone(program.module)
    assert program.rewritten(copied).coupling is None
    with pytest.raises(AssertionError, match="must be of the program's graph"):
        replace(program, module=copied)


def test_inputs_are_flat_in_the_order_of_the_graph() -> None:
    program = capture(Tied().eval(), X, {"more": X + 1})
    first, second = program.inputs.flat()
    assert torch.equal(first, X) and torch.equal(second, X + 1)
    other = program.inputs.of((X + 2,), {"more": X + 3})
    assert [float((t - X).mean().round()) for t in other.flat()] == [2, 3]
    args, kwargs = other.copies()
    args[0].zero_()
    assert torch.equal(other.args[0], X + 2) and kwargs["more"] is not other.kwargs["more"]
    assert {t.device.type for t in other.to(torch.device("meta")).flat()} == {"meta"}
