"""Ops that find elements by number: what is addressed is frozen, what rides along passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from graphcomp.coupling.axis import UNIT, Axes, Axis, couple, fresh, length
from graphcomp.coupling.axis import product as joined
from graphcomp.coupling.notation import broadcast
from graphcomp.coupling.size import Size
from graphcomp.ir.graph import bind, value
from graphcomp.ops.call import AxesValue, Call
from graphcomp.ops.create import overloads
from graphcomp.ops.facts import Float, Lookup, in_float, moves, product
from graphcomp.ops.movement import all_frozen
from graphcomp.ops.registry import op

aten = torch.ops.aten
Indices: TypeAlias = Sequence[Axes | None]

BY_NUMBER = "addressed by number"
BY_VALUE = "which elements are picked depends on their values"

BY_NUMBERS = in_float("picked by number", rows="self")
PLACED = in_float("elements go to numbered places")
NUMBERS = in_float("returns whole numbers or truth values")


# ------------------------------------------------------------------------------------------------ tables
@op(aten.embedding.default, facts=moves(Lookup()))
def embedding(weight: Axes, indices: Axes, *, call: Call) -> Axes:
    """v d, ... -> ... d: rows are addressed by number."""
    call.freeze(weight[0], BY_NUMBER)
    return (*indices, weight[1])


@op(
    aten.embedding_bag.default, aten.embedding_bag.padding_idx, aten._embedding_bag.default,
    aten._embedding_bag_forward_only.default, facts=in_float("sums rows", rows="weight"),
)  # fmt: skip
def embedding_bag(
    weight: Axes, indices: Axes, offsets: Axes, per_sample_weights: Axes | None = None, *, call: Call
) -> list[Axes]:
    """v d, n, b -> b d: sums, means or maxima of rows. The other results are bookkeeping."""
    call.freeze([weight[0], *indices, *offsets, *(per_sample_weights or ())], BY_NUMBER)
    rows, *others = call.shapes
    d = length(weight[1])
    return [
        (fresh(rows[0], call.why), weight[1]),
        *((fresh(s[0], call.why), weight[1] if s[1:] == (d,) else UNIT)[: len(s)] for s in others),
    ]


@op(aten.embedding_renorm_.default, facts=in_float("scales rows"))
def embedding_renorm(self: Axes, *, call: Call) -> Axes:
    """Rows are scaled to a greatest norm."""
    call.freeze(self, "rows are scaled by their norm")
    return self


# ------------------------------------------------------------------------------------------------ x[i, j]
@op(
    aten.index.Tensor, aten.index.Tensor_hacked_twin, aten._unsafe_index.Tensor, aten._unsafe_index.Tensor_hacked_twin,
    facts=BY_NUMBERS,
)  # fmt: skip
def index(self: Axes, indices: Indices, *, call: Call) -> Axes:
    """Indexed dims are frozen. The dims of the indices, broadcast, stand in their place, or in front where another
    dim lies between them."""
    block, others, at = _indexed(self, indices, call)
    if _has_mask(call):
        call.freeze(block, BY_VALUE)
        block = tuple(fresh(n, call.because(BY_VALUE)) for n in call.shape[at : at + len(block)])
    return (*others[:at], *block, *others[at:])


@op(
    aten.index_put.default, aten.index_put_.default, aten.index_put.hacked_twin, aten.index_put_.hacked_twin,
    aten._unsafe_index_put.default, aten._unsafe_index_put.hacked_twin, aten._index_put_impl_.default,
    aten._index_put_impl_.hacked_twin, facts=PLACED,
)  # fmt: skip
def index_put(self: Axes, indices: Indices, values: Axes, *, call: Call) -> Axes:
    """`values` has the dims of what `index` reads, and replaces it. Where it goes matters: its block is frozen."""
    block, others, at = _indexed(self, indices, call)
    picked = (*others[:at], *block, *others[at:])
    call.freeze(block, BY_NUMBER)
    for k, axis in enumerate(reversed(values), 1):
        dim = len(picked) - k
        if at <= dim < at + len(block):
            call.freeze(axis, BY_NUMBER)
        elif length(axis) != 1:
            couple(axis, picked[dim], call.why)
    return self


def _indexed(self: Axes, indices: Indices, call: Call) -> tuple[Axes, Axes, int]:
    """The dims that the indices bring, the dims of `self` that are not indexed, and where the former go among these.

    A mask takes as many dims of `self` as it has and brings one.
    """
    masks = _masks(call)
    block: list[Axes] = []
    others: list[Axis] = []
    places: list[int] = []
    dim = 0
    for axes, mask in zip(indices, masks, strict=False):
        taken = len(axes) if mask and axes is not None else 1
        if axes is None:
            others.append(self[dim])
        else:
            call.freeze(self[dim : dim + taken], BY_NUMBER)
            call.freeze(axes if mask else (), BY_VALUE)
            block.append((UNIT,) if mask else axes)
            places.append(len(others))
        dim += taken
    others += self[dim:]
    together = len(set(places)) == 1
    return tuple(broadcast(block, call.why)), tuple(others), places[0] if together else 0


def _masks(call: Call) -> list[bool]:
    """Which of the indices are masks."""
    dtypes = [_dtype(index) for index in bind(call.node)["indices"]]
    return [dtype in (torch.bool, torch.uint8) for dtype in dtypes]


def _has_mask(call: Call) -> bool:
    return any(_masks(call))


def _dtype(index: Any) -> torch.dtype | None:
    found = value(index) if isinstance(index, fx.Node) else None
    return found.dtype if isinstance(found, Tensor) else None


# ------------------------------------------------------------------------------------------------ along one dim
@op(aten.index_select.default, facts=in_float("no integer kernel"))
def index_select(self: Axes, dim: int, index: Axes, *, call: Call) -> Axes:
    """The dim of the index takes the place of `dim`."""
    if not self:
        return self
    call.freeze(self[dim], BY_NUMBER)
    return _with(self, dim, index[0] if index else UNIT)


@op(aten.gather.default, facts=BY_NUMBERS)
def gather(self: Axes, dim: int, index: Axes, *, call: Call) -> Axes:
    """One element of `dim` per element of `index`; in every other dim the two go together."""
    _beside(call, dim, self, index)
    return index


@op(
    *overloads(aten.scatter, aten.scatter_), aten.scatter_add.default, aten.scatter_add_.default,
    aten.scatter_reduce.two, aten.scatter_reduce_.two, facts=PLACED,
)  # fmt: skip
def scatter(self: Axes, dim: int, index: Axes, src: Axes | None = None, *, call: Call) -> Axes:
    """Elements of `src` go to numbered places of `dim`."""
    _beside(call, dim, self, index)
    if src is not None:
        _beside(call, dim, src, index)
    if index:
        call.freeze(index[dim], BY_NUMBER)
    return self


def _beside(call: Call, dim: int, axes: Axes, index: Axes) -> None:
    """`dim` of `axes` is addressed; the other dims couple with `index`, or are read in part."""
    for k, (own, theirs) in enumerate(zip(axes, index, strict=True)):
        if k == dim % len(axes):
            call.freeze(own, BY_NUMBER)
        elif length(own) == length(theirs):
            couple(own, theirs, call.why)
        else:
            call.freeze([own, theirs], "part of it is addressed")


@op(aten.take_along_dim.default, facts=BY_NUMBERS)
def take_along_dim(self: Axes, indices: Axes, dim: int | None = None, *, call: Call) -> list[Axes]:
    """As `gather`, and the other dims broadcast."""
    if dim is None:
        call.freeze(self, BY_NUMBER)
        return [(joined(*indices),)]
    call.freeze(self[dim], BY_NUMBER)
    axes = broadcast([_with(self, dim, UNIT), _with(indices, dim, UNIT)], call.why)
    return [_with(tuple(axes), dim, indices[dim])]


@op(aten.index_add.default, aten.index_add_.default, aten.index_copy.default, aten.index_copy_.default, facts=PLACED)
def index_add(self: Axes, dim: int, index: Axes, source: Axes, *, call: Call) -> Axes:
    """Slices of `source` go to numbered places of `dim`."""
    call.freeze(index, BY_NUMBER)
    for k, (own, theirs) in enumerate(zip(self, source, strict=True)):
        if k == dim % len(self):
            call.freeze([own, theirs], BY_NUMBER)
        else:
            couple(own, theirs, call.why)
    return self


@op(*overloads(aten.index_fill, aten.index_fill_), facts=PLACED)
def index_fill(self: Axes, dim: int, index: Axes, *, call: Call) -> Axes:
    """Numbered places get one value."""
    call.freeze([*index, *([self[dim]] if self else [])], BY_NUMBER)
    return self


@op(
    aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable,
    aten.kthvalue.default, aten.diff.default, aten.msort.default, aten.multinomial.default,
    facts=in_float("ordered by value"),
)  # fmt: skip
def ordered(
    call: Call, self: Axes, dim: int = -1, prepend: Axes | None = None, append: Axes | None = None
) -> list[Axes]:
    """Order along `dim` matters: frozen. The other dims pass."""
    dim = 0 if call.node.target is aten.msort.default else dim
    for other in (prepend, append):
        for k, (own, theirs) in enumerate(zip(self, other or (), strict=False)):
            if k != dim % len(self):
                couple(own, theirs, call.why)
    call.freeze([axes[dim] for axes in (self, prepend, append) if axes], "the order along it matters")
    return [_along(self, dim, shape, call) for shape in call.shapes]


def _along(self: Axes, dim: int, shape: tuple[Size, ...], call: Call) -> Axes:
    """`self` with another length along `dim`; a result of another rank is a reduction, or counts."""
    if len(shape) == len(self):
        return _with(self, dim, fresh(shape[dim], call.why)) if self else self
    dim %= len(self)
    rest = (*self[:dim], *self[dim + 1 :])
    return rest if tuple(map(length, rest)) == shape else tuple(fresh(n, call.why) for n in shape)


@op(aten.searchsorted.Tensor, aten.searchsorted.Scalar, facts=NUMBERS)
def searchsorted(call: Call, sorted_sequence: Axes, sorter: Axes | None = None, **number: Any) -> Axes:
    """One row of boundaries for all, or one per row of the values."""
    call.freeze([sorted_sequence[-1], *(sorter or ())], BY_VALUE)
    values = number.get("self")
    if not isinstance(values, AxesValue):
        return tuple(fresh(n, call.why) for n in call.shape)
    for own, theirs in zip(values[:-1], sorted_sequence[:-1], strict=False):
        couple(own, theirs, call.why)
    return values


@op(aten.bucketize.Tensor, aten.bucketize.Scalar, facts=NUMBERS)
def bucketize(call: Call, boundaries: Axes, **number: Any) -> Axes:
    """Each value by itself, among frozen boundaries."""
    call.freeze(boundaries, BY_VALUE)
    values = number.get("self")
    return values if isinstance(values, AxesValue) else ()


@op(aten.isin.Tensor_Tensor, aten.isin.Tensor_Scalar, aten.isin.Scalar_Tensor, facts=NUMBERS)
def isin(call: Call, elements: Axes = (), test_elements: Any = None) -> Axes:
    """Each element by itself, among a frozen set."""
    if isinstance(test_elements, AxesValue):
        call.freeze(test_elements, BY_VALUE)
    return elements


@op(aten.repeat_interleave.self_Tensor, facts=BY_NUMBERS)
def repeat_interleave(self: Axes, repeats: Axes, dim: int | None = None, *, call: Call) -> list[Axes]:
    """Each index a number of times that is its own."""
    call.freeze([*repeats, *(self if dim is None else [self[dim]])], BY_NUMBER)
    return all_frozen(call) if dim is None else [_with(self, dim, fresh(call.shape[dim], call.why))]


# ------------------------------------------------------------------------------------------------ between dims
@op(aten.cross.default, aten.linalg_cross.default, facts=in_float("products of coordinates"))
def cross(self: Axes, other: Axes, dim: int | None = None, *, call: Call) -> Axes:
    """The three coordinates stay."""
    axes = broadcast([self, other], call.why)
    default = -1 if call.node.target is aten.linalg_cross.default else None
    dim = default if dim is None else dim
    call.freeze(axes if dim is None else axes[dim], "a cross product has three coordinates")
    return tuple(axes)


@op(
    aten.cdist.default,
    aten._cdist_forward.default,
    aten._euclidean_dist.default,
    facts=product(Float("distances of floats")),
)
def cdist(x1: Axes, x2: Axes, *, call: Call) -> list[Axes]:
    """... p m, ... r m -> ... p r: masked units must be zero on both sides."""
    call.contract("x1", len(x1) - 1)
    return call.einsum("... p m, ... r m -> ... p r", x1=x1, x2=x2)


# ------------------------------------------------------------------------------------------------ frequencies
@op(
    *overloads(
        aten.fft_fft, aten.fft_ifft, aten.fft_rfft, aten.fft_irfft, aten.fft_hfft, aten.fft_ihfft, aten.fft_fft2,
        aten.fft_ifft2, aten.fft_rfft2, aten.fft_irfft2, aten.fft_fftn, aten.fft_ifftn, aten.fft_rfftn,
        aten.fft_irfftn, aten.fft_fftshift, aten.fft_ifftshift, aten._fft_r2c, aten._fft_c2r, aten._fft_c2c,
    ),
    facts=in_float("complex numbers; costs are not counted, as by convention"),
)  # fmt: skip
def fft(self: Axes, dim: int | Sequence[int] | None = None, s: Sequence[Size] | None = None, *, call: Call) -> Axes:
    """Frozen along the dims that are transformed (the last len(s), or all, where none is named)."""
    named = [dim] if isinstance(dim, int) else dim
    if named is None:
        named = range(len(self) - len(s), len(self)) if s is not None else range(len(self))
    dims = {d % len(self) for d in named}
    call.freeze([self[d] for d in dims], "transformed to frequencies")
    return tuple(fresh(call.shape[d], call.why) if d in dims else axis for d, axis in enumerate(self))


# ------------------------------------------------------------------------------------------------ all of it
@op(
    aten.take.default, aten.masked_select.default, aten.masked_scatter.default, aten.masked_scatter_.default,
    aten.nonzero.default, aten.nonzero_numpy.default, aten.nonzero_static.default, aten.argwhere.default,
    aten.where.default, aten._unique.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.unique_dim.default, aten.renorm.default,
    aten.bincount.default, aten.histc.default, aten.put.default, aten.put_.default,
    aten.repeat_interleave.Tensor, aten.pdist.default, aten.pairwise_distance.default, aten.dist.default,
    aten.quantile.default, aten.quantile.scalar, aten.nanquantile.default, aten.nanquantile.scalar,
    aten.stft.default, aten.stft.center, aten.istft.default, aten.trace.default, aten.cov.default,
    aten.corrcoef.default, aten.equal.default, aten.diagonal_scatter.default,
    aten.as_strided_scatter.default, aten.pad_sequence.default, aten.linalg_vander.default,
    *overloads(aten.gradient, aten.trapezoid, aten.trapz, aten.cumulative_trapezoid, aten.index_reduce),
    facts=in_float("depends on every place"),
)  # fmt: skip
def whole(call: Call, **arguments: Any) -> list[Axes]:
    """What comes out depends on every place that goes in: operands and results are frozen."""
    for argument in arguments.values():
        for axes in argument if isinstance(argument, list) else [argument]:
            if isinstance(axes, AxesValue):
                call.freeze(axes, BY_VALUE)
    return all_frozen(call)


def _with(axes: Axes, dim: int, axis: Axis) -> Axes:
    dim %= len(axes)
    return (*axes[:dim], axis, *axes[dim + 1 :])
