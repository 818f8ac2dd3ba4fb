"""One op has one hidden size: layers, directions, gates and states share it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcomp.coupling.axis import Product, Reason, fresh, length, normal
from graphcomp.coupling.propagate import propagate
from graphcomp.ops.call import AxesValue, Call
from graphcomp.ops.recurrent import opaque

from .rule_walk import Walk, check_law, free, frozen, same

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("bias", [True, False])
def test_layers(kind: str, bias: bool) -> None:
    layer = getattr(nn, kind)(5, 8, bias=bias)
    names = list(layer._flat_weights_names)

    def run(x: Tensor, **params: Tensor) -> Any:
        h = torch.zeros(1, x.shape[1], params[names[1]].shape[1])
        operands = [params[name] for name in names]
        args = (operands, bias, 1, 0.0, False, False, False)
        return torch.lstm(x, (h, h), *args) if kind == "LSTM" else getattr(torch, NAMES[kind])(x, h, *args)

    w = Walk(run, x=torch.randn(4, 2, 5), **{n: p.detach() for n, p in layer.named_parameters()})
    h = w[names[1]][1]
    assert free(h)
    for name in names:
        assert same(normal(w[name][0]).parts[-1] if kind != "RNN" else w[name][0], h)  # type: ignore[union-attr]
    assert all(same(axes[-1], h) for axes in w.results)
    assert w.contracted == {names[0]: {1}, names[1]: {1}}
    assert frozen(*w["x"][:2])
    assert check_law(w) == 2  # the input's features and h


NAMES = {"GRU": "gru", "RNN": "rnn_tanh"}


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.before = nn.Linear(3, 5)
        self.layer = getattr(nn, kind)(5, 8, **options)
        self.after = nn.Linear(8 * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x))[0])  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("kind", GATES)
def test_stacked_and_bidirectional(kind: str) -> None:
    model = Recurrent(kind, num_layers=2, bidirectional=True, batch_first=True).eval()
    exported = torch.export.export(model, (torch.randn(2, 4, 3),), strict=False)
    coupling = propagate(exported.module(check_guards=False))
    at = coupling.attributes
    assert not coupling.unknown
    h = at["layer.weight_hh_l0"][1]
    assert free(h)
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        assert same(at[f"layer.weight_hh_{suffix}"][1], h)
    for axis in (at["layer.weight_ih_l1"][1], at["after.weight"][1]):
        directions, units = normal(axis).parts  # type: ignore[union-attr]
        assert frozen(directions)
        assert same(units, h)
    assert same(at["layer.weight_ih_l0"][1], at["before.weight"][0], at["before.bias"][0])
    assert free(at["before.bias"][0])
    call = next(c for c in coupling.calls.values() if "params.0" in c.contracted)
    assert {k: v for k, v in call.contracted.items() if k in ("params.0", "params.1", "params.13")} == {
        "params.0": (1,), "params.1": (1,), "params.13": (1,),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_projection_is_frozen() -> None:
    model = nn.LSTM(5, 8, proj_size=4).eval()
    exported = torch.export.export(model, (torch.randn(4, 2, 5),), strict=False)
    coupling = propagate(exported.module(check_guards=False))
    assert not coupling.unknown
    assert all(frozen(*axes) for axes in coupling.attributes.values())


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(kind: str) -> None:
    cell = getattr(nn, kind)(5, 8)

    def run(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Any:
        op = {"LSTMCell": torch.lstm_cell, "GRUCell": torch.gru_cell, "RNNCell": torch.rnn_tanh_cell}[kind]
        return op(x, (h, h) if kind == "LSTMCell" else h, w_ih, w_hh, b_ih, b_hh)  # type: ignore[arg-type]

    params = {n.replace("weight", "w").replace("bias", "b"): p.detach() for n, p in cell.named_parameters()}
    w = Walk(run, x=torch.randn(2, 5), h=torch.randn(2, 8), **params)
    assert same(w["w_hh"][1], w["h"][1], *(axes[1] for axes in w.results))
    assert isinstance(normal(w["b_ih"][0]), Product) == (kind != "RNNCell")
    assert w.contracted == {"w_ih": {1}, "w_hh": {1}}
    assert check_law(w) == 3


def test_a_layer_with_weights_of_the_librarys_own_is_frozen_and_counted() -> None:
    """cuDNN's layer is not there on a CPU, so the rule is called."""

    def axes(*sizes: int) -> AxesValue:
        return AxesValue(fresh(n) for n in sizes)

    weights = [axes(32, 5), axes(32, 8), axes(32), axes(32)]
    call = Call(None, [(7, 2, 8), (1, 2, 8)], Reason("addressed by position", "aten::_cudnn_rnn"), frozenset())  # type: ignore[arg-type]
    results = opaque(call, input=axes(7, 2, 5), weight=weights, hx=axes(1, 2, 8))
    assert all(frozen(*own[:1]) for own in (*weights, *results[:1]))
    assert sum(math.prod(map(length, product.axes)) for product in call.products) == 7 * 2 * (32 * 5 + 32 * 8)
