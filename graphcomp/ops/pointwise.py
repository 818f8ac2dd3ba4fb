"""Pointwise ops: dims align from the right, equal dims couple, dims of length 1 stretch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from graphcomp.coupling.axis import UNIT, Axes, couple, cut, length
from graphcomp.coupling.notation import broadcast
from graphcomp.ops.call import AxesValue, Call
from graphcomp.ops.facts import Clip, Fill, Move, Rescale, in_float, moves
from graphcomp.ops.registry import family, op
from graphcomp.torch_compat import OpOverload, schema_of

aten = torch.ops.aten

# Ops that keep every index where it is but do not carry the `pointwise` tag.
_UNTAGGED = """
    dropout dropout_ feature_dropout feature_dropout_ alpha_dropout native_dropout contiguous clone alias detach detach_
    lift_fresh lift_fresh_copy to _to_copy type_as _conj hardswish hardswish_ silu silu_ mish gelu gelu_ elu elu_ celu
    selu selu_ rrelu rrelu_with_noise hardsigmoid hardtanh hardtanh_ relu6 relu6_ leaky_relu leaky_relu_ relu relu_
    __and__ __or__ __xor__ __iand__ __ior__ logical_and logical_or logical_not logical_xor
    fill fill_ zero zero_ copy copy_ masked_fill masked_fill_ where full_like zeros_like ones_like empty_like rand_like
    randn_like randint_like positive float_power log_sigmoid softplus logsigmoid log_sigmoid_forward softshrink
    hardshrink threshold threshold_ bernoulli nan_to_num nan_to_num_ square square_ floor_divide floor_divide_
    true_divide divide multiply subtract rsub remainder fmod clip clip_ clamp_max clamp_min isfinite isnan isinf isclose
    absolute fake_quantize_per_tensor_affine requires_grad_ resolve_conj resolve_neg _assert_tensor_metadata
    special_expit complex polar real imag isreal conj chalf pin_memory abs_ absolute_ negative negative_ fix fix_
    copysign_ heaviside_ eq_ ne_ lt_ le_ gt_ ge_ not_equal not_equal_ less less_ less_equal less_equal_
    greater greater_ greater_equal greater_equal_ _add_relu multiply_ subtract_ divide_ true_divide_ gcd_ lcm_
    __irshift__ __ilshift__ mish_ arccos arccosh arcsin arcsinh arctan arctan2 arctanh alpha_dropout_
    feature_alpha_dropout feature_alpha_dropout_ rrelu_ rrelu_with_noise_ xlogy_ _neg_view _lazy_clone _masked_scale
"""
UNTAGGED = frozenset(_UNTAGGED.split())


def is_pointwise(op: OpOverload) -> bool:
    """Tagged so by ATen, or named above. A variant that writes into `out` reads a tensor more, of the result's axes."""
    return torch.Tag.pointwise in op.tags or (
        op.namespace == "aten" and schema_of(op).name.removeprefix("aten::") in UNTAGGED
    )


def pointwise(call: Call, **arguments: Any) -> Axes | list[Axes]:
    """Every tensor argument broadcasts with the others; all results have that shape."""
    operands = [value for value in arguments.values() if isinstance(value, AxesValue)]
    axes = broadcast(operands, call.because("pointwise operands differ in make"))
    rank = max((len(shape) for shape in call.shapes), default=0)
    axes = [UNIT] * (rank - len(axes)) + axes
    call.residual = _is_residual(call, operands)
    if call.residual:
        call.mark(axes, "residual")
    return [tuple(axes) for _ in call.shapes]


def _is_residual(call: Call, operands: list[AxesValue]) -> bool:
    """A sum of two activations, none of them stretched, of which neither is a function of the other's value alone.

    GELU is none, nor is x + (quantized(x, range of x) - x): what scales a value is no other branch.
    """
    if call.node.target not in (aten.add.Tensor, aten.add_.Tensor) or not {"self", "other"} <= call.activations:
        return False
    one, other = call.origins["self"], call.origins["other"]
    return not _is_stretched(*operands) and not (one <= other or other <= one)


def _is_stretched(a: Axes, b: Axes) -> bool:
    """Return whether the shapes differ. Two symbolic lengths that are added are one length, however each is written."""
    pairs = [(length(one), length(other)) for one, other in zip(a, b, strict=False)]
    return len(a) != len(b) or any(m != n and (isinstance(m, int) or isinstance(n, int)) for m, n in pairs)


FLOATS = in_float("computed in float, element by element")
COPIES = moves(Move(), keeps_zeros=True, scales="elements")
FILLS = replace(FLOATS, integer=Fill())

family(is_pointwise, pointwise, FLOATS)

op(aten.contiguous.default, aten.clone.default, aten.alias.default, pointwise, facts=COPIES)
op(aten.detach.default, pointwise, facts=replace(FLOATS, keeps_zeros=True, scales="elements"))
op(aten.to.dtype, pointwise, facts=in_float("returns another dtype", keeps_zeros=True))
op(
    aten.dropout.default, aten.feature_dropout.default, pointwise,
    facts=moves(Move("input"), scales="elements"),
)  # fmt: skip
op(aten.add.Tensor, pointwise, facts=replace(FLOATS, integer=Rescale(), scales="added"))
op(
    aten.mul.Tensor, aten.sigmoid.default, aten.hardsigmoid.default, pointwise,
    facts=replace(FLOATS, integer=Rescale()),
)  # fmt: skip
op(aten.leaky_relu.default, pointwise, facts=replace(FLOATS, integer=Rescale(), scales="elements"))
op(aten.relu.default, pointwise, facts=replace(FLOATS, integer=Clip(0.0), scales="elements"))
op(aten.relu6.default, pointwise, facts=replace(FLOATS, integer=Clip(0.0, 6.0)))
op(aten.hardtanh.default, pointwise, facts=replace(FLOATS, integer=Clip("min_val", "max_val")))
op(aten.clamp.default, pointwise, facts=replace(FLOATS, integer=Clip("min", "max")))
op(aten.clamp_min.default, pointwise, facts=replace(FLOATS, integer=Clip(low="min")))
op(aten.clamp_max.default, pointwise, facts=replace(FLOATS, integer=Clip(high="max")))
op(
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf,
    pointwise, facts=FILLS,
)  # fmt: skip


@op(aten.prelu.default, aten._prelu_kernel.default, facts=FLOATS)
def prelu(self: Axes, weight: Axes, *, call: Call) -> Axes:
    """`weight` has one value, or one per channel (dim 1; dim 0 where there is only one)."""
    per_channel = self[1] if len(self) > 1 else self[0]
    broadcast([(per_channel,), weight] if len(weight) <= 1 else [self, weight], call.why)
    return tuple(self)


@op(aten.glu.default, facts=in_float("gates one half with the other"))
def glu(self: Axes, dim: int = -1, *, call: Call) -> Axes:
    """The first half of `dim` is gated by the second, index by index."""
    axes = list(self)
    left, right = cut(axes[dim], length(axes[dim]) // 2)
    couple(left, right, call.because("the halves of a gate differ in make"))
    axes[dim] = left
    return tuple(axes)


@op("graphcomp::backward_of", facts=in_float("stands for a gradient"))
def backward_of(results: list[Axes]) -> list[Axes]:
    """The results as they are; the operands only matter to the gradient."""
    return list(results)
