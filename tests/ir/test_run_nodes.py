"""A tap sees every value and may give another; a run drops what is read, changes nothing and says where it fails."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphcomp
from graphcomp.capture.capture import Captured, capture
from graphcomp.ir.graph import source_line
from graphcomp.ir.run_nodes import Lockstep, Run, compute_node, failed_at, run_tapped
from graphcomp.ir.shapes import run_shapes

aten = torch.ops.aten
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """Writes into a buffer and into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(6))
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x.mul_(2)
        return self.down(torch.relu(self.up(x + self.calls)))


def plain() -> Captured:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), X)


def node_of(captured: Captured, target: Any) -> fx.Node:
    return captured.module.graph.find_nodes(op="call_function", target=target)[0]


def test_a_tap_sees_each_value_once_in_the_order_of_the_graph() -> None:
    captured, seen = plain(), list[tuple[str, Any]]()
    found = run_tapped(captured.module, [X], see=lambda node, value: seen.append((node.name, value)))
    assert [name for name, _ in seen] == [node.name for node in captured.module.graph.nodes if node.op != "output"]
    assert torch.equal(found[0], captured.module(X)) and found[0] is seen[-1][1]


def test_users_read_what_stands_instead() -> None:
    captured, seen = plain(), dict[fx.Node, Any]()
    relu = node_of(captured, aten.relu.default)
    (found,) = run_tapped(
        captured.module,
        [X],
        see=seen.__setitem__,
        instead=lambda node, value: torch.ones_like(value) if node is relu else value,
    )
    assert torch.equal(found, captured.original[2](torch.ones(4, 8)))
    assert torch.equal(seen[relu], captured.original[:2](X))


def test_a_value_is_dropped_after_the_last_use() -> None:
    captured, alive = plain(), dict[str, Any]()
    left: list[set[str]] = []

    def see(node: fx.Node, value: Any) -> None:
        if node.op == "call_function":
            left.append({name for name, weak in alive.items() if weak() is not None})
            alive[node.name] = weakref.ref(value)

    run_tapped(captured.module, [X], see=see)
    first, second, _ = alive
    assert left == [set(), {first}, {second}]


@pytest.mark.parametrize("run", ["tapped", "lockstep"])
def test_a_run_leaves_buffers_and_inputs_as_they_are(run: str) -> None:
    torch.manual_seed(0)
    model = Counting().eval()
    captured, x = capture(model, X.clone()), X.clone()
    expected = Counting.forward(copied := _copy(model), X.clone())
    for _ in range(2):
        if run == "tapped":
            (found,) = run_tapped(captured.module, [x])
        else:
            found, other = _in_lockstep(captured.module, [[x], [3 * x]])
            assert not torch.equal(found, other)
        torch.testing.assert_close(found, expected.detach())
    assert torch.equal(x, X) and not bool(captured.module.get_buffer("calls").any())
    assert bool(copied.calls.all())


def _copy(model: Counting) -> Counting:
    found = Counting()
    found.load_state_dict(model.state_dict())
    return found


def _in_lockstep(module: fx.GraphModule, batches: list[list[Tensor]]) -> list[Tensor]:
    steps, found = Lockstep(module, batches), list[Tensor]()
    for node in module.graph.nodes:
        steps.step(node)
        if node.op == "output":
            found = [values[0] for values in steps.of(node)]
        steps.drop(node)
    assert not any(run.values for run in steps.runs)
    return found


def test_gradients_are_recorded_where_asked() -> None:
    module = plain().module
    assert not run_tapped(module, [X])[0].requires_grad
    assert run_tapped(module, [X], gradients=True)[0].requires_grad


def test_a_node_may_be_computed_in_another_way() -> None:
    captured = plain()

    def negated(module: fx.GraphModule, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = compute_node(module, node, args, kwargs)
        return -found if node.target is aten.relu.default else found

    (found,) = run_tapped(captured.module, [X], compute=negated)
    assert torch.equal(found, captured.original[2](-captured.original[:2](X)))


@pytest.mark.parametrize("run", [lambda module, x: run_tapped(module, [x]), lambda module, x: run_shapes(module)])
def test_an_error_names_the_node_and_the_source_line(run: Callable[[fx.GraphModule, Tensor], Any]) -> None:
    captured = capture(Counting().eval(), X.clone())
    captured.module.get_submodule("down").weight = nn.Parameter(torch.ones(3, 5))
    last = captured.module.graph.find_nodes(op="call_function", target=aten.linear.default)[-1]
    with pytest.raises(RuntimeError) as raised:
        run(captured.module, X)
    assert failed_at(raised.value) == f"{last.name} {source_line(last)}"
    assert "test_run_nodes.py" in source_line(last) and "return self.down" in source_line(last)
    assert failed_at(RuntimeError("of something else")) == ""


def test_values_of_nodes_added_on_the_way_stay() -> None:
    captured = plain()
    module, relu = captured.module, node_of(captured, aten.relu.default)
    run = Run(module, [X])
    for node in module.graph.nodes:
        run.step(node)
        if node is relu:
            with module.graph.inserting_after(node):
                added = module.graph.call_function(aten.neg.default, (node,))
            for user in [user for user in relu.users if user is not added]:
                user.replace_input_with(relu, added)
        if node.op == "output":
            assert torch.equal(run.values[node][0], captured.original[2](-captured.original[:2](X)))
        run.drop(node)


def test_nodes_are_run_in_one_place() -> None:
    root = Path(graphcomp.__file__).parent
    other = [
        str(file) for file in root.rglob("*.py") if re.search(r"^\s*class \w+\(.*Interpreter", file.read_text(), re.M)
    ]
    assert not other
