"""The recorder: a model written down op by op while it runs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as hooks

import graphcomp as gc
from graphcomp.capture.record import Recording, record

aten = torch.ops.aten


class Model(nn.Module):
    """A module whose forward is a function of the module and its inputs."""

    def __init__(self, forward: Callable[..., Any], **children: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = forward
        for name, child in children.items():
            if isinstance(child, Tensor) and not isinstance(child, nn.Parameter):
                self.register_buffer(name, child)
            else:
                setattr(self, name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def replay(recording: Recording, *args: Any, **kwargs: Any) -> Any:
    return fx.GraphModule(recording.tensors, recording.graph)(*args, **kwargs)


def targets(recording: Recording) -> list[Any]:
    return [node.target for node in recording.graph.nodes if node.op == "call_function"]


def test_a_residual_convnet_replays_to_the_same_outputs() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu_()
        y += x
        return self.head(y.mean((2, 3)))

    model = Model(forward, conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3), head=nn.Linear(3, 5)).eval()
    x = torch.randn(2, 3, 6, 6)
    recording = record(model, (x,), {})
    assert torch.equal(replay(recording, x), model(x))
    other = torch.randn(2, 3, 6, 6)
    assert torch.equal(replay(recording, other), model(other))
    assert recording.output_names == ("0",)


def test_tensors_are_the_models_own_under_their_names() -> None:
    model = Model(lambda self, x: self.norm(self.fc(x)), fc=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)).eval()
    recording = record(model, (torch.randn(2, 4),), {})
    names = {node.target for node in recording.graph.find_nodes(op="get_attr")}
    assert names == {"fc.weight", "fc.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
    assert recording.tensors["fc.weight"] is model.fc.weight


def test_every_op_knows_its_value_its_line_and_its_module() -> None:
    model = Model(lambda self, x: self.block(x) * 2, block=nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    recording = record(model, (torch.randn(3, 4),), {})
    addmm = next(node for node in recording.graph.nodes if node.target is aten.addmm.default)
    assert addmm.meta["val"].shape == (3, 8)
    assert type(addmm.meta["val"]).__name__ == "FakeTensor"
    assert [path for path, _ in addmm.meta["nn_module_stack"].values()] == ["", "block", "block.0"]
    mul = next(node for node in recording.graph.nodes if node.target is aten.mul.Tensor)
    assert mul.meta["stack_trace"].startswith(f'File "{__file__}", line ')
    assert "self.block(x) * 2" in mul.meta["stack_trace"]
    assert list(mul.meta["nn_module_stack"].values()) == [("", f"{__name__}.Model")]


def test_a_model_of_torch_layers_only_names_the_layers_line() -> None:
    recording = record(nn.Sequential(nn.Linear(2, 2)), (torch.randn(1, 2),), {})
    traces = [node.meta["stack_trace"] for node in recording.graph.nodes if node.op == "call_function"]
    assert all("linear.py" in trace and "in forward" in trace for trace in traces)


def test_the_path_that_was_taken_is_recorded() -> None:
    def forward(_self: Any, x: Tensor) -> Tensor:
        return x.exp() if x.sum() > 0 else x.sin()

    assert aten.exp.default in targets(record(Model(forward), (torch.ones(2),), {}))
    assert aten.sin.default in targets(record(Model(forward), (-torch.ones(2),), {}))


def test_numbers_read_from_tensors_are_constants() -> None:
    recording = record(Model(lambda _self, x: x * x.max().item()), (torch.tensor([1.0, 3.0]),), {})
    mul = next(node for node in recording.graph.nodes if node.target is aten.mul.Tensor)
    assert mul.args[1] == 3.0


def test_what_python_reads_stays_in_the_graph() -> None:
    """What a run does next hangs on it, though no node uses it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h if h[0, 2] > 0 or torch.equal(h[0], h[1]) else -h)

    model = Model(forward, up=nn.Linear(3, 6), down=nn.Linear(6, 2)).eval()
    analysis = gc.analyze(model, torch.randn(2, 3))
    assert analysis.captured.producer == "record"
    assert analysis.groups == ()
    reasons = {str(frozen.reason) for frozen in analysis.frozen if frozen.name == "up.weight" and frozen.dim == 0}
    assert reasons == {"one index is selected by number (aten.select.int)"}


