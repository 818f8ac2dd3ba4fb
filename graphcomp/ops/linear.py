"""Products of matrices: linear, matmul and its kin, einsum, attention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from graphcomp.coupling.axis import UNIT, Axes, Axis, couple, freeze, length, regroup
from graphcomp.coupling.notation import broadcast, einsum_letters, from_end, summed_products
from graphcomp.coupling.size import Size, divide
from graphcomp.ir.graph import bind, value
from graphcomp.ops.call import Call
from graphcomp.ops.facts import Compute, Float, Fused, Routed, in_float, product
from graphcomp.ops.registry import op

aten = torch.ops.aten

IN_PLACE = "writes into an operand"
VECTORS = product(Float("a product with a vector"))
OTHER_DTYPE = product(Float("returns another dtype"))
ANY_DIMS = product(Float("no integer kernel for products over any dims"))
OUTER = in_float("multiplies and sums nothing")

op(aten.linear.default, "... i, o i, o -> ... o", facts=product(Compute(("input",), "weight", 0, "bias")))
op(aten.mm.default, "n i, i o -> n o", facts=product(Compute(("self", "mat2"), "mat2", 1)))
op(aten.mv.default, "n i, i -> n", facts=VECTORS)
op(aten.mm.dtype, "n i, i o -> n o", facts=OTHER_DTYPE)
op(aten.dot.default, "i, i -> ", facts=VECTORS)
op(aten.vdot.default, "i, i -> ", facts=VECTORS)
op(aten.outer.default, "a, b -> a b", facts=OUTER)
op(aten.ger.default, "a, b -> a b", facts=OUTER)
op(aten._int_mm.default, "n i, i o -> n o", facts=product(Float("multiplies integers already")))
op(aten.bilinear.default, "... i, ... j, o i j, o -> ... o", facts=product(Float("multiplies three operands")))


@op(aten.bmm.default, facts=product(Compute(("self", "mat2"), "mat2", 2)))
@op(aten.bmm.dtype, facts=OTHER_DTYPE)
def bmm(self: Axes, mat2: Axes, *, call: Call) -> list[Axes]:
    """Batched matrix product."""
    return _matmul(call, "self", self, "mat2", mat2)


@op(aten.matmul.default, facts=product(Compute(("self", "other"), "other", -1)))
@op(aten.linalg_matmul.default, facts=product(Float("another name of matmul")))
def matmul(self: Axes, other: Axes, *, call: Call) -> list[Axes]:
    """Batch dims broadcast, the last dim of the first meets the last but one of the second."""
    return _matmul(call, "self", self, "other", other)


@op(aten.addmm.default, facts=product(Compute(("mat1",), "mat2", 1, "self")))
@op(aten.baddbmm.default, facts=product(Compute(("batch1", "batch2"), "batch2", 2)))
@op(aten.addmm.dtype, aten.baddbmm.dtype, facts=OTHER_DTYPE)
@op(aten.addmm_.default, aten.baddbmm_.default, facts=product(Float(IN_PLACE)))
def addmm(self: Axes, call: Call, mat1: Axes = (), mat2: Axes = (), **batched: Any) -> Axes:
    """A product plus something broadcast over it."""
    if batched.get("batch1") is not None:
        found = _matmul(call, "batch1", batched["batch1"], "batch2", batched["batch2"])[0]
    else:
        found = _matmul(call, "mat1", mat1, "mat2", mat2)[0]
    return tuple(broadcast([found, self], call.why))


def _matmul(call: Call, left_name: str, left: Axes, right_name: str, right: Axes) -> list[Axes]:
    """Both batched, or either a vector. Between two activations it is attention: batch dims are heads."""
    both = {left_name, right_name} <= call.activations
    l_spec = "i" if len(left) == 1 else "... a i"
    r_spec = "i" if len(right) == 1 else "... i b"
    result = ("... " if len(left) > 2 or len(right) > 2 else "") + " ".join(
        name for name, axes in (("a", left), ("b", right)) if len(axes) > 1
    )
    if not result.startswith("..."):
        l_spec, r_spec = l_spec.removeprefix("... "), r_spec.removeprefix("... ")
    found = call.einsum(f"{l_spec}, {r_spec} -> {result}", None, **{left_name: left, right_name: right})
    batch = found[0][: max(len(left), len(right)) - 2]
    if both and batch:
        call.mark(batch, "head")
        call.mark([left[-1], right[-1]], "head_dim")
    elif batch:
        stacked = left if left_name not in call.activations else right
        call.mark(stacked[:-2], "expert")
    return found


@op(aten.addmv.default, aten.addmv_.default, facts=VECTORS)
def addmv(self: Axes, mat: Axes, vec: Axes, *, call: Call) -> Axes:
    """A product with a vector plus something broadcast over it."""
    return tuple(broadcast([call.einsum("n i, i -> n", mat=mat, vec=vec)[0], self], call.why))


@op(aten.addr.default, aten.addr_.default, facts=OUTER)
def addr(self: Axes, vec1: Axes, vec2: Axes, *, call: Call) -> Axes:
    """An outer product plus something broadcast over it."""
    return tuple(broadcast([(*vec1, *vec2), self], call.why))


@op(aten.addbmm.default, aten.addbmm_.default, facts=product(Float("sums a batch of products")))
def addbmm(self: Axes, batch1: Axes, batch2: Axes, *, call: Call) -> Axes:
    """The sum of a batch of products plus something broadcast over it."""
    return tuple(broadcast([call.einsum("b n i, b i m -> n m", batch1=batch1, batch2=batch2)[0], self], call.why))


@op(aten.inner.default, facts=ANY_DIMS)
def inner(self: Axes, other: Axes, *, call: Call) -> Axes:
    """The last dims are summed away; the others stand side by side."""
    if not self or not other:
        return (*self, *other)
    couple(self[-1], other[-1], call.why)
    call.contract("other", len(other) - 1)
    call.multiply((*self, *other[:-1]), "self", "other")
    return (*self[:-1], *other[:-1])


@op(aten.tensordot.default, facts=ANY_DIMS)
def tensordot(self: Axes, other: Axes, dims_self: Sequence[int], dims_other: Sequence[int], *, call: Call) -> Axes:
    """As `inner`, along any dims."""
    mine, theirs = [d % len(self) for d in dims_self], [d % len(other) for d in dims_other]
    for a, b in zip(mine, theirs, strict=True):
        couple(self[a], other[b], call.why)
    call.contract("other", *theirs)
    rest = [axis for d, axis in enumerate(other) if d not in theirs]
    if mine:
        call.multiply((*self, *rest), "self", "other")
    return (*(axis for d, axis in enumerate(self) if d not in mine), *rest)


@op(aten.linalg_vecdot.default, facts=VECTORS)
def vecdot(x: Axes, y: Axes, dim: int = -1, *, call: Call) -> Axes:
    """Summed along `dim`; the other dims broadcast."""
    axes = broadcast([x, y], call.why)
    back = dim % len(axes) - len(axes)
    name, operand = ("x", x) if length(from_end(y, back)) == 1 else ("y", y)
    if length(axes[back]) != 1:
        call.contract(name, len(operand) + back)
    call.multiply(axes, "x", "y")
    del axes[back]
    return tuple(axes)


@op(aten.linalg_multi_dot.default, aten.chain_matmul.default, facts=product(Float("multiplies several matrices")))
def multi_dot(call: Call, tensors: Sequence[Axes] = (), matrices: Sequence[Axes] = ()) -> Axes:
    """Each operand's last dim meets the first of the next. Multiplied in the order that costs least at full lengths, as
    torch does: after a cut another order may cost less."""
    name, operands = ("tensors", tensors) if tensors else ("matrices", matrices)
    for k, (left, right) in enumerate(pairwise(operands), 1):
        couple(left[-1], right[0], call.why)
        call.contract(f"{name}.{k}", 0)
    ends = [*([UNIT] if len(operands[0]) == 1 else operands[0][:1]), *(axes[0] for axes in operands[1:])]
    ends.append(UNIT if len(operands[-1]) == 1 else operands[-1][1])
    for first, middle, last in _chain([length(axis) for axis in ends]):
        operand_names = tuple(f"{name}.{k}" for k in range(first, last))
        call.multiply((ends[first], ends[middle], ends[last]), *operand_names)
    return (*operands[0][:-1], *operands[-1][1:])


def _chain(lengths: Sequence[Size]) -> list[tuple[int, int, int]]:
    """Return the products (a, b) (b, c) of a chain of matrices in the cheapest order, by the places of a, b and c."""
    count = len(lengths)
    costs: dict[tuple[int, int], Any] = {(k, k + 1): 0 for k in range(count - 1)}
    best: dict[tuple[int, int], int] = {}
    for reach in range(2, count):
        for a in range(count - reach):
            c = a + reach
            totals = {b: costs[a, b] + costs[b, c] + lengths[a] * lengths[b] * lengths[c] for b in range(a + 1, c)}
            # of lengths that depend on the inputs the first order stands for all
            comparable = all(isinstance(total, int) for total in totals.values())
            best[a, c] = min(totals, key=totals.__getitem__) if comparable else a + 1
            costs[a, c] = totals[best[a, c]]
    return _splits(best, 0, count - 1)


def _splits(best: dict[tuple[int, int], int], a: int, c: int) -> list[tuple[int, int, int]]:
    if c - a < 2:
        return []
    b = best[a, c]
    return [*_splits(best, a, b), *_splits(best, b, c), (a, b, c)]


@op(aten.einsum.default, facts=product(Float("written out as matmul where two operands are multiplied")))
def einsum(equation: str, tensors: list[Axes], *, call: Call) -> Axes:
    """Letters as einsum reads them; a letter that is not in the result is summed away, dims of length 1 stretch."""
    names, result = einsum_letters(equation, [len(axes) for axes in tensors])
    known: dict[str, Axis] = dict.fromkeys("".join(names), UNIT)
    last: dict[str, tuple[int, int]] = {}
    for k, (letters, axes) in enumerate(zip(names, tensors, strict=True)):
        for dim, (letter, axis) in enumerate(zip(letters, axes, strict=True)):
            (known[letter],) = broadcast([(known[letter],), (axis,)], call.why)
            if length(axis) != 1:
                last[letter] = k, dim
    for letter, (k, dim) in last.items():
        if letter not in result:
            call.contract(f"tensors.{k}", dim)
    _multiply_by_letters(call, names, tensors, result, known)
    _mark_product(call, names, result, known)
    return tuple(known[letter] for letter in result)


def _multiply_by_letters(
    call: Call, names: list[str], tensors: list[Axes], result: str, axis_of: dict[str, Axis]
) -> None:
    """As `summed_products` counts; a dim of length 1 that stretches is none that is summed over."""
    met = [
        [letter for letter, axis in zip(letters, axes, strict=True) if length(axis) == length(axis_of[letter])]
        for letters, axes in zip(names, tensors, strict=True)
    ]
    for letters, count in summed_products(met, result):
        call.multiply([axis_of[letter] for letter in letters], *(f"tensors.{k}" for k in range(count)))


def _mark_product(call: Call, names: list[str], result: str, axis_of: dict[str, Axis]) -> None:
    """As `_matmul` marks: letters that several operands and the result have are batch dims, the last one is `b`."""
    times = Counter(letter for name in names for letter in set(name))
    shared = {letter for letter, count in times.items() if count > 1}
    batch, summed = shared & set(result), shared - set(result)
    if not batch or not summed:
        return
    if all(f"tensors.{k}" in call.activations for k in range(len(names))):
        call.mark([axis_of[letter] for letter in batch], "head")
        call.mark([axis_of[letter] for letter in summed | (set(result[-1:]) - batch)], "head_dim")
    else:
        call.mark([axis_of[letter] for letter in batch], "expert")


# ------------------------------------------------------------------------------------------------ attention
@op(
    aten.scaled_dot_product_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_attention_math.default,
    facts=product(Fused()),
)
def scaled_dot_product_attention(
    query: Axes,
    key: Axes,
    value: Axes,
    attn_mask: Axes | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    call: Call,
) -> list[Axes]:
    """(..., h, s, d), (..., h, t, d), (..., h, t, e) -> (..., h, s, e). Softmax over t, so t is frozen; the implied
    1/sqrt(d) is pinned. Grouped-query: every key head serves h/h_kv query heads, (h r) = query heads."""
    why = call.why
    call.freeze([query[-2], key[-2], value[-2]], "softmax over these positions")
    couple(key[-2], value[-2], why)
    couple(query[-1], key[-1], why)
    batch = _attention_batch(query, key, value, enable_gqa, call)
    call.contract("query", len(query) - 1)
    call.mark([query[-1], value[-1]], "head_dim")
    call.mark([a for a in batch[1:] or batch if isinstance(length(a), int)], "head")
    if scale is None:
        call.pins["scale"] = 1 / math.sqrt(length(query[-1]))
    scores = (*batch, query[-2], key[-2])
    # two products: (s d)(t d) and (s t)(t e). Masks, causal ones too, save nothing
    call.multiply((*scores, query[-1]), "query", "key", kind="attention")
    call.multiply((*scores, value[-1]), "value", kind="attention")
    if attn_mask is not None:
        broadcast([scores, attn_mask], why)
    results: list[Axes] = [(*batch, query[-2], value[-1])]
    for shape in call.shapes[1:]:  # logsumexp and bookkeeping of the fused kernels
        from graphcomp.coupling.axis import fresh

        results.append(
            scores[: len(shape)]
            if tuple(map(length, scores[: len(shape)])) == shape
            else tuple(fresh(n, why) for n in shape)
        )
    return results


def _attention_batch(query: Axes, key: Axes, value: Axes, grouped: bool, call: Call) -> Axes:
    q, k, v = query[:-2], key[:-2], value[:-2]
    # the fused kernels have no argument enable_gqa: they group wherever there are fewer key heads
    grouped = grouped or "enable_gqa" not in bind(call.node)
    if grouped and q and length(q[-1]) != length(k[-1]):
        heads = length(k[-1])
        kv, _ = regroup([q[-1]], [heads, divide(length(q[-1]), heads)], call.why)
        for other in (k[-1], v[-1]):
            couple(kv, other, call.why)
        return (*broadcast([q[:-1], k[:-1], v[:-1]], call.why), q[-1])
    return tuple(broadcast([q, k, v], call.why))


# ------------------------------------------------------------------------------------------------ stacked experts
@op(
    "transformers::grouped_mm_fallback",
    aten._grouped_mm.default,
    facts=product(Routed("each row meets another matrix")),
)
def grouped_mm(call: Call, **arguments: Any) -> Axes:
    """Rows of the first operand, sorted by expert, meet that expert's matrix: (t, i), (e, i, o) -> (t, o).

    Experts are dispatched by number, so e is frozen. torch's kernel takes rows of whole blocks of 16 bytes; in a graph
    the fallback stands for the kernel, which the class calls.
    """
    names = list(arguments)
    tokens, weight = arguments[names[0]], arguments[names[1]]
    freeze(weight[0], call.because("experts are addressed by number"))
    call.mark(weight[0], "expert")
    couple(tokens[-1], weight[-2], call.why)
    call.contract(names[1], len(weight) - 2)
    call.multiply((*tokens, weight[-1]), *names[:2])  # each row meets the matrix of one expert
    for name, axes in ((names[0], tokens), (names[1], weight)):
        _align_rows(call, name, axes)
    _freeze_offsets(call, [v for name, v in arguments.items() if name in ("offs", "offsets")])
    return (*tokens[:-1], weight[-1])


BLOCK = 16
"""Bytes that rows of operands of torch's grouped product are multiples of."""


def _align_rows(call: Call, name: str, axes: Axes) -> None:
    """Let the dim whose elements lie side by side be as long as blocks of bytes are."""
    operand = value(bind(call.node)[name])
    side_by_side = [
        k for k, stride in enumerate(operand.stride()) if k >= len(axes) - 2 and type(stride) is int and stride == 1
    ]
    for k in side_by_side[-1:]:
        call.align(axes[k], BLOCK // math.gcd(BLOCK, operand.element_size()))


def _freeze_offsets(call: Call, offsets: Sequence[Axes | None]) -> None:
    for axes in offsets:
        call.freeze(axes or (), "experts are addressed by number")
