"""Bits of each layer: the choice is within the limits, and close to the best of all choices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.errors import BudgetError, PlanError
from graphcomp.quantization.mixed import Costs, Unit, bit_errors, choose_bits, options_of, units_of
from graphcomp.quantization.ptq import PostTraining
from graphcomp.quantization.spec import QuantConfig, QuantSpec

WEIGHTS = PostTraining(QuantConfig(activations=None), rounding="nearest")


def units(count: int) -> list[Unit]:
    return [Unit((f"layer{k}",), (f"node{k}",)) for k in range(count)]


def sizes_cost(sizes: Mapping[Unit, float], stored: Mapping[int, int]) -> object:
    def cost(chosen: Mapping[Unit, int]) -> Costs:
        return (sum(sizes[unit] * stored[bits] for unit, bits in chosen.items()),)

    return cost


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(1e-6, 1.0), st.floats(2.0, 6.0)), min_size=1, max_size=4),
       st.floats(0.3, 1.0))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_choice_is_within_the_limit_and_near_the_best(layers: list[tuple[int, float, float]], share: float) -> None:
    """No choice within the limit has a smaller error than one step of one layer less."""
    found = units(len(layers))
    bits = range(2, 6)
    errors = {u: {b: e * r ** -(b - 2) for b in bits} for u, (_, e, r) in zip(found, layers, strict=True)}
    sizes = {u: float(n) for u, (n, _, _) in zip(found, layers, strict=True)}
    cost = sizes_cost(sizes, {b: b for b in bits})
    limit = max(share * cost(dict.fromkeys(found, 5))[0], cost(dict.fromkeys(found, 2))[0])
    chosen = choose_bits(errors, cost, {"bytes": limit})
    assert cost(chosen)[0] <= limit
    within = [
        dict(zip(found, own, strict=True))
        for own in itertools.product(bits, repeat=len(found))
        if cost(dict(zip(found, own, strict=True)))[0] <= limit
    ]
    best = min(sum(errors[u][b] for u, b in own.items()) for own in within)
    largest_step = max(errors[u][b] - errors[u][b + 1] for u in found for b in (2, 3, 4))
    assert sum(errors[u][b] for u, b in chosen.items()) <= best + largest_step
    assert not any(all(own[u] >= chosen[u] for u in found) and own != chosen for own in within)


def test_bits_that_save_nothing_are_not_taken() -> None:
    """Five bits are stored as eight: a layer goes from eight to four at once."""
    (unit,) = units(1)
    errors = {unit: {b: 4.0**-b for b in range(4, 9)}}
    stored = {4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
    cost = sizes_cost({unit: 1.0}, stored)
    assert choose_bits(errors, cost, {"bytes": 8})[unit] == 8
    assert choose_bits(errors, cost, {"bytes": 7})[unit] == 4


def test_two_limits_hold_together() -> None:
    a, b = units(2)
    errors = {u: {bits: 4.0**-bits for bits in (2, 3, 4)} for u in (a, b)}

    def cost(chosen: Mapping[Unit, int]) -> Costs:
        return float(10 * chosen[a] + chosen[b]), float(chosen[a] + 10 * chosen[b])

    chosen = choose_bits(errors, cost, {"bytes": 34, "bops": 44})
    assert all(c <= limit for c, limit in zip(cost(chosen), (34, 44), strict=True))
    assert chosen[a] == 3


def test_a_limit_out_of_reach_is_refused() -> None:
    (unit,) = units(1)
    cost = sizes_cost({unit: 1.0}, {2: 2, 3: 3})
    with pytest.raises(BudgetError, match="no choice of bits") as refused:
        choose_bits({unit: {2: 1.0, 3: 0.5}}, cost, {"bytes": 1.5})
    assert "Budget(bytes=2)" in str(refused.value)


# ------------------------------------------------------------------------------------------------ errors of layers
class Scaled(nn.Module):
    """Two branches; the outputs hang on the first a hundred times as much."""

    def __init__(self) -> None:
        super().__init__()
        self.matters, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return 100 * self.matters(x) + self.other(x)


def batches() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(8, 16, generator=generator)] for _ in range(3)]


def test_errors_are_those_of_the_outputs() -> None:
    torch.manual_seed(0)
    model = Scaled().eval()
    program = gc.analyze(model, batches()[0][0]).captured
    found = {u.paths: e for u, e in bit_errors(program, WEIGHTS, (3, 6), batches(), activations=False).items()}
    matters, other = found[("matters",)], found[("other",)]
    assert matters[3] > 1000 * other[3]
    for errors in (matters, other):
        assert list(errors) == [3, 4, 5, 6]
        assert all(errors[b] > 2.5 * errors[b + 1] for b in (3, 4, 5))
    # the measured error of the fewest bits, by hand
    whole = torch.cat([b[0] for b in batches()])
    with torch.no_grad():
        t = model(whole)
        weight = model.matters.weight
        step = weight.abs().amax(1, keepdim=True) / 3
        model.matters.weight.copy_((weight / step).round().clamp(-3, 3) * step)
        error = (model(whole) - t).square().sum() / t.square().sum()
    assert matters[3] == pytest.approx(float(error), rel=1e-3)


def test_layers_that_share_a_weight_are_one_unit() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.middle, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.middle(self.table(ids))))

    ids = torch.randint(20, (4, 6))
    program = gc.analyze(Tied().eval(), ids).captured
    found = bit_errors(program, WEIGHTS, (4, 8), [[ids]], activations=False)
    assert {unit.paths for unit in found} == {("head", "table"), ("middle",)}


def test_children_come_behind_their_parents() -> None:
    chosen = {Unit(("block.child",), ("a",)): 4, Unit(("block",), ("b",)): 6}
    config = options_of(WEIGHTS, chosen, activations=False).config
    assert [config.specs(path)[0].bits for path in ("block", "block.child")] == [6, 4]
    assert config.specs("block")[1] is None
    both = options_of(PostTraining(QuantConfig()), chosen, activations=True).config
    assert [spec.bits for spec in both.specs("block.child")] == [4, 4]
    assert config.specs("other")[0] == QuantSpec(8, granularity="channel")
    assert units_of((), torch.fx.Graph()) == ()


# ------------------------------------------------------------------------------------------------ as users call it
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 3, 9, 9, generator=generator) for _ in range(2)]


def error(model: nn.Module, small: nn.Module) -> float:
    with torch.no_grad():
        wanted, found = (torch.cat([m(batch) for batch in images()]) for m in (model, small))
    return float((wanted - found).norm() / wanted.norm())


@pytest.mark.parametrize(("limit", "activation_bits"), [("bytes", None), ("bops", "same"), ("bops", 8)])
@pytest.mark.slow
@pytest.mark.ci
def test_a_budget_is_met_with_a_smaller_error_than_equal_bits(limit: str, activation_bits: int | str | None) -> None:
    model = net()
    options = {"sparsity": 0.0, "activation_bits": activation_bits, "calibration": images(), "progress": False}
    first = gc.QuantConfig().first_and_last_bits
    assert first == 8
    equal = gc.compress(model, images()[0][:2], bits=4, **options)
    cost = getattr(equal.report, limit).after
    mixed = gc.compress(model, images()[0][:2], bits=(2, 8), budget=gc.Budget(**{limit: cost}), **options)
    assert getattr(mixed.report, limit).after <= cost
    assert error(model, mixed) <= error(model, equal)
    assert any("bits were chosen" in note for note in mixed.report.notes)
    assert len({layer.weight_bits for layer in mixed.report.layers if layer.weight_bits}) > 1


@pytest.mark.parametrize("activations", ["dynamic", "dynamic_per_token"])
def test_ranges_at_run_time_keep_their_bits(activations: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    budget = gc.Budget(bytes=0.17)
    small = gc.compress(
        model, torch.randn(16, 32), bits=(3, 8), activations=activations, budget=budget, progress=False
    )  # fmt: skip
    assert small.report.bytes.ratio <= 0.17
    assert {layer.activation_bits for layer in small.report.layers} == {8}


def test_units_go_by_sparsity_and_bits_by_the_budget() -> None:
    model = net()
    small = gc.compress(
        model, images()[0][:2], sparsity=0.3, bits=(2, 8), activation_bits=None, budget=gc.Budget(bytes=0.12),
        calibration=images(), progress=False,
    )  # fmt: skip
    assert small.report.units_removed > 0
    assert small.report.bytes.ratio <= 0.12
    assert small.report.repairs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (4, 8)}, "needs a budget"),
        ({"bits": (4, 8), "budget": gc.Budget(macs=0.5)}, "a budget on macs"),
        ({"bits": (8, 4), "budget": gc.Budget(bytes=0.5)}, "the fewest come first"),
        ({"bits": (4, 8), "activation_bits": (4, 8), "budget": gc.Budget(bytes=0.5)}, "learned in training"),
    ],
)
def test_what_cannot_be_met_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        gc.compress(net(), images()[0][:2], progress=False, **options)


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(BudgetError, match="no choice of bits meets the budget of 100 bytes"):
        gc.compress(net(), images()[0][:2], bits=(4, 8), budget=gc.Budget(bytes=100), progress=False)
