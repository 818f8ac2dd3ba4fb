"""Which groups may be cut, by `ignore`, `keep_inputs`, roles and frozen parameters; and shares by module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.pruning.prunable import find_prunable

X = torch.linspace(-1, 1, 16).reshape(2, 8)


class Chain(nn.Module):
    """8 -> 16 -> 16 -> 16 -> 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 8) -> (n, 4)."""
        for layer in (self.a, self.b, self.c):
            x = layer(x).relu()
        result: Tensor = self.d(x)
        return result


def widths(model: nn.Module) -> list[int]:
    """Output features of each linear layer."""
    return [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]


def compress(model: nn.Module, **options: Any) -> gc.CompressedModel:
    return gc.compress(model, X, ranking="local", progress=False, **options)


# ------------------------------------------------------------------------------------------------ ignore, keep_inputs
def test_ignore_keeps_the_outputs_of_a_module_and_keep_inputs_its_inputs_too() -> None:
    assert widths(compress(Chain()).module) == [8, 8, 8, 4]
    assert widths(compress(Chain(), ignore="b").module) == [8, 16, 8, 4]
    assert widths(compress(Chain(), keep_inputs="b").module) == [16, 16, 8, 4]
    assert widths(compress(Chain(), ignore="d").module) == [8, 8, 8, 4]
    assert widths(compress(Chain(), keep_inputs=["d"], ignore=["a"]).module) == [16, 8, 16, 4]


def test_the_report_names_the_groups_that_were_taken_out() -> None:
    notes = compress(Chain(), ignore=["a"], keep_inputs="re:^d$").report.notes
    assert "left whole by ignore=: a/hidden (16)" in notes
    assert "left whole by keep_inputs=: c/hidden (16)" in notes
    note, *_ = compress(Chain(), ignore="d").report.notes
    assert "ignore='d' leaves no group whole" in note


def test_modules_stand_for_their_names() -> None:
    model = Chain()
    assert widths(compress(model, ignore=model.b).module) == [8, 16, 8, 4]
    assert widths(compress(model, keep_inputs=[model.b]).module) == [16, 16, 8, 4]
    assert widths(compress(model, sparsity={model.a: 0.25}).module) == [12, 16, 16, 4]
    ready = gc.prepare(model, X, bits=(4, 8), ignore=[model.b], layer_bits={model.a: (8, 8)}, scope=model)
    assert "b/hidden" not in {group.name for group in ready.session.groups}
    assert ready.bits()["a"][0] == 8
    with pytest.raises(gc.PlanError, match="no module of the model"):
        compress(model, ignore=Chain().b)


def test_a_module_may_be_the_scope() -> None:
    whole = nn.Sequential(nn.Linear(8, 8), Chain()).eval()
    assert widths(compress(whole, scope=whole[1]).module) == [8, 8, 8, 8, 4]
    assert widths(compress(whole, scope="1", ignore=[whole[1].b]).module) == [8, 8, 16, 8, 4]


def test_modules_in_options_of_quantization() -> None:
    model = Chain()
    config = gc.QuantConfig(overrides={model.b: (gc.QuantSpec(4, granularity="channel"), None)})
    options = gc.PostTraining(config, ignore=model.c)
    small = compress(model, sparsity=0, quantization=options, calibration=[X])
    assert [layer.weight_bits for layer in small.report.layers] == [8, 4, 32, 8]


def test_a_name_alone_is_one_name() -> None:
    small = compress(Chain(), sparsity=0, quantization=gc.PostTraining(ignore="a"), calibration=[X])
    assert [layer.weight_bits for layer in small.report.layers] == [32, 8, 8, 8]


# ------------------------------------------------------------------------------------------------ shares by module
def test_shares_by_module() -> None:
    small = compress(Chain(), sparsity={"a": 0.25, "re:[bc]": 0.5, "c": 0.75})
    assert widths(small.module) == [12, 8, 4, 4]
    assert (small.report.units_removed, small.report.units_total) == (24, 48)
    some = compress(Chain(), sparsity={"b": 0.5})
    assert widths(some.module) == [16, 8, 16, 4]
    assert some.report.sparsity == 0.5


def test_shares_by_module_are_rounded_each() -> None:
    small = compress(Chain(), sparsity={"a": 0.25, "b": 0.4}, round_to=8)
    assert [width % 8 for width in widths(small.module)[:3]] == [0, 0, 0]
    assert widths(small.module)[1] == 8
    assert sum("round_to=8" in note for note in small.report.notes) == 2


@pytest.mark.parametrize(
    ("sparsity", "says"),
    [
        ({"d": 0.5}, "makes no units"),
        ({"e": 0.5}, "no module"),
        ({"a": 1.0}, "outside"),
        ({}, "sparsity"),
        ({3: 0.5}, "name or a module"),
        ({"re:[": 0.5}, "regular expression"),
    ],
)
def test_shares_that_cannot_be_met(sparsity: Any, says: str) -> None:
    with pytest.raises(gc.PlanError, match=says):
        compress(Chain(), sparsity=sparsity)


# ------------------------------------------------------------------------------------------------ frozen parameters
class Adapted(nn.Module):
    """A frozen layer of 64 units with a low-rank adapter beside it."""

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        self.base, self.last = nn.Linear(8, 64), nn.Linear(64, 4)
        self.down, self.up = nn.Linear(8, rank, bias=False), nn.Linear(rank, 64, bias=False)
        for layer in (self.base, self.last):
            layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 8) -> (n, 4)."""
        result: Tensor = self.last((self.base(x) + self.up(self.down(x))).relu())
        return result