def test_data_windows_and_nested_inputs() -> None:
    """`x.data` is made behind the dispatcher's back; it is still the input."""

    def forward(self: Any, inputs: dict[str, list[Tensor]], scale: float = 1.0) -> dict[str, Any]:
        first, second = inputs["images"]
        return {"sum": first.data + second, "weight": self.fc.weight.data * scale}

    model = Model(forward, fc=nn.Linear(2, 2))
    inputs = {"images": [torch.ones(2), torch.full((2,), 2.0)]}
    recording = record(model, (inputs,), {"scale": 3.0})
    assert not any(name.startswith("_lifted") for name in recording.tensors)
    result = replay(recording, inputs, scale=3.0)
    assert result["sum"].tolist() == [3.0, 3.0]
    assert torch.equal(result["weight"], model.fc.weight * 3.0)
    assert recording.output_names == ("sum", "weight")
    names = [node.target for node in recording.graph.find_nodes(op="placeholder")]
    assert names == ["arg_0_images_0", "arg_0_images_1", "scale"]


def test_constants_made_on_the_way_are_lifted_and_safe_from_writes() -> None:
    def forward(_self: Any, x: Tensor) -> Tensor:
        counter = torch.tensor([1.0, 2.0])
        counter += 1
        return x + counter

    recording = record(Model(forward), (torch.zeros(2),), {})
    assert recording.tensors["_lifted_tensor_constant0"].tolist() == [1.0, 2.0]
    for _ in range(2):
        assert replay(recording, torch.zeros(2)).tolist() == [2.0, 3.0]


def test_several_results_are_items() -> None:
    def forward(_self: Any, x: Tensor) -> Tensor:
        values, indices = x.topk(2)
        left, right = x.split(2, dim=1)
        return values + indices + left * right

    x = torch.randn(3, 4)
    recording = record(Model(forward), (x,), {})
    assert targets(recording).count(operator.getitem) == 4
    assert torch.equal(replay(recording, x), forward(None, x))


def test_fakes_share_memory_exactly_where_values_do() -> None:
    recording = record(Model(lambda _self, x: (x.view(4)[1:], x + 1)), (torch.zeros(2, 2),), {})
    value = {str(node.target): node.meta["val"] for node in recording.graph.nodes if node.op != "output"}
    memory = {name: v.untyped_storage()._cdata for name, v in value.items()}
    assert memory["aten.view.default"] == memory["aten.slice.Tensor"] == memory["arg_0"]
    assert memory["aten.add.Tensor"] != memory["arg_0"]
    assert value["aten.slice.Tensor"].storage_offset() == 1


@dataclass
class Boxes:
    """A container that pytree does not know."""

    corners: Tensor
    label: str


def test_tensors_in_unknown_containers_are_outputs() -> None:
    recording = record(Model(lambda _self, x: [Boxes(x * 2, "a"), Boxes(x * 3, "b")]), (torch.ones(2),), {})
    assert recording.output_names == ("0.corners", "1.corners")
    first, second = replay(recording, torch.ones(2))
    assert (first.tolist(), second.tolist()) == ([2.0, 2.0], [3.0, 3.0])


def test_encoder_layers_are_recorded_op_by_op_and_the_switch_is_put_back() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    recording = record(layer, (torch.randn(1, 3, 8),), {})
    assert not any("transformer_encoder" in str(target) for target in targets(recording))
    assert aten.native_layer_norm.default in targets(recording)
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_a_model_on_the_meta_device_is_recorded() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        recording = record(model, (torch.randn(2, 4),), {})
    (output,) = recording.graph.output_node().args[0]
    assert output.meta["val"].shape == (2, 4)
    assert output.meta["val"].device.type == "meta"


def test_no_hook_is_left_when_the_model_fails() -> None:
    before = (len(hooks._global_forward_pre_hooks), len(hooks._global_forward_hooks))
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="shapes"):
        record(model, (torch.randn(2, 5),), {})
    assert (len(hooks._global_forward_pre_hooks), len(hooks._global_forward_hooks)) == before
