"""What QASSO promises: bits within their range, units to the number, zeros that stay, and nothing else touched."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphcomp as gc
from tests.marks import slow
from tests.training.runs import (
    SCHEDULE,
    backward,
    batch,
    bits_of,
    leave,
    model_of,
    ready_of,
    removed_by_slicing,
    same,
    state_of,
    train,
    weights_of,
)

aten = torch.ops.aten
COOLDOWN = SCHEDULE.ends[2]
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.02}),
    "momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-2}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.005, "momentum": 0.5}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 1e-2}),
}


def qasso(ready: nn.Module, base: str = "momentum", **options: Any) -> gc.QASSO:
    kind, own = BASES[base]
    return gc.QASSO(ready, kind, **{"schedule": SCHEDULE, **own, **options})


# ------------------------------------------------------------------------------------------------ bits
MOST = {2: [8, 8, 6, 6, 4, 4], 4: [8, 8, 6.5, 6.5, 5, 5]}
"""Fewest bits -> the most, in each of the six steps of projection from 8 down: two thirds of the range in all, to the
nearest bit."""


@pytest.mark.parametrize(
    "name", ["residual", "vit", "dense", *slow("encoder", "decoder", "upsample", "unequal", "mlp")]
)
@pytest.mark.parametrize("forgetting", ["descent", *slow("uniform")])
@pytest.mark.slow
@pytest.mark.ci
def test_bits_are_in_the_range_after_every_step_from_projection_on(name, forgetting):
    ready = ready_of(name, bits=(2, 8))
    optimizer = qasso(ready, sparsity=0.4, forgetting=forgetting, lr_quant=0.01)
    for step in range(SCHEDULE.steps):
        train(optimizer, ready, name, range(step, step + 1))
        most = 8 if step < 3 else MOST[2][min(step - 3, 5)]
        least = 8 if step < 3 else 2
        for where, bits in bits_of(ready).items():
            assert least - 1e-4 <= bits <= most + 1e-4, f"{where} after step {step}"
    assert {"weights", "activations"} == {"weights" if s.is_weight else "activations" for s, _ in ready.quantizers()}


def test_a_layer_keeps_to_a_range_of_its_own():
    own = (("head", (8, 8)), ("re:first.*", (4, 8)))
    ready = ready_of("residual", bits=(2, 8), layer_bits=own)
    optimizer = qasso(ready, sparsity=0.4, lr_quant=0.01)
    ranges = {s.name: (s.low, s.high) for s, _ in ready.quantizers()}
    assert set(ranges.values()) == {(2, 8), (4, 8), (8, 8)}
    for step in range(SCHEDULE.steps):
        train(optimizer, ready, "residual", range(step, step + 1))
        for where, bits in bits_of(ready).items():
            low, high = ranges[where]
            most = {2: MOST[2], 4: MOST[4], 8: [8] * 6}[low][max(0, min(step - 3, 5))]
            assert (high if step < 3 else low) - 1e-4 <= bits <= most + 1e-4, f"{where} after step {step}"


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_layers_of_one_group_with_very_different_ranges(base):
    ready = ready_of("unequal", bits=(4, 16))
    ranges = {s.layer: q.q_m.item() for s, q in ready.quantizers() if s.is_weight}
    assert ranges["large"] > 50 * ranges["small"]
    optimizer = qasso(ready, base, sparsity=0.5)
    for step in range(SCHEDULE.steps):
        train(optimizer, ready, "unequal", range(step, step + 1))
        if step >= 3:
            assert all(4 - 1e-4 <= b <= 16 + 1e-4 for b in bits_of(ready).values())
        if step >= 8:
            assert all(b <= 8 + 1e-4 for b in bits_of(ready).values())


def test_bits_hold_for_levels_that_are_unevenly_spaced():
    ready = ready_of("mlp", bits=(3, 6), learn_exponent=True)
    optimizer = qasso(ready, sparsity=0.5, lr_quant=0.05)
    train(optimizer, ready, "mlp", SCHEDULE.steps)
    exponents = [q.t.item() for s, q in ready.quantizers() if s.is_weight]
    assert max(abs(t - 1) for t in exponents) > 1e-3
    for bits in bits_of(ready).values():
        assert 3 <= round(bits) <= 4 and bits == pytest.approx(round(bits), abs=1e-5)


@pytest.mark.parametrize("name", ["dense", *slow("residual", "encoder")])
def test_bits_are_whole_and_constant_in_the_cool_down_while_ranges_move(name):
    ready = ready_of(name, bits=(2, 8))
    optimizer = qasso(ready, sparsity=0.4, lr_quant=0.01)
    train(optimizer, ready, name, COOLDOWN + 1)
    fixed, ranges = bits_of(ready), optimizer.bank.q_m()
    assert all(b == pytest.approx(round(b), abs=1e-5) and 2 <= round(b) <= 4 for b in fixed.values())
    for step in range(COOLDOWN + 1, COOLDOWN + 10):  # beyond the schedule's end, too
        train(optimizer, ready, name, range(step, step + 1))
        assert bits_of(ready) == pytest.approx(fixed, abs=1e-5)
    assert bool((optimizer.bank.q_m() != ranges).any())


def test_a_narrower_range_than_the_module_was_prepared_with():
    ready = ready_of("mlp", bits=(2, 8))
    optimizer = qasso(ready, sparsity=0.5, bits=(4, 5))
    for step in range(SCHEDULE.steps):
        train(optimizer, ready, "mlp", range(step, step + 1))
        assert all(4 - 1e-4 <= b <= 5 + 1e-4 for b in bits_of(ready).values())


# ------------------------------------------------------------------------------------------------ units
@pytest.mark.parametrize("sparsity", [0.1, 0.35, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("name", ["mlp", *slow("residual", "vit")])
def test_the_sparsity_is_met_to_the_unit(name, sparsity):
    ready = ready_of(name, bits=(4, 8))
    optimizer = qasso(ready, sparsity=sparsity)
    total = sum(group.size for group in optimizer.groups)
    target = -int(-(sparsity * total - 0.5) // 1)  # the nearest whole number, halves down
    for step in range(SCHEDULE.steps):
        train(optimizer, ready, name, range(step, step + 1))
        gone = {11: round(target / 2), COOLDOWN - 1: target}.get(step)  # at the end of each period
        if gone is not None:
            assert optimizer.removed == gone
    masks = [ready.get_buffer(f"graphcomp_mask_{k}") for k in range(len(optimizer.groups))]
    assert sum(int((mask == 0).sum()) for mask in masks) == optimizer.removed == target
    assert all(bool(mask.any()) for mask in masks)


@pytest.mark.parametrize("sparsity", [0.97, 0.999])
def test_more_than_can_go_is_refused_at_the_start(sparsity):
    with pytest.raises(gc.BudgetError, match="22"):  # two groups of 12 units, one of each stays
        qasso(ready_of("mlp", bits=(4, 8)), sparsity=sparsity)


def test_almost_all_can_go():
    ready = ready_of("residual", bits=None)
    optimizer = qasso(ready, sparsity=0.9)
    train(optimizer, ready, "residual", SCHEDULE.steps)
    assert optimizer.removed == 36 and all(len(units) for units in ready.kept().values())


@pytest.mark.parametrize(("round_to", "sparsity", "removed"), [(4, 0.5, 12), (5, 0.75, 14)])
def test_the_number_kept_is_a_multiple(round_to, sparsity, removed):
    """12 and 12 become 5 and 5 at most: 18 cannot be removed, and 14 is the nearest number that can."""
    ready = ready_of("mlp", bits=None)
    optimizer = qasso(ready, sparsity=sparsity, round_to=round_to)
    train(optimizer, ready, "mlp", SCHEDULE.steps)
    assert optimizer.removed == removed
    assert all(len(units) % round_to == 0 for units in ready.kept().values())
    assert bool(ready.remarks) == (removed == 14)


@pytest.mark.parametrize(
    ("widths", "round_to", "sparsity", "periods", "share"),
    [
        ([5, 10], 3, 0.25, 5, 1.0),
        ([6, 11, 5, 4], 3, 0.5, 3, 1.0),
        ([12, 8, 17], 4, 0.1, 5, 0.5),
        ([10, 3, 2], 2, 0.25, 3, 0.8),
    ],
)
def test_what_goes_in_an_early_period_leaves_the_end_within_reach(widths, round_to, sparsity, periods, share):
    """Widths that are no multiples: after the wrong first choice the number asked for can no longer be met."""
    shapes = [6, *widths, 3]
    ready = gc.prepare(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(shapes))), batch("mlp"), bits=None)
    schedule = gc.Schedule(30, warmup=0, projection=0, joint=20, pruning_periods=periods)
    optimizer = qasso(
        ready, sparsity=sparsity, round_to=round_to, max_group_sparsity=share, schedule=schedule, saliency="random"
    )
    for _ in range(20):
        for parameter in ready.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert optimizer.removed == round(sparsity * sum(widths))
    assert all(len(u) % round_to == 0 or len(u) == group.size for group, u in ready.kept().items())


def test_a_group_keeps_its_share():
    ready = ready_of("residual", bits=None)
    optimizer = qasso(ready, sparsity=0.4, max_group_sparsity=0.5)
    train(optimizer, ready, "residual", SCHEDULE.steps)
    assert optimizer.removed == 16
    assert all(2 * len(units) >= group.size for group, units in ready.kept().items())


@pytest.mark.parametrize("saliency", ["geta", "l2", "taylor"])
def test_units_leave_by_the_saliency_asked_for(saliency):
    ready = ready_of("mlp", bits=None)
    optimizer = qasso(ready, sparsity=0.5, saliency=saliency)
    train(optimizer, ready, "mlp", SCHEDULE.steps)
    assert optimizer.removed == 12


def test_each_option_of_the_joint_stage_matters():
    def trained(**options: Any) -> dict[str, Tensor]:
        ready = ready_of("unequal", bits=(4, 8))
        train(qasso(ready, "sgd", sparsity=0.5, **options), ready, "unequal", COOLDOWN)
        return {**state_of(ready), **{group.name: units for group, units in ready.kept().items()}}

    plain = trained()
    assert same(trained(), plain)
    others = {"eta": 0.5, "xi": 0.1, "forgetting": "uniform", "saliency": "l2", "lr_quant": 0.1, "bits": 4}
    for name, value in others.items():
        assert not same(trained(**{name: value}), plain), name


def test_groups_are_compared_by_the_normalization_asked_for():
    """The units of the layer with the small weights go first, unless each group's scores are on one scale."""
    gone = {}
    for normalize in ("none", "mean"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3))
        with torch.no_grad():
            model[0].weight.mul_(1e-3), model[0].bias.mul_(1e-3)
        ready = gc.prepare(model, batch("mlp"), bits=None).train()
        train(qasso(ready, "sgd", sparsity=0.5, saliency="l2", normalize=normalize), ready, "mlp", COOLDOWN)
        gone[normalize] = sorted(12 - len(units) for units in ready.kept().values())
    assert gone["none"] == [1, 11] and max(gone["mean"]) < 10


