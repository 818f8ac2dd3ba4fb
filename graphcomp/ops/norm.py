"""Normalisation: per channel (batch, instance), or over the channels (layer, group, RMS: statistics)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphcomp.coupling.axis import UNIT, Axes, Axis, couple, fresh, length, split
from graphcomp.coupling.size import Size
from graphcomp.ops import masked
from graphcomp.ops.call import Call
from graphcomp.ops.facts import Facts, Float, in_float
from graphcomp.ops.registry import facts_of, op

aten = torch.ops.aten


def _norm(form: Callable[..., Any] | str) -> Facts:
    return Facts(Float("statistics of floats"), "statistics", form, keeps_zeros=False, scales="no", norm=True)


UNMASKED = _norm("its statistics are of each channel, or its dims are frozen")


# ------------------------------------------------------------------------------------------------ per channel
@op(aten.batch_norm.default, facts=_norm(masked.batch_norm))
@op(
    aten.native_batch_norm.default, aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default, aten._native_batch_norm_legit.default, aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default, aten._native_batch_norm_legit_functional.default,
    aten._batch_norm_with_update.default, aten._batch_norm_with_update_functional.default,
    aten._batch_norm_no_update.default, facts=UNMASKED,
)  # fmt: skip
def batch_norm(
    input: Axes,
    weight: Axes | None = None,
    bias: Axes | None = None,
    running_mean: Axes | None = None,
    running_var: Axes | None = None,
    training: bool = False,
    *,
    call: Call,
) -> list[Axes]:
    """n c ..., c, c, c, c -> n c ...; further results are per channel, or empty."""
    _per_channel(call, input[1], weight, bias, running_mean, running_var)
    if training and _standardizes(call, running_mean):
        call.contract("input", 0, *range(2, len(input)))
    elif training:
        call.freeze([input[0], *input[2:]], "batch statistics are taken over it")
    return [input, *(_statistics(shape, input[1], call) for shape in call.shapes[1:])]


@op(aten.instance_norm.default, facts=_norm(masked.instance_norm))
def instance_norm(
    input: Axes,
    weight: Axes | None = None,
    bias: Axes | None = None,
    running_mean: Axes | None = None,
    running_var: Axes | None = None,
    *,
    call: Call,
) -> Axes:
    """n c ..., c, c, c, c -> n c ...: statistics over space."""
    _per_channel(call, input[1], weight, bias, running_mean, running_var)
    if _standardizes(call, running_mean):
        call.contract("input", *range(2, len(input)))
    else:
        call.freeze(input[2:], "statistics of each channel are taken over it")
    return input


def _standardizes(call: Call, running_mean: Axes | None) -> bool:
    """Whether the op standardizes a weight: its masked form then takes the statistics of the kept inputs."""
    return "input" not in call.activations and running_mean is None and callable(facts_of(call.node.target).masked)


def _per_channel(call: Call, channels: Axis, *vectors: Axes | None) -> None:
    for vector in vectors:
        if vector is not None:
            couple(channels, vector[0], call.why)


def _statistics(shape: Sequence[Size], channels: Axis, call: Call) -> Axes:
    return (channels,) if tuple(shape) == (length(channels),) else tuple(fresh(n, call.why) for n in shape)


# ------------------------------------------------------------------------------------------------ over channels
@op(aten.layer_norm.default, facts=_norm(masked.layer_norm))
@op(aten.native_layer_norm.default, facts=_norm(masked.native_layer_norm))
@op(aten.rms_norm.default, facts=_norm(masked.rms_norm))
@op(aten._fused_rms_norm.default, facts=_norm(masked._fused_rms_norm))
def layer_norm(
    input: Axes, normalized_shape: Sequence[Size], weight: Axes | None = None, bias: Axes | None = None, *, call: Call
) -> list[Axes]:
    """Statistics over the last dims; `weight` and `bias` have these dims only. Mean and spread come after."""
    first = len(input) - len(normalized_shape)
    normalized = input[first:]
    for affine in (weight, bias):
        for own, theirs in zip(normalized, affine or (), strict=False):
            couple(own, theirs, call.why)
    call.contract("input", *range(first, len(input)))
    if "input" in call.activations:  # statistics of a weight say nothing of a stream
        call.mark(normalized, "normalized", "layer_norm")
    call.lengths["normalized_shape"] = list(normalized)
    return [input, *((*input[:first], *[UNIT] * len(normalized)) for _ in call.shapes[1:])]


@op(aten.group_norm.default, facts=_norm(masked.group_norm))
def group_norm(
    input: Axes, num_groups: int, weight: Axes | None = None, bias: Axes | None = None, *, call: Call
) -> list[Axes]:
    """n (g c) ..., (g c), (g c) -> n (g c) ...: statistics over c and space."""
    call.lengths["num_groups"] = _group_norm(call, input, num_groups, weight, bias)
    return [input]


@op(aten.native_group_norm.default, facts=_norm(masked.native_group_norm))
def native_group_norm(input: Axes, weight: Axes | None, bias: Axes | None, group: int, *, call: Call) -> list[Axes]:
    """As `group_norm`; mean and spread of each group come after."""
    g = _group_norm(call, input, group, weight, bias)
    call.lengths.update(C=input[1], group=g)
    return [input, *((input[0], g) for _ in call.shapes[1:])]


def _group_norm(call: Call, input: Axes, groups: int, weight: Axes | None, bias: Axes | None) -> Axis:
    """The axis of the groups. Where each has one channel only, no statistics reach over channels."""
    text = "n (g c) ..., (g c), (g c) -> n (g c) ..."
    call.einsum(text, {"g": groups}, input=input, weight=weight, bias=bias)
    call.freeze(input[2:], "statistics of each group are taken over it")
    g, per_group = split(input[1], groups, call.why)
    if length(per_group) > 1:
        call.contract("input", 1)
        call.mark(input[1], "normalized")
    return g


# ------------------------------------------------------------------------------------------------ over a weight
@op(
    aten._weight_norm.default, aten._weight_norm_interface.default,
    facts=in_float("divides a weight by its norm", sums="totals", masked="a zero does not change a norm"),
)  # fmt: skip
def weight_norm(v: Axes, g: Axes, dim: int = 0, *, call: Call) -> list[Axes]:
    """Slices of `v` along `dim` get the length `g` says: a norm over all other dims, which a zero does not change."""
    for own, theirs in zip(v, g, strict=False):
        if length(theirs) != 1:
            couple(own, theirs, call.why)
    others = [d for d in range(len(v)) if d != dim % len(v)]
    call.contract("v", *others)
    call.mark([v[d] for d in others], "normalized")
    return [v, g][: len(call.shapes)]
