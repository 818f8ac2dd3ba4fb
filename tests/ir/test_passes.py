"""A pipeline says in which pass, and after which, a graph became invalid or a pass failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

import graphcomp as gc
from graphcomp.capture.capture import Captured, capture
from graphcomp.errors import PassError
from graphcomp.ir.graph import clone
from graphcomp.ir.passes import GraphPass, Pipeline, wrong_value

aten = torch.ops.aten


def program() -> Captured:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    return capture(model, torch.randn(4, 6))


@dataclass(frozen=True)
class Edit(GraphPass):
    name: str  # type: ignore[misc]  # one per test
    edit: Callable[[fx.GraphModule], None] = lambda module: None

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        copied, _ = clone(module)
        self.edit(copied)
        copied.recompile()
        return copied


def relu(module: fx.GraphModule) -> fx.Node:
    (node,) = module.graph.find_nodes(op="call_function", target=aten.relu.default)
    return node


def tanh(module: fx.GraphModule) -> None:
    relu(module).target = aten.tanh.default


def lose_tensor(module: fx.GraphModule) -> None:
    del module.get_submodule("2").weight


def disorder(module: fx.GraphModule) -> None:
    node = relu(module)
    node.args[0].prepend(node)


def halve(module: fx.GraphModule) -> None:
    """Compute another shape than the nodes say."""
    layer = module.get_submodule("0")
    layer.weight, layer.bias = nn.Parameter(layer.weight[:4].detach()), nn.Parameter(layer.bias[:4].detach())
    last = module.get_submodule("2")
    last.weight = nn.Parameter(last.weight[:, :4].detach())


def fail(module: fx.GraphModule) -> None:
    raise KeyError("lost")


def refuse(module: fx.GraphModule) -> None:
    raise gc.PlanError("not like this")


KEEP = Edit("keep")


def test_passes_run_one_after_the_other_and_change_no_program() -> None:
    first = program()
    last = Pipeline("two", (Edit("tanh", tanh), KEEP))(first)
    x = first.inputs.flat()[0]
    assert isinstance(last, Captured) and last.inputs is first.inputs and wrong_value(last.module) is None
    weights = last.tensors
    assert all(weights[name] is tensor for name, tensor in first.tensors.items())
    expected = torch.tanh(x @ weights["0.weight"].T + weights["0.bias"]) @ weights["2.weight"].T + weights["2.bias"]
    torch.testing.assert_close(last.module(x), expected)
    assert relu(first.module) is not None


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lose_tensor, "there is no '2.weight'"),
        (disorder, "used before it has been defined"),
        (halve, r"(?s)_0_weight.*the node says \(\(8, 6\), .*computes \(\(4, 6\)"),
    ],
)
def test_an_invalid_graph_names_the_pass_and_the_one_before(edit: Callable[[fx.GraphModule], None], says: str) -> None:
    passes = (KEEP, Edit("break", edit), Edit("keep again"))
    with pytest.raises(gc.VerificationError, match=says) as raised:
        Pipeline("three", passes)(program())
    assert str(raised.value).startswith("the pass 'break' of 'three', after 'keep' left a graph that is not valid")


def test_a_pass_that_fails_is_named() -> None:
    with pytest.raises(PassError, match=r"the pass 'fail' of 'two', after 'keep' failed\n(.|\n)*KeyError"):
        Pipeline("two", (KEEP, Edit("fail", fail)))(program())
    with pytest.raises(gc.PlanError, match="not like this") as raised:
        Pipeline("one", (Edit("refuse", refuse),))(program())
    assert raised.value.__notes__ == ["in the pass 'refuse' of 'one'"]


def test_quantizing_names_the_pass_that_refuses() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(gc.CalibrationError) as raised:
        gc.compress(model, torch.randn(4, 6), bits=8, calibration=[torch.full((4, 6), torch.nan)], repair=None)
    assert raised.value.__notes__ == [
        "in the pass 'calibrate activations' of 'one shot, with bits', after 'calibrate weights'"
    ]