def test_the_units_asked_for_are_those_that_go():
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = qasso(ready, sparsity=0.25, saliency=leave(up_hidden=(3, 0, 7), middle_hidden=(5, 1, 2)))
    train(optimizer, ready, "mlp", SCHEDULE.steps)
    gone = {group.name: sorted(set(range(12)) - set(units.tolist())) for group, units in ready.kept().items()}
    assert gone == {"up/hidden": [0, 3, 7], "middle/hidden": [1, 2, 5]}


# ------------------------------------------------------------------------------------------------ zeros
@pytest.mark.parametrize(
    ("name", "base"),
    [
        *(("mlp", base) for base in BASES),
        ("residual", "adamw"),
        ("width", "momentum"),
        *(pytest.param("residual", base, marks=pytest.mark.slow) for base in BASES if base != "adamw"),
        *(pytest.param("width", base, marks=pytest.mark.slow) for base in BASES if base != "momentum"),
    ],
)
def test_what_is_gone_is_zero_to_the_bit_from_the_end_of_its_period_on(name, base):
    options = {"prune": ("width",)} if name == "width" else {}
    ready = ready_of(name, bits=(4, 8), **options)
    optimizer = qasso(ready, base, sparsity=0.5)
    masks: dict[str, Tensor] = {}
    for step in range(SCHEDULE.steps + 5):
        train(optimizer, ready, name, range(step, step + 1))
        if step in (11, COOLDOWN - 1):  # the ends of the periods
            masks = removed_by_slicing(ready, ready.kept())
            assert any(bool(mask.any()) for mask in masks.values())
        for key, mask in masks.items():
            gone = ready.get_parameter(key).detach()[mask]
            assert torch.equal(gone, torch.zeros_like(gone)), f"{key} after step {step}"
    small = gc.finalize(ready)
    assert small.report.to_dict()["verified"]["trained == sliced"] < 1e-9


