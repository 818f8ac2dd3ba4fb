"""Ops that move or regroup indices and compute nothing: view, transpose, cat, split, slice, expand, pad, …"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from graphcomp.coupling.axis import (
    UNIT,
    Axes,
    Axis,
    concat,
    couple,
    cut,
    fresh,
    is_frozen,
    length,
    product,
    regroup,
    split,
)
from graphcomp.coupling.notation import broadcast
from graphcomp.coupling.size import Size, divide
from graphcomp.ir.graph import bind, value
from graphcomp.ops.call import Call
from graphcomp.ops.facts import Move, Rescale, in_float, moves
from graphcomp.ops.registry import op
from graphcomp.torch_compat import OpOverload, schema_of

aten = torch.ops.aten

MOVES = moves(Move())
KEEPS = moves(Move(), keeps_zeros=True)
IN_PLACE = in_float("writes into the operand")
CANONICAL = in_float("another op by the time a graph is quantized")
CONJUGATES = in_float("complex numbers")
COMPLEX = in_float("complex numbers")
JOINS = in_float("no integer kernel that joins operands of several scales")
LIKE_ANOTHER = in_float("takes its lengths from another operand")


# ------------------------------------------------------------------------------------------------ regrouping
@op(aten.view.default, aten.reshape.default, facts=replace(KEEPS, scales="regrouped"))
@op(aten._unsafe_view.default, facts=KEEPS)
@op(aten._reshape_alias.default, facts=CANONICAL)
def view(self: Axes, *, call: Call) -> Axes:
    """Row-major regrouping. A length of -1 stays for the runtime to work out."""
    return _regrouped(call, self, "size" if "size" in _names(call) else "shape")


@op(aten.view_as.default, aten.reshape_as.default, facts=LIKE_ANOTHER)
def view_as(self: Axes, other: Axes, *, call: Call) -> Axes:
    """As `view`; the lengths are those of `other`, so the two couple."""
    axes = tuple(regroup(self, call.shape, call.why))
    for own, theirs in zip(axes, other, strict=True):
        couple(own, theirs, call.why)
    return axes


@op(aten.flatten.using_ints, facts=replace(KEEPS, scales="regrouped"))
@op(aten.ravel.default, facts=MOVES)
def flatten(self: Axes, *, call: Call) -> Axes:
    """Some neighbouring dims become one."""
    return tuple(regroup(self, call.shape, call.why))


@op(aten.unflatten.int, facts=MOVES)
def unflatten(self: Axes, dim: int, *, call: Call) -> Axes:
    """One dim becomes several; a length of -1 stays."""
    dim %= len(self)
    count = len(call.shape) - len(self) + 1
    parts = regroup([self[dim]], call.shape[dim : dim + count], call.why)
    call.lengths["sizes"] = parts
    return (*self[:dim], *parts, *self[dim + 1 :])


def _regrouped(call: Call, axes: Axes, argument: str) -> Axes:
    result = tuple(regroup(axes, call.shape, call.why))
    call.lengths[argument] = list(result)
    return result


def _names(call: Call) -> set[str]:
    assert isinstance(call.node.target, OpOverload)
    return {a.name for a in schema_of(call.node.target).arguments}


@op(aten.squeeze.default, aten.squeeze.dims, facts=MOVES)
@op(aten.squeeze.dim, facts=KEEPS)
@op(aten.squeeze_.default, aten.squeeze_.dim, aten.squeeze_.dims, facts=IN_PLACE)
def squeeze(self: Axes, dim: int | Sequence[int] | None = None, *, call: Call) -> Axes:
    """Dims of length 1 go, all or the named ones."""
    named = range(len(self)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % len(self) for d in named if length(self[d]) == 1} if self else set()
    return tuple(axis for d, axis in enumerate(self) if d not in gone)


@op(aten.unsqueeze.default, facts=KEEPS)
@op(aten.unsqueeze_.default, facts=IN_PLACE)
def unsqueeze(self: Axes, dim: int) -> Axes:
    """A new dim of length 1."""
    dim %= len(self) + 1
    return (*self[:dim], UNIT, *self[dim:])


# ------------------------------------------------------------------------------------------------ reordering
@op(aten.permute.default, facts=KEEPS)
def permute(self: Axes, dims: Sequence[int]) -> Axes:
    """Dims in another order."""
    return tuple(self[d] for d in dims)


@op(aten.transpose.int, facts=KEEPS)
@op(aten.swapaxes.default, aten.swapdims.default, facts=MOVES)
@op(aten.transpose_.default, aten.swapaxes_.default, aten.swapdims_.default, facts=IN_PLACE)
def transpose(self: Axes, call: Call, **dims: Any) -> Axes:
    """Two dims swapped."""
    a, b = (dims["dim0"], dims["dim1"]) if "dim0" in dims else (dims["axis0"], dims["axis1"])
    axes = list(self)
    if axes:
        axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


@op(aten.mT.default, facts=MOVES)
@op(aten.mH.default, aten.adjoint.default, facts=CONJUGATES)
def swap_last(self: Axes) -> Axes:
    """The last two dims swapped."""
    return (*self[:-2], self[-1], self[-2])


@op(aten.t.default, facts=KEEPS)
@op(aten.numpy_T.default, facts=MOVES)
@op(aten.t_.default, facts=IN_PLACE)
@op(aten.matrix_H.default, facts=CONJUGATES)
def t(self: Axes) -> Axes:
    """All dims in reverse."""
    return tuple(reversed(self))


@op(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist, facts=MOVES)
def movedim(self: Axes, source: int | Sequence[int], destination: int | Sequence[int]) -> Axes:
    """Some dims go to new places, the others keep their order."""
    sources = [source] if isinstance(source, int) else source
    targets = [destination] if isinstance(destination, int) else destination
    rank = len(self)
    placed = {t % rank: s % rank for s, t in zip(sources, targets, strict=True)}
    rest = iter([d for d in range(rank) if d not in placed.values()])
    return tuple(self[placed[d] if d in placed else next(rest)] for d in range(rank))


@op(aten.flip.default, aten.roll.default, facts=MOVES)
def reorder(self: Axes, dims: Sequence[int] = (), *, call: Call) -> Axes:
    """Indices change places within a dim: positions matter, so it is frozen."""
    moved = [d % len(self) for d in dims] if dims else range(len(self))
    call.freeze([self[d] for d in moved], "indices change places")
    return tuple(self)


@op(aten.flipud.default, aten.fliplr.default, facts=MOVES)
def flip_rows(self: Axes, *, call: Call) -> Axes:
    """Dim 0, or 1, in reverse."""
    call.freeze(self[0 if call.node.target is aten.flipud.default else 1], "indices change places")
    return tuple(self)


@op(aten.rot90.default, facts=MOVES)
def rot90(self: Axes, dims: Sequence[int] = (0, 1), *, call: Call) -> Axes:
    """Frozen in the plane that turns."""
    call.freeze([self[d] for d in dims], "indices change places")
    plane = {d % len(self) for d in dims}
    return tuple(fresh(n, call.why) if d in plane else self[d] for d, n in enumerate(call.shape))


@op(aten.channel_shuffle.default, facts=MOVES)
def channel_shuffle(self: Axes, groups: int, *, call: Call) -> Axes:
    """Channels (g c) come out as (c g)."""
    outer, inner = split(self[1], groups, call.why)
    call.freeze(outer, "the number of groups is fixed")
    return (self[0], product(inner, outer), *self[2:])


@op(aten.pixel_shuffle.default, facts=MOVES)
def pixel_shuffle(self: Axes, upscale_factor: int, *, call: Call) -> Axes:
    """(..., (c r r), h, w) -> (..., c, h r, w r): space is frozen."""
    r = upscale_factor
    channels, rest = split(self[-3], divide(length(self[-3]), r * r), call.why)
    call.freeze([rest, *self[-2:]])
    return (*self[:-3], channels, *(fresh(n, call.why) for n in call.shape[-2:]))


@op(aten.pixel_unshuffle.default, facts=MOVES)
def pixel_unshuffle(self: Axes, downscale_factor: int, *, call: Call) -> Axes:
    """(..., c, h r, w r) -> (..., (c r r), h, w): space is frozen."""
    call.freeze(list(self[-2:]))
    window = fresh(downscale_factor * downscale_factor, call.why)
    return (*self[:-3], product(self[-3], window), *(fresh(n, call.why) for n in call.shape[-2:]))


# ------------------------------------------------------------------------------------------------ joining, parting
@op(aten.cat.default, facts=moves(Rescale()))
@op(aten.concat.default, aten.concatenate.default, facts=JOINS)
def cat(tensors: list[Axes], dim: int = 0, *, call: Call) -> Axes:
    """Along `dim` the inputs lie end to end; every other dim is shared."""
    present = [axes for axes in tensors if not (len(axes) == 1 and length(axes[0]) == 0)] or tensors[:1]
    dim %= len(present[0])
    axes = list(present[0])
    for other in present[1:]:
        for k, (a, b) in enumerate(zip(axes, other, strict=True)):
            if k != dim:
                couple(a, b, call.because("concatenated along another dim"))
    axes[dim] = _end_to_end([other[dim] for other in present], call.shape[dim], call)
    return tuple(axes)


def _end_to_end(parts: Sequence[Axis], total: Size, call: Call) -> Axis:
    """`parts` as one axis; a symbolic part is frozen already and cannot be told apart from its neighbours."""
    joined = concat(*parts)
    if length(joined) == total:
        return joined
    call.freeze(list(parts), "joined to a symbolic length")
    return fresh(total, call.why)


@op(
    aten.hstack.default, aten.vstack.default, aten.row_stack.default, aten.dstack.default, aten.column_stack.default,
    facts=JOINS,
)  # fmt: skip
def hstack(tensors: list[Axes], *, call: Call) -> Axes:
    """`cat` of operands that have the dim at least."""
    op = call.node.target
    if op is aten.column_stack.default:
        return cat([(*axes, UNIT)[: max(len(axes), 2)] if axes else (UNIT, UNIT) for axes in tensors], 1, call=call)
    if op is aten.dstack.default:
        return cat([_at_least(axes, 3) for axes in tensors], 2, call=call)
    if op is aten.hstack.default:
        return cat([axes or (UNIT,) for axes in tensors], min(1, max(map(len, tensors)) - 1), call=call)
    return cat([_at_least(axes, 2) for axes in tensors], 0, call=call)


@op(aten.atleast_1d.default, aten.atleast_2d.default, aten.atleast_3d.default, facts=MOVES)
@op(aten.atleast_1d.Sequence, aten.atleast_2d.Sequence, aten.atleast_3d.Sequence, facts=JOINS)
def at_least(call: Call, self: Axes = (), tensors: Sequence[Axes] = ()) -> list[Axes]:
    """New dims of length 1."""
    return [_at_least(axes, len(shape)) for axes, shape in zip(tensors or [self], call.shapes, strict=True)]


def _at_least(axes: Axes, rank: int) -> Axes:
    if rank == 3 and 0 < len(axes) < 3:
        return (UNIT, axes[0], UNIT) if len(axes) == 1 else (*axes, UNIT)
    return (*[UNIT] * (rank - len(axes)), *axes)


@op(aten.block_diag.default, facts=JOINS)
def block_diag(tensors: list[Axes]) -> Axes:
    """Rows end to end, columns end to end."""
    blocks = [_at_least(axes, 2) for axes in tensors]
    return (concat(*(rows for rows, _ in blocks)), concat(*(columns for _, columns in blocks)))


@op(aten.kron.default, facts=in_float("multiplies and sums nothing"))
def kron(self: Axes, other: Axes) -> Axes:
    """Every dim is the product of the two operands' dims."""
    rank = max(len(self), len(other))
    pairs = zip(_at_least(self, rank)[-rank:], _at_least(other, rank)[-rank:], strict=True)
    return tuple(product(a, b) for a, b in pairs)


