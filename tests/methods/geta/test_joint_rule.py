"""The joint rule by hand, its bounds and the descent that it keeps; what it does to the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from graphcomp.methods.geta.joint_rule import Entry, Forgetting, Rule, Sums, joint_rule
from graphcomp.methods.geta.quantizer_group import Bank
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.spec import QuantSpec

ETA, XI = 0.999, 0.9


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rule(forget: float, rounding: float, size: float = 4.0, update: float = 1.0) -> tuple[float, float]:
    """gamma and d of one group with one entry, four steps before the end, steps from 0.1 to 1 allowed."""
    sums = Sums(doubles(forget), doubles(rounding), doubles(size), doubles(update))
    gamma, d = joint_rule(sums, torch.tensor([0]), 1, doubles(0.1), doubles(1.0), 4, ETA, XI)
    return gamma.item(), d.item()


@pytest.mark.parametrize(
    ("forget", "rounding", "gamma", "d"),
    [
        (2, 1, 0.25, 1.0),  # equal shares, the largest step
        (2, -10, 0.25, 0.9 * 0.999 / 10 / 0.25),  # the step that keeps the descent: 0.35964
        (-0.01, 1, 0.001 / 0.01, 1.0),  # slowly: (1 - eta) ||u||² / 0.01
        (-0.01, -10, 0.1, 0.9 * 0.999 / 10 / 0.1),  # 0.8991
        (0, 0, 0.25, 1.0),  # neither for nor against
        (-0.0001, 1, 0.25, 1.0),  # slowly would be faster than equal shares
        (2, -100, 0.9 * 0.999 / 100 / 0.1, 0.1),  # that step is not allowed: gamma shrinks to 0.08991
        (-0.01, -100, 0.9 * 0.999 / 100 / 0.1, 0.1),
        (2, -0.1, 0.25, 1.0),  # that step is larger than allowed
    ],
)
def test_by_hand(forget, rounding, gamma, d):
    assert rule(forget, rounding) == (pytest.approx(gamma, rel=1e-12), pytest.approx(d, rel=1e-12))


def test_nothing_left_to_forget():
    assert rule(0, 0, size=0) == (0, 1.0)
    assert rule(0, -1, size=1e-20) == (0, 1.0)


def test_the_last_step_forgets_all():
    sums = Sums(doubles(2), doubles(0), doubles(4), doubles(1))
    gamma, _ = joint_rule(sums, torch.tensor([0]), 1, doubles(0.1), doubles(1), 1, ETA, XI)
    assert gamma.item() == 1


def as_published(c: Tensor, r: Tensor, v: Tensor, lr: float, low: float, high: float, left: int) -> tuple[float, float]:
    """gamma and d of one layer as the paper writes them, with cosines; the bounds are ours."""
    norm_c, norm_r, norm_v = (float(x.norm()) for x in (c, r, v))
    cos_gamma, cos_d = float(c @ v) / (norm_c * norm_v), float(r @ v) / (norm_r * norm_v)
    gamma = 1 / left if cos_gamma >= 0 else min(-(1 - ETA) * lr * norm_v / (cos_gamma * norm_c), 1 / left)
    d = high if cos_d >= 0 else -XI * ETA * lr * norm_v / (gamma * cos_d * norm_r)
    if d < low:
        gamma, d = gamma * d / low, low
    return gamma, min(d, high)


def parts(x: Tensor, d: Tensor, q_m: Tensor) -> tuple[Tensor, Tensor]:
    """C and R of tensors (n, 6) with a quantizer each."""
    c = torch.maximum(torch.minimum(x, q_m[:, None]), -q_m[:, None])
    codes = c / d[:, None]
    return c, codes.round() - codes


@dataclass
class Draw:
    """n layers of 6 weights, gradients of all scales, and the steps allowed."""

    c: Tensor
    r: Tensor
    v: Tensor
    lr: Tensor
    low: Tensor
    high: Tensor

    @property
    def sums(self) -> Sums:
        u = self.lr[:, None] * self.v
        return Sums((self.c * u).sum(1), (self.r * u).sum(1), self.c.square().sum(1), u.square().sum(1))


def draw(n: int, seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)

    def uniform(a: float, b: float) -> Tensor:
        return torch.empty(n, dtype=torch.float64).uniform_(a, b, generator=generator)

    def normal() -> Tensor:
        return torch.randn(n, 6, dtype=torch.float64, generator=generator)

    x = normal() * 10 ** uniform(-2, 1)[:, None] + uniform(-1, 1)[:, None]
    q_m = x.abs().amax(1) * uniform(0.5, 1)  # some saturate
    low = q_m / (2 ** uniform(5, 15) - 1)
    c, r = parts(x, low * 1.7, q_m)
    return Draw(c, r, normal() * 10 ** uniform(-3, 2)[:, None], 10 ** uniform(-5, 0), low, q_m)


def test_as_published_where_a_group_is_one_layer():
    drawn = draw(300, seed=0)
    for left in (1, 5):
        gamma, d = joint_rule(drawn.sums, torch.arange(300), 300, drawn.low, drawn.high, left, ETA, XI)
        for k in range(300):
            bounds = drawn.lr[k].item(), drawn.low[k].item(), drawn.high[k].item()
            expected = as_published(drawn.c[k], drawn.r[k], drawn.v[k], *bounds, left)
            assert (gamma[k].item(), d[k].item()) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("left", [1, 2, 7])
def test_forgetting_keeps_the_descent_in_ten_thousand_draws(left):
    """<-u, p> >= eta (1 - xi) ||u||² for p = -u - gamma (C + d R), in every group; all bounds hold."""
    signs: set[tuple[bool, bool]] = set()
    for seed in range(10):
        drawn = draw(1000, seed)
        drawn.r[::5] = 0  # every fifth has no quantizer
        group = torch.arange(1000) % 250
        gamma, d = joint_rule(drawn.sums, group, 250, drawn.low, drawn.high, left, ETA, XI)
        assert bool((gamma > 0).all()) and bool((gamma <= 1 / left).all())
        assert bool((drawn.low <= d).all()) and bool((d <= drawn.high).all())
        u = drawn.lr[:, None] * drawn.v
        p = -u - gamma[group, None] * (drawn.c + d[:, None] * drawn.r)
        assert bool((summed(-(u * p).sum(1)) >= ETA * (1 - XI) * summed(u.square().sum(1)) * (1 - 1e-9)).all())
        with_u = summed(drawn.sums.forget) >= 0
        against = summed((drawn.sums.round < 0).double()) > 0
        signs |= set(zip(with_u.tolist(), against.tolist(), strict=True))
    assert len(signs) == 4


def summed(values: Tensor) -> Tensor:
    """(1000,) -> (250,) the sums of the groups."""
    return values.view(4, 250).sum(0)


# ------------------------------------------------------------------------------------------------ on weights
QUANTIZED, FLOAT, TURNED = "quantized", "float", "turned"


def setting(exponent: float = 1.0) -> tuple[dict[str, Tensor], Bank, Forgetting]:
    """Three weights in float64: two with a quantizer, one of them with its units in dim 1; two groups."""
    torch.manual_seed(0)
    weights = {QUANTIZED: torch.randn(6, 5), FLOAT: torch.randn(6), TURNED: torch.randn(4, 8)}
    parameters = {name: nn.Parameter(w.double()) for name, w in weights.items()}
    quantizers = []
    for name in (QUANTIZED, TURNED):
        quantizer = GetaQuantizer(QuantSpec(4, kind="geta", learn_exponent=exponent != 1)).double()
        largest = parameters[name].detach().abs().max() * 0.8  # some saturate
        quantizer.set_range(-largest, largest)
        quantizer.t.data.fill_(exponent)
        quantizers.append(quantizer)
    bank = Bank(quantizers, [2.0, 2.0], [8.0, 8.0])
    bank.fix(torch.tensor([5.3, 4.7], dtype=torch.float64))
    entries = [
        Entry(FLOAT, 0, torch.tensor([1, 4]), 0, -1),
        Entry(QUANTIZED, 0, torch.tensor([1, 4]), 0, 0),
        Entry(TURNED, 1, torch.tensor([0, 2, 7]), 1, 1),
    ]
    return parameters, bank, Forgetting(entries, parameters, bank, groups=2)


def active(name: str, tensor: Tensor) -> Tensor:
    return tensor[:, [0, 2, 7]] if name == TURNED else tensor[[1, 4]]


@pytest.mark.parametrize("exponent", [1.0, 1.3])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_active_slices_lose_the_share_of_their_quantized_value(exponent, uniform, sign):
    parameters, bank, forgetting = setting(exponent)
    old = {name: p.detach().clone() for name, p in parameters.items()}
    quantizers = dict(zip((QUANTIZED, TURNED), bank.quantizers, strict=True))
    d = bank.d()
    hats = {n: quantizers[n](x).detach() if n in quantizers else x for n, x in old.items()}
    clipped = {n: _clipped(x, quantizers.get(n)) for n, x in old.items()}
    before = forgetting.gather()
    updates = {name: sign * 0.01 * torch.randn_like(p) for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter -= updates[name]
    forgetting.apply(before, d, torch.tensor([6.0, 6.0], dtype=torch.float64), 3, Rule(ETA, XI, uniform))
    steps = dict(zip((QUANTIZED, TURNED), bank.d().tolist(), strict=True))
    for position, names in enumerate([(FLOAT, QUANTIZED), (TURNED,)]):
        gamma = 1 / 3 if uniform else _gamma(names, clipped, hats, updates, d, bank)
        for k, name in enumerate((QUANTIZED, TURNED)):
            if name in names:
                rounding = (hats[name] - clipped[name]) / d[k]  # s R
                used = d[k].item() if uniform else steps[name]
                hats[name] = clipped[name] + used * rounding
        for name in names:
            expected = old[name] - updates[name]
            others = expected.clone()
            share = gamma * active(name, hats[name])
            if name == TURNED:
                expected[:, [0, 2, 7]] -= share
            else:
                expected[[1, 4]] -= share
            torch.testing.assert_close(parameters[name].detach(), expected, rtol=1e-9, atol=1e-12)
            rest = torch.isclose(expected, others, rtol=0, atol=0)
            assert torch.equal(parameters[name].detach()[rest], others[rest]), position
    assert bool((bank.bits() >= 2 - 1e-6).all()) and bool((bank.bits() <= 6 + 1e-6).all())


def _clipped(x: Tensor, quantizer: GetaQuantizer | None) -> Tensor:
    if quantizer is None:
        return x
    q_m, t = quantizer.q_m.detach(), quantizer.t.detach()
    return x.sign() * torch.minimum(x.abs(), q_m) ** t


def _gamma(
    names: tuple[str, ...],
    clipped: dict[str, Tensor],
    hats: dict[str, Tensor],
    updates: dict[str, Tensor],
    d: Tensor,
    bank: Bank,
) -> float:
    """By loops, three steps before the end."""
    forget = sum(float((active(n, clipped[n]) * active(n, updates[n])).sum()) for n in names)
    update = sum(float(active(n, updates[n]).square().sum()) for n in names)
    gamma = 1 / 3 if forget >= 0 else min((1 - ETA) * update / -forget, 1 / 3)
    low, _ = bank.limits(torch.tensor([6.0, 6.0], dtype=torch.float64))
    for k, name in enumerate((QUANTIZED, TURNED)):
        if name in names:
            rounding = active(name, (hats[name] - clipped[name]) / d[k])
            against = float((rounding * active(name, updates[name])).sum())
            own = float(active(name, updates[name]).square().sum())
            gamma = min(gamma, XI * ETA * own / -against / float(low[k])) if against < 0 else gamma
    return gamma


@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_with_no_gradient_the_norm_falls_to_zero_in_equal_shares(shift):
    """Also where all weights are negative: what is left to forget is told by the norm, not by the mean."""
    parameters, bank, forgetting = setting()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += shift
        for quantizer, name in zip(bank.quantizers, (QUANTIZED, TURNED), strict=True):
            largest = parameters[name].detach().abs().max()
            quantizer.set_range(-largest, largest)
    most = torch.tensor([8.0, 8.0], dtype=torch.float64)
    bank.project(most)
    start = {name: active(name, p.detach()).norm().item() for name, p in parameters.items()}
    norms = [start]
    for left in (5, 4, 3, 2, 1):
        forgetting.apply(forgetting.gather(), bank.d(), most, left, Rule(uniform=True))
        norms.append({name: active(name, p.detach()).norm().item() for name, p in parameters.items()})
    for name in parameters:
        falling = [found[name] for found in norms]
        assert all(b < a for a, b in pairwise(falling))
        # what is left is the rounding of the last step
        assert falling[-1] <= 0.5 * bank.d().max().item() * math.sqrt(active(name, parameters[name]).numel())
    assert norms[-1][FLOAT] == pytest.approx(0, abs=1e-12)
    assert norms[1][FLOAT] == pytest.approx(0.8 * start[FLOAT])