def test_a_model_that_lost_units_computes_what_the_small_one_does():
    """Where a unit that is zero does not give zero: sigmoids, and the statistics of a layer norm."""
    for name, options in (("mlp", {}), ("width", {"prune": ("width",)})):
        ready = ready_of(name, bits=None, **options)
        train(qasso(ready, "adamw", sparsity=0.5), ready, name, SCHEDULE.steps)
        small = gc.finalize(ready)
        x = batch(name, 99)
        torch.testing.assert_close(small(*x), ready.eval()(*x), rtol=1e-4, atol=1e-5)
        assert small.report.to_dict()["units"]["removed"] > 0


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_what_an_earlier_run_removed_stays_removed_and_counts(sparsity):
    ready = ready_of("mlp", bits=(4, 8))
    train(qasso(ready, sparsity=0.4), ready, "mlp", SCHEDULE.steps)
    before = ready.kept()
    optimizer = qasso(ready, "adamw", sparsity=sparsity)
    assert optimizer.removed == 10
    train(optimizer, ready, "mlp", SCHEDULE.steps)
    assert optimizer.removed == max(10, round(sparsity * 24))
    assert all(bool(torch.isin(units, before[group]).all()) for group, units in ready.kept().items())
    assert gc.finalize(ready).report.to_dict()["units"]["removed"] == optimizer.removed