@op(aten.stack.default, facts=JOINS)
def stack(tensors: list[Axes], dim: int = 0, *, call: Call) -> Axes:
    """A new dim, frozen: which input is which matters."""
    axes = list(tensors[0])
    for other in tensors[1:]:
        for a, b in zip(axes, other, strict=True):
            couple(a, b, call.because("stacked"))
    dim %= len(axes) + 1
    return (*axes[:dim], fresh(len(tensors), call.because("the order of stacked values")), *axes[dim:])


@op(aten.split_with_sizes.default, facts=MOVES)
def split_with_sizes(self: Axes, dim: int = 0, *, call: Call) -> list[Axes]:
    """[a | b | …] in pieces of given lengths."""
    pieces = _pieces(self[dim], [shape[dim] for shape in call.shapes], call)
    call.lengths["split_sizes"] = pieces
    return [_with(self, dim, piece) for piece in pieces]


@op(aten.split.Tensor, aten.chunk.default, aten.tensor_split.sections, aten.tensor_split.indices, facts=CANONICAL)
def split_evenly(self: Axes, dim: int = 0, *, call: Call) -> list[Axes]:
    """Where the number or lengths of pieces are symbolic: frozen. (Others are split_with_sizes by now.)"""
    call.freeze(self[dim], "split by a rule that depends on the length")
    return [_with(self, dim, fresh(shape[dim], call.why)) for shape in call.shapes]


