"""Recurrent layers and cells: one hidden size h for all layers, directions, gates and states of an op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from graphcomp.coupling.axis import Axes, Axis, couple, fresh, length, product, split
from graphcomp.ops.call import Call
from graphcomp.ops.facts import Float, in_float
from graphcomp.ops.facts import product as multiplies
from graphcomp.ops.movement import all_frozen
from graphcomp.ops.registry import op

aten = torch.ops.aten

GATES = multiplies(Float("states and gates are floats"))
PACKS = in_float("sequences of different lengths are packed")


# ------------------------------------------------------------------------------------------------ layers
def layers(
    gates: int,
    *,
    call: Call,
    hx: Axes | list[Axes],
    params: list[Axes],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool = False,
    input: Axes = (),
    data: Axes = (),
    batch_sizes: Axes = (),
) -> list[Axes]:
    """t b i, (l r) b h -> t b (r h), (l r) b h, with r directions and, for each, (gates h) i and (gates h) h.

    Packed sequences are `data`, of shape (t b, i). Under a projection (proj_size) all of it is frozen.
    """
    states = hx if isinstance(hx, list) else [hx]
    _meet(call, (input or data)[:-1], {f"params.{k}": matrix for k, matrix in enumerate(params)})
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    if len(params) != each * num_layers * directions:
        return _frozen(call, [input or data, batch_sizes, *states, *params])
    h = states[0][-1]
    both = product(fresh(directions, call.because("one index per direction")), h)
    for k in range(num_layers * directions):
        source = (input or data)[-1] if k < directions else both
        _cell(call, gates, source, h, params[each * k : each * (k + 1)])
        call.contract(f"params.{each * k}", 1)
        call.contract(f"params.{each * k + 1}", 1)
    call.freeze((input or data)[:-1], "positions of a sequence, or its batch")
    for state in states:
        call.freeze(state[:-1], "one index per layer and direction, or of the batch")
        couple(state[-1], h, call.why)
    return [(*(input or data)[:-1], both), *states]


def _cell(call: Call, gates: int, source: Axis, h: Axis, params: Sequence[Axes]) -> None:
    """(k h) i, (k h) h, (k h), (k h): the gates k lie end to end and are read by their place."""
    w_ih, w_hh, *_ = params
    for rows in params:
        which, units = split(rows[0], gates, call.why)
        call.freeze(which, "which gate is which matters")
        couple(units, h, call.why)
    couple(w_ih[1], source, call.why)
    couple(w_hh[1], h, call.why)


def _meet(call: Call, steps: Axes, params: dict[str, Axes]) -> None:
    """Every matrix meets every step of every sequence once; gates and states are pointwise."""
    for name, matrix in params.items():
        if len(matrix) == 2:
            call.multiply((*steps, *matrix), name, kind="recurrent")


def _frozen(call: Call, operands: Sequence[Axes]) -> list[Axes]:
    for axes in operands:
        call.freeze(axes, "a recurrent layer with a projection, or of unknown form")
    return all_frozen(call)


op(aten.lstm.input, aten.lstm.data, partial(layers, 4), facts=GATES)
op(aten.gru.input, aten.gru.data, partial(layers, 3), facts=GATES)
op(aten.rnn_tanh.input, aten.rnn_tanh.data, aten.rnn_relu.input, aten.rnn_relu.data, partial(layers, 1), facts=GATES)


# ------------------------------------------------------------------------------------------------ one step
def cell(
    gates: int,
    *,
    call: Call,
    input: Axes,
    hx: Axes | list[Axes],
    w_ih: Axes,
    w_hh: Axes,
    b_ih: Axes | None = None,
    b_hh: Axes | None = None,
) -> list[Axes]:
    """b i, b h -> b h"""
    states = hx if isinstance(hx, list) else [hx]
    _cell(call, gates, input[-1], states[0][-1], [p for p in (w_ih, w_hh, b_ih, b_hh) if p is not None])
    call.contract("w_ih", 1)
    call.contract("w_hh", 1)
    _meet(call, input[:-1], {"w_ih": w_ih, "w_hh": w_hh})
    for state in states:
        for own, theirs in zip(state, (*input[:-1], states[0][-1]), strict=True):
            couple(own, theirs, call.why)
    return list(states)


op(aten.lstm_cell.default, partial(cell, 4), facts=GATES)
op(aten.gru_cell.default, partial(cell, 3), facts=GATES)
op(aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default, partial(cell, 1), facts=GATES)


@op(aten._thnn_fused_lstm_cell.default, aten._thnn_fused_gru_cell.default, facts=in_float("gates of floats"))
def fused_cell(
    call: Call,
    input_gates: Axes,
    hidden_gates: Axes,
    cx: Axes | None = None,
    hx: Axes | None = None,
    input_bias: Axes | None = None,
    hidden_bias: Axes | None = None,
) -> list[Axes]:
    """b (k h), b (k h), b h -> b h, b h and a workspace."""
    state = cx or hx or ()
    gates = 4 if cx else 3
    for axes in (input_gates, hidden_gates, input_bias, hidden_bias):
        if axes is not None:
            which, units = split(axes[-1], gates, call.why)
            call.freeze(which, "which gate is which matters")
            couple(units, state[-1], call.why)
    for axes in (input_gates, hidden_gates):
        couple(axes[0], state[0], call.why)
    results = 2 if cx else 1
    return [state] * results + all_frozen(call)[results:]


@op(aten.mkldnn_rnn_layer.default, facts=GATES)
def mkldnn_layer(
    input: Axes,
    weight0: Axes,
    weight1: Axes,
    weight2: Axes,
    weight3: Axes,
    hx_: Axes,
    cx_: Axes,
    hidden_size: int,
    *,
    call: Call,
) -> list[Axes]:
    """One layer in one direction, as a recorded run sees it: t b i -> t b h, states and a workspace."""
    gates, h = length(weight0[0]) // hidden_size, hx_[-1]
    _cell(call, gates, input[-1], h, [weight0, weight1, weight2, weight3])
    call.contract("weight0", 1)
    call.contract("weight1", 1)
    _meet(call, input[:-1], {"weight0": weight0, "weight1": weight1})
    call.freeze([*input[:-1], *hx_[:-1], *cx_[:-1]], "positions of a sequence, or its batch")
    couple(cx_[-1], h, call.why)
    call.lengths["hidden_size"] = h
    return [(*input[:-1], h), hx_, cx_, *all_frozen(call)[3:]]


@op(aten._cudnn_rnn.default, facts=GATES)
def opaque(call: Call, **arguments: object) -> list[Axes]:
    """Weights in a layout of the library's own: frozen."""
    input, weights = arguments["input"], arguments["weight"]
    assert isinstance(input, tuple) and isinstance(weights, list)
    _meet(call, input[:-1], {f"weight.{k}": matrix for k, matrix in enumerate(weights)})
    operands: list[Axes] = []
    for argument in arguments.values():
        operands += [a for a in (argument if isinstance(argument, list) else [argument]) if isinstance(a, tuple)]
    return _frozen(call, operands)


# ------------------------------------------------------------------------------------------------ packed sequences
@op(aten._pack_padded_sequence.default, facts=PACKS)
def pack(input: Axes, lengths: Axes, *, call: Call) -> list[Axes]:
    """t b ... -> (t b) ...: time and batch are frozen."""
    call.freeze([*input[:2], *lengths], "sequences of different lengths are packed")
    data, *others = all_frozen(call)
    return [(data[0], *input[2:]), *others]


@op(aten._pad_packed_sequence.default, facts=PACKS)
def unpack(data: Axes, batch_sizes: Axes, *, call: Call) -> list[Axes]:
    """(t b) ... -> t b ...: time and batch are frozen."""
    call.freeze([data[0], *batch_sizes], "sequences of different lengths are packed")
    padded, *others = all_frozen(call)
    return [(*padded[:2], *data[1:]), *others]