# ------------------------------------------------------------------------------------------------ what a step touches
def base_results(optimizer: gc.QASSO, ready: nn.Module) -> dict[str, Tensor]:
    """Filled, in each step, with the weights that the base optimizer leaves."""
    found: dict[str, Tensor] = {}

    def record(*_: Any) -> None:
        found.update({name: p.detach().clone() for name, p in weights_of(ready).items()})

    optimizer.base.register_step_post_hook(record)
    return found


def rows(shape: Any, dim: int, indices: list[int]) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.index_fill_(dim, torch.tensor(indices), True)
    return mask


def heads(units: list[int], size: int, parts: int = 1, of: int = 0) -> list[int]:
    """Rows of whole heads of `size` rows, in each of `parts` parts that are `of` rows apart."""
    return [part * of + unit * size + k for part in range(parts) for unit in units for k in range(size)]


STRUCTURES: dict[str, tuple[str, dict[str, list[int]], float, dict[str, tuple[int, list[int]]]]] = {
    # name: model, units that leave, sparsity, parameter -> dim and indices that are forgotten
    "fused qkv": (
        "vit",
        {"qkv_head": [1]},
        1 / 51,
        {k: (0, heads([1], 8, parts=3, of=24)) for k in ("qkv.weight", "qkv.bias")},
    ),
    "heads": (
        "encoder",
        {"query_head": [1]},
        1 / 50,
        {f"{layer}.{k}": (0, heads([1], 8)) for layer in ("query", "key", "value") for k in ("weight", "bias")},
    ),
    "key/value heads with their queries": (
        "decoder",
        {"q_head": [1]},
        1 / 28,
        {"q.weight": (0, heads([1], 16)), "k.weight": (0, heads([1], 8)), "v.weight": (0, heads([1], 8))},
    ),
    "one query of each key/value head": (
        "decoder",
        {"q_group": [0]},
        1 / 28,
        {"q.weight": (0, heads([0, 2], 8))},
    ),
    "gated feed-forward": (
        "decoder",
        {"gate_hidden": [3, 20]},
        2 / 28,
        {f"{layer}.{k}": (0, [3, 20]) for layer in ("gate", "up") for k in ("weight", "bias")},
    ),
    "transposed and depthwise": (
        "upsample",
        {"wide_channel": [0, 5]},
        2 / 14,
        {
            "wide.weight": (1, [0, 5]),
            "wide.bias": (0, [0, 5]),
            "depthwise.weight": (0, [0, 5]),
            "depthwise.bias": (0, [0, 5]),
        },
    ),
    "the second of two that are concatenated": (
        "dense",
        {"right_channel": [1, 3]},
        2 / 10,
        {
            "right.weight": (0, [1, 3]),
            "right.bias": (0, [1, 3]),
            "norm.weight": (0, [7, 9]),
            "norm.bias": (0, [7, 9]),
        },
    ),
    "size of heads": (
        "encoder",
        {"query_head_dim": [2], "value_head_dim": [5]},
        2 / 16,
        {
            **{f"{layer}.{k}": (0, [2, 10]) for layer in ("query", "key") for k in ("weight", "bias")},
            **{f"value.{k}": (0, [5, 13]) for k in ("weight", "bias")},
        },
    ),
    "size of heads of a fused qkv": (
        "vit",
        {"qkv_head_dim": [6]},
        1 / 8,
        {f"qkv.{k}": (0, [8 * j + 6 for j in range(9)]) for k in ("weight", "bias")},
    ),
    "hidden of stacked experts": ("experts", {"up_hidden": [3, 7]}, 2 / 15, {"up": (2, [3, 7])}),
    "a residual stream": (
        "residual",
        {"stem_0_width": [2]},
        1 / 40,
        {
            "stem.0.weight": (0, [2]),
            "stem.1.weight": (0, [2]),
            "stem.1.bias": (0, [2]),
            "first.3.weight": (0, [2]),
            "first.3.bias": (0, [2]),
            "first.4.weight": (0, [2]),
            "first.4.bias": (0, [2]),
        },
    ),
}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("structure", "bits"),
    [
        *((structure, None) for structure in STRUCTURES),
        ("fused qkv", (4, 8)),
        ("the second of two that are concatenated", (4, 8)),
        *(pytest.param(structure, (4, 8), marks=pytest.mark.slow) for structure in STRUCTURES),
    ],
)
def test_only_the_rows_of_units_that_leave_differ_from_the_base_optimizer(structure, bits):
    name, units, sparsity, expected = STRUCTURES[structure]
    schedule = gc.Schedule(6, warmup=1, projection=0, joint=3, pruning_periods=1)
    roles: dict[str, tuple[str, ...]] = {}  # of units that stay whole by default
    if "size of heads" in structure:
        roles = {"prune": ("head_dim",)}
    elif "one query" in structure:
        roles = {"prune": ("channel", "head", "hidden", "expert", "group")}
    ready = ready_of(name, bits=bits, **roles)
    forgetting = "uniform"  # a share of each element in each step, whatever the gradients
    optimizer = qasso(
        ready, "adamw", sparsity=sparsity, saliency=leave(**units), schedule=schedule, forgetting=forgetting
    )
    base = base_results(optimizer, ready)
    masks = {key: rows(ready.get_parameter(key).shape, dim, where) for key, (dim, where) in expected.items()}
    sliced: dict[str, Tensor] = {}
    for step in range(6):
        train(optimizer, ready, name, range(step, step + 1))
        sliced = removed_by_slicing(ready, ready.kept()) if step in (0, 3) else sliced
        for key, weight in weights_of(ready).items():
            changed = weight.detach() != base[key]
            mask = masks.get(key, torch.zeros_like(changed))
            if step in (1, 2):  # being forgotten, but for what rounds to 0
                assert not bool((changed & ~mask).any()), key
                assert torch.equal(changed, mask) if bits is None else 2 * changed.sum() >= mask.sum(), key
            else:  # nothing yet; or gone, with what read it
                assert not bool((changed & ~sliced[key]).any()), key
    gone = removed_by_slicing(ready, ready.kept())
    assert all(bool(gone[key][mask].all()) for key, mask in masks.items())
    assert optimizer.removed == sum(len(u) for u in units.values())


