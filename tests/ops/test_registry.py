"""The registry: what rule() accepts, and what happens to an op without one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from graphcomp.coupling.axis import couple
from graphcomp.coupling.notation import parse
from graphcomp.errors import RuleError
from graphcomp.ops.registry import find, forget, rule

from .rule_walk import Walk, free, frozen, same

aten = torch.ops.aten


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    lib = torch.library.Library("graphcomp_test", "DEF")
    lib.define("scale(Tensor x, Tensor w) -> Tensor")
    lib.impl("scale", lambda x, w: x * w, "CompositeExplicitAutograd")
    lib.impl("scale", lambda x, w: torch.empty_like(x), "Meta")
    yield
    forget("graphcomp_test::scale")
    lib._destroy()


def scale(x: Tensor, w: Tensor) -> Tensor:
    return torch.ops.graphcomp_test.scale(x, w)  # type: ignore[no-any-return]


def test_unknown_op_freezes_and_is_named() -> None:
    w = Walk(lambda x, w: scale(x, w) + 1, x=torch.randn(3, 4), w=torch.randn(4))
    (unknown,) = w.coupling.unknown.values()
    assert unknown.op == "graphcomp_test.scale.default"
    assert "in forward" in unknown.source
    assert 'graphcomp.rule("graphcomp_test::scale"' in unknown.fix
    assert frozen(*w["x"], *w["w"], *w.result)


def test_the_users_rule_lifts_it() -> None:
    rule("graphcomp_test::scale", "n c, c -> n c")
    w = Walk(lambda x, w: scale(x, w) + 1, x=torch.randn(3, 4), w=torch.randn(4))
    assert not w.coupling.unknown
    assert same(w["x"][1], w["w"][0], w.result[1])
    assert free(*w["x"])
    forget("graphcomp_test::scale")
    assert find(torch.ops.graphcomp_test.scale.default) is None


def test_a_rule_that_does_not_fit_is_unknown_not_a_crash() -> None:
    rule("graphcomp_test::scale", "n c h, c -> n c h")
    w = Walk(scale, x=torch.randn(3, 4), w=torch.randn(4))
    forget("graphcomp_test::scale")
    (unknown,) = w.coupling.unknown.values()
    assert "expects 3 dims and the operand has 2" in unknown.why
    assert frozen(*w["x"], *w["w"])


def test_a_rule_of_the_wrong_shape_is_unknown() -> None:
    rule("graphcomp_test::scale", "n c, c -> n")
    w = Walk(scale, x=torch.randn(3, 4), w=torch.randn(4))
    forget("graphcomp_test::scale")
    (unknown,) = w.coupling.unknown.values()
    assert "the rule gives shapes [(3,)] and the op [(3, 4)]" in unknown.why


def test_a_rule_that_fails_is_unknown_not_a_crash(caplog: pytest.LogCaptureFixture) -> None:
    rule("graphcomp_test::scale")(lambda x, w: {}["no such key"])
    with caplog.at_level(logging.DEBUG, "graphcomp.coupling"):
        w = Walk(scale, True, x=torch.randn(3, 4), w=torch.randn(4))
    forget("graphcomp_test::scale")
    (unknown,) = w.coupling.unknown.values()
    assert unknown.why == "its rule failed, KeyError: 'no such key'"
    assert frozen(*w["x"], *w["w"], *w.result)
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("rubbish", [3, [None], ["n c"]])
def test_a_rule_that_gives_no_axes_is_unknown(rubbish: Any) -> None:
    rule("graphcomp_test::scale")(lambda x, w: rubbish)
    w = Walk(scale, True, x=torch.randn(3, 4), w=torch.randn(4))
    forget("graphcomp_test::scale")
    assert [unknown.why.startswith("its rule failed") for unknown in w.coupling.unknown.values()] == [True]
    assert frozen(*w["x"], *w["w"])


def test_second_registration_raises() -> None:
    with pytest.raises(RuleError, match="has a coupling rule already"):
        rule(aten.linear.default, "... i, o i, o -> ... o")


def test_not_an_op() -> None:
    with pytest.raises(RuleError, match="is not an op"):
        rule("linear", "n c -> n c")
    with pytest.raises(RuleError, match="at least one op"):
        rule()


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (("graphcomp_test::scale", "n c, c"), "one '->'"),
        (("graphcomp_test::scale", ""), "one '->'"),
        (("graphcomp_test::", "n c, c -> n c"), "'lib::op'"),
        (("graphcomp_test::scale.default", "n c, c -> n c"), "'graphcomp_test::scale', which stands for all overloads"),
    ],
)
def test_what_is_neither_op_nor_rule_is_refused(arguments: tuple[str, ...], fix: str) -> None:
    with pytest.raises(RuleError, match="is not an op") as error:
        rule(*arguments)
    assert fix in error.value.fix


def test_an_op_that_graphcomp_knows_is_known_by_name_too() -> None:
    with pytest.raises(RuleError, match="aten::linear has a coupling rule already") as error:
        rule("aten::linear", "... i, i o, o -> ... o")
    assert error.value.why == "graphcomp knows aten.linear.default"


def test_an_op_that_was_taught_by_name_is_taught_by_overload_too() -> None:
    rule("graphcomp_test::scale", "n c, c -> n c")
    try:
        with pytest.raises(RuleError, match="has a coupling rule already"):
            rule(torch.ops.graphcomp_test.scale.default, "n c, c -> n c")
    finally:
        forget("graphcomp_test::scale")


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_rule_in_python_returns_the_axes_of_the_result(kind: Any) -> None:
    def scaled(x: Any, w: Any, *, call: Any) -> Any:
        couple(x[-1], w[0], call.why)
        return kind(x)

    rule("graphcomp_test::scale")(scaled)
    w = Walk(scale, x=torch.randn(3, 4), w=torch.randn(4))
    forget("graphcomp_test::scale")
    assert same(w["x"][1], w["w"][0], w.result[1]) and free(*w["x"])


def test_a_rule_in_python_returns_a_list_for_several_results() -> None:
    library = torch.library.Library("graphcomp_test_two", "DEF")
    library.define("both(Tensor x, Tensor w) -> (Tensor, Tensor)")
    library.impl("both", lambda x, w: (x.clone(), w.clone()), "CompositeExplicitAutograd")
    rule("graphcomp_test_two::both")(lambda x, w: [x, list(w)])
    try:
        walk = Walk(lambda x, w: torch.ops.graphcomp_test_two.both(x, w), x=torch.randn(3, 4), w=torch.randn(5))
        assert [len(axes) for axes in walk.results] == [2, 1] and free(*walk.results[0], *walk.results[1])
    finally:
        forget("graphcomp_test_two::both")
        library._destroy()


@torch.library.custom_op("graphcomp_test_in::scale_", mutates_args=("x",))
def scale_(x: Tensor, s: Tensor) -> None:
    """An op that writes into an operand and returns nothing."""
    x.mul_(s)


def test_an_op_that_returns_nothing_says_what_it_writes() -> None:
    def scaled(x: Tensor, s: Tensor) -> Tensor:
        y = x.clone()
        torch.ops.graphcomp_test_in.scale_(y, s)
        return y

    tensors = {"x": torch.randn(3, 4), "s": torch.randn(4)}
    rule("graphcomp_test_in::scale_", "... c, c ->")
    try:
        (unknown,) = Walk(scaled, **tensors).coupling.unknown.values()
        assert unknown.why.startswith("the op writes into x, and the rule '... c, c ->' does not end")
        forget("graphcomp_test_in::scale_")
        assert '"... a, a -> ... a"' in next(iter(Walk(scaled, **tensors).coupling.unknown.values())).fix
        rule("graphcomp_test_in::scale_", "... c, c -> ... c")
        walk = Walk(scaled, **tensors)
        assert same(walk["x"][1], walk["s"][0]) and not walk.coupling.unknown
    finally:
        forget("graphcomp_test_in::scale_")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n c, c", "exactly one '->'"),
        ("n c -> n -> c", "exactly one '->'"),
        ("n c -> n d", "stands only on the right"),
        ("n c -> ... c", "stands only on the right"),
        ("n (c) -> n", "two or more letters"),
        ("n (c *s) -> n", "two or more letters"),
        ("n ? -> n", "cannot read"),
        ("... *s -> ...", "two dims of open number"),
    ],
)
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(RuleError, match=message.replace("*", r"\*")):
        parse(text)


def test_lengths_are_looked_at_without_harm() -> None:
    def reshape(x: Tensor) -> Tensor:
        torch._check(x.shape[0] > 0)
        return x * x.shape[1]

    w = Walk(reshape, x=torch.randn(3, 4))
    assert free(*w["x"])


def test_every_rule_is_for_an_op() -> None:
    for op in (aten.sym_size.int, aten._assert_scalar.default, aten.item.default):
        assert find(op) is not None
