"""Pointwise ops: dims align from the right, equal dims couple, dims of length 1 stretch."""

from __future__ import annotations

from typing import Any

import torch

from graphcomp.coupling.axis import UNIT, Axes, couple, cut, length
from graphcomp.coupling.notation import broadcast
from graphcomp.coupling.table import AxesValue, Call, find, rule

aten = torch.ops.aten

# Ops that keep every index where it is but do not carry the `pointwise` tag.
UNTAGGED = """
    dropout dropout_ feature_dropout feature_dropout_ alpha_dropout native_dropout contiguous clone alias detach detach_
    lift_fresh lift_fresh_copy to _to_copy type_as _conj hardswish hardswish_ silu silu_ mish gelu gelu_ elu elu_ celu
    selu selu_ rrelu rrelu_with_noise hardsigmoid hardtanh hardtanh_ relu6 relu6_ leaky_relu leaky_relu_ relu relu_
    __and__ __or__ __xor__ __iand__ __ior__ logical_and logical_or logical_not logical_xor
    fill fill_ zero zero_ copy copy_ masked_fill masked_fill_ where full_like zeros_like ones_like empty_like rand_like
    randn_like randint_like positive float_power log_sigmoid softplus logsigmoid log_sigmoid_forward softshrink hardshrink
    threshold threshold_ bernoulli nan_to_num nan_to_num_ square square_ floor_divide floor_divide_ true_divide divide
    multiply subtract rsub remainder fmod clip clip_ clamp_max clamp_min isfinite isnan isinf isclose absolute
    fake_quantize_per_tensor_affine requires_grad_ resolve_conj resolve_neg _assert_tensor_metadata special_expit
""".split()


def _family() -> list[torch._ops.OpOverload]:
    """All tagged overloads of ATen, and the untagged names above, without out= variants."""
    ops = []
    for name in dir(aten):
        packet = getattr(aten, name)
        if not isinstance(packet, torch._ops.OpOverloadPacket):
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if overload.endswith("out") or "out" in (a.name for a in op._schema.arguments):
                continue
            if torch.Tag.pointwise in op.tags or name in UNTAGGED:
                ops.append(op)
    return ops


def pointwise(call: Call, **arguments: Any) -> Axes | list[Axes]:
    """Every tensor argument broadcasts with the others; all results have that shape."""
    operands = [value for value in arguments.values() if isinstance(value, AxesValue)]
    axes = broadcast(operands, call.because("pointwise operands differ in make"))
    rank = max((len(shape) for shape in call.shapes), default=0)
    axes = [UNIT] * (rank - len(axes)) + axes
    if _is_sum_of_activations(call, operands):
        call.mark(axes, "residual")
    return [tuple(axes) for _ in call.shapes]


def _is_sum_of_activations(call: Call, operands: list[AxesValue]) -> bool:
    """A residual add: both operands depend on the input and none is stretched."""
    if call.node.target not in (aten.add.Tensor, aten.add_.Tensor) or not {"self", "other"} <= call.activations:
        return False
    shapes = [tuple(map(length, axes)) for axes in operands]
    return len(shapes) == 2 and shapes[0] == shapes[1]


for _op in _family():
    if find(_op) is None:
        rule(_op)(pointwise)


@rule(aten.prelu.default, aten._prelu_kernel.default)
def prelu(self: Axes, weight: Axes, *, call: Call) -> Axes:
    """`weight` has one value, or one per channel (dim 1; dim 0 where there is only one)."""
    per_channel = self[1] if len(self) > 1 else self[0]
    broadcast([(per_channel,), weight] if len(weight) <= 1 else [self, weight], call.why)
    return tuple(self)


@rule(aten.glu.default)
def glu(self: Axes, dim: int = -1, *, call: Call) -> Axes:
    """The first half of `dim` is gated by the second, index by index."""
    axes = list(self)
    left, right = cut(axes[dim], length(axes[dim]) // 2)
    couple(left, right, call.because("the halves of a gate differ in make"))
    axes[dim] = left
    return tuple(axes)

