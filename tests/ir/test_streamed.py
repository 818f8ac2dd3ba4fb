"""A tensor that stands in a file computes what the tensor in memory computes, and is read when something reads it."""

from __future__ import annotations

import copy
import gc as collector
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.ir.streamed import (
    Stored,
    StreamedTensor,
    in_memory,
    is_streamed,
    put_aside,
    put_back,
    scratch,
    streamed,
    with_plain_tensors,
)

safetensors = pytest.importorskip("safetensors.torch")
W = torch.arange(24.0).reshape(4, 6)


@pytest.fixture
def w(tmp_path: Path) -> StreamedTensor:
    safetensors.save_file({"w": W}, tmp_path / "a.safetensors")
    return streamed(tmp_path / "a.safetensors", "w", (4, 6), torch.float32)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    real = Stored.read

    def noted(self: Stored) -> Tensor:
        found.append(self.name)
        return real(self)

    monkeypatch.setattr(Stored, "read", noted)
    return found


MOVED = {
    "index_select": lambda t: t.index_select(1, torch.tensor([5, 0])),
    "cat": lambda t: torch.cat([t, t + 0, t], 1),
    "stack": lambda t: torch.stack([t, t]),
    "chunk": lambda t: t.chunk(2, 0)[1],
    "split": lambda t: t.split([1, 3])[1],
    "unbind": lambda t: t.unbind(1)[2],
    "transpose": lambda t: t.transpose(0, 1),
    "t": lambda t: t.t(),
    "reshape": lambda t: t.t().reshape(3, 8),
    "view": lambda t: t.view(-1)[3:9],
    "item": lambda t: t[1, 2:],
    "last": lambda t: t.view(-1)[-1],
    "to": lambda t: t.to(torch.bfloat16).float(),
    "double": lambda t: t.double(),
    "clone": lambda t: t.clone(),
    "data": lambda t: t.data,
    "index_fill_": lambda t: t.clone().index_fill_(0, torch.tensor([1]), 7),
    "deepcopy": lambda t: copy.deepcopy(t),
    "parameter": lambda t: nn.Parameter(t),
}


@pytest.mark.parametrize("name", MOVED)
def test_moves_are_written_down_and_read_alike(w: StreamedTensor, reads: list[str], name: str) -> None:
    wanted = MOVED[name](W)
    found = MOVED[name](w)
    assert isinstance(found, StreamedTensor) and (name == "cat") == bool(reads)
    assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    assert torch.equal(in_memory(found), wanted) and reads
    assert isinstance(found, nn.Parameter) == isinstance(wanted, nn.Parameter)


def test_other_ops_read(w: StreamedTensor, reads: list[str]) -> None:
    x = torch.ones(2, 6)
    assert torch.equal(torch.nn.functional.linear(x, w), x @ W.t()) and reads == ["w"]
    assert torch.equal(torch.ops.aten.mul.Tensor(w, w), W * W)
    assert torch.equal(w + w, 2 * W) and float(w.sum()) == float(W.sum())
    assert torch.equal(w[W > 3], W[W > 3])  # a shape that depends on elements
    assert w.contiguous().data_ptr() and type(w.contiguous()) is Tensor


def test_facts_read_nothing(w: StreamedTensor, reads: list[str]) -> None:
    assert (w.size(0), w.dim(), w.numel(), w.dtype, w.device.type, len(w)) == (4, 2, 24, torch.float32, "cpu", 4)
    assert w.untyped_storage().nbytes() == 96 and w.is_floating_point() and not w.is_meta
    repr(w)
    assert not reads


def test_memory_is_that_of_torch(w: StreamedTensor) -> None:
    """Savers tell tied tensors and views by addresses."""
    plain = W.clone()
    for move in (MOVED["view"], MOVED["item"], MOVED["chunk"], MOVED["t"], MOVED["clone"], lambda t: t.detach()):
        wanted, found = move(plain), move(w)
        same = wanted.untyped_storage().data_ptr() == plain.untyped_storage().data_ptr()
        assert (found.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()) == same
        assert not same or found.data_ptr() - w.data_ptr() == wanted.data_ptr() - plain.data_ptr()


def test_nothing_writes_into_a_folder(w: StreamedTensor, tmp_path: Path) -> None:
    for write in (
        lambda: w.add_(1), lambda: w.__setitem__(0, 1.0), lambda: w.index_fill_(0, torch.tensor([0]), 1.0),
        lambda: torch.ops.aten.mul_.Tensor(w, 2), lambda: w.clone()[0].zero_(), lambda: nn.init.zeros_(nn.Parameter(w)),
    ):  # fmt: skip
        with pytest.raises(gc.InputError):
            write()
    assert torch.equal(in_memory(w), W)


def test_what_was_written_down_stays_as_it_was(w: StreamedTensor) -> None:
    mine = w.clone()
    taken, shared = mine.index_select(0, torch.tensor([1])), mine.detach()
    mine.index_fill_(0, torch.tensor([1]), 7)
    assert torch.equal(in_memory(taken), W[1:2]) and torch.equal(in_memory(w), W)
    assert torch.equal(in_memory(shared), in_memory(mine)) and float(in_memory(mine)[1, 0]) == 7


def net(w: StreamedTensor) -> nn.Module:
    """A linear layer whose weight stands in a file."""
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(w)
    return layer


def test_modules(w: StreamedTensor) -> None:
    layer = net(w)
    assert is_streamed(layer) and not is_streamed(nn.Linear(2, 2))
    double = copy.deepcopy(layer).double()
    assert isinstance(double.weight, StreamedTensor) and double.weight.dtype == torch.float64
    x = torch.ones(2, 6)
    assert torch.equal(double(x.double()), nn.functional.linear(x, W, layer.bias).double()) or torch.allclose(
        double(x.double()), nn.functional.linear(x.double(), W.double(), layer.bias.double())
    )
    assert layer.weight.dtype == torch.float32
    assert isinstance(layer.state_dict()["weight"], StreamedTensor)


def test_gradients_of_activations_read_the_weight_again(w: StreamedTensor, reads: list[str]) -> None:
    x = torch.ones(2, 6, requires_grad=True)
    output = net(w)(x)
    before = len(reads)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(gradient, W.sum(0).expand(2, 6)) and len(reads) > before


def test_plain_tensors_for_export_and_back(w: StreamedTensor) -> None:
    model: Any = nn.Sequential(net(w), net(w))
    model[1].weight = model[0].weight
    plain, streamed_of = with_plain_tensors(model)
    assert plain[0].weight is plain[1].weight and type(plain[0].weight.data) is Tensor and len(streamed_of) == 1
    back = put_back(torch.fx.symbolic_trace(nn.Sequential(plain[0])), streamed_of)
    assert back.get_parameter("0.weight") is model[0].weight


def test_what_is_put_aside_goes_with_the_last_reader(tmp_path: Path) -> None:
    with scratch(tmp_path):
        found = put_aside(W.t())
    half = found[:2].detach()
    assert torch.equal(in_memory(found), W.t()) and len(list(tmp_path.iterdir())) == 1
    del found
    collector.collect()
    assert torch.equal(in_memory(half), W.t()[:2])
    del half
    collector.collect()
    assert not list(tmp_path.iterdir())
