"""Every question about an op has an answer, if only "no"; an op without answers is safe and named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.cost import CostModel
from graphcomp.ops import registry
from graphcomp.ops.facts import Clip, Compute, Float, Lookup, Move
from graphcomp.ops.registry import OpKey, facts_of, find, known, op, registered
from graphcomp.testing import tiny_models
from graphcomp.torch_compat import OpOverload, schema_of

from .rule_walk import check_facts

aten = torch.ops.aten


def ops_of_aten() -> Iterator[OpOverload]:
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        library, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if library == "aten" and hasattr(getattr(aten, packet, None), overload or "default"):
            yield getattr(getattr(aten, packet), overload or "default")


CORE = [found for found in ops_of_aten() if torch.Tag.core in found.tags]


def built_in() -> list[OpKey]:
    return [key for key in registered() if not str(key).startswith(("graphcomp_", "tests::"))]


def test_every_registered_op_answers_every_question() -> None:
    silent = {
        str(key): facts.unanswered() for key in built_in() if (facts := registry._ENTRIES[key].facts).unanswered()
    }
    assert silent == {}
    assert len(built_in()) > 600


def test_every_core_op_answers_every_question() -> None:
    silent = {str(found): facts.unanswered() for found in CORE if (facts := facts_of(found)).unanswered()}
    assert silent == {}
    assert len(CORE) > 150


def test_core_ops_without_a_rule_say_why() -> None:
    without = {str(found): registry.why_unknown(found) for found in CORE if find(found) is None}
    assert "no coupling rule" not in without.values()
    assert without["aten.convolution_backward.default"] == "a gradient: no forward has it"
    assert len(without) == 10


def test_answers_agree_with_each_other() -> None:
    wrong = []
    for key in [*built_in(), *CORE]:
        facts = facts_of(key) if isinstance(key, OpOverload) else registry._ENTRIES[key].facts
        computes, moves = isinstance(facts.integer, Compute), isinstance(facts.integer, (Move, Lookup))
        if computes and facts.sums != "products":
            wrong.append(f"{key} computes on integers and sums {facts.sums}")
        if moves and facts.sums != "nothing":
            wrong.append(f"{key} moves elements and sums {facts.sums}")
        if callable(facts.masked) and facts.sums != "statistics":
            wrong.append(f"{key} has a masked form and sums {facts.sums}")
        if facts.keeps_zeros and facts.sums != "nothing":
            wrong.append(f"{key} keeps zeros and sums {facts.sums}")
        if isinstance(facts.integer, Float) and not facts.integer.why:
            wrong.append(f"{key} is float without a reason")
    assert wrong == []


def test_named_arguments_are_those_of_the_op() -> None:
    wrong = []
    for key in built_in():
        integer = registry._ENTRIES[key].facts.integer
        if not isinstance(key, OpOverload):
            continue
        known_names = {argument.name for argument in schema_of(key).arguments}
        named: set[Any] = set()
        if isinstance(integer, Compute):
            named = {*integer.data, integer.weight, integer.bias}
        elif isinstance(integer, Move):
            named = {integer.operand}
        elif isinstance(integer, Lookup):
            named = {integer.weight}
        elif isinstance(integer, Clip):
            named = {end for end in (integer.low, integer.high) if isinstance(end, str)}
        elif isinstance(integer, Float):
            named = {integer.rows}
        if not named - {""} <= known_names:
            wrong.append((str(key), named - known_names))
    assert wrong == []


SAMPLES: dict[Any, tuple[Any, ...]] = {
    aten.view.default: ([4, 3],),
    aten.reshape.default: ([4, 3],),
    aten._unsafe_view.default: ([4, 3],),
    aten.permute.default: ([1, 0],),
    aten.transpose.int: (0, 1),
    aten.squeeze.dim: (0,),
    aten.unsqueeze.default: (0,),
    aten.to.dtype: (torch.float64,),
}


@pytest.mark.parametrize("key", [key for key in built_in() if registry._ENTRIES[key].facts.keeps_zeros], ids=str)
def test_ops_that_keep_zeros_hold_the_elements_of_their_operand(key: Any) -> None:
    x = torch.randn(3, 4)
    x[1] = 0
    found = key(x, *SAMPLES.get(key, ()))
    assert sorted(found.flatten().tolist()) == pytest.approx(sorted(x.flatten().tolist()))


@pytest.mark.parametrize(
    "key", [key for key in built_in() if registry._ENTRIES[key].facts.scales == "elements"], ids=str
)
def test_ops_that_scale_by_element(key: Any) -> None:
    arguments = (0.0, False) if "dropout" in str(key) else ()
    x, s = torch.randn(3, 4), torch.rand(4) + 0.5
    torch.testing.assert_close(key(x * s, *arguments), key(x, *arguments) * s)


@pytest.mark.parametrize(
    "key", [key for key in built_in() if registry._ENTRIES[key].facts.scales == "channels"], ids=str
)
def test_ops_that_scale_by_channel(key: Any) -> None:
    name = schema_of(key).name
    space = 1 if "1d" in name else 3 if "3d" in name else 2
    x, s = torch.randn(2, 3, *[4] * space), (torch.rand(3) + 0.5).view(1, 3, *[1] * space)
    if "upsample" in name:
        arguments: tuple[Any, ...] = (None, False, [2.0, 2.0]) if "bilinear" in name else (None, [2.0, 2.0])
    else:
        arguments = ([2] * space,)
    got, plain = key(x * s, *arguments), key(x, *arguments)
    got, plain = (t[0] if isinstance(t, tuple) else t for t in (got, plain))
    torch.testing.assert_close(got, plain * s)


@pytest.mark.parametrize("name", tiny_models())
def test_rules_say_what_the_facts_say(name: str) -> None:
    model, inputs = tiny_models()[name]
    plan = gc.analyze(model, inputs)
    for node, call in plan.coupling.calls.items():
        check_facts(node, call)
    assert any(call.products for call in plan.coupling.calls.values())


# ------------------------------------------------------------------------------------------------ no answer
@torch.library.custom_op("graphcomp_complete::mix", mutates_args=())
def mix(x: Tensor, w: Tensor) -> Tensor:
    """An op that nothing is known of."""
    return x @ w.t()


@mix.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


class Mixed(nn.Module):
    """Two ordinary layers, and the unknown op between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(6, 3)
        self.w = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Any:
        """(n, 4) -> (n, 3)."""
        return self.c(torch.ops.graphcomp_complete.mix(self.b(torch.relu(self.a(x))), self.w))


