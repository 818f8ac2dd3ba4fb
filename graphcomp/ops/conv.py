"""Convolutions, pooling, resampling: channels couple, batch passes, space is addressed by position.

A convolution of kernel 1 that moves no place lets space pass, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from graphcomp.coupling.axis import Axes, couple, fresh, length, split
from graphcomp.coupling.axis import product as joined
from graphcomp.coupling.size import Size, divide
from graphcomp.ops.call import Call
from graphcomp.ops.facts import Compute, Facts, Float, Move, Rescale, in_float, moves, product
from graphcomp.ops.movement import all_frozen
from graphcomp.ops.registry import op
from graphcomp.torch_compat import OpOverload

aten = torch.ops.aten

RECORDED = "a kernel that recorded graphs name, which are not quantized"


# ------------------------------------------------------------------------------------------------ convolution
@op(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    facts=product(Compute(("input",), "weight", 0, "bias", convolution=True)),
)  # fmt: skip
@op(aten.mkldnn_convolution.default, facts=product(Float(RECORDED)))
def conv(
    call: Call,
    weight: Axes,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    input: Axes = (),
    self: Axes = (),
    bias: Axes | None = None,
    groups: int = 1,
) -> list[Axes]:
    """n (g i) *s, (g o) i +k, (g o) -> n (g o) *t"""
    name, source = ("input", input) if input else ("self", self)
    return _conv(call, name, source, weight, bias, groups, "(g o) i", _space_passes(weight, stride, padding))


@op(
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    facts=product(Compute(("input",), "weight", 1, "bias", convolution=True, transposed=True)),
)  # fmt: skip
def conv_transpose(
    input: Axes,
    weight: Axes,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    bias: Axes | None = None,
    groups: int = 1,
    *,
    call: Call,
) -> list[Axes]:
    """n (g i) *s, (g i) o +k, (g o) -> n (g o) *t"""
    passes = _space_passes(weight, stride, [*padding, *output_padding])
    return _conv(call, "input", input, weight, bias, groups, "(g i) o", passes)


@op(aten.convolution.default, aten._convolution.default, aten._convolution.deprecated, facts=product(Float(RECORDED)))
def convolution(
    input: Axes,
    weight: Axes,
    bias: Axes | None,
    stride: Sequence[int],
    padding: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *,
    call: Call,
) -> list[Axes]:
    """Either of the above."""
    passes = _space_passes(weight, stride, [*padding, *output_padding])
    return _conv(call, "input", input, weight, bias, groups, "(g i) o" if transposed else "(g o) i", passes)


def _space_passes(weight: Axes, stride: Sequence[int], padding: Sequence[int] | str) -> bool:
    """Whether every place of the result is made of the same place of the input, and of no other."""
    moves = set(stride) != {1} or not (isinstance(padding, str) or set(padding) == {0})
    return not moves and all(length(axis) == 1 for axis in weight[2:])


def _conv(
    call: Call, name: str, source: Axes, weight: Axes, bias: Axes | None, groups: int, filters: str, passes: bool
) -> list[Axes]:
    """The batch dim may be missing. `groups` is the length of g. Where space `passes`, its dims are letters."""
    n = "n " if len(source) == len(weight) else ""
    space, result_space = ["x y z"[: 2 * len(weight) - 5]] * 2 if passes else ["*s", "*t"]
    transposed = filters == "(g i) o"
    # each place of the input of a transposed convolution meets the whole kernel, a place of the result but a part
    kernel = "*k" if transposed else "+k"
    text = f"{n}(g i) {space}, {filters} {kernel}, (g o) -> {n}(g o) {result_space}"
    result = call.einsum(text, {"g": groups}, **{name: source}, weight=weight, bias=bias)
    if transposed:
        call.products.clear()
        call.multiply((*source, *weight[1:]), name, "weight", kind="convolution")
    call.mark(weight[:2], "conv")
    call.lengths["groups"], _ = split(weight[0], groups, call.why)
    return result


op(aten.conv_tbc.default, "*t n i, +k i o, o -> *u n o", facts=product(Float("channels stand last")))


@op("torchvision::deform_conv2d", facts=product(Float("no integer kernel for deformed windows")))
def deform_conv2d(
    input: Axes,
    weight: Axes,
    offset: Axes,
    mask: Axes,
    bias: Axes,
    n_weight_grps: int = 1,
    groups: int = 1,
    n_offset_grps: int = 1,
    offset_groups: int = 1,
    *,
    call: Call,
) -> list[Axes]:
    """As conv2d; the channels of one offset group share their offsets."""
    g = max(groups, n_weight_grps)
    shared, _ = split(input[1], max(offset_groups, n_offset_grps), call.why)
    call.freeze(shared, "the number of offset groups is fixed")
    text = "n (g i) *s, (g o) i +k, n *f, n *m, (g o) -> n (g o) *t"
    result = call.einsum(text, {"g": g}, input=input, weight=weight, offset=offset, mask=mask, bias=bias)
    call.mark(weight[:2], "conv")
    call.lengths["groups"], _ = split(weight[0], g, call.why)
    return result


# ------------------------------------------------------------------------------------------------ windows
LARGEST = moves(Move(pools=True), scales="channels")
MEANS = moves(Rescale(), scales="channels")
FLOAT_MEANS = in_float("no integer kernel for means of volumes", scales="channels")
WITH_PLACES = in_float("returns the places, too")
FLOAT_PAD = in_float("pads with the elements at the border")
RECORDED_POOL = in_float(RECORDED)

WINDOWS: dict[int, dict[OpOverload, Facts]] = {
    1: {
        aten.max_pool1d.default: LARGEST, aten.max_pool1d_with_indices.default: WITH_PLACES,
        aten.avg_pool1d.default: MEANS, aten.adaptive_avg_pool1d.default: MEANS,
        aten.adaptive_max_pool1d.default: WITH_PLACES,
        aten.reflection_pad1d.default: FLOAT_PAD, aten.replication_pad1d.default: FLOAT_PAD,
    },
    2: {
        aten.max_pool2d.default: LARGEST, aten.max_pool2d_with_indices.default: WITH_PLACES,
        aten.avg_pool2d.default: MEANS, aten.adaptive_avg_pool2d.default: MEANS,
        aten._adaptive_avg_pool2d.default: RECORDED_POOL,
        aten.adaptive_max_pool2d.default: replace(WITH_PLACES, scales="channels"),
        aten.reflection_pad2d.default: FLOAT_PAD, aten.replication_pad2d.default: FLOAT_PAD,
        aten.mkldnn_max_pool2d.default: RECORDED_POOL, aten.mkldnn_adaptive_avg_pool2d.default: RECORDED_POOL,
    },
    3: {
        aten.max_pool3d.default: LARGEST, aten.max_pool3d_with_indices.default: WITH_PLACES,
        aten.avg_pool3d.default: FLOAT_MEANS, aten.adaptive_avg_pool3d.default: FLOAT_MEANS,
        aten._adaptive_avg_pool3d.default: RECORDED_POOL, aten.adaptive_max_pool3d.default: WITH_PLACES,
        aten.reflection_pad3d.default: FLOAT_PAD, aten.replication_pad3d.default: FLOAT_PAD,
        aten.mkldnn_max_pool3d.default: RECORDED_POOL,
    },
}  # fmt: skip
"""Number of trailing dims of space -> ops and their facts."""


def windows(self: Axes, spatial: int, *, call: Call) -> list[Axes]:
    """The last `spatial` dims change length and are frozen, the others pass."""
    call.freeze(self[-spatial:], "a window slides over it")
    return [_in_space(self[:-spatial], shape, call) for shape in call.shapes]


for _spatial, _ops in WINDOWS.items():
    _rule = partial(windows, spatial=_spatial)
    for _op, _facts in _ops.items():
        op(_op, _rule, facts=_facts)


def _in_space(lead: Axes, shape: Sequence[Size], call: Call) -> Axes:
    return (*lead, *(fresh(n, call.why) for n in shape[len(lead) :]))


@op(aten._pad_circular.default, facts=FLOAT_PAD)
def pad_circular(self: Axes, pad: Sequence[int], *, call: Call) -> list[Axes]:
    """Wraps around in as many trailing dims as `pad` has pairs."""
    return windows(self, len(pad) // 2, call=call)


@op(aten.max_unpool2d.default, aten.max_unpool3d.default, facts=in_float("elements go to numbered places"))
def max_unpool(self: Axes, indices: Axes, *, call: Call) -> list[Axes]:
    """Values go back to where `indices` says, channel by channel."""
    spatial = 2 if call.node.target is aten.max_unpool2d.default else 3
    for own, theirs in zip(self, indices, strict=True):
        couple(own, theirs, call.why)
    return windows(self, spatial, call=call)


@op(aten.fractional_max_pool2d.default, aten.fractional_max_pool3d.default, facts=in_float("pools at random places"))
def fractional_max_pool(self: Axes, random_samples: Axes, *, call: Call) -> list[Axes]:
    """Windows at random places, drawn for each channel: frozen."""
    call.freeze([*self, *random_samples], "pooled at random places")
    return all_frozen(call)


@op(aten.im2col.default, facts=in_float("no integer kernel for windows that are copied out"))
def im2col(self: Axes, kernel_size: Sequence[int], *, call: Call) -> Axes:
    """(..., c, h, w) -> (..., (c k), l): space is frozen."""
    call.freeze(self[-2:], "a window slides over it")
    kernel = fresh(divide(call.shape[-2], length(self[-3])), call.why)
    return (*self[:-3], joined(self[-3], kernel), fresh(call.shape[-1], call.why))


@op(aten.col2im.default, facts=in_float("sums windows that overlap"))
def col2im(self: Axes, *, call: Call) -> Axes:
    """(..., (c k), l) -> (..., c, h, w): space is frozen."""
    channels, kernel = split(self[-2], call.shape[-3], call.why)
    call.freeze([kernel, self[-1]], "a window slides over it")
    return (*self[:-2], channels, *(fresh(n, call.why) for n in call.shape[-2:]))


# ------------------------------------------------------------------------------------------------ resampling
INTERPOLATED = in_float("interpolates")
SCALED = replace(INTERPOLATED, scales="channels")

for _packet in (
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d,
    aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_trilinear3d,
    aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa,
):  # fmt: skip
    _scales = SCALED if _packet in (aten.upsample_nearest2d, aten.upsample_bilinear2d) else INTERPOLATED
    op(_packet.default, "n c *s -> n c *t", facts=INTERPOLATED)
    op(_packet.vec, "n c *s -> n c *t", facts=_scales)

for _overload in ("default", "size_list", "scale_list", "size_list_scale_list"):
    op(getattr(aten.__interpolate, _overload), "n c *s -> n c *t", facts=INTERPOLATED)

for _sampler in (aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default):
    op(_sampler, "n c *s, n *g -> n c *t", facts=INTERPOLATED)


@op(aten.affine_grid_generator.default, facts=in_float("positions in space"))
def affine_grid(theta: Axes, *, call: Call) -> list[Axes]:
    """Positions in space."""
    call.freeze(theta)
    return all_frozen(call)


# ------------------------------------------------------------------------------------------------ detection
@op("torchvision::roi_align", "torchvision::roi_pool", facts=INTERPOLATED)
def roi(input: Axes, rois: Axes, *, call: Call) -> list[Axes]:
    """n c *s, r *q -> r c *t: a region names its image by number."""
    call.freeze([input[0], *input[2:], *rois], "regions are addressed by position")
    return [(rois[0], *_in_space((input[1],), shape[1:], call)) for shape in call.shapes]


@op(
    "torchvision::ps_roi_align", "torchvision::ps_roi_pool", "torchvision::nms",
    facts=in_float("picks by position, or by the order of scores"),
)  # fmt: skip
def positional(call: Call, **arguments: Axes) -> list[Axes]:
    """Channels, or boxes, are picked by their place."""
    for axes in arguments.values():
        if isinstance(axes, tuple):
            call.freeze(axes)
    return all_frozen(call)