@op(
    aten.hsplit.int, aten.hsplit.array, aten.vsplit.int, aten.vsplit.array, aten.dsplit.int, aten.dsplit.array,
    aten.narrow.default, facts=CANONICAL,
)  # fmt: skip
def split_elsewhere(self: Axes, *, call: Call) -> list[Axes]:
    """Pieces of one dim, which is frozen: the one whose length changes."""
    for k, axis in enumerate(self):
        if any(shape[k] != length(axis) for shape in call.shapes):
            call.freeze(axis, "split in a form that keeps no lengths")
    return [
        tuple(a if length(a) == n else fresh(n, call.why) for a, n in zip(self, shape, strict=True))
        for shape in call.shapes
    ]


@op(aten.unbind.int, facts=MOVES)
def unbind(self: Axes, dim: int = 0, *, call: Call) -> list[Axes]:
    """One value per index of `dim`: which is which matters."""
    call.freeze(self[dim], "one value per index")
    dim %= len(self)
    return [(*self[:dim], *self[dim + 1 :]) for _ in call.shapes]


@op(aten.select.int, facts=MOVES)
def select(self: Axes, dim: int, *, call: Call) -> Axes:
    """One index of `dim`, by number."""
    call.freeze(self[dim], "one index is selected by number")
    dim %= len(self)
    return (*self[:dim], *self[dim + 1 :])