def test_an_op_without_an_answer_is_safe_and_named() -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(2, 4)
    assert known(torch.ops.graphcomp_complete.mix.default).facts.unanswered()
    plan = gc.analyze(model, x)
    assert [found.op for found in plan.unknown_ops] == ["graphcomp_complete.mix.default"]
    assert [found.op for found in CostModel(plan).uncounted] == ["graphcomp_complete.mix.default"]
    small = gc.compress(model, x, sparsity=0.5, bits=8, progress=False)
    assert any("mix" in note and "not counted" in note for note in small.report.notes)
    assert "'w' stays float: mix has no integer form" in small.report.notes
    (left,) = [note for note in small.report.notes if note.startswith("left whole around")]
    assert "test_complete.py" in left and 'graphcomp.rule("graphcomp_complete::mix", "... a, b a -> ... b")' in left
    assert left in str(small.report)
    with pytest.raises(gc.BudgetError, match="graphcomp_complete"):
        gc.compress(model, x, budget=gc.Budget(macs=0.5), progress=False)


@torch.library.custom_op("graphcomp_complete::gram", mutates_args=())
def gram(x: Tensor) -> Tensor:
    """An op of one operand that multiplies."""
    return x @ x.mT


@gram.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-2])


class Grams(nn.Module):
    """Rows of a layer, weighed by how alike they are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        """(n, 4) -> (n, 3)."""
        y = self.a(x)
        return self.b(torch.ops.graphcomp_complete.gram(y) @ y) + self.d(self.c(x).relu())


def test_an_unknown_op_is_not_counted_whatever_its_operands_are() -> None:
    plan = gc.analyze(Grams(), torch.randn(5, 4))
    assert [found.op for found in CostModel(plan).uncounted] == ["graphcomp_complete.gram.default"]
    with pytest.raises(gc.BudgetError, match="gram") as error:
        gc.compress(Grams(), torch.randn(5, 4), budget=gc.Budget(macs=0.8), progress=False)
    assert 'graphcomp.op("graphcomp_complete::gram", "' in error.value.fix


def test_an_answer_that_is_none_of_its_kind_is_refused() -> None:
    for answer in ({"integer": "linear"}, {"integer": 8}, {"scales": "some"}, {"keeps_zeros": 1}, {"masked": 3}):
        with pytest.raises(gc.RuleError):
            op("graphcomp_complete::other", "n c -> n c", **answer)  # type: ignore[arg-type]
    with pytest.raises(gc.RuleError, match="none of"):
        op("graphcomp_complete::other", "n c, o c -> n o", macs="n x")
    with pytest.raises(gc.RuleError, match="rule in Python"):
        op("graphcomp_complete::other", macs="n c")
    assert "graphcomp_complete::other" not in registered()
