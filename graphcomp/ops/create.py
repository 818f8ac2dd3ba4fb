"""Ops that make a tensor out of nothing: uniform fills are free, what differs from index to index is frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphcomp.coupling.axis import Axes, Axis, fresh, length
from graphcomp.coupling.size import Size
from graphcomp.ops.call import AxesValue, Call
from graphcomp.ops.facts import in_float
from graphcomp.ops.movement import all_frozen
from graphcomp.ops.registry import OpKey, op
from graphcomp.torch_compat import OpOverloadPacket

aten = torch.ops.aten

MADE = in_float("made of numbers, not of operands")


def overloads(*packets: Callable[..., Any]) -> list[OpKey]:
    """All overloads of some ops, without those that write to out= or name their dims."""
    ops: list[OpKey] = []
    for packet in packets:
        assert isinstance(packet, OpOverloadPacket)
        for name in packet.overloads():  # type: ignore[no-untyped-call]
            if "out" not in name and "names" not in name and "dimname" not in name.lower():
                ops.append(getattr(packet, name))
    return ops


# ------------------------------------------------------------------------------------------------ fills
@op(
    aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format, aten.empty_permuted.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
    facts=MADE,
)  # fmt: skip
def fill(call: Call) -> Axes:
    """Every element alike: free factors, whose lengths are constants of the op."""
    axes = tuple(_free(n, call) for n in call.shape)
    call.lengths["size"] = [axis if isinstance(length(axis), int) else None for axis in axes]
    return axes


def _free(n: Size, call: Call) -> Axis:
    return fresh(n, None if isinstance(n, int) else call.because("a symbolic length"))


@op(
    *overloads(
        aten.arange, aten.range, aten.linspace, aten.logspace, aten.eye, aten.triu_indices, aten.randperm, aten.rand,
        aten.randn, aten.randint, aten.hann_window, aten.hamming_window, aten.blackman_window, aten.bartlett_window,
        aten.kaiser_window, aten.fft_fftfreq, aten.fft_rfftfreq, aten.empty_strided, aten.new_empty_strided,
        aten.scalar_tensor, aten.tensor,
    ),
    aten.normal.float_float, facts=MADE,
)  # fmt: skip
def sequence(call: Call, **arguments: Any) -> list[Axes]:
    """Every index has a value of its own: frozen. (Tensors among the operands are scalars, or give a dtype.)"""
    return all_frozen(call)


# ------------------------------------------------------------------------------------------------ grids and codes
@op(aten.meshgrid.default, aten.meshgrid.indexing, facts=in_float("repeats several operands"))
def meshgrid(tensors: list[Axes], indexing: str = "ij", *, call: Call) -> list[Axes]:
    """One dim per operand; "xy" swaps the first two."""
    axes = [axis for operand in tensors for axis in (operand or (fresh(1),))]
    if indexing == "xy" and len(axes) > 1:
        axes[:2] = axes[1], axes[0]
    return [tuple(axes) for _ in call.shapes]


@op(aten.one_hot.default, facts=in_float("whole numbers"))
def one_hot(self: Axes, *, call: Call) -> Axes:
    """A new last dim, one index per number."""
    return (*self, fresh(call.shape[-1], call.because("one index per number")))


@op(
    aten.cartesian_prod.default,
    aten.combinations.default,
    aten.vander.default,
    facts=in_float("combines elements in order"),
)
def enumerate_(call: Call, tensors: Sequence[Axes] = (), self: Axes = (), x: Axes = ()) -> list[Axes]:
    """Combinations in order: frozen."""
    for axes in (*tensors, self, x):
        call.freeze(axes)
    return all_frozen(call)


@op(
    *overloads(
        aten.uniform_, aten.normal_, aten.exponential_, aten.geometric_, aten.log_normal_, aten.cauchy_, aten.random_,
        aten.bernoulli_, aten.poisson, aten.binomial, aten._standard_gamma,
    ),
    aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor,
    facts=in_float("random numbers"),
)  # fmt: skip
def randomise(call: Call, **arguments: Any) -> list[Axes]:
    """Every index draws a number of its own: frozen."""
    for axes in arguments.values():
        if isinstance(axes, AxesValue):
            call.freeze(axes, "random numbers are drawn in order")
    return all_frozen(call)
