"""Section 5 (e) of the methods' description, items 1 to 6, with its values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graphcomp as gc
from graphcomp.methods.ajpq.evaluations import Evaluations
from graphcomp.methods.ajpq.method import Ajpq, Searching
from graphcomp.methods.ajpq.plan import ChannelPlan, bits_of, spread_bits
from graphcomp.methods.ajpq.trial import Trial, channel_steps
from graphcomp.quantization.quantizers.mixed import MixedQuantizer
from graphcomp.training.prepared import Prepared
from tests.methods.learning import Net, batches, loss, net

from .planning import meter, random_plan, searching

X = batches()[0][0]


def trained_net() -> Net:
    """`net()` whose norms have statistics and factors of their own."""
    model = net()
    torch.manual_seed(3)
    for norm in (model.one, model.two):
        norm.weight.data.uniform_(-1.5, 1.5)
        norm.bias.data.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model


# ------------------------------------------------------------------------------------------------ 1
def by_hand(weight: Tensor, bits: Tensor) -> Tensor:
    """Each output channel to the nearest level of its bits, with the best of 40 steps; channels of 0 bits to 0."""
    found = torch.zeros_like(weight)
    for c, b in enumerate(bits.tolist()):
        if b == 0:
            continue
        most = 2 ** (b - 1) - 1
        steps = [float(weight[c].abs().max()) / most * k / 40 for k in range(1, 41)]
        levels = [(weight[c] / s).round().clamp(-most, most) * s for s in steps]
        found[c] = min(levels, key=lambda own: float((own - weight[c]).square().sum()))
    return found


def removed(model: Net, ready: Prepared, plan: ChannelPlan) -> Net:
    """The model with the channels of 0 bits cut out by hand, and the rest rounded by hand."""
    first, second = (own.nonzero().flatten() for own in plan.bits[:2])
    small = copy.deepcopy(model)
    rounded = [
        by_hand(w.detach(), b) for w, b in zip((small.first.weight, small.second.weight), plan.bits, strict=False)
    ]
    head = small.head.weight.detach()[:, second]  # the input is cut before the rows are rounded
    small.first = torch.nn.Conv2d(1, len(first), 3, padding=1)
    small.second = torch.nn.Conv2d(len(first), len(second), 3, padding=1)
    small.first.weight.data = rounded[0][first]
    small.second.weight.data = by_hand(model.second.weight.detach()[:, first], plan.bits[1])[second]
    small.first.bias.data, small.second.bias.data = model.first.bias.data[first], model.second.bias.data[second]
    for name, units in (("one", first), ("two", second)):
        norm, own = torch.nn.BatchNorm2d(len(units)), ready.get_submodule(name)
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, tensor).data = getattr(own, tensor).detach()[units].clone()
        setattr(small, name, norm)
    small.head.weight.data = by_hand(head, plan.bits[2])
    return small.eval()


@pytest.mark.parametrize("bits", [(4, 4), (2, 8)])
def test_e1_zero_bits_are_a_channel_that_is_removed(bits):
    model = trained_net()
    ready, search = searching(bits=bits, model=copy.deepcopy(model))
    for seed in range(4):
        plan = random_plan(search, seed)
        assert bits == (2, 8) or set(torch.cat(plan.bits).tolist()) <= {0, 4}
        trial = Trial(ready, search.layout, [[X]], repair=False)
        trial.put(plan)
        torch.testing.assert_close(ready(X), removed(model, ready, plan)(X), rtol=1e-6, atol=1e-6)
        trial.restore()


def test_e1_the_result_computes_what_the_masked_module_computes():
    seen: list[Tensor] = []

    class Watched(Ajpq):
        def search(self, ready: Any, goal: Any, shown: Any) -> None:
            super().search(ready, goal, shown)
            seen.append(ready(X).detach())

    asked: dict[str, Any] = {"bits": (2, 8), "activation_bits": None, "budget": gc.Budget(bops=0.1)}
    small = gc.compress(
        trained_net(), X, method=Watched(evaluations=9), data=batches(), loss=loss, progress=False, **asked
    )
    assert small.report.units_removed > 0
    assert (
        small.module.get_buffer("first.weight_codes" if hasattr(small.module, "x") else _codes(small)[0]).numel() < 72
    )
    torch.testing.assert_close(small(X), seen[0], rtol=1e-5, atol=1e-5)


def _codes(small: gc.CompressedModel) -> list[str]:
    return [name for name, _ in small.module.named_buffers() if name.endswith("_codes")]


# ------------------------------------------------------------------------------------------------ 2
def test_e2_actions_become_bits():
    actions = torch.tensor([1e-6, 0.2, 0.5, 0.8, 1 - 1e-6], dtype=torch.float64)
    assert bits_of(actions, 2, 8).tolist() == [2, 3, 5, 7, 8]


def test_e2_each_number_of_bits_has_an_equal_share_of_the_actions():
    counts = torch.bincount(bits_of(torch.linspace(0, 1, 70_001, dtype=torch.float64), 2, 8))
    assert counts[:2].sum() == 0 and bool(((counts[2:] - 10_000).abs() <= 1).all())


# ------------------------------------------------------------------------------------------------ 3
def check_monotone(search: Searching, plan: ChannelPlan) -> None:
    """That a channel of higher importance never has fewer bits, of those of its layer that stay."""
    for importance, bits in zip(search.layout.importance, plan.bits, strict=True):
        stays = bits > 0
        own, given = importance[stays], bits[stays]
        assert bool(((own[:, None] <= own[None]) | (given[:, None] >= given[None])).all())


@pytest.mark.parametrize("controller", ["spread", "channel"])
@pytest.mark.parametrize("budget", [{"bops": 0.03}, {"bytes": 0.05}, {"macs": 0.4}, {"bops": 0.02, "params": 0.5}])
def test_e3_bits_are_monotone_and_the_budget_holds(controller, budget):
    _, search = searching(Ajpq(controller=controller), budget=gc.Budget(**budget))
    for seed in range(25):
        plan = random_plan(search, seed)
        check_monotone(search, plan)
        found = meter(search).repaired(plan)
        check_monotone(search, found)
        assert all(cost <= meter(search).limits[name] + 1e-6 for name, cost in meter(search).cost(found).items())
        again = meter(search).repaired(found)
        assert again is found  # idempotent
        assert all(bool((a <= b).all()) for a, b in zip(found.bits, plan.bits, strict=True))
        assert meter(search).repaired(random_plan(search, seed)).key == found.key  # deterministic
        assert all(bool(own.any()) for own in found.left)


def one_by_one(search: Searching, plan: ChannelPlan) -> ChannelPlan:
    """The repair as it is written: one level of one kernel at a time; then one unit at a time."""
    own, layout, low = meter(search), search.layout, 2
    bits = [b.clone() for b in plan.bits]
    while not own.holds(ChannelPlan(plan.left, tuple(bits))):
        above = [
            (float(layout.importance[k][c]) / int(bits[k][c]), k, c)
            for k in range(len(bits))
            for c in range(len(bits[k]))
            if int(bits[k][c]) > low
        ]
        if not above:
            break
        _, k, c = min(above)
        bits[k][c] -= 1
    found = ChannelPlan(plan.left, tuple(bits))
    while not own.holds(found):
        worth = [(float(layout.worth[k][u]), k, u) for k, m in enumerate(found.left) for u in range(len(m)) if m[u]]
        worth = [entry for entry in worth if int(found.left[entry[1]].sum()) > 1]
        _, k, u = min(worth)
        left = [m.clone() for m in found.left]
        left[k][u] = False
        stays = layout.channels(left)
        found = ChannelPlan(tuple(left), tuple(b.where(s, 0) for b, (s, _) in zip(found.bits, stays, strict=True)))
    return found


@pytest.mark.parametrize("share", [0.03, 0.012, 0.006])
def test_e3_the_repair_is_the_one_that_lowers_one_kernel_at_a_time(share):
    _, search = searching(budget=gc.Budget(bops=share))
    for seed in range(5):
        plan = random_plan(search, seed)
        wanted, found = one_by_one(search, plan), meter(search).repaired(plan)
        assert [b.tolist() for b in found.bits] == [b.tolist() for b in wanted.bits]
        assert found.key == wanted.key


def test_e3_what_no_plan_meets_is_refused():
    _, search = searching(budget=gc.Budget(bops=0.0001))
    with pytest.raises(gc.BudgetError, match="no plan meets the budget"):
        meter(search).repaired(random_plan(search, 0))


# ------------------------------------------------------------------------------------------------ 4
def test_e4_one_number_of_bits_and_no_units_is_plain_int8():
    model = trained_net()
    small = gc.compress(
        model, X, method="ajpq", bits=8, sparsity=0, activation_bits=None, calibration=[X], progress=False
    )
    assert [layer.weight_bits for layer in small.report.layers] == [8, 8, 8] and small.report.units_removed == 0
    for name in ("second", "head"):
        weight = model.get_submodule(name).weight.detach()
        steps = channel_steps(weight, torch.full((len(weight),), 8), 0).float()
        codes = (weight / steps.view(-1, *[1] * (weight.dim() - 1))).round().clamp(-127, 127)
        stored = next(small.module.get_buffer(c) for c in _codes(small) if c.startswith(f"{name}.weight"))
        mirrored = stored.flatten(1).float() * (stored.flatten(1).float() * codes.flatten(1)).sum(1, True).sign()
        assert torch.equal(mirrored, codes.flatten(1))  # a norm with a negative factor mirrors the codes


def test_e4_without_bits_only_channels_go():
    model = trained_net()
    small = gc.compress(
        model, X, method=Ajpq(evaluations=12), budget=gc.Budget(macs=0.5), data=batches(), loss=loss, repair=None,
        progress=False,
    )  # fmt: skip
    assert small.report.macs.ratio <= 0.5 and all(layer.weight_bits == 32 for layer in small.report.layers)
    kept = small.kept["second.weight"]
    cut = model.second.weight.detach()[kept[0]][:, kept[1]]
    assert torch.equal(small.module.second.weight, cut)


# ------------------------------------------------------------------------------------------------ 5
def toy(search: Searching) -> tuple[list[Tensor], Any]:
    """Additive sensitivities S_c that grow with the importance, and the score of a plan: -sum S_c 4^-b_c."""
    sensitivities = [own.square() * 2 for own in search.layout.importance]

    def score(plan: ChannelPlan) -> float:
        pairs = zip(sensitivities, plan.bits, strict=True)
        return -float(sum((s * 4.0 ** -b.double()).sum() for s, b in pairs))

    return sensitivities, score


def optimum(search: Searching, sensitivities: list[Tensor], score: Any) -> float:
    """The Lagrangian optimum: a bit at a time where the error falls most for what the bit costs."""
    own = meter(search)
    bits = [torch.full_like(s, 2, dtype=torch.int64) for s in sensitivities]
    left = search.layout.whole(2).left
    elements = [count for _, count in search.layout.channels(left)]
    while True:
        gains = sorted(
            (-float(sensitivities[k][c]) * (4.0 ** -int(b[c])) * 0.75 / elements[k], k, c)
            for k, b in enumerate(bits)
            for c in range(len(b))
            if int(b[c]) < 8
        )
        for _, k, c in gains:
            bits[k][c] += 1
            if own.holds(ChannelPlan(left, tuple(bits))):
                break
            bits[k][c] -= 1
        else:
            return -score(ChannelPlan(left, tuple(bits)))


def lower_bound(search: Searching, sensitivities: list[Tensor]) -> float:
    """What no plan can be below: the best of the Lagrangian's duals over prices of a byte."""
    own, bits = meter(search), torch.arange(2, 9, dtype=torch.float64)
    left = search.layout.whole(2).left
    elements = [count for _, count in search.layout.channels(left)]
    fields = sum(len(s) for s in sensitivities) * (4 + 32) / 8
    duals = []
    for price in torch.logspace(-9, 0, 400, dtype=torch.float64).tolist():
        least = sum(
            float((s[:, None] * 4.0**-bits + price * count * bits / 8).amin(1).sum())
            for s, count in zip(sensitivities, elements, strict=True)
        )
        duals.append(least - price * (own.limits["bytes"] - fields))
    return max(duals)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("controller", "plans", "share"), [("spread", 300, 0.12), ("spread", 300, 0.16), ("channel", 300, 0.12)]
)
def test_e5_the_search_finds_the_optimum_of_additive_sensitivities(controller, plans, share):
    method = Ajpq(controller=controller, evaluations=plans)
    _, search = searching(method, sparsity=0, budget=gc.Budget(bytes=share))
    sensitivities, score = toy(search)
    best = optimum(search, sensitivities, score)
    found = [search.best(score, Evaluations(None, {}), seed) for seed in (0, 0, 1)]
    assert found[0].key == found[1].key  # a seed says all
    assert all(lower_bound(search, sensitivities) <= -score(plan) <= 1.05 * best for plan in found)