def test_ranks_of_adapters_are_whole_by_default() -> None:
    plan = gc.analyze(Adapted(), X)
    found = find_prunable(plan)
    assert [group.size for group in found.groups] == [64]
    assert any("ranks of adapters" in note and "down/hidden (4)" in note for note in found.notes)
    assert [group.size for group in gc.prunable_groups(plan, prune=["hidden"])] == [4]
    trainable = gc.analyze(Adapted().requires_grad_(True), X)
    assert [group.size for group in gc.prunable_groups(trainable)] == [64, 4]


def test_ranks_of_adapters_that_were_loaded_for_inference_are_whole() -> None:
    plan = gc.analyze(Adapted().requires_grad_(False), X)
    assert [group.size for group in find_prunable(plan).groups] == [64]
    narrow = gc.analyze(Chain().requires_grad_(False), X)
    assert [group.size for group in gc.prunable_groups(narrow)] == [16, 16, 16]


class Fixed(nn.Module):
    """Attention of 4 heads on positions that are not trained, which have the width that the heads have together."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, 16), requires_grad=False)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 5, 16) -> (n, 5, 16)."""
        x = x + self.positions
        q, k, v = (f(x).view(-1, 5, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return result


def test_heads_beside_frozen_positions_are_no_adapters() -> None:
    plan = gc.analyze(Fixed(), torch.randn(2, 5, 16))
    assert [group.role for group in find_prunable(plan).groups] == ["head"]


def test_layers_trained_beside_frozen_ones_are_no_adapters() -> None:
    model = Chain()
    model.a.requires_grad_(False)
    assert [group.size for group in gc.prunable_groups(gc.analyze(model, X))] == [16, 16, 16]


def test_groups_with_frozen_parameters_are_named() -> None:
    model = Chain()
    model.a.requires_grad_(False)
    options: dict[str, Any] = {"data": [X] * 2, "loss": lambda y, _: y.square().mean(), "steps": 20}
    small = gc.compress(model, X, sparsity=0.5, method="hesso", progress=False, **options)
    assert widths(small.module)[0] == 16
    assert any("requires_grad=False" in note and "a/hidden (16)" in note for note in small.report.notes)


def test_a_model_without_trainable_parameters() -> None:
    options: dict[str, Any] = {"data": [X] * 2, "loss": lambda y, _: y.square().mean(), "steps": 20}
    with pytest.raises(gc.NothingToPrune, match=r"fix:(.|\n)*requires_grad_\(True\)"):
        gc.compress(Chain().requires_grad_(False), X, method="hesso", progress=False, **options)


def test_training_rounds_to_the_nearest_count() -> None:
    options: dict[str, Any] = {"data": [X] * 2, "loss": lambda y, _: y.square().mean(), "steps": 20}
    small = gc.compress(Chain(), X, sparsity=0.3, round_to=8, method="hesso", progress=False, **options)
    assert small.report.units_removed == 16
    assert [width % 8 for width in widths(small.module)[:3]] == [0, 0, 0]
    assert any("round_to=8" in note for note in small.report.notes)


# ------------------------------------------------------------------------------------------------ the raw cut
def test_kept_units_as_a_mask() -> None:
    plan = gc.analyze(Chain(), X)
    mask = torch.zeros(16, dtype=torch.bool)
    mask[3:7] = True
    for given in (mask, mask.tolist(), mask.numpy(), [3, 4, 5, 6], {3, 4, 5, 6}, range(3, 7)):
        small = gc.slice_groups(plan, {plan.groups[0]: given})
        assert small.kept["a.weight"][0].tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("units", "says"),
    [
        (torch.ones(3, dtype=torch.bool), r"shape \(3,\)"),
        ([0.5], "whole numbers"),
        ([[1]], "one dim"),
        ("abc", "indices or a mask"),
        (None, "indices or a mask"),
        ([16], "below 16"),
        ([], "lose all"),
    ],
)
def test_kept_units_that_are_none(units: Any, says: str) -> None:
    plan = gc.analyze(Chain(), X)
    with pytest.raises(gc.PlanError, match=says):
        gc.slice_groups(plan, {plan.groups[0]: units})


def test_groups_of_another_plan_are_refused() -> None:
    plan, other = (gc.analyze(Chain(), X) for _ in range(2))
    with pytest.raises(gc.PlanError, match="another plan"):
        gc.slice_groups(plan, {other.groups[0]: [0, 1]})
    with pytest.raises(gc.PlanError, match="another plan"):
        gc.slice_groups(plan, {plan.groups[0]: [0, 1]}, up_for_pruning=other.groups)
    with pytest.raises(gc.PlanError, match="ChannelGroup"):
        gc.slice_groups(plan, {"a/hidden": [0, 1]})  # type: ignore[dict-item]


# ------------------------------------------------------------------------------------------------ in training
@pytest.mark.parametrize("round_to", [1, 4])
def test_shares_by_module_in_training(round_to: int) -> None:
    model = Chain()
    options: dict[str, Any] = {"data": [X] * 2, "loss": lambda y, _: y.square().mean(), "steps": 25}
    small = gc.compress(
        model,
        X,
        sparsity={model.a: 0.25, "re:[bc]": 0.75},
        round_to=round_to,
        method="hesso",
        progress=False,
        **options,
    )
    first, *others, _ = widths(small.module)
    assert first == 12 and sum(others) == 8
    assert all(width % round_to == 0 for width in (first, *others))


def test_shares_by_module_in_training_leave_the_rest_whole() -> None:
    ready = gc.prepare(Chain(), X, bits=None)
    optimizer = gc.QASSO(ready, lr=0.1, schedule=25, sparsity={"b": 0.5})
    for _ in range(25):
        ready(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [len(units) for units in ready.kept().values()] == [16, 8, 16]
    assert optimizer.removed == 8 and optimizer.total == 16
    with pytest.raises(gc.PlanError, match="beside a budget"):
        gc.QASSO(ready, lr=0.1, schedule=25, sparsity={"b": 0.5}, budget=gc.Budget(params=0.5))