def _pieces(axis: Axis, lengths: Sequence[Size], call: Call) -> list[Axis]:
    if not isinstance(length(axis), int) or not all(isinstance(n, int) for n in lengths):
        call.freeze(axis, "split at symbolic places")
        return [fresh(n, call.why) for n in lengths]
    pieces: list[Axis] = []
    for n in lengths[:-1]:
        piece, axis = cut(axis, n)
        pieces.append(piece)
    return [*pieces, axis]


def _with(axes: Axes, dim: int, axis: Axis) -> Axes:
    dim %= len(axes)
    return (*axes[:dim], axis, *axes[dim + 1 :])


@op(aten.slice.Tensor, facts=MOVES)
def slice_(
    self: Axes, dim: int = 0, start: Size | None = None, end: Size | None = None, step: int = 1, *, call: Call
) -> Axes:
    """Indices start:end:step of `dim`. With step 1 the dim is cut; with step k it is read as (n, k)."""
    return _with(self, dim, _taken(self[dim], start, end, step, call.shape[dim], call))


def _taken(axis: Axis, start: Size | None, end: Size | None, step: int, wanted: Size, call: Call) -> Axis:
    """The `wanted` indices start:end:step of `axis`."""
    total = length(axis)
    if total == wanted:
        return axis
    if not all(isinstance(n, int) for n in (total, wanted, start or 0, end or 0)):
        call.freeze(axis, "sliced at symbolic places")
        return fresh(wanted, call.why)
    first = min(max((start or 0) + (total if (start or 0) < 0 else 0), 0), total)
    if step != 1:
        return _every(axis, first, step, wanted, call)
    left, rest = cut(axis, first)
    middle, right = cut(rest, wanted)
    call.lengths["start"] = left
    call.lengths["end"] = concat(left, middle) if length(right) else None
    return middle


def _every(axis: Axis, first: int, step: int, wanted: int, call: Call) -> Axis:
    """Every `step`-th index: coordinate `first` of the inner part of (n, step)."""
    if divide(length(axis), step) != wanted or first >= step:
        call.freeze(axis, "sliced with a step that does not divide the length")
        return fresh(wanted, call.why)
    outer, inner = split(axis, wanted, call.why)
    call.freeze(inner, "which of every few indices is addressed by number")
    call.lengths["end"] = axis
    return outer