# ------------------------------------------------------------------------------------------------ 6
def test_e6_sizes_hold_a_field_of_four_bits_and_a_step_for_each_kernel():
    small = gc.compress(
        trained_net(), X, method=Ajpq(evaluations=9), bits=(2, 8), activation_bits=None, progress=False,
        budget=gc.Budget(bytes=0.15), data=batches(), loss=loss,
    )  # fmt: skip
    kernels = sum(layer.units_kept for layer in small.report.layers)
    biases = kernels  # folded norms, and the bias of the head
    assert small.report.sizes["remainder"] == (kernels * (4 + 32) + biases * 32) / 8
    codes = [small.module.get_buffer(name) for name in _codes(small) if name.endswith("weight_codes")]
    assert sum(len(own) for own in codes) == kernels
    own = zip(small.report.layers, codes, strict=True)
    dense = sum(float(layer.weight_bits) * stored.numel() for layer, stored in own) / 8
    assert 0.8 * dense < small.report.sizes["C0"] <= dense + 0.1
    assert dense <= 0.15 * 672 * 4 - kernels * (4 + 32) / 8 + 0.1  # means of bits are rounded in the report


def test_spread_is_a_line_over_ranks():
    importance = torch.tensor([0.3, 0.1, 0.2, 0.4, 0.5], dtype=torch.float64)
    assert spread_bits(importance, 5.0, 2.0, 2, 8).tolist() == [5, 3, 4, 6, 7]
    assert spread_bits(importance, 5.0, 9.0, 2, 8).tolist() == [5, 2, 2, 8, 8]
    assert spread_bits(importance[:1], 5.0, 2.0, 2, 8).tolist() == [5]


def test_steps_have_the_least_error_of_forty():
    weight, bits = torch.randn(5, 3, 3, 3), torch.tensor([2, 3, 4, 6, 8])
    quantizer = MixedQuantizer(gc.QuantSpec(8, kind="mixed", granularity="channel"), weight.shape, 0)
    quantizer.set_widths(bits)
    quantizer.scale.data.copy_(channel_steps(weight, bits, 0))
    torch.testing.assert_close(quantizer(weight), by_hand(weight, bits))
    assert torch.equal(channel_steps(torch.zeros(2, 3), torch.tensor([2, 3]), 0), torch.ones(2, dtype=torch.float64))
    assert F.mse_loss(quantizer(weight), weight) < 0.1
