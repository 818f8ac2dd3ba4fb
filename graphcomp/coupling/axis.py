"""The axis algebra: what one dim of one value is made of, and what it shares with others.

    axis := Factor            a cell in a union-find forest
          | Product(parts)    row-major: (heads, head_dim); Product(()) is a dim of length 1
          | Concat(parts)     end to end: [q | k | v];      Concat(()) is a dim of length 0

A factor starts whole and is *refined*, bound to a Product or Concat, when an op looks inside it. Binding reaches
everything that shares the factor. Nothing here raises on a model: what does not align is frozen, with the reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from graphcomp.coupling.size import Size, add, divide, multiply


@dataclass(frozen=True)
class Reason:
    """Why indices must stay: `text`, the `op` that asked, and the user's source line."""

    text: str
    op: str = ""
    source: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.op})" if self.op else self.text


class Factor:
    """A set of indices no op has looked inside yet. Compare with `is`, after `find`."""

    __slots__ = ("_bound", "frozen", "marks", "serial", "size")
    _serials = itertools.count()

    def __init__(self, size: Size, frozen: Reason | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.marks: frozenset[str] = frozenset()
        self.serial = next(Factor._serials)
        self._bound: Axis | None = None  # another factor (union) or what this one was refined into

    def __repr__(self) -> str:
        return f"f{self.serial}:{self.size}" + ("!" if self.frozen else "")


@dataclass(frozen=True, eq=False, repr=False)
class Product:
    """Row-major product of `parts`; the last one varies fastest."""

    parts: tuple[Axis, ...]

    def __repr__(self) -> str:
        return "(" + " ".join(map(repr, self.parts)) + ")"


@dataclass(frozen=True, eq=False, repr=False)
class Concat:
    """`parts` end to end."""

    parts: tuple[Axis, ...]

    def __repr__(self) -> str:
        return "[" + " | ".join(map(repr, self.parts)) + "]"


Axis: TypeAlias = Factor | Product | Concat
Axes: TypeAlias = tuple[Axis, ...]
"""One Axis per dim of a value."""

UNIT = Product(())
EMPTY = Concat(())


# ------------------------------------------------------------------------------------------------ reading
def normal(axis: Axis) -> Axis:
    """`axis` with bindings followed, nested forms of one kind flattened, units and empties dropped."""
    if isinstance(axis, Factor):
        root = _find(axis)
        return root if root._bound is None else normal(root._bound)
    kind, neutral = (Product, UNIT) if isinstance(axis, Product) else (Concat, EMPTY)
    parts: list[Axis] = []
    for part in map(normal, axis.parts):
        parts.extend(part.parts if isinstance(part, (Product, Concat)) and isinstance(part, kind) else (part,))
    if kind is Product and any(_is_empty(part) for part in parts):
        return EMPTY
    if not parts:
        return neutral
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


def _find(factor: Factor) -> Factor:
    """The root of `factor`'s union, shortening the path on the way."""
    root = factor
    while isinstance(root._bound, Factor):
        root = root._bound
    while factor is not root:
        following = factor._bound
        factor._bound = root
        assert isinstance(following, Factor)
        factor = following
    return root


def _is_empty(axis: Axis) -> bool:
    return isinstance(axis, Concat) and not axis.parts


def length(axis: Axis) -> Size:
    """Number of indices."""
    if isinstance(axis, Factor):
        return axis.size
    if isinstance(axis, Product):
        return multiply(map(length, axis.parts))
    return add(map(length, axis.parts))


def leaves(axis: Axis) -> Iterator[Factor]:
    """The unrefined factors of `axis`, left to right, repeats included."""
    axis = normal(axis)
    if isinstance(axis, Factor):
        yield axis
        return
    for part in axis.parts:
        yield from leaves(part)


def is_frozen(axis: Axis) -> bool:
    """Whether every index of `axis` must stay."""
    return all(leaf.frozen for leaf in leaves(axis))


# ------------------------------------------------------------------------------------------------ building
def fresh(size: Size, frozen: Reason | None = None) -> Axis:
    """A new axis of `size` indices that nothing else shares (yet)."""
    if isinstance(size, int) and size <= 1:
        return UNIT if size == 1 else EMPTY
    return Factor(size, frozen)


def product(*parts: Axis) -> Axis:
    """`parts` as one row-major dim."""
    return normal(Product(parts))


def concat(*parts: Axis) -> Axis:
    """`parts` end to end."""
    return normal(Concat(parts))


# ------------------------------------------------------------------------------------------------ constraining
def freeze(axis: Axis, why: Reason) -> None:
    """All indices of `axis` must stay. The first reason given is the one kept."""
    for leaf in leaves(axis):
        leaf.frozen = leaf.frozen or why


def mark(axis: Axis, *names: str) -> None:
    """Remember a fact about the indices (`head`, `normalized`, …); it follows refinement and coupling."""
    for leaf in leaves(axis):
        leaf.marks |= frozenset(names)


def couple(a: Axis, b: Axis, why: Reason) -> None:
    """`a` and `b` must agree index by index: removing one index removes the other.

    `why` becomes the reason of what has to be frozen because the two do not align.
    """
    todo = [(a, b)]
    while todo:
        a, b = map(normal, todo.pop())
        if a is b:
            continue
        if length(a) != length(b):
            _freeze_both(a, b, why, f"lengths {length(a)} and {length(b)} cannot be matched")
        elif isinstance(a, Factor):
            _bind(a, b)
        elif isinstance(b, Factor):
            _bind(b, a)
        else:
            todo += _pieces(a, b, why)


def _freeze_both(a: Axis, b: Axis, why: Reason, text: str) -> None:
    reason = Reason(text, why.op, why.source)
    freeze(a, reason)
    freeze(b, reason)


def _bind(factor: Factor, axis: Axis) -> None:
    """From now on `factor` is `axis`; what was known of it holds for the leaves of `axis`."""
    if any(leaf is factor for leaf in leaves(axis)):  # only with symbolic lengths; cannot be expressed
        freeze(axis, Reason("an axis would contain itself"))
        return
    factor._bound = axis
    if factor.frozen:
        freeze(axis, factor.frozen)
    if factor.marks:
        mark(axis, *factor.marks)


def _pieces(a: Axis, b: Axis, why: Reason) -> list[tuple[Axis, Axis]]:
    """Two refined axes as pairs of pieces that agree; what does not align is frozen and left out."""
    if isinstance(a, Product) and isinstance(b, Product):
        pairs, rest_a, rest_b = _align(a.parts, b.parts)
        for x, y in zip(rest_a, rest_b, strict=True):
            _freeze_both(x, y, why, f"{length(x)} indices are grouped in two ways that do not nest")
        return pairs
    if not isinstance(length(a), int):
        pairs = _same_shape(a, b)
        if not pairs:
            _freeze_both(a, b, why, "pieces of a symbolic length cannot be told apart")
        return pairs
    bounds = sorted(_boundaries(a) | _boundaries(b))
    return list(zip(_cut_all(a, bounds), _cut_all(b, bounds), strict=True))


def _same_shape(a: Axis, b: Axis) -> list[tuple[Axis, Axis]]:
    if not (isinstance(a, Concat) and isinstance(b, Concat)):
        return []
    if [length(p) for p in a.parts] != [length(p) for p in b.parts]:
        return []
    return list(zip(a.parts, b.parts, strict=True))


def _boundaries(axis: Axis) -> set[int]:
    if not isinstance(axis, Concat):
        return set()
    return set(itertools.accumulate(length(part) for part in axis.parts[:-1]))


def _cut_all(axis: Axis, bounds: Sequence[int]) -> list[Axis]:
    pieces, done = [], 0
    for bound in bounds:
        left, axis = cut(axis, bound - done)
        pieces.append(left)
        done = bound
    return [*pieces, axis]


def _align(a: Sequence[Axis], b: Sequence[Axis]) -> tuple[list[tuple[Axis, Axis]], list[Axis], list[Axis]]:
    """Split two row-major sequences of the same total at their common boundaries.

    Returns pairs of equal length, and the blocks (one list a side) in which no boundary is common. A boundary lies
    behind the outermost n indices of all; two that do not nest (4 and 6 of 12) leave what is outside of both (2) and
    inside of both (12, here nothing) to be paired. So what is in a block depends on the set of all boundaries that
    were ever asked for, not on their order.
    """
    pairs: list[tuple[Axis, Axis]] = []
    blocks_a, blocks_b = [], []
    xs, ys = list(a), list(b)
    while xs and ys:
        x, y = xs.pop(0), ys.pop(0)
        if length(x) == length(y):
            pairs.append((x, y))
        elif (parts := _try_split(x, length(y))) is not None:
            pairs.append((parts[0], y))
            xs.insert(0, parts[1])
        elif (parts := _try_split(y, length(x))) is not None:
            pairs.append((x, parts[0]))
            ys.insert(0, parts[1])
        elif (outer := _outside_of_both(x, y)) is not None:
            pairs.append((outer[0][0], outer[1][0]))
            xs.insert(0, outer[0][1])
            ys.insert(0, outer[1][1])
        else:
            xs, ys = [x, *xs], [y, *ys]
            pairs += _inner_pairs(xs, ys)
            (block_x, xs), (block_y, ys) = _block(xs, ys)
            blocks_a.append(product(*block_x))
            blocks_b.append(product(*block_y))
    if xs or ys:  # only with symbolic lengths, whose totals may not be seen to agree
        blocks_a.append(product(*xs))
        blocks_b.append(product(*ys))
    return pairs, blocks_a, blocks_b


def _inner_pairs(xs: list[Axis], ys: list[Axis]) -> list[tuple[Axis, Axis]]:
    """Take what agrees off the inner ends, where a symbolic length outside of it cannot be divided: the heads and their
    dims stay apart from a sequence that is padded to whole chunks."""
    pairs: list[tuple[Axis, Axis]] = []
    while len(xs) > 1 and len(ys) > 1 and not all(isinstance(length(axis), int) for axis in (*xs, *ys)):
        x, y = xs[-1], ys[-1]
        if length(x) != length(y):
            swapped = divide(length(x), length(y)) is None
            longer, n = (y, length(x)) if swapped else (x, length(y))
            outer = divide(length(longer), n)
            parts = None if outer is None else _try_split(longer, outer)
            if parts is None:
                break
            (ys if swapped else xs)[-1:] = parts
            continue
        pairs.append((xs.pop(), ys.pop()))
    return pairs


def _outside_of_both(x: Axis, y: Axis) -> tuple[tuple[Axis, Axis], tuple[Axis, Axis]] | None:
    """Two factors, each as (n, rest) with the largest n that divides both; None where that is 1."""
    if not (isinstance(x, Factor) and isinstance(y, Factor) and isinstance(x.size, int) and isinstance(y.size, int)):
        return None
    common = math.gcd(x.size, y.size)
    if common == 1:
        return None
    known, new = _try_split(x, common), _try_split(y, common)
    assert known is not None and new is not None, "a factor can be split by what divides it"
    return known, new


def _block(
    xs: Sequence[Axis], ys: Sequence[Axis]
) -> tuple[tuple[list[Axis], list[Axis]], tuple[list[Axis], list[Axis]]]:
    """Each side as the shortest leading block that ends where a boundary nests with all of both sides, and the rest."""
    if not all(isinstance(length(axis), int) for axis in (*xs, *ys)):
        i, k = _smallest_block(xs, ys)
        return (list(xs[:i]), list(xs[i:])), (list(ys[:k]), list(ys[k:]))
    end, grown = 1, math.lcm(length(xs[0]), length(ys[0]))
    while grown != end:
        end = grown
        grown = math.lcm(end, *_not_nested(xs, end), *_not_nested(ys, end))
    return _cut_at(xs, end), _cut_at(ys, end)


def _not_nested(parts: Sequence[Axis], end: int) -> Iterator[int]:
    """Boundaries of `parts` that a boundary at `end` has to nest with, but may not."""
    before = 1
    for part in parts:
        after = before * length(part)
        splits = isinstance(part, Factor) and after % end == 0 and end % before == 0
        if not (after > end and splits):
            yield after
        if after >= end:
            return
        before = after


def _cut_at(parts: Sequence[Axis], end: int) -> tuple[list[Axis], list[Axis]]:
    """Row-major `parts` as the outermost `end` indices and the rest."""
    block: list[Axis] = []
    for k, part in enumerate(parts):
        inside = end // length(product(*block))
        if inside == 1:
            return block, list(parts[k:])
        if inside < length(part):
            halves = _try_split(part, inside)
            assert halves is not None, "a factor can be split by what divides it"
            return [*block, halves[0]], [halves[1], *parts[k + 1 :]]
        block.append(part)
    return block, []


def _smallest_block(xs: Sequence[Axis], ys: Sequence[Axis]) -> tuple[int, int]:
    """How many leading axes of each side have the same total length; all where that cannot be seen."""
    by_total = {total: i for i, total in enumerate(itertools.accumulate(map(length, ys), _times), 1)}
    for i, total in enumerate(itertools.accumulate(map(length, xs), _times), 1):
        if total in by_total:
            return i, by_total[total]
    return len(xs), len(ys)


def _times(a: Size, b: Size) -> Size:
    return multiply((a, b))


# ------------------------------------------------------------------------------------------------ looking inside
def split(axis: Axis, n: Size, why: Reason) -> tuple[Axis, Axis]:
    """`axis` as `(n, rest)`. Where its structure does not allow that, what does not nest is frozen.

    `n` must divide the length.
    """
    parts = _try_split(axis, n)
    if parts is not None:
        return parts
    left, right = regroup([axis], [n, divide(length(axis), n)], why)
    return left, right


def _try_split(axis: Axis, n: Size) -> tuple[Axis, Axis] | None:
    axis = normal(axis)
    rest = divide(length(axis), n)
    if rest is None:
        return None
    if rest == 1:
        return axis, UNIT
    if n == 1:
        return UNIT, axis
    if isinstance(axis, Factor):
        left, right = fresh(n), fresh(rest)
        _bind(axis, Product((left, right)))
        return left, right
    if isinstance(axis, Concat):
        return _split_concat(axis, rest)
    first, others = axis.parts[0], Product(axis.parts[1:])
    inner = divide(n, length(first))
    if inner is not None:  # the boundary lies at or behind the first part
        parts = _try_split(others, inner)
        return None if parts is None else (product(first, parts[0]), parts[1])
    parts = _try_split(first, n)
    return None if parts is None else (parts[0], product(parts[1], others))


def _split_concat(axis: Concat, rest: Size) -> tuple[Axis, Axis] | None:
    """[a | b] as ([a' | b'], rest), where each part is a whole number of `rest`: their rests are one and the same.

    Where a part is not, every row of `rest` indices is one piece, and no row can go without the others.
    """
    counts = [divide(length(part), rest) for part in axis.parts]
    if not any(count is None for count in counts):
        halves = [_try_split(part, count) for part, count in zip(axis.parts, counts, strict=True)]
        known = [half for half in halves if half is not None]
        if len(known) == len(halves):
            return concat(*(left for left, _ in known)), _all_one([inner for _, inner in known])
    if not isinstance(length(axis), int):
        return None
    rows = length(axis) // rest
    return Concat((UNIT,) * rows), _all_one(_cut_all(axis, [rest * k for k in range(1, rows)]))


def _all_one(axes: Sequence[Axis]) -> Axis:
    """Couple all of `axes`."""
    for other in axes[1:]:
        couple(axes[0], other, Reason("pieces of different make are read as one"))
    return axes[0]


def cut(axis: Axis, i: int) -> tuple[Axis, Axis]:
    """`axis` as `[left | right]` with `i` indices on the left (0 <= i <= length). The length must be an int.

    Always exact: a cut inside one row of a Product sets that row apart.
    """
    axis = normal(axis)
    total = length(axis)
    if i == 0:
        return EMPTY, axis
    if i == total:
        return axis, EMPTY
    if isinstance(axis, Factor):
        left, right = fresh(i), fresh(total - i)
        _bind(axis, Concat((left, right)))
        return left, right
    if isinstance(axis, Concat):
        return _cut_concat(axis, i)
    outer, inner = axis.parts[0], Product(axis.parts[1:])
    row, column = divmod(i, length(inner))
    above, below = cut(outer, row)
    if column == 0:
        return product(above, inner), product(below, inner)
    _, below = cut(below, 1)
    left, right = cut(inner, column)
    return concat(product(above, inner), left), concat(right, product(below, inner))


def _cut_concat(axis: Concat, i: int) -> tuple[Axis, Axis]:
    for k, part in enumerate(axis.parts):
        n = length(part)
        if i < n:
            left, right = cut(part, i)
            return concat(*axis.parts[:k], left), concat(right, *axis.parts[k + 1 :])
        i -= n
    return axis, EMPTY


def regroup(parts: Sequence[Axis], sizes: Sequence[Size], why: Reason) -> list[Axis]:
    """The row-major sequence `parts` read as dims of the given `sizes`: what view and reshape do.

    The totals must agree. Where the boundaries do not nest, both sides are frozen.
    """
    wanted = [fresh(n) for n in sizes]
    pairs, blocks_a, blocks_b = _align(_row(product(*parts)), [w for w in wanted if w is not UNIT])
    for known, new in pairs:
        couple(new, known, why)
    for known, new in zip(blocks_a, blocks_b, strict=True):
        _freeze_both(known, new, why, f"{length(known)} indices are grouped in two ways that do not nest")
    return [normal(w) for w in wanted]


def _row(axis: Axis) -> tuple[Axis, ...]:
    return axis.parts if isinstance(axis, Product) else (axis,)


# ------------------------------------------------------------------------------------------------ indices
def coordinates(axis: Axis) -> list[tuple[Factor, Tensor]]:
    """For each unfrozen factor in `axis`: which of its units every index belongs to.

    Returns (factor, (length,) int64) pairs; -1 where the index does not depend on the factor. A factor comes more
    than once only if one index can depend on two of its units, as in (c c).
    """
    rows: list[tuple[Factor, Tensor]] = []
    for factor, row in _occurrences(normal(axis)):
        for k, (known, other) in enumerate(rows):
            if known is factor and not bool(((row >= 0) & (other >= 0)).any()):
                rows[k] = factor, torch.maximum(row, other)
                break
        else:
            rows.append((factor, row))
    return rows


def _occurrences(axis: Axis) -> list[tuple[Factor, Tensor]]:
    if isinstance(axis, Factor):
        return [] if axis.frozen else [(axis, torch.arange(axis.size))]
    if is_frozen(axis):
        return []
    lengths = [length(part) for part in axis.parts]
    rows = []
    for k, part in enumerate(axis.parts):
        for factor, row in _occurrences(part):
            before, after = lengths[:k], lengths[k + 1 :]
            if isinstance(axis, Product):
                row = row.repeat_interleave(multiply(after)).repeat(multiply(before))
            else:
                row = torch.cat([row.new_full((add(before),), -1), row, row.new_full((add(after),), -1)])
            rows.append((factor, row))
    return rows


def kept_indices(axis: Axis, kept: Mapping[Factor, Tensor]) -> Tensor | None:
    """Indices of `axis` that stay when only the `kept` units of each factor do: (k,) int64, ascending; None: all."""
    stays: Tensor | None = None
    for factor, row in coordinates(axis):
        if factor not in kept:
            continue
        unit_stays = torch.zeros(factor.size + 1, dtype=torch.bool)  # the last entry answers for -1
        unit_stays[kept[factor]] = True
        unit_stays[-1] = True
        stays = unit_stays[row] if stays is None else stays & unit_stays[row]
    return None if stays is None else stays.nonzero().flatten()


def kept_length(axis: Axis, counts: Mapping[Factor, int]) -> Size:
    """Length of `axis` when `counts` units of each named factor stay."""
    axis = normal(axis)
    if isinstance(axis, Factor):
        return counts.get(axis, axis.size)
    parts = [kept_length(part, counts) for part in axis.parts]
    return multiply(parts) if isinstance(axis, Product) else add(parts)


def all_leaves(axes: Iterable[Axis]) -> Iterator[Factor]:
    """The leaves of every axis of a value."""
    for axis in axes:
        yield from leaves(axis)