@pytest.mark.parametrize("base", list(BASES))
def test_the_base_optimizer_makes_its_own_steps(base):
    """What it leaves in a step is what it would leave alone, from the same weights, gradients and state."""
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = qasso(ready, base, sparsity=0.5)
    kind, own = BASES[base]
    train(optimizer, ready, "mlp", 10)
    alone = [nn.Parameter(p.detach().clone()) for p in weights_of(ready).values()]
    twin = kind(alone, **own)
    for mine, its in zip(alone, weights_of(ready).values(), strict=True):
        if its in optimizer.state:
            held = optimizer.state[its].items()
            twin.state[mine] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in held}
    found = base_results(optimizer, ready)
    optimizer.zero_grad()
    backward(ready, batch("mlp", 10))
    for mine, its in zip(alone, weights_of(ready).values(), strict=True):
        mine.grad = None if its.grad is None else its.grad.clone()
    optimizer.step()
    twin.step()
    assert all(torch.equal(mine, found[name]) for mine, name in zip(alone, weights_of(ready), strict=True))


@pytest.mark.parametrize("forgetting", ["descent", *slow("uniform")])
def test_with_no_gradients_what_leaves_fades_and_the_rest_stands(forgetting):
    ready = ready_of("residual", bits=(6, 8))
    schedule = gc.Schedule(10, warmup=0, projection=0, joint=6, pruning_periods=1)
    optimizer = qasso(ready, "sgd", sparsity=0.4, schedule=schedule, forgetting=forgetting)
    start = {name: p.detach().clone() for name, p in weights_of(ready).items()}
    norms = []
    for _ in range(6):
        for parameter in ready.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        leaving = removed_by_slicing(ready, optimizer.chosen)  # when the period is over; what reads it, too
        for name, mask in leaving.items():
            changed = weights_of(ready)[name].detach() != start[name]
            assert not bool((changed & ~mask).any()), name
        norms.append(sum(float(weights_of(ready)[n].detach()[m].square().sum()) for n, m in leaving.items()) ** 0.5)
    assert norms == sorted(norms, reverse=True) and norms[-1] == 0 and optimizer.removed == 16
    assert all(a > b for a, b in pairwise(norms))


