"""The axis algebra: what one dim is made of, checked against torch on tensors of index numbers."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphcomp.coupling.axis import (
    EMPTY,
    UNIT,
    Axis,
    Factor,
    Product,
    Reason,
    concat,
    coordinates,
    couple,
    cut,
    freeze,
    fresh,
    is_frozen,
    kept_indices,
    kept_length,
    leaves,
    length,
    mark,
    normal,
    product,
    regroup,
    split,
)

WHY = Reason("test")


def factor(n: int) -> Factor:
    axis = fresh(n)
    assert isinstance(axis, Factor)
    return axis


def shown(axis: Axis) -> str:
    """The structure with a letter per factor, in order of appearance: '[(a b) | a]'."""
    letters: dict[Factor, str] = {}

    def show(axis: Axis) -> str:
        if isinstance(axis, Factor):
            return letters.setdefault(axis, chr(ord("a") + len(letters))) + ("!" if axis.frozen else "")
        inner = [show(part) for part in axis.parts]
        return "(" + " ".join(inner) + ")" if isinstance(axis, Product) else "[" + " | ".join(inner) + "]"

    return show(normal(axis))


# ------------------------------------------------------------------------------------------------ building
def test_lengths_of_one_and_none_are_no_factors() -> None:
    assert fresh(1) is UNIT
    assert fresh(0) is EMPTY
    assert length(product()) == 1
    assert length(concat()) == 0


def test_nested_forms_flatten() -> None:
    a, b, c = factor(2), factor(3), factor(4)
    assert shown(product(product(a, b), UNIT, c)) == "(a b c)"
    assert shown(concat(concat(a, b), EMPTY, c)) == "[a | b | c]"
    assert shown(product(a)) == "a"
    assert length(product(a, concat(b, c))) == 14
    assert product(a, EMPTY) is EMPTY


# ------------------------------------------------------------------------------------------------ couple
def test_couple_binds_factors_and_everything_that_shares_them() -> None:
    a, b, c = factor(6), factor(6), factor(6)
    couple(a, b, WHY)
    couple(b, c, WHY)
    couple(c, product(factor(2), factor(3)), WHY)
    assert shown(a) == shown(b) == "(a b)"
    assert list(leaves(a)) == list(leaves(c))


def test_couple_products_at_their_common_boundaries() -> None:
    a, b = product(factor(4), factor(6)), product(factor(2), factor(12))
    couple(a, b, WHY)
    assert shown(a) == shown(b) == "(a b c)"
    assert [leaf.size for leaf in leaves(a)] == [2, 2, 6]


def test_couple_concats_at_the_union_of_their_boundaries() -> None:
    a, b = concat(factor(4), factor(8)), concat(factor(6), factor(6))
    couple(a, b, WHY)
    assert [leaf.size for leaf in leaves(a)] == [4, 2, 6]
    assert list(leaves(a)) == list(leaves(b))


def test_couple_a_product_with_equal_parts_couples_every_part() -> None:
    outer, rest = factor(3), factor(4)
    parts = [factor(4) for _ in range(3)]
    couple(product(outer, rest), concat(*parts), WHY)
    assert {normal(part) for part in parts} == {normal(rest)}
    assert is_frozen(outer)
    assert not is_frozen(rest)


def test_couple_what_does_not_nest_freezes_both_sides_and_says_why() -> None:
    a, b = product(factor(4), factor(6)), product(factor(3), factor(8))
    couple(a, b, WHY)
    assert [(leaf.size, bool(leaf.frozen)) for leaf in leaves(a)] == [(4, True), (3, True), (2, False)]
    assert [(leaf.size, bool(leaf.frozen)) for leaf in leaves(b)] == [(3, True), (4, True), (2, False)]
    assert list(leaves(a))[-1] is list(leaves(b))[-1]
    assert "grouped in two ways" in str(next(leaves(a)).frozen)


def test_inner_dims_stay_apart_from_a_symbolic_length_that_cannot_be_divided() -> None:
    s = sympy.Symbol("s", integer=True, positive=True)
    padded = s + sympy.Mod(8 - sympy.Mod(s, 8), 8)
    heads, dims = fresh(16), fresh(32)
    chunks = regroup([fresh(2), fresh(padded), product(heads, dims)], [2, padded // 8, 8, 16, 32], Reason("view"))
    assert [length(axis) for axis in chunks[2:]] == [8, 16, 32]
    assert is_frozen(chunks[1]) and is_frozen(chunks[2])
    assert not is_frozen(heads) and not is_frozen(dims)
    assert list(leaves(chunks[3])) == list(leaves(heads)) and list(leaves(chunks[4])) == list(leaves(dims))


def test_couple_of_unequal_lengths_freezes_both_sides() -> None:
    a, b = factor(4), factor(5)
    couple(a, b, WHY)
    assert "lengths 4 and 5" in str(a.frozen)
    assert b.frozen == a.frozen


def test_an_axis_coupled_with_itself_is_left_alone() -> None:
    a = product(factor(2), factor(3))
    couple(a, normal(a), WHY)
    assert shown(a) == "(a b)"


def test_freezing_and_marks_follow_refinement_and_coupling() -> None:
    a, b = factor(6), factor(6)
    freeze(a, Reason("first"))
    freeze(a, Reason("second"))
    mark(b, "head")
    couple(a, b, WHY)
    outer, inner = split(a, 2, WHY)
    for leaf in (*leaves(outer), *leaves(inner)):
        assert str(leaf.frozen) == "first"
        assert leaf.marks == {"head"}


# ------------------------------------------------------------------------------------------------ looking inside
def test_split_refines_a_factor() -> None:
    a = factor(12)
    outer, inner = split(a, 3, WHY)
    assert (length(outer), length(inner)) == (3, 4)
    assert shown(a) == "(a b)"


def test_split_between_and_inside_the_parts_of_a_product() -> None:
    a = product(factor(4), factor(6))
    assert [length(part) for part in split(a, 2, WHY)] == [2, 12]
    assert [length(part) for part in split(a, 8, WHY)] == [8, 3]
    assert [leaf.size for leaf in leaves(a)] == [2, 2, 2, 3]


def test_split_where_no_boundary_fits_freezes() -> None:
    a = product(factor(4), factor(3))
    outer, inner = split(a, 3, WHY)
    assert is_frozen(a)
    assert is_frozen(outer)
    assert is_frozen(inner)


def test_split_freezes_no_more_than_what_does_not_nest() -> None:
    a = product(factor(8), factor(9))
    outer, inner = split(a, 12, WHY)
    assert [(leaf.size, bool(leaf.frozen)) for leaf in leaves(a)] == [(4, False), (2, True), (3, True), (3, False)]
    assert [(leaf.size, bool(leaf.frozen)) for leaf in leaves(outer)] == [(4, False), (3, True)]
    assert [(leaf.size, bool(leaf.frozen)) for leaf in leaves(inner)] == [(2, True), (3, False)]


def test_views_that_do_not_nest_leave_what_all_of_them_share() -> None:
    for order in itertools.permutations([2, 4, 6]):
        assert free_rows(12, order) == {tuple([0] * 6 + [1] * 6)}


@given(st.sampled_from([12, 24, 36, 48, 60, 72]), st.data())
def test_the_order_of_views_does_not_matter(total: int, data: st.DataObject) -> None:
    """What stays free is known beforehand: the boundaries that nest with all others, and nothing else between."""
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    order = data.draw(st.lists(st.sampled_from(divisors), max_size=5))
    assert free_rows(total, order) == free_by_definition(total, order)


def free_rows(total: int, boundaries: Sequence[int]) -> set[tuple[int, ...]]:
    """Unit of every index, for each factor that stays free when an axis is viewed as (n, total / n) for each n."""
    axis = fresh(total)
    for n in boundaries:
        regroup([axis], [n, total // n], WHY)
    return {tuple(row.tolist()) for _, row in coordinates(axis)}


def free_by_definition(total: int, boundaries: Sequence[int]) -> set[tuple[int, ...]]:
    asked = {1, total, *boundaries}
    implied = set(asked)
    while True:
        wider = implied | {f(a, b) for f in (math.gcd, math.lcm) for a in implied for b in implied}
        if wider == implied:
            break
        implied = wider
    cuts = sorted(n for n in implied if all(n % other == 0 or other % n == 0 for other in asked))
    free = [(a, b) for a, b in itertools.pairwise(cuts) if not any(a < n < b for n in asked)]
    return {tuple(i // (total // b) % (b // a) for i in range(total)) for a, b in free}


def test_split_of_a_concat_couples_the_inner_parts() -> None:
    a, b = factor(8), factor(16)
    outer, inner = split(concat(a, b), 6, WHY)
    assert shown(outer) == "[a | b]"
    assert shown(product(a, UNIT)) == "(a b)"
    assert normal(inner) is list(leaves(a))[1] is list(leaves(b))[1]


def test_cut_at_a_multiple_of_the_inner_length_cuts_the_outer_factor() -> None:
    outer, inner = factor(4), factor(6)
    left, right = cut(product(outer, inner), 12)
    assert (length(left), length(right)) == (12, 12)
    assert shown(concat(left, right)) == "[(a b) | (c b)]"
    assert shown(outer) == "[a | b]"


def test_cut_inside_a_row_sets_the_row_apart() -> None:
    outer, inner = factor(4), factor(6)
    left, right = cut(product(outer, inner), 8)
    assert (length(left), length(right)) == (8, 16)
    assert [length(part) for part in normal(outer).parts] == [1, 1, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize("i", [0, 7])
def test_cut_at_an_end(i: int) -> None:
    a = factor(7)
    left, right = cut(a, i)
    assert (left, right) == ((EMPTY, a) if i == 0 else (a, EMPTY))


# ------------------------------------------------------------------------------------------------ indices
def test_coordinates_of_products_and_concats() -> None:
    a, b = factor(2), factor(3)
    (first, outer), (second, inner), (again, _) = coordinates(concat(product(a, b), product(a, a)))[:3]
    assert (first, second, again) == (a, b, a)
    assert outer.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert inner.tolist() == [0, 1, 2, 0, 1, 2, -1, -1, -1, -1]


def test_coordinates_leave_out_frozen_factors() -> None:
    a, b = factor(2), factor(3)
    freeze(a, WHY)
    assert [f for f, _ in coordinates(product(a, b))] == [b]


def test_a_factor_that_comes_twice_keeps_pairs_of_kept_units() -> None:
    a = factor(3)
    kept = kept_indices(product(a, a), {a: torch.tensor([0, 2])})
    assert kept is not None
    assert kept.tolist() == [0, 2, 6, 8]
    assert kept_length(product(a, a), {a: 2}) == 4


def test_nothing_cut_is_none() -> None:
    a = factor(3)
    assert kept_indices(a, {}) is None
    assert kept_indices(UNIT, {a: torch.tensor([0])}) is None


# ------------------------------------------------------------------------------------------------ properties
def numbers(axis: Axis, kept: dict[Factor, Tensor]) -> Tensor:
    indices = kept_indices(axis, kept)
    return torch.arange(length(axis)) if indices is None else indices


def random_axis(rng: random.Random, depth: int = 3) -> Axis:
    """A tree of at most `depth` levels, some of whose factors come more than once."""
    pool = [factor(n) for n in (2, 2, 3, 4, 6)]

    def grow(depth: int) -> Axis:
        if depth == 0 or rng.random() < 0.3:
            return rng.choice(pool)
        parts = [grow(depth - 1) for _ in range(rng.choice([2, 2, 3]))]
        return (product if rng.random() < 0.5 else concat)(*parts)

    return grow(depth)


def keep_some(rng: random.Random, axes: Sequence[Axis]) -> dict[Factor, Tensor]:
    """A random choice of units for the free factors of some axes."""
    kept = {}
    for leaf in itertools.chain.from_iterable(map(leaves, axes)):
        if not leaf.frozen and leaf not in kept:
            kept[leaf] = torch.tensor(sorted(rng.sample(range(leaf.size), rng.randint(1, leaf.size))))
    return kept


seeds = st.integers(0, 10**6)


@given(seeds)
def test_cut_then_concat_is_the_identity_on_indices(seed: int) -> None:
    rng = random.Random(seed)
    axis = random_axis(rng)
    if length(axis) > 500:
        return
    left, right = cut(axis, rng.randint(0, length(axis)))
    kept = keep_some(rng, [axis])
    assert numbers(concat(left, right), kept).tolist() == numbers(axis, kept).tolist()
    joined = [*numbers(left, kept).tolist(), *(numbers(right, kept) + length(left)).tolist()]
    assert joined == numbers(axis, kept).tolist()


@given(seeds)
def test_split_is_a_product(seed: int) -> None:
    rng = random.Random(seed)
    axis = random_axis(rng)
    total = length(axis)
    if total > 500:
        return
    n = rng.choice([d for d in range(1, total + 1) if total % d == 0])
    outer, inner = split(axis, n, WHY)
    assert length(outer) == n
    assert length(inner) == total // n
    kept = keep_some(rng, [axis, outer, inner])
    rows, columns = numbers(outer, kept), numbers(inner, kept)
    assert (rows[:, None] * (total // n) + columns).flatten().tolist() == numbers(axis, kept).tolist()


@given(seeds)
@settings(max_examples=50)
def test_coupled_axes_keep_the_same_indices(seed: int) -> None:
    rng = random.Random(seed)
    a, b = random_axis(rng), random_axis(rng)
    if length(a) != length(b):
        least = min(length(a), length(b))
        a, b = cut(a, least)[0], cut(b, least)[0]
    couple(a, b, WHY)
    kept = keep_some(rng, [a, b])
    assert numbers(a, kept).tolist() == numbers(b, kept).tolist()
    assert len(numbers(a, kept)) == kept_length(a, {f: len(units) for f, units in kept.items()})


Step = Callable[[list[Tensor], list[tuple[Axis, ...]], random.Random], None]


def view(tensors: list[Tensor], axes: list[tuple[Axis, ...]], rng: random.Random) -> None:
    k = rng.randrange(len(tensors))
    sizes, rest = [], tensors[k].numel()
    for _ in range(rng.choice([1, 2, 2, 3])):
        sizes.append(rng.choice([d for d in range(1, rest + 1) if rest % d == 0]))
        rest //= sizes[-1]
    sizes.append(rest)
    tensors.append(tensors[k].reshape(sizes))
    axes.append(tuple(regroup(axes[k], sizes, WHY)))


def permute(tensors: list[Tensor], axes: list[tuple[Axis, ...]], rng: random.Random) -> None:
    k = rng.randrange(len(tensors))
    order = rng.sample(range(tensors[k].dim()), tensors[k].dim())
    tensors.append(tensors[k].permute(order))
    axes.append(tuple(axes[k][d] for d in order))


def split_dim(tensors: list[Tensor], axes: list[tuple[Axis, ...]], rng: random.Random) -> None:
    k = rng.randrange(len(tensors))
    dim = rng.randrange(tensors[k].dim())
    at = rng.randint(1, max(1, tensors[k].shape[dim] - 1))
    pieces = tensors[k].split([at, tensors[k].shape[dim] - at], dim)
    for piece, axis in zip(pieces, cut(axes[k][dim], at), strict=True):
        if piece.numel():
            tensors.append(piece)
            axes.append((*axes[k][:dim], axis, *axes[k][dim + 1 :]))


def cat(tensors: list[Tensor], axes: list[tuple[Axis, ...]], rng: random.Random) -> None:
    k = rng.randrange(len(tensors))
    dim = rng.randrange(tensors[k].dim())

    def fits(j: int) -> bool:
        shapes = [list(t.shape) for t in (tensors[j], tensors[k])]
        return len(shapes[0]) == len(shapes[1]) and all(
            a == b for d, (a, b) in enumerate(zip(*shapes, strict=True)) if d != dim
        )

    j = rng.choice([j for j in range(len(tensors)) if fits(j)])
    if tensors[j].numel() + tensors[k].numel() > 400:
        return
    for d, (a, b) in enumerate(zip(axes[k], axes[j], strict=True)):
        if d != dim:
            couple(a, b, WHY)
    joined = concat(axes[k][dim], axes[j][dim])
    tensors.append(torch.cat([tensors[k], tensors[j]], dim))
    axes.append((*axes[k][:dim], joined, *axes[k][dim + 1 :]))


def add(tensors: list[Tensor], axes: list[tuple[Axis, ...]], rng: random.Random) -> None:
    """Couple two values of one shape, as a sum does; the numbers of the first stand for both."""
    k = rng.randrange(len(tensors))
    j = rng.choice([j for j in range(len(tensors)) if tensors[j].shape == tensors[k].shape])
    for a, b in zip(axes[k], axes[j], strict=True):
        couple(a, b, WHY)


@given(seeds, st.integers(1, 10))
@settings(max_examples=200)
def test_slicing_commutes_with_views_cats_splits_and_permutations(seed: int, steps: int) -> None:
    """Replay the same moves on sliced tensors: every value must be its full value at the kept indices."""
    rng = random.Random(seed)
    shape = rng.choice([(12,), (24,), (4, 6), (2, 12), (8, 3), (2, 3, 4)])
    tensors = [torch.arange(math.prod(shape)).view(shape)]
    axes: list[tuple[Axis, ...]] = [tuple(map(fresh, shape))]
    for _ in range(steps):
        rng.choice([view, view, permute, split_dim, cat, add])(tensors, axes, rng)
    kept = keep_some(rng, [axis for value in axes for axis in value])
    counts = {f: len(units) for f, units in kept.items()}
    gone = removed(tensors[0], axes[0], kept)
    for tensor, value in zip(tensors, axes, strict=True):
        sliced = tensor
        for dim, axis in enumerate(value):
            indices = kept_indices(axis, kept)
            sliced = sliced if indices is None else sliced.index_select(dim, indices)
        assert list(sliced.shape) == [kept_length(axis, counts) for axis in value]
        # what is left of a value is exactly what does not come from a removed element
        assert sliced.flatten().tolist() == tensor.flatten()[~torch.isin(tensor.flatten(), gone)].tolist()


def removed(tensor: Tensor, axes: Sequence[Axis], kept: dict[Factor, Tensor]) -> Tensor:
    stays = tensor
    for dim, axis in enumerate(axes):
        indices = kept_indices(axis, kept)
        stays = stays if indices is None else stays.index_select(dim, indices)
    return tensor.flatten()[~torch.isin(tensor.flatten(), stays.flatten())]


@given(seeds)
@settings(max_examples=30)
def test_the_order_of_couplings_does_not_matter(seed: int) -> None:
    """The same couplings in another order, and either way round, keep the same indices of everything.

    This holds where all products nest. Where two do not, both are frozen, and how far may depend on what was known.
    """
    results = []
    for shuffle_seed in range(3):
        rng = random.Random(seed)
        axes = [random_axis(rng, 2) for _ in range(4)]
        whole = [factor(n) for n in (12, 24, 24)]
        axes += [*whole, product(factor(4), factor(3)), product(factor(2), factor(6)), concat(factor(8), factor(4))]
        pairs = [(i, j) for i, j in itertools.combinations(range(len(axes)), 2) if length(axes[i]) == length(axes[j])]
        pairs = rng.sample(pairs, min(len(pairs), 6))
        order = random.Random(shuffle_seed)
        order.shuffle(pairs)
        for i, j in pairs:
            couple(*(axes[k] for k in order.sample([i, j], 2)), WHY)
        results.append(partition(axes))
    assert results[0] == results[1] == results[2]


def partition(axes: Sequence[Axis]) -> frozenset[frozenset[tuple[int, int, int]]]:
    """For each unit of each free factor, the (axis, occurrence, index) triples that belong to it, as one set."""
    owners: dict[tuple[Factor, int], set[tuple[int, int, int]]] = {}
    for k, axis in enumerate(axes):
        for n, (found, row) in enumerate(coordinates(axis)):
            occurrence = sum(f is found for f, _ in coordinates(axis)[:n])
            for index, unit in enumerate(row.tolist()):
                if unit >= 0:
                    owners.setdefault((found, unit), set()).add((k, occurrence, index))
    return frozenset(map(frozenset, owners.values()))


@given(seeds, st.integers(2, 25))
@settings(max_examples=20)
def test_couplings_end(seed: int, count: int) -> None:
    rng = random.Random(seed)
    pool: list[Axis] = [factor(24) for _ in range(4)]
    pool += [product(*map(factor, sizes)) for sizes in ((2, 12), (4, 6), (3, 8), (2, 2, 6))]
    pool += [concat(*map(factor, sizes)) for sizes in ((12, 12), (8, 16), (6, 6, 12))]
    for _ in range(count):
        a, b = rng.sample(pool, 2)
        couple(a, b, WHY)
        pool.append(concat(*cut(a, rng.randint(0, 24))))
    assert all(length(axis) == 24 for axis in pool)
