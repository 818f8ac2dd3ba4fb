"""Reductions: sums contract, means, variances and extremes are statistics, a winner's position freezes.

Statistics of a parameter itself (the range of a weight that is quantized, say) are masked like any other, but say
nothing of the network: no axis counts as normalized for them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphcomp.coupling.axis import UNIT, Axes, length
from graphcomp.coupling.notation import broadcast, from_end
from graphcomp.ops import masked
from graphcomp.ops.call import Call
from graphcomp.ops.facts import ZEROS_ADD_NOTHING, Facts, in_float
from graphcomp.ops.registry import op

aten = torch.ops.aten


def _formed(form: Callable[..., Any]) -> Facts:
    """Return the facts of a statistic whose masked form is `form`."""
    return in_float("statistics of floats", sums="statistics", masked=form)


@op(
    aten.sum.default, aten.sum.dim_IntList, aten.nansum.default,
    facts=in_float("sums of any length", sums="totals", masked=ZEROS_ADD_NOTHING),
)  # fmt: skip
def total(self: Axes, dim: Any = None, keepdim: bool = False, *, call: Call) -> Axes:
    """The reduced dims go, or stay with length 1; masked units add nothing."""
    dims = _dims(dim, len(self))
    call.contract("self", *dims)
    return _reduced(self, dims, keepdim)


@op(aten.mean.default, facts=_formed(masked.mean))
@op(aten.mean.dim, facts=_formed(masked.mean), scales="averaged")
@op(aten.var.default, aten.var.dim, facts=_formed(masked.var_unbiased))
@op(aten.var.correction, facts=_formed(masked.var))
@op(aten.std.default, aten.std.dim, facts=_formed(masked.std_unbiased))
@op(aten.std.correction, facts=_formed(masked.std))
@op(aten.var_mean.default, aten.var_mean.dim, facts=_formed(masked.var_mean_unbiased))
@op(aten.var_mean.correction, facts=_formed(masked.var_mean))
@op(aten.std_mean.default, aten.std_mean.dim, facts=_formed(masked.std_mean_unbiased))
@op(aten.std_mean.correction, facts=_formed(masked.std_mean))
def statistic(self: Axes, dim: Any = None, keepdim: bool = False, *, call: Call) -> list[Axes]:
    """As a sum, but masked units are left out of the count too: each of these ops has a masked form."""
    dims = _dims(dim, len(self))
    _statistic(call, self, dims)
    return [_reduced(self, dims, keepdim) for _ in call.shapes]


@op(aten.amax.default, aten.max.default, facts=_formed(masked.amax))
@op(aten.amin.default, aten.min.default, facts=_formed(masked.amin))
@op(aten.max.dim, facts=_formed(masked.max_dim))
@op(aten.min.dim, facts=_formed(masked.min_dim))
@op(aten.aminmax.default, facts=_formed(masked.aminmax))
@op(aten.logsumexp.default, facts=_formed(masked.logsumexp))
def extreme(self: Axes, dim: Any = None, keepdim: bool = False, *, call: Call) -> list[Axes]:
    """Of the kept units: each of these ops has a masked form. Where someone reads which index won, as `pick`."""
    if _reads_positions(call):
        return pick(self, dim, keepdim, call=call)
    dims = _dims(dim, len(self))
    call.contract("self", *dims)
    return [_reduced(self, dims, keepdim) for _ in call.shapes]


@op(
    aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.Scalar, aten.norm.ScalarOpt_dtype,
    aten.norm.ScalarOpt_dim_dtype, aten.frobenius_norm.dim, aten.linalg_norm.default,
    facts=in_float("a norm of floats", sums="totals", masked=ZEROS_ADD_NOTHING),
)  # fmt: skip
def norm(self: Axes, dim: Any = None, keepdim: bool = False, *, call: Call, **options: Any) -> Axes:
    """Zeros add nothing to a norm, unless its order is negative: then the smallest counts."""
    order = next((options[name] for name in ("ord", "p") if options.get(name) is not None), 2)
    if not isinstance(order, (int, float)) or order < 0:
        return pick(self, dim, keepdim, call=call)[0]
    dims = _dims(dim, len(self))
    _statistic(call, self, dims)
    return _reduced(self, dims, keepdim)


@op(
    aten.argmax.default, aten.argmin.default, aten.any.default, aten.any.dim, aten.all.default, aten.all.dim,
    aten.prod.default, aten.prod.dim_int, aten.median.dim, aten.mode.default,
    aten.count_nonzero.default, aten.count_nonzero.dim_IntList, aten.any.dims, aten.all.dims,
    aten.nanmean.default, aten.median.default, aten.nanmedian.default, aten.nanmedian.dim, aten.linalg_norm.ord_str,
    facts=in_float("reduced to a winner or a product"),
)  # fmt: skip
def pick(self: Axes, dim: Any = None, keepdim: bool = False, *, call: Call) -> list[Axes]:
    """The result depends on which indices there are: the reduced dims are frozen."""
    dims = _dims(dim, len(self))
    call.freeze([self[d] for d in dims], "reduced to a winner or a product")
    return [_reduced(self, dims, keepdim) for _ in call.shapes]


@op(
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default, aten.cumsum.default,
    aten.cumsum_.default, aten.cumprod.default, aten.logcumsumexp.default, aten.cummax.default, aten.cummin.default,
    aten.cumprod_.default, aten._safe_softmax.default, aten.special_softmax.default, aten.special_log_softmax.default,
    facts=in_float("normalised or accumulated in float"),
)  # fmt: skip
def along(self: Axes, dim: int, *, call: Call) -> list[Axes]:
    """Every result along `dim` depends on the others there: frozen."""
    if self:
        call.freeze(self[dim], "normalised or accumulated along it")
    return [tuple(self) for _ in call.shapes]


@op(
    aten.cosine_similarity.default,
    facts=in_float("divides by norms", sums="totals", masked=ZEROS_ADD_NOTHING),
)  # fmt: skip
def cosine_similarity(x1: Axes, x2: Axes, dim: int = 1, *, call: Call) -> Axes:
    """A contraction of both operands; the norm of one that is stretched along `dim` counts its copies: frozen."""
    axes = broadcast([x1, x2], call.why)
    back = dim % len(axes) - len(axes)
    for name, operand in (("x1", x1), ("x2", x2)):
        if length(from_end(operand, back)) == 1:
            call.freeze(axes[back], "one of two vectors is stretched along it")
        else:
            call.contract(name, len(operand) + back)
    return _reduced(tuple(axes), [dim % len(axes)], keepdim=False)


def _statistic(call: Call, self: Axes, dims: Sequence[int]) -> None:
    call.contract("self", *dims)
    if "self" in call.activations:
        call.mark([self[d] for d in dims], "normalized")


def _reads_positions(call: Call) -> bool:
    """Whether the second result of max.dim or min.dim, the positions, is used."""
    if call.node.target not in (aten.max.dim, aten.min.dim):
        return False
    return any(user.target is not operator.getitem or (user.args[1] == 1 and user.users) for user in call.node.users)


def _dims(dim: Any, rank: int) -> list[int]:
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return list(range(rank))
    return [d % rank for d in ([dim] if isinstance(dim, int) else dim)] if rank else []


def _reduced(axes: Axes, dims: Sequence[int], keepdim: bool) -> Axes:
    return tuple(UNIT if d in dims else axis for d, axis in enumerate(axes) if keepdim or d not in dims)
