"""Quantizers are pointwise; per channel, scale and zero point have the channel's axis."""

from __future__ import annotations

import torch

from graphcomp.coupling.axis import Axes, Reason, couple, freeze, length
from graphcomp.ops.call import Call
from graphcomp.ops.facts import in_float
from graphcomp.ops.index import whole
from graphcomp.ops.pointwise import pointwise
from graphcomp.ops.registry import elementwise, op, refuse

aten = torch.ops.aten

QUANTIZES = in_float("a quantizer of the user's own")


@op(
    aten.fake_quantize_per_channel_affine.default, aten.fake_quantize_per_channel_affine_cachemask.default,
    aten._fake_quantize_learnable_per_channel_affine.default, facts=QUANTIZES,
)  # fmt: skip
@elementwise
def per_channel(self: Axes, scale: Axes, zero_point: Axes, axis: int, *, call: Call) -> list[Axes]:
    """One scale and zero point per index of dim `axis`."""
    return _per_channel(call, self, axis, scale, zero_point)


@op(
    "quantized_decomposed::quantize_per_channel", "quantized_decomposed::dequantize_per_channel",
    "quantized_decomposed::fake_quant_per_channel", facts=QUANTIZES,
)  # fmt: skip
@elementwise
def decomposed_per_channel(input: Axes, scales: Axes, zero_points: Axes | None, axis: int, *, call: Call) -> list[Axes]:
    """As `per_channel`, in the form that torch.ao and ExecuTorch exchange."""
    return _per_channel(call, input, axis, scales, zero_points)


@op(
    aten.fused_moving_avg_obs_fake_quant.default, aten._fused_moving_avg_obs_fq_helper.default, facts=QUANTIZES,
)  # fmt: skip
@elementwise
def fused_observer(
    self: Axes, running_min: Axes, running_max: Axes, scale: Axes, zero_point: Axes, ch_axis: int, *, call: Call
) -> list[Axes]:
    """Observer and fake quantizer of torch.ao in one; per tensor, its own tensors have length 1 (or 0 at first)."""
    per_index = [axes for axes in (running_min, running_max, scale, zero_point) if axes and length(axes[0]) > 1]
    return _per_channel(call, self, ch_axis, *per_index)


@op("graphcomp::look_up", facts=QUANTIZES)
@elementwise
def look_up(values: Axes, table: Axes, axis: int | None = None, *, call: Call) -> list[Axes]:
    """One table of values per index of dim `axis`, or one in all."""
    freeze(table[-1], Reason("values are looked up by number", call.why.op, call.why.source))
    return [values for _ in call.shapes] if axis is None else _per_channel(call, values, axis, table)


def _per_channel(call: Call, axes: Axes, dim: int, *vectors: Axes | None) -> list[Axes]:
    for vector in vectors:
        if vector is not None:
            couple(axes[dim], vector[0], call.why)
    return [axes for _ in call.shapes]


op(
    aten._fake_quantize_learnable_per_tensor_affine.default,
    aten.fake_quantize_per_tensor_affine_cachemask.default,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default,
    pointwise,
    facts=QUANTIZES,
)

for _name in ("quantize_per_tensor", "dequantize_per_tensor", "convert_element_type"):
    op(f"quantized_decomposed::{_name}", pointwise, facts=QUANTIZES)
for _name in ("choose_qparams", "choose_qparams_symmetric"):
    op(f"quantized_decomposed::{_name}", whole, facts=in_float("a range of floats"))

refuse(
    "graphcomp::unpack", "graphcomp::dequantize_grouped", "graphcomp::quantize_dynamic", "graphcomp::matmul_dynamic",
    why="integers of a compressed model, several in one number",
    fix="compress the float model: compress(model, example_inputs, sparsity=…, bits=…) cuts, then quantizes",
)  # fmt: skip
