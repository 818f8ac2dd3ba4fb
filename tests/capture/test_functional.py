"""In-place ops become functional, also through views; what has to stay in place does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcomp.capture.capture import Captured, capture
from graphcomp.ir.memory import is_writing, writers
from graphcomp.training.same_gradients import other_gradients

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.i, self.o = nn.Linear(8, 16), nn.Linear(16, 5)
        self.drop, self.lstm = nn.Dropout(0.5), nn.LSTM(8, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def setitem(self: Any, x: Tensor) -> Tensor:
    y = self.i(x)
    y[:, ::2] = 0
    return self.o(y)


def filled_buffer(self: Any, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 4, 16)
    for t in range(4):
        y[:, t] = self.i(x + t)
    return self.o(y).mean(1)


def view_of_a_view(self: Any, x: Tensor) -> Tensor:
    y = self.i(x).view(-1, 4, 4).transpose(1, 2)
    z = y[:, 1]
    z.mul_(3)
    y[:, :, 0].add_(1)
    z.add_(2)
    return self.o(y.flatten(1)) + z.sum()


def older_results(self: Any, x: Tensor) -> Tensor:
    y = self.i(x)
    z = y[:, :8]
    r = z.mul_(2)
    y.add_(1)
    y[:, 2:4] *= 2
    return self.o(y) + r.sum(1, keepdim=True)


def overlapping(self: Any, x: Tensor) -> Tensor:
    y = self.i(x)
    y[:, 1:] = y[:, :-1].clone()
    return self.o(y)


def stretched_and_cast(self: Any, x: Tensor) -> Tensor:
    y = self.i(x)
    y[:, :8] = x[:, :1].double()
    y[:, 9] = x.argmax(1)
    return self.o(y)


def masked(self: Any, x: Tensor) -> Tensor:
    y = self.i(x)
    y[y < 0] = 0.1
    return self.o(y)


def diagonal(self: Any, x: Tensor) -> Tensor:
    y = self.i(x).view(-1, 4, 4)
    torch.diagonal(y, 0, 1, 2).mul_(2)
    return self.o(y.flatten(1))


def one_of_several_results(self: Any, x: Tensor) -> Tensor:
    y, _ = self.lstm(x[:, None])
    y[:, 0, :4] = 1
    return self.o(y[:, 0])


def behind_dropout(self: Any, x: Tensor) -> Tensor:
    y = self.drop(self.i(x))
    y[:, 0] = 0
    return self.o(y)


def detached_before(self: Any, x: Tensor) -> Tensor:
    y = self.i(x)
    z = y.detach()
    y[:, 0] = 0
    return self.o(y) + z.sum(1, keepdim=True)


def copied(self: Any, x: Tensor) -> Tensor:
    y, z = self.i(x), self.i(x * 2)
    y.copy_(z)
    y.mul_(2)
    return self.o(y) + z.sum()


FUNCTIONAL = [
    setitem, filled_buffer, view_of_a_view, older_results, overlapping, stretched_and_cast, masked, diagonal,
    one_of_several_results, behind_dropout, detached_before, copied,
]  # fmt: skip


def is_functional(captured: Captured) -> bool:
    return not any(map(is_writing, captured.module.graph.nodes))


@pytest.mark.parametrize("body", FUNCTIONAL, ids=lambda body: body.__name__)
def test_a_write_becomes_functional_and_computes_the_same(body: Callable[[Any, Tensor], Tensor]) -> None:
    model = Net(body).eval()
    captured = capture(model, torch.randn(4, 8))
    assert is_functional(captured)
    x = torch.randn(6, 8)
    assert torch.equal(captured.module(x), model(x))
    assert other_gradients(captured) == ""


def dropped_and_written(self: Any, x: Tensor) -> Tensor:
    y = self.i(x)
    z = self.drop(y)  # in eval mode this is y itself
    y[:, 0] = 0
    return self.o(z)


def dropped_and_scaled(self: Any, x: Tensor) -> Tensor:
    y = self.i(x)
    z = self.drop(y)
    y.mul_(3)
    return self.o(z)


def written_beside_autograd(self: Any, x: Tensor) -> Tensor:
    y = self.i(x)
    y.detach()[:, 0] = 0
    return self.o(y)


def written_input(self: Any, x: Tensor) -> Tensor:
    x[:, 0] = 0
    return self.o(self.i(x))


IN_PLACE = [dropped_and_written, dropped_and_scaled, written_beside_autograd, written_input]


@pytest.mark.parametrize("body", IN_PLACE, ids=lambda body: body.__name__)
def test_a_write_that_has_to_stay_in_place_computes_the_same(body: Callable[[Any, Tensor], Tensor]) -> None:
    model = Net(body).eval()
    captured = capture(model, torch.randn(4, 8))
    assert not is_functional(captured)
    x = torch.randn(6, 8)
    with torch.no_grad():
        assert torch.equal(captured.module(x.clone()), model(x.clone()))


def test_writers_names_every_node_of_the_memory() -> None:
    captured = capture(Net(dropped_and_written).eval(), torch.randn(4, 8))
    found = {node.target for node in writers(captured.module)}
    assert {aten.linear.default, aten.dropout.default, aten.select.int} <= found
    assert {str(op.target) for op in writers(captured.module).values()} == {"aten.fill_.Tensor"}


def test_a_graph_that_writes_nothing_has_no_writers() -> None:
    assert writers(capture(Net(setitem).eval(), torch.randn(4, 8)).module) == {}


def test_a_write_through_a_view_becomes_a_scatter() -> None:
    captured = capture(Net(setitem).eval(), torch.randn(4, 8))
    (scatter,) = captured.module.graph.find_nodes(op="call_function", target=aten.slice_scatter.default)
    assert "test_functional.py" in scatter.meta["stack_trace"]
    assert [user.target for user in scatter.users] == [aten.linear.default]