@pytest.mark.parametrize("name", ["mlp", "residual", *slow("vit")])
def test_a_step_that_forgets_stays_a_descent(name):
    """<-u, p> >= eta (1 - xi) ||u||² over all that leaves, with u the update of plain SGD and p the whole move."""
    ready = ready_of(name, bits=(4, 8)).double()
    optimizer = qasso(ready, "sgd", sparsity=0.5)
    result = base_results(optimizer, ready)
    for step in range(COOLDOWN - 1):
        before = {key: p.detach().clone() for key, p in weights_of(ready).items()}
        optimizer.zero_grad()
        backward(ready, [x.double() if x.is_floating_point() else x for x in batch(name, step)])
        optimizer.step()
        if step < 9 or step == 11:  # not forgetting, or writing zeros
            continue
        gone, descent, square = removed_by_slicing(ready, ready.kept()), 0.0, 0.0
        for key, mask in removed_by_slicing(ready, optimizer.chosen).items():
            active, now = mask & ~gone[key], weights_of(ready)[key].detach()
            u, p = before[key] - result[key], now - before[key]
            descent -= float((u * p)[active].sum())
            square += float(u[active].square().sum())
        assert square > 0 and descent >= 0.999 * (1 - 0.9) * square * (1 - 1e-9)


class Waits(TorchDispatchMode):
    """The ops that bring a number to the host, on which a GPU would have to wait."""

    OPS = frozenset({aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [t for t in args[1] if t is not None and t.dtype is torch.bool] if func is aten.index.Tensor else []
        if func in self.OPS or masks:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["residual", *slow("decoder")])
def test_no_step_waits_for_the_device_but_where_a_period_begins_or_ends(name):
    """Ranges that follow, projection, forgetting, zeros and bits held: all without a number on the host."""
    ready = ready_of(name, bits=(4, 8))
    optimizer = qasso(ready, sparsity=0.4)
    quiet = set()
    for step in range(SCHEDULE.steps):
        moment = optimizer.moment
        optimizer.zero_grad()
        backward(ready, batch(name, step))
        with Waits() as waits:
            optimizer.step()
        if not (moment.stage == gc.Stage.JOINT and (moment.first or moment.last)) and step != COOLDOWN:
            assert waits.seen == [], f"step {step}"
            quiet.add(moment.stage)
    assert quiet == set(gc.Stage) and optimizer.removed > 0


# ------------------------------------------------------------------------------------------------ nothing asked
@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("name", ["dense", *slow("residual", "encoder")])
def test_with_nothing_to_do_it_is_the_base_optimizer_bit_for_bit(name, base):
    kind, own = BASES[base]
    model = model_of(name).train()
    ready = ready_of(name, bits=None)
    train(qasso(ready, base, sparsity=0.0), ready, name, SCHEDULE.steps)
    train(kind(model.parameters(), **own), model, name, SCHEDULE.steps)
    ours = state_of(ready)
    for key, tensor in model.state_dict().items():
        assert torch.equal(ours[key], tensor) if key in ours else "num_batches_tracked" in key, key


@pytest.mark.parametrize("name", ["mlp", *slow("vit")])
def test_sixteen_bits_and_all_units_follow_the_float_model(name):
    kind, own = BASES["momentum"]
    model, start = model_of(name).train(), dict(model_of(name).named_parameters())
    ready = ready_of(name, bits=(16, 16))
    with torch.no_grad():
        for _, quantizer in ready.quantizers():  # nothing saturates, in no batch
            quantizer.set_range(-4 * quantizer.q_m, 4 * quantizer.q_m)
    schedule = gc.Schedule(20, warmup=0, projection=6, joint=6)
    train(qasso(ready, sparsity=0.0, lr_quant=1e-12, schedule=schedule), ready, name, 20)
    train(kind(model.parameters(), **own), model, name, 20)
    for key, tensor in model.named_parameters():
        moved, apart = (tensor - start[key]).norm(), (tensor - ready.get_parameter(key)).norm()
        assert 0 < apart < 1e-3 * moved, key
