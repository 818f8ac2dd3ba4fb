"""Capture: from a model and example inputs to a graph, with the model left as it was."""

from __future__ import annotations

import copy
import operator
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, fx, nn

import graphcomp as gc
from graphcomp.capture.capture import Captured, capture
from graphcomp.errors import CaptureError, InputError
from graphcomp.ir.graph import bind
from graphcomp.ir.module import CapturedModule
from graphcomp.pruning.slice import SliceGroups
from graphcomp.testing import Encoder, random_kept, randomize

aten = torch.ops.aten


class Model(nn.Module):
    """A module whose forward is a function of the module and its inputs."""

    def __init__(self, forward: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.function = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Pair(nn.Module):
    """Two named inputs, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        hidden = self.fc(x) if mask is None else self.fc(x) * mask
        return OrderedDict(out=self.head(hidden), extra=OrderedDict(hidden=hidden, twice=hidden * 2))


class Branch(nn.Module):
    """A branch on data, which export refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if y.sum() > 0:
            return y.exp()
        return y.sin()


def ops(captured: Captured) -> list[Any]:
    return [node.target for node in captured.module.graph.nodes if node.op == "call_function"]


def find(captured: Captured, target: Any) -> fx.Node:
    (node,) = captured.module.graph.find_nodes(op="call_function", target=target)
    return node


def convnet() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5))