@op(aten.slice_scatter.default, facts=JOINS)
def slice_scatter(
    self: Axes, src: Axes, dim: int = 0, start: Size | None = None, end: Size | None = None, step: int = 1, *,
    call: Call,
) -> Axes:  # fmt: skip
    """`src` has the dims of what `slice` takes, and replaces it."""
    taken = _with(self, dim, _taken(self[dim], start, end, step, length(src[dim]), call))
    for own, theirs in zip(taken, src, strict=True):
        couple(own, theirs, call.why)
    return tuple(self)


@op(aten.select_scatter.default, facts=JOINS)
def select_scatter(self: Axes, src: Axes, dim: int, *, call: Call) -> Axes:
    """One index replaced."""
    dim %= len(self)
    call.freeze(self[dim], "one index is selected by number")
    broadcast([(*self[:dim], *self[dim + 1 :]), src], call.why)
    return tuple(self)


@op(aten.unfold.default, facts=in_float("windows that overlap"))
def unfold(self: Axes, dimension: int, *, call: Call) -> Axes:
    """Sliding windows along a dim: frozen."""
    dimension %= len(self)
    call.freeze(self[dimension], "sliding windows")
    axes = _with(self, dimension, fresh(call.shape[dimension], call.why))
    return (*axes, fresh(call.shape[-1], call.why))


@op(
    aten.as_strided.default, aten.diagonal.default, aten.diag_embed.default, aten.tril_indices.default,
    aten.as_strided_.default, aten.diag.default, aten.diagflat.default, aten.linalg_diagonal.default,
    aten.fill_diagonal_.default, facts=in_float("read by strides, or along a diagonal"),
)  # fmt: skip
def strided(call: Call, self: Axes = ()) -> Axes:
    """Memory read by strides, or along a diagonal: frozen."""
    call.freeze(self)
    return tuple(fresh(n, call.why) for n in call.shape)


@op(aten.tril.default, aten.triu.default, aten.tril_.default, aten.triu_.default, facts=in_float("zeros a triangle"))
def triangle(self: Axes, *, call: Call) -> Axes:
    """Kept or not by position in the last two dims."""
    call.freeze(list(self[-2:]))
    return tuple(self)


# ------------------------------------------------------------------------------------------------ repeating
@op(aten.expand.default, facts=MOVES)
def expand(self: Axes, *, call: Call) -> Axes:
    """Dims of length 1 become free factors of the new length (copies all alike)."""
    new = len(call.shape) - len(self)
    own: Axes = (*[UNIT] * new, *self)
    axes = tuple(fresh(n) if length(a) != n else a for a, n in zip(own, call.shape, strict=True))
    call.lengths["size"] = list(axes)
    return axes


@op(aten.expand_as.default, facts=LIKE_ANOTHER)
@op(aten.broadcast_to.default, facts=MOVES)
@op(aten.broadcast_tensors.default, facts=JOINS)
def expand_as(call: Call, self: Axes = (), other: Axes | None = None, tensors: Sequence[Axes] = ()) -> list[Axes]:
    """Dims of length 1 take the axes of what they are stretched to."""
    if tensors:
        axes = tuple(broadcast(list(tensors), call.why))
        return [axes for _ in call.shapes]
    if other is not None:
        return [tuple(broadcast([self, other], call.why))]
    return [_broadcast_to(self, call)]


def _broadcast_to(self: Axes, call: Call) -> Axes:
    axes = expand(self, call=call)
    call.lengths["size"] = list(axes)
    return axes


@op(aten.repeat.default, aten.tile.default, facts=MOVES)
def repeat(self: Axes, *, call: Call) -> Axes:
    """Copies end to end: (r d), where r is a free factor whose length is a constant of the op."""
    own: Axes = (*[UNIT] * (len(call.shape) - len(self)), *self)
    pairs = [_copies(axis, n, call) for axis, n in zip(own, call.shape, strict=True)]
    argument = "repeats" if "repeats" in _names(call) else "dims"
    given = len(bind(call.node)[argument])  # tile may name the last dims only
    call.lengths[argument] = [times for times, _ in pairs][len(pairs) - given :]
    return tuple(axis for _, axis in pairs)


