"""A node that a pass makes says what the node computes, and has the source line of the op that the node stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphcomp as gc
from graphcomp.capture.capture import Captured, capture
from graphcomp.coupling.analysis import analyze_captured
from graphcomp.ir.graph import module_path, source_line, value
from graphcomp.ir.rewrite import after, become, before, redirect, replace_node
from graphcomp.pruning.mask import InsertMasks
from graphcomp.pruning.slice import SliceGroups
from graphcomp.testing.law import random_kept
from graphcomp.torch_compat import FakeTensor

aten = torch.ops.aten
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def captured() -> tuple[Captured, fx.Node]:
    torch.manual_seed(0)
    found = capture(Net().eval(), X)
    return found, found.module.graph.find_nodes(op="call_function", target=aten.relu.default)[0]


def run(program: Captured) -> Tensor:
    program.module.graph.lint()
    program.module.recompile()
    result: Tensor = program.module(X)
    return result


def test_nodes_in_front_stand_one_behind_the_other() -> None:
    program, relu = captured()
    make = before(relu)
    first = make(aten.neg.default, relu.args[0])
    second = make(aten.sum.dim_IntList, first, [1], True, dtype=torch.float64)
    assert [relu.prev.prev, relu.prev] == [first, second]
    for node in (first, second):
        assert source_line(node) == source_line(relu) != "" and module_path(node) == module_path(relu)
    assert isinstance(value(second), FakeTensor)
    assert (tuple(value(second).shape), value(second).dtype) == ((4, 1), torch.float64)
    redirect([relu], relu.args[0], first)
    model = program.original
    torch.testing.assert_close(run(program), model.down(torch.relu(-model.up(X))))


def test_nodes_behind_may_stand_for_another_op() -> None:
    program, relu = captured()
    last = program.module.graph.find_nodes(op="call_function", target=aten.linear.default)[-1]
    users = list(relu.users)
    added = after(relu, like=last)(aten.neg.default, relu)
    assert relu.next is added and module_path(added) == "down"
    redirect(users, relu, added)
    model = program.original
    torch.testing.assert_close(run(program), model.down(-torch.relu(model.up(X))))


def test_what_stands_for_a_tensor_has_the_line_of_the_reader() -> None:
    program, _ = captured()
    (weight,) = (n for n in program.module.graph.find_nodes(op="get_attr") if n.target == "down.weight")
    assert source_line(weight) == ""
    added = after(weight)(aten.neg.default, weight)
    assert module_path(added) == "down" and "return self.down" in source_line(added)


def test_without_the_values_of_operands_there_is_no_value() -> None:
    _, relu = captured()
    relu.args[0].meta.pop("val")
    assert "val" not in before(relu)(aten.neg.default, relu.args[0]).meta


def test_new_tensors_are_registered_under_free_names() -> None:
    program, relu = captured()
    make = before(relu)
    taken = make.tensor(program.module, "up.weight", nn.Parameter(torch.ones(2, 3)))
    fresh = make.tensor(program.module, "a.b.scale", torch.ones(5))
    assert (taken.target, fresh.target) == ("up.weight_1", "a.b.scale")
    assert isinstance(program.module.get_parameter("up.weight_1"), nn.Parameter)
    assert torch.equal(program.module.get_buffer("a.b.scale"), torch.ones(5))
    assert isinstance(value(fresh), FakeTensor) and value(fresh).shape == (5,)
    assert value(fresh).fake_mode is value(relu).fake_mode


def test_a_node_may_become_another_or_leave() -> None:
    program, relu = captured()
    name, line = relu.name, source_line(relu)
    become(relu, aten.to.dtype, relu.args[0], torch.float64)
    assert (relu.name, source_line(relu), value(relu).dtype) == (name, line, torch.float64)
    replace_node(relu, before(relu)(aten.tanh.default, relu.args[0]))
    assert relu not in program.module.graph.nodes
    model = program.original
    torch.testing.assert_close(run(program), model.down(torch.tanh(model.up(X))))


# ------------------------------------------------------------------------------------------------ every flow
class Convs(nn.Module):
    """A norm to fold, a convolution without bias, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, bias=False)
        self.table, self.out = nn.Embedding(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        return self.out(torch.relu(self.b(x)).mean((2, 3)) + self.table(i))


class Recurrent(nn.Module):
    """An einsum and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 6))
        self.gru, self.out = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bti,hid->bthd", x, self.weight).flatten(2)[..., :6]
        return self.out(self.gru(x)[0].mean(1))


MODELS: dict[str, tuple[type[nn.Module], tuple[Tensor, ...]]] = {
    "convs": (Convs, (torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))),
    "recurrent": (Recurrent, (torch.randn(2, 5, 4),)),
}
POST_TRAINING: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits in groups": {"bits": 4, "activation_bits": None, "group_size": 4},
}


def graphs(model: gc.CompressedModel) -> Iterator[fx.Graph]:
    quantized = model.quantized
    assert isinstance(model.module, fx.GraphModule) and quantized is not None
    for module in (model.module, quantized.fake, quantized.lowered.module):
        yield module.graph


def check(graph: fx.Graph) -> None:
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_module")]
    assert calls and not [node for node in calls if value(node) is None]
    assert not [node for node in calls if not source_line(node)]


@pytest.mark.parametrize("name", MODELS)
def test_graphs_of_pruning(name: str) -> None:
    kind, inputs = MODELS[name]
    torch.manual_seed(0)
    analysis = analyze_captured(capture(kind().eval(), inputs))
    groups, module = list(analysis.groups), analysis.captured.module
    kept = random_kept(groups, torch.Generator().manual_seed(0))
    check(module.graph)
    check(InsertMasks(analysis.coupling, groups)(module).graph)
    check(SliceGroups(analysis.coupling, kept)(module).graph)


@pytest.mark.parametrize("how", POST_TRAINING)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
@pytest.mark.ci
def test_graphs_of_post_training_quantization(name: str, how: str) -> None:
    kind, inputs = MODELS[name]
    torch.manual_seed(0)
    found = gc.compress(kind().eval(), inputs, sparsity=0.4, calibration=[inputs], **POST_TRAINING[how])
    for graph in graphs(found):
        check(graph)


@pytest.mark.parametrize("name", MODELS)
def test_graphs_of_training(name: str) -> None:
    kind, inputs = MODELS[name]
    torch.manual_seed(0)
    ready = gc.prepare(kind(), inputs, bits=(4, 8))
    check(ready.graph)
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=0.01, sparsity=0.4, schedule=4)
    for _ in range(4):
        optimizer.zero_grad()
        ready(*inputs).square().mean().backward()
        optimizer.step()
    for graph in graphs(gc.finalize(ready)):
        check(graph)


MAKES = re.compile(r"inserting_(before|after)\(|\.call_(function|module|method)\(|\.create_node\(|\.get_attr\(")
TRACED = ("ir/rewrite.py", "capture/canonical.py", "capture/record.py", "ir/graph_json.py")
"""Where nodes are made: by passes, of a region that is inlined, of a run, of a document."""


def test_nodes_are_made_in_one_place() -> None:
    root = Path(gc.__file__).parent
    files = {str(file.relative_to(root)) for file in root.rglob("*.py") if MAKES.search(file.read_text())}
    assert files == set(TRACED)