# ---------------------------------------------------------------------------------------------- the graph
class Difference(nn.Module):
    """(n, 8), (n, 8) -> (n, 4): the difference of two branches, each of its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.c(torch.relu(self.a(x)) - torch.relu(self.b(y)))
        return result


@pytest.mark.parametrize("kind", ["positional", "keyword", "submodule"])
def test_one_tensor_given_twice_is_two_inputs(kind: str) -> None:
    net, x, y = Difference().eval(), torch.randn(3, 8), torch.randn(3, 8)
    if kind == "submodule":

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = net

            def forward(self, x: Tensor) -> Any:
                return self.inner(x, x)

        captured = capture(Outer().eval(), (x,), scope="inner")
    elif kind == "keyword":
        captured = capture(net, (x,), {"y": x})
    else:
        captured = capture(net, (x, x))
    given = ((x,), {"y": y}) if kind == "keyword" else ((x, y), {})
    assert torch.allclose(captured.module(*given[0], **given[1]), net(x, y))


def test_captured_module_computes_the_model_on_any_batch() -> None:
    model = convnet().eval()
    captured = capture(model, torch.randn(1, 3, 8, 8))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(captured.module(x), model(x))
    assert (captured.producer, captured.reason, captured.scope) == ("export", "", "")
    assert captured.inputs.args[0].shape == (1, 3, 8, 8), "the batch is doubled for export only"


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.slow
@pytest.mark.ci
def test_the_sequence_is_as_dynamic_as_the_ids_whatever_the_mask_is_made_of(dtype: torch.dtype) -> None:
    """And what is made of the graph runs at another batch and length."""
    torch.manual_seed(0)
    model = randomize(Encoder())
    ids, mask = torch.randint(11, (2, 6)), torch.ones(2, 6).tril(3).to(dtype)
    plan = gc.analyze(model, (ids, mask))
    shapes = [n.meta["val"].shape for n in plan.captured.module.graph.find_nodes(op="placeholder")]
    assert all(isinstance(length, torch.SymInt) for shape in shapes for length in shape)
    kept = random_kept(gc.prunable_groups(plan), torch.Generator().manual_seed(0))
    native, graph = gc.slice_groups(plan, kept).module, SliceGroups(plan.coupling, kept)(plan.captured.module)
    ids, mask = torch.randint(11, (3, 9)), torch.ones(3, 9).tril(5).to(dtype)
    torch.testing.assert_close(graph(ids, mask), native(ids, mask))


def test_static_capture_has_plain_sizes() -> None:
    captured = capture(convnet(), torch.randn(2, 3, 8, 8), dynamic=False)
    (x,) = captured.module.graph.find_nodes(op="placeholder")
    assert all(type(size) is int for size in x.meta["val"].shape)


def test_batch_and_sequence_of_tokens_are_symbolic() -> None:
    model = Model(lambda self, ids: self.fc(self.table(ids)), table=nn.Embedding(9, 4), fc=nn.Linear(4, 4))
    captured = capture(model, torch.zeros(2, 3, dtype=torch.long))
    assert captured.module(torch.zeros(5, 7, dtype=torch.long)).shape == (5, 7, 4)


def test_a_model_of_one_fixed_batch_is_captured_with_it() -> None:
    model = Model(lambda self, x: self.fc(x).view(1, 8), fc=nn.Linear(4, 8))
    captured = capture(model, torch.randn(1, 4))
    assert captured.producer == "export"
    assert captured.module(torch.randn(1, 4)).shape == (1, 8)


def test_tensors_are_shared_and_named_as_in_the_model() -> None:
    model = nn.Sequential(OrderedDict(body=convnet()))
    captured = capture(model, torch.randn(2, 3, 8, 8))
    held = dict(captured.module.named_parameters()) | dict(captured.module.named_buffers())
    assert set(held) == set(model.state_dict()) - {"body.1.num_batches_tracked"}
    assert all(tensor is operator.attrgetter(name)(model) for name, tensor in held.items())


def test_every_op_has_value_line_and_module() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = x.mean()
        left, right = (self.fc(x) - shift).chunk(2, dim=1)
        return left * right

    captured = capture(Model(forward, fc=nn.Linear(4, 4)), torch.randn(2, 4))
    for node in captured.module.graph.find_nodes(op="call_function", target=aten.linear.default):
        assert list(node.meta["nn_module_stack"].values())[-1][0] == "fc"
    for node in captured.module.graph.nodes:
        if node.op == "call_function":
            assert node.meta["val"] is not None
            assert 'test_capture.py", line' in node.meta["stack_trace"]
            assert node.meta["nn_module_stack"]


def test_keyword_inputs_and_the_structure_of_outputs() -> None:
    model = Pair()
    x, mask = torch.randn(2, 4), torch.ones(2, 4)
    for inputs, keywords in ((x, {"mask": mask}), ((x,), {"mask": mask}), ({"x": x, "mask": mask}, None)):
        captured = capture(model, inputs, keywords)
        result = captured.module(*captured.inputs.args, **captured.inputs.kwargs)
        assert type(result) is OrderedDict
        assert torch.equal(result["extra"]["twice"], model(x, mask)["extra"]["twice"])
        assert captured.output_names == ("out", "extra.hidden", "extra.twice")


# ---------------------------------------------------------------------------------------------- canonical form
def test_in_place_ops_become_functional() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.fc(x)
        y.relu_()
        y += x
        return y * torch.zeros_like(y).fill_(2.0)

    model = Model(forward, fc=nn.Linear(4, 4))
    captured = capture(model, torch.randn(2, 4))
    assert {aten.relu.default, aten.add.Tensor, aten.fill.Scalar} <= set(ops(captured))
    assert not any(target._schema.is_mutable for target in ops(captured))
    x = torch.randn(3, 4)
    assert torch.equal(captured.module(x), model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: _then(self.fc(x), lambda y: y[:, :2].add_(1), lambda y: y),  # the base is read later
        lambda self, x: _then(self.fc(x).view(-1), lambda y: y.view(2, -1).mul_(2), lambda y: y + 1),
        lambda self, x: _then(x.argmax(1), lambda y: y.mul_(2), lambda y: y),
    ],
)
def test_in_place_ops_that_can_be_observed_keep_their_meaning(forward: Callable[..., Any]) -> None:
    model = Model(forward, fc=nn.Linear(4, 4))
    captured = capture(model, torch.randn(2, 4), dynamic=False)
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(captured.module(x), model(x))


def _then(value: Tensor, change: Callable[[Tensor], Any], read: Callable[[Tensor], Tensor]) -> Tensor:
    change(value)
    return read(value)


@pytest.mark.parametrize(
    ("cut", "sizes"),
    [
        (lambda x: x.chunk(3, dim=1), [4, 4, 2]),
        (lambda x: x.split(4, dim=-1), [4, 4, 2]),
        (lambda x: x.split([1, 9], dim=1), [1, 9]),
        (lambda x: torch.unsafe_chunk(x, 2, 1), [5, 5]),
        (lambda x: torch.unsafe_split(x, 5, 1), [5, 5]),
        (lambda x: x.tensor_split(3, dim=1), [4, 3, 3]),
        (lambda x: x.tensor_split([2, 3], dim=1), [2, 1, 7]),
    ],
)
def test_every_cut_is_split_with_sizes(cut: Callable[[Tensor], Any], sizes: list[int]) -> None:
    captured = capture(Model(lambda _self, x: cut(x)), torch.randn(2, 10))
    assert find(captured, aten.split_with_sizes.default).args[1] == sizes
    x = torch.randn(4, 10)
    assert all(torch.equal(a, b) for a, b in zip(captured.module(x), cut(x), strict=True))


def test_narrow_is_slice_and_a_slice_of_everything_is_nothing() -> None:
    captured = capture(Model(lambda _self, x: x[:].narrow(1, 2, 3)), torch.randn(2, 8))
    assert ops(captured) == [aten.slice.Tensor]
    assert find(captured, aten.slice.Tensor).args[1:] == (1, 2, 5)


def test_unused_values_and_checks_leave_the_graph() -> None:
    def forward(_self: Any, x: Tensor) -> Tensor:
        x.exp()
        torch._assert(x.shape[0] < 1000, "small")
        return x.to(torch.float64)

    captured = capture(Model(forward), torch.randn(2, 4))
    assert ops(captured) == [aten.to.dtype]


def test_no_grad_regions_are_inlined_and_still_stop_gradients() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return self.head(x)

    model = Model(forward, frozen=nn.Linear(4, 4), head=nn.Linear(4, 4))
    captured = capture(model, torch.randn(2, 4))
    assert ops(captured) == [aten.linear.default, aten.detach.default, aten.linear.default]
    captured.module(torch.randn(2, 4)).sum().backward()
    assert model.frozen.weight.grad is None
    assert model.head.weight.grad is not None


def test_disabled_autocast_is_inlined_and_enabled_autocast_is_not() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return self.fc(x)

    x = torch.randn(2, 4)
    plain = capture(Model(forward, fc=nn.Linear(4, 4), enabled=False), x)
    assert ops(plain) == [aten.linear.default]
    mixed = capture(Model(forward, fc=nn.Linear(4, 4), enabled=True), x)
    assert mixed.module(x).dtype is torch.bfloat16


@pytest.mark.parametrize("is_causal", [None, True, False])
def test_a_mask_of_torchs_transformer_is_not_read(is_causal: bool | None) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    x = torch.randn(2, 5, 8)
    captured = capture(encoder, {"src": x, "mask": mask, "is_causal": is_causal})
    assert captured.producer == "export"
    expected = encoder(x, mask=mask, is_causal=is_causal)
    torch.testing.assert_close(captured.module(src=x, mask=mask, is_causal=is_causal), expected)


# ---------------------------------------------------------------------------------------------- train and eval
def test_train_and_eval_switch_norm_and_dropout() -> None:
    module = copy.deepcopy(capture(convnet(), torch.randn(2, 3, 8, 8)).module)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(module(x), module(x))
    before = module.get_buffer("1.running_mean").clone()
    assert module.train().training
    assert not torch.equal(module(x), module(x))
    assert not torch.equal(module.get_buffer("1.running_mean"), before)
    module.eval()
    assert not module.training
    assert torch.equal(module(x), module(x))


def test_recurrent_layers_follow_the_mode() -> None:
    captured = capture(nn.GRU(4, 8, num_layers=2, dropout=0.5, batch_first=True), torch.randn(2, 3, 4))
    x = torch.randn(2, 3, 4)
    captured.module.train()
    assert not torch.equal(captured.module(x)[0], captured.module(x)[0])
    captured.module.eval()
    assert torch.equal(captured.module(x)[0], captured.module(x)[0])


class Attention(nn.Module):
    """Attention in one op, whose dropout is 0 in eval mode; with `more`, twice in training mode."""

    def __init__(self, p: float, more: bool = False) -> None:
        super().__init__()
        self.p, self.more, self.qkv = p, more, nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.more and self.training:
            q = F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)


def test_dropout_in_attention_follows_the_mode_in_a_graph_that_is_trained() -> None:
    x = torch.randn(2, 3, 4)
    model = nn.Sequential(Attention(0.5), nn.Tanh(), Attention(0.0), nn.Tanh(), Attention(0.25)).train()
    captured = capture(model, x, training=True).module
    for module in (captured, copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        nodes = module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        for mode, expected in ((True, [0.5, 0.0, 0.25]), (False, [0.0] * 3), (True, [0.5, 0.0, 0.25])):
            module.train(mode)
            assert [bind(node)["dropout_p"] for node in nodes] == expected
            torch.manual_seed(0)
            own = model.train(mode)(x)
            torch.manual_seed(0)
            assert torch.equal(module(x), own)
    assert model.training


def test_ops_that_are_not_the_same_in_both_modes_are_left_alone() -> None:
    x = torch.randn(2, 3, 4)
    for model in (Attention(0.5, more=True), Refused()):
        node = find(capture(model, x, training=True), aten.scaled_dot_product_attention.default)
        assert bind(node)["dropout_p"] == 0 and "follows_mode" not in node.meta


class Refused(Attention):
    """Export refuses it in training mode."""

    def __init__(self) -> None:
        super().__init__(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.sum() > 0:
            x = x + 1
        return super().forward(x)


def test_what_is_always_on_stays_on() -> None:
    captured = capture(Model(lambda _self, x: F.dropout(x, 0.5, training=True)), torch.randn(2, 4))
    captured.module.train().eval()
    x = torch.ones(64)[None].expand(2, 64)
    assert find(captured, aten.dropout.default).args[2] is True
    assert not torch.equal(captured.module(x[:, :4]) * 0 + 1, captured.module(x[:, :4]))


def test_copies_keep_class_meta_and_mode() -> None:
    module = capture(convnet(), torch.randn(2, 3, 8, 8)).module
    copied = copy.deepcopy(module)
    assert isinstance(copied, CapturedModule)
    assert copied.get_parameter("0.weight") is not module.get_parameter("0.weight")
    for old, new in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        assert new.meta.get("val") is old.meta.get("val")
    copied.train()
    assert "dropout.default(relu_, 0.5, True)" in copied.code
    assert "dropout.default(relu_, 0.5, False)" in module.code
    copied.load_state_dict(module.state_dict())


# ---------------------------------------------------------------------------------------------- outputs and scope
def test_outputs_select_and_drop() -> None:
    captured = capture(Pair(), torch.randn(2, 4), outputs="out")
    assert captured.output_names == ("out",)
    assert captured.module(torch.randn(2, 4)).shape == (2, 2)
    prefixed = capture(Pair(), torch.randn(2, 4), outputs=["extra"])
    assert prefixed.output_names == ("extra.hidden", "extra.twice")
    assert len(prefixed.module(torch.randn(2, 4))) == 2
    assert "head.weight" not in dict(prefixed.module.named_parameters()), "what only dropped outputs need is gone"


def test_unknown_outputs_are_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(CaptureError, match=r"no output 'logits'(.|\n)*'out', 'extra.hidden', 'extra.twice'"):
        capture(Pair(), torch.randn(2, 4), outputs="logits")


def test_scope_captures_a_submodule_on_the_inputs_it_gets() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.tail(Branch.forward(self, x), mask=torch.ones(4))["out"]

    model = Model(forward, fc=nn.Linear(4, 4), tail=Pair())
    captured = capture(model, torch.randn(2, 4), scope="tail")
    assert captured.producer == "export"
    assert captured.original is model.tail
    assert captured.scope == "tail"
    assert list(captured.inputs.kwargs) == ["mask"]
    assert "head.weight" in dict(captured.module.named_parameters())
    result = captured.module(*captured.inputs.args, **captured.inputs.kwargs)
    assert torch.equal(result["out"], model.tail(*captured.inputs.args, **captured.inputs.kwargs)["out"])
    assert not model.tail._forward_pre_hooks


def test_scope_errors() -> None:
    model = nn.Sequential(OrderedDict(encoder=nn.Linear(4, 4)))
    model.encoder.unused = nn.Linear(4, 4)
    with pytest.raises(CaptureError, match=r"no submodule 'encodr'(.|\n)*scope='encoder'"):
        capture(model, torch.randn(2, 4), scope="encodr")
    with pytest.raises(CaptureError, match="was not called"):
        capture(model, torch.randn(2, 4), scope="encoder.unused")
    with pytest.raises(InputError, match="does not run on the example inputs"):
        capture(model, torch.randn(2, 5), scope="encoder.unused")


# ---------------------------------------------------------------------------------------------- the model is left alone
@pytest.mark.parametrize(
    "model", [convnet(), nn.Sequential(convnet(), Model(lambda _self, x: x[x > 0].tolist() and x))]
)
def test_the_model_is_left_as_it_was(model: nn.Sequential) -> None:
    model.train()
    model[0].eval()
    hook = model.register_forward_hook(lambda _module, _inputs, output: output * 2)
    next(iter(model.parameters())).requires_grad_(False)
    flags = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    x = torch.randn(2, 3, 8, 8)
    torch.set_rng_state(random)
    captured = capture(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert list(model._forward_hooks) == [hook.id]
    assert not captured.module.training
    model.eval()
    assert torch.equal(captured.module(x), model(x)), "the hook is part of what the model computes"


def test_what_a_forward_writes_on_its_model_is_taken_back() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.add_(1)
        self.cache["x"] = x
        x += 1
        return x if x.sum() > 0 else -x

    model = Model(forward, calls=0, cache={})
    model.register_buffer("seen", torch.zeros(()))
    x = torch.ones(2, 4)
    captured = capture(model, x)
    assert captured.producer == "record"
    assert (model.calls, model.seen.item(), model.cache) == (0, 0.0, {})
    assert torch.equal(x, torch.ones(2, 4))


# ---------------------------------------------------------------------------------------------- unusual models
def test_tied_and_shared_tensors_have_one_name_and_their_aliases() -> None:
    def forward(self: Any, ids: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.table(ids))))

    block = nn.Linear(4, 4)
    model = Model(forward, table=nn.Embedding(9, 4), head=nn.Linear(4, 9, bias=False), block=block, twin=block)
    model.head.weight = model.table.weight
    captured = capture(model, torch.zeros(2, 3, dtype=torch.long))
    assert captured.aliases["table.weight"] == ("table.weight", "head.weight")
    assert captured.aliases["block.weight"] == ("block.weight", "twin.weight")
    reads = [node.target for node in captured.module.graph.find_nodes(op="get_attr")]
    assert sorted(reads) == ["block.bias", "block.weight", "table.weight"]


def test_parametrized_tensors_are_read_as_the_tensors_they_are_made_of() -> None:
    model = parametrizations.weight_norm(nn.Linear(4, 4))
    captured = capture(model, torch.randn(2, 4))
    names = set(dict(captured.module.named_parameters()))
    assert names == {"bias", "parametrizations.weight.original0", "parametrizations.weight.original1"}
    x = torch.randn(2, 4)
    assert torch.allclose(captured.module(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).to(dtype)
    captured = capture(model, torch.randn(2, 4, dtype=dtype))
    x = torch.randn(2, 4, dtype=dtype)
    assert torch.equal(captured.module(x), model(x))


def test_non_contiguous_parameters() -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.randn(4, 3).t())
    captured = capture(model, torch.randn(2, 4))
    assert captured.module.get_parameter("weight") is model.weight
    assert torch.equal(captured.module(torch.ones(2, 4)), model(torch.ones(2, 4)))


def test_a_model_too_large_for_any_memory_is_captured_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2**20, 2**20) for _ in range(4)))  # 17 TB in float32
        captured = capture(model, torch.randn(1, 2**20))
    assert captured.producer == "export"
    assert captured.module.get_parameter("3.weight") is model[3].weight


# ---------------------------------------------------------------------------------------------- refusals
def test_what_export_refuses_is_recorded_with_the_reason() -> None:
    model = Branch()
    x = torch.randn(2, 4)
    captured = capture(model, x)
    assert captured.producer == "record"
    assert "data-dependent" in captured.reason
    assert captured.module.get_parameter("fc.weight") is model.fc.weight
    assert torch.equal(captured.module(x), model(x))


def test_nothing_is_written_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    capture(Branch(), torch.randn(2, 4))
    with pytest.raises(InputError):
        capture(Branch(), torch.randn(2, 5))
    assert capfd.readouterr() == ("", "")


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"Pair does not run(.|\n)*self.fc\(x\)(.|\n)*2x5 and 4x4"):
        capture(Pair(), torch.randn(2, 5))
    with pytest.raises(InputError, match="unexpected keyword argument 'masc'"):
        capture(Pair(), torch.randn(2, 4), {"masc": torch.ones(4)})
    with pytest.raises(InputError, match="hold no tensor"):
        capture(Pair(), ())
    with pytest.raises(InputError, match="of type int"):
        capture(Pair(), 3)


def test_lazy_modules_must_have_run() -> None:
    with pytest.raises(InputError, match="run the model once"):
        capture(nn.Sequential(nn.LazyLinear(4)), torch.randn(2, 4))


def test_names_that_fx_needs_for_itself_are_refused() -> None:
    model = Model(lambda self, x: self.code(x), code=nn.Linear(4, 4))
    with pytest.raises(CaptureError, match="called 'code'"):
        capture(model, torch.randn(2, 4))


def test_what_can_be_neither_exported_nor_recorded_names_the_line() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.utils._python_dispatch.is_in_torch_dispatch_mode():
            raise RuntimeError("not under a mode")
        return self.fc(x)

    with pytest.raises(CaptureError, match=r"not under a mode(.|\n)*scope=") as caught:
        capture(Model(forward, fc=nn.Linear(4, 4)), torch.randn(2, 4))
    assert 'in forward -> raise RuntimeError("not under a mode")' in caught.value.at


def test_a_model_that_returns_no_tensor() -> None:
    with pytest.raises(CaptureError, match="returns no tensor"):
        capture(Model(lambda _self, x: x.sum().item()), torch.randn(2, 4))


def test_a_cache_in_the_outputs_is_explained() -> None:
    class KeyValueCache:
        def __init__(self, keys: Tensor) -> None:
            self.keys = keys

    captured = capture(Model(lambda _self, x: (x * 2, KeyValueCache(x))), torch.randn(2, 4))
    assert captured.producer == "record"
    assert "use_cache" in captured.reason
    assert captured.output_names == ("0", "1.keys")


# ---------------------------------------------------------------------------------------------- real models
ZOO = Path(__file__).resolve().parents[3] / "shared"


@pytest.mark.slow
@pytest.mark.skipif(not (ZOO / "zoo.py").exists(), reason="the shared zoo is not here")
@pytest.mark.parametrize(
    ("name", "producer"),
    [
        ("tv/resnet18", "export"),
        ("tv/swin_t", "export"),
        ("hf/bert", "export"),
        ("hf/llama", "export"),
        ("hf/mixtral", "export"),
        ("hf/t5", "export"),
        ("tv/ssdlite320_mobilenet_v3_large", "record"),
    ],
)
def test_real_models(name: str, producer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ZOO), *sys.path])
    zoo = pytest.importorskip("zoo")
    (case,) = zoo.cases(names=[name])
    model, args, kwargs = case.build()
    captured = capture(model, args, kwargs)
    assert captured.producer == producer
    with torch.no_grad():
        expected, result = model(*args, **kwargs), captured.module(*args, **kwargs)
    difference, compared, reshaped = zoo.rel_diff(expected, result)
    assert type(result) is type(expected)
    assert compared > 0
    assert reshaped == 0
    assert difference < 1e-5


def test_a_size_that_is_constant_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(lambda self, x: self.conv(x).sum((2, 3)) / (x.shape[2] * x.shape[3]), conv=nn.Conv2d(3, 4, 1))
    module = capture(model, torch.randn(2, 3, 8, 8)).module
    with caplog.at_level("WARNING", "graphcomp"):
        module(torch.randn(5, 3, 8, 8))  # another batch, for which there is a symbol
        assert "was of shape" not in caplog.text
        for _ in range(2):
            module(torch.randn(2, 3, 16, 16))
    assert caplog.text.count("was of shape") == 1 and "(2, 3, 16, 16) was of shape" in caplog.text
