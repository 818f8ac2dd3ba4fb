"""The notation of rules: what is read, what is refused, what couples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from graphcomp.coupling.axis import UNIT, Axes, Factor, Reason, fresh, is_frozen, leaves, length, normal
from graphcomp.coupling.notation import Contraction, apply, broadcast, einsum_letters, parse
from graphcomp.errors import RuleError

WHY = Reason("test")


def axes(*sizes: int) -> Axes:
    return tuple(map(fresh, sizes))


def run(text: str, *operands: Axes | None, shape: Sequence[int] = (), **sizes: int) -> tuple[Axes, list[Contraction]]:
    applied = apply(parse(text), operands, [shape], WHY, sizes)
    return applied.results[0], applied.contractions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("i, o", "needs exactly one '->'"),
        ("i -> o -> i", "needs exactly one '->'"),
        ("i -> o", r"\['o'\] stands only on the right"),
        ("i -> ... i", r"'\.\.\.' stands only on the right"),
        ("(i) -> i", "two or more letters"),
        ("(i *s) -> i", "two or more letters"),
        ("i + o -> i", r"cannot read '\+'"),
        ("i +k -> i +k", "a kernel stands on the right"),
        ("i 3 -> i", "cannot read '3'"),
        ("... i ... -> i", "two dims of open number"),
        ("... *s -> ...", "two dims of open number"),
    ],
)
def test_malformed_rules_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("rule", "masked", "macs"),
    [
        ("... i, o i, o i -> ... o", [1, 2], 2 * (2 * 5 * 7)),  # a gated layer: two products of the data
        ("... i, o i, p i -> ... o, ... p", [1, 2], 2 * 5 * (7 + 7)),
        ("... i, o i, o i, p o -> ... p", [1, 2, 2, 3], 2 * (2 * 5 * 7) + 2 * 7 * 7),
        ("... i, o i -> ... o", [1], 2 * 5 * 7),
    ],
)
def test_a_letter_that_several_operands_contract_is_masked_in_each_but_the_first(
    rule: str, masked: list[int], macs: int
) -> None:
    notation = parse(rule)
    operands = [axes(*((2, 5), (7, 5), (7, 5), (7, 7))[k]) for k in range(len(notation.operands))]
    applied = apply(notation, operands, [(2, 7)] * len(notation.results), WHY)
    assert sorted(contraction.operand for contraction in applied.contractions) == masked
    assert sum(math.prod(int(length(axis)) for axis in product.axes) for product in applied.products) == macs


def test_data_that_stand_behind_their_weights() -> None:
    operands = [axes(7, 5), axes(7, 5), axes(2, 5)]
    applied = apply(parse("o i, o i, ... i -> ... o"), operands, [(2, 7)], WHY, data=2)
    assert [product.operands for product in applied.products] == [(2, 0), (2, 1)]
    assert [contraction.operand for contraction in applied.contractions] == [1, 2]


def test_equal_letters_couple_and_letters_on_the_left_only_are_contracted() -> None:
    x, weight = axes(2, 5), axes(7, 5)
    result, contracted = run("... i, o i, o -> ... o", x, weight, None, shape=(2, 7))
    assert normal(x[1]) is normal(weight[1])
    assert list(map(normal, result)) == [normal(x[0]), normal(weight[0])]
    assert contracted == [Contraction(1, 1)]


def test_optional_operands_may_be_left_out() -> None:
    bias = axes(7)
    result, _ = run("... i, o i, o -> ... o", axes(5), axes(7, 5), bias, shape=(7,))
    assert normal(result[0]) is normal(bias[0])


def test_products_take_the_lengths_they_are_given() -> None:
    x, weight = axes(2, 12, 8), axes(6, 4, 3)
    result, contracted = run("n (g i) *s, (g o) i *k -> n (g o) *t", x, weight, shape=(2, 6, 6), g=3)
    assert [leaf.size for leaf in leaves(x[1])] == [3, 4]
    assert [leaf.size for leaf in leaves(weight[0])] == [3, 2]
    assert next(leaves(x[1])) is next(leaves(weight[0])) is next(leaves(result[1]))
    assert contracted == [Contraction(1, 1)]


def test_stars_freeze_and_make_new_frozen_dims() -> None:
    x = axes(2, 4, 8, 8)
    result, _ = run("n c *s -> n c *t", x, shape=(2, 4, 5, 6))
    assert [is_frozen(axis) for axis in x] == [False, False, True, True]
    assert [length(axis) for axis in result] == [2, 4, 5, 6]
    assert all(map(is_frozen, result[2:]))


def test_open_dims_broadcast() -> None:
    x, y = axes(3, 1, 4, 5), axes(2, 5, 6)
    result, contracted = run("... a i, ... i b -> ... a b", x, y, shape=(3, 2, 4, 6))
    assert [length(axis) for axis in result] == [3, 2, 4, 6]
    assert contracted == [Contraction(1, 1)]


@pytest.mark.parametrize(
    ("text", "sizes", "message"),
    [
        ("a b -> a", (2, 3, 4), "expects 2 dims and the operand has 3"),
        ("n c *s -> n c", (2,), "expects 2 dims or more and the operand has 1"),
        ("(a b) -> a", (6,), "both unknown"),
    ],
)
def test_operands_that_do_not_fit(text: str, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        run(text, axes(*sizes), shape=(2, 2))


def test_broadcast_stretches_dims_of_one_and_couples_the_others() -> None:
    x, y = axes(4, 5), axes(3, 1, 5)
    result = broadcast([x, y], WHY)
    assert [length(axis) for axis in result] == [3, 4, 5]
    assert normal(x[1]) is normal(y[2])
    assert not any(isinstance(axis, Factor) and axis.frozen for axis in result)
    assert broadcast([axes(1), ()], WHY) == [UNIT]


@pytest.mark.parametrize(
    ("equation", "ranks", "names", "result"),
    [
        ("bi, io -> bo", (2, 2), ["bi", "io"], "bo"),
        ("...i,io->...o", (3, 2), ["αβi", "io"], "αβo"),
        ("i...j,...j->i...", (4, 2), ["iαβj", "βj"], "iαβ"),
        ("...i,i->...", (1, 1), ["i", "i"], ""),
        ("...i,...i->i", (3, 2), ["αβi", "βi"], "i"),
        ("bA,bai", (2, 3), ["bA", "bai"], "Aai"),
        ("j...,i", (2, 1), ["jα", "i"], "αij"),
    ],
)
def test_letters_of_einsum(equation: str, ranks: Sequence[int], names: list[str], result: str) -> None:
    assert einsum_letters(equation, ranks) == (names, result)
    sizes = {letter: k for k, letter in enumerate(sorted(set("".join(names))), 2)}
    tensors = [torch.empty([sizes[letter] for letter in name]) for name in names]
    assert torch.einsum(equation, *tensors).shape == tuple(sizes[letter] for letter in result)