def _copies(axis: Axis, total: Size, call: Call) -> tuple[Axis | None, Axis]:
    """How many copies of `axis` end to end make `total` (None: a symbolic number), and the result's axis."""
    if length(axis) == total:
        return UNIT, axis
    times = divide(total, length(axis))
    if isinstance(times, int):
        copies = fresh(times)
        return copies, product(copies, axis)
    call.freeze(axis, "repeated a symbolic number of times")
    return None, fresh(total, call.why)


@op(aten.repeat_interleave.self_int, facts=MOVES)
def repeat_interleave(self: Axes, dim: int | None = None, *, call: Call) -> Axes:
    """Each index copied in place: (d r)."""
    axes = list(self) if dim is not None else [product(*self)]
    dim = (dim or 0) % len(axes)
    times = divide(call.shape[dim], length(axes[dim]))
    if times is None:
        call.freeze(axes[dim], "repeated a symbolic number of times")
        return _with(tuple(axes), dim, fresh(call.shape[dim], call.why))
    copies = fresh(times)
    repeated = product(axes[dim], copies)
    call.lengths["repeats"] = copies
    if bind(call.node).get("output_size") is not None:
        call.lengths["output_size"] = repeated
    return _with(tuple(axes), dim, repeated)


# ------------------------------------------------------------------------------------------------ padding
@op(aten.pad.default, aten.constant_pad_nd.default, facts=moves(Move(pads=True)))
def pad(self: Axes, pad: Sequence[Size], mode: str = "constant", *, call: Call) -> Axes:
    """Along a padded dim [before | x | after]. A constant fill is free, a reflection addresses positions."""
    axes = list(self)
    lengths: list[Axis | None] = [None] * len(pad)
    for k in range(len(pad) // 2):
        dim = len(axes) - 1 - k
        before, after = pad[2 * k], pad[2 * k + 1]
        if before == 0 and after == 0:
            continue
        lengths[2 * k], lengths[2 * k + 1], axes[dim] = _padded(axes[dim], before, after, dim, mode, call)
    call.lengths["pad"] = lengths
    return tuple(axes)


def _padded(
    axis: Axis, before: Size, after: Size, dim: int, mode: str, call: Call
) -> tuple[Axis | None, Axis | None, Axis]:
    sizes = (before, after, length(axis), call.shape[dim])
    if mode != "constant" or not all(isinstance(n, int) and n >= 0 for n in sizes) or is_frozen(axis):
        call.freeze(axis, "padded" if mode == "constant" else f"padded by {mode}")
        return None, None, fresh(call.shape[dim], call.why)
    left, right = fresh(before), fresh(after)
    return left, right, concat(left, axis, right)


def all_frozen(call: Call) -> list[Axes]:
    """Results that share nothing and must stay whole."""
    return [tuple(fresh(n, call.why) for n in shape) for shape in call.shapes]


# ------------------------------------------------------------------------------------------------ elements re-read
@op(aten.view_as_complex.default, facts=COMPLEX)
def view_as_complex(self: Axes, *, call: Call) -> Axes:
    """(..., 2) -> (...): real and imaginary part. Two floats are one number, wherever the number stands."""
    call.freeze(self[-1], "real and imaginary part")
    call.strides = 2
    return self[:-1]


@op(aten.view_as_real.default, facts=COMPLEX)
def view_as_real(self: Axes, *, call: Call) -> Axes:
    """(...) -> (..., 2): real and imaginary part."""
    return (*self, fresh(2, call.because("real and imaginary part")))


@op(aten.view.dtype, facts=in_float("the bytes of another dtype"))
def view_dtype(self: Axes, *, call: Call) -> Axes:
    """The same bytes as another dtype: of another width, the last dim is frozen, and rows hold whole elements."""
    if tuple(map(length, self)) == call.shape:
        return self
    before, after = value(bind(call.node)["self"]).element_size(), value(call.node).element_size()
    call.strides = max(1, after // before)
    call.freeze(self[-1], "its bytes are read as another dtype")
    return _with(self, -1, fresh(call.shape[-1], call.why))
