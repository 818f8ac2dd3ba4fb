"""The vectors of a bank are the quantizers' own numbers, and its moves are theirs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graphcomp.methods.geta.quantizer_group import DECAY, Bank
from graphcomp.quantization.quantizers.geta import RANGE_LIMITS, GetaQuantizer
from graphcomp.quantization.spec import QuantSpec


def quantizers(*ranges: float, bits: int = 8, exponents: tuple[float, ...] = ()) -> list[GetaQuantizer]:
    """One per range; with exponents where they are given."""
    found = []
    for k, q_m in enumerate(ranges):
        quantizer = GetaQuantizer(QuantSpec(bits, kind="geta", learn_exponent=bool(exponents)))
        quantizer.set_range(torch.tensor(-q_m), torch.tensor(q_m))
        if exponents:
            quantizer.t.data.fill_(exponents[k])
        found.append(quantizer)
    return found


def bank(found: list[GetaQuantizer], low: float = 4, high: float = 8) -> Bank:
    return Bank(found, [low] * len(found), [high] * len(found))


def bits_of(quantizer: GetaQuantizer) -> float:
    """b = log2(q_m^t / d + 1) + 1, on plain numbers."""
    d, q_m, t = (float(p.detach()) for p in (quantizer.d, quantizer.q_m, quantizer.t))
    return math.log2(q_m**t / d + 1) + 1


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


RANGES = (1.0, 0.1, 30.0, 1e-4)


@pytest.mark.parametrize("exponents", [(), (0.5, 2.0, 1.3, 1.0)])
def test_vectors_are_what_the_quantizers_hold(exponents):
    found = quantizers(*RANGES, exponents=exponents)
    own = bank(found)
    close(own.d(), [q.d.item() for q in found])
    close(own.q_m(), [q.q_m.item() for q in found])
    close(own.t(), [q.t.item() for q in found])
    close(own.bits(), [bits_of(q) for q in found])
    close(own.bits(), [q.bits.item() for q in found])


@pytest.mark.parametrize("exponents", [(), (0.5, 2.0, 1.3, 1.0)])
@pytest.mark.parametrize("bits", [2, 5, 16])
def test_projection_moves_the_step_alone_and_only_as_far_as_it_must(bits, exponents):
    found = quantizers(*RANGES, bits=bits, exponents=exponents)
    own = bank(found)
    before = own.q_m(), own.t(), own.d()
    asked = [b if 4 <= b <= 7 else min(max(b, 4), 7) for b in own.bits().tolist()]
    own.project(torch.full((4,), 7.0))
    assert torch.equal(own.q_m(), before[0]) and torch.equal(own.t(), before[1])
    close(own.bits(), asked)
    if 4 <= bits <= 7 and not exponents:
        assert torch.equal(own.d(), before[2])


@pytest.mark.parametrize("bits", [2.0, 4.0, 7.0, 16.0])
def test_bits_are_set_exactly(bits):
    own = bank(quantizers(*RANGES, exponents=(0.5, 2.0, 1.3, 1.0)))
    own.fix(torch.full((4,), bits, dtype=torch.float64))
    close(own.bits(), [bits] * 4)


def test_limits_are_the_steps_of_the_fewest_and_the_most_bits():
    own = bank(quantizers(1.0, 0.1))
    low, high = own.limits(torch.tensor([6.0, 8.0], dtype=torch.float64))
    close(low, [1 / 31, 0.1 / 127])
    close(high, [1 / 7, 0.1 / 7])


def test_what_an_optimizer_drove_out_of_its_limits_comes_back():
    found = quantizers(1.0, 1.0, 1.0, exponents=(1.0, 1.0, 1.0))
    own = bank(found)
    found[0].q_m.data.fill_(-3.0)
    found[1].t.data.fill_(7.0)
    found[2].d.data.fill_(-1.0)
    own.clamp()
    assert found[0].q_m.item() == pytest.approx(RANGE_LIMITS[0]) and found[1].t.item() == 2.0
    assert all(1.5 - 1e-4 <= bits_of(q) <= 24 + 1e-4 for q in found)


# ------------------------------------------------------------------------------------------------ ranges that follow
def test_ranges_follow_what_is_quantized_in_training_and_come_down_slowly():
    found = quantizers(1.0, 1.0, 1.0)
    own = bank(found)
    own.follow(True)
    for magnitude in (5.0, 3.0):  # of two passes, the larger counts
        found[0](torch.tensor([-magnitude, 2.0]))
    found[1](torch.tensor([0.2]))
    own.set_ranges()
    close(own.q_m(), [5.0, DECAY, 1.0])  # what saw nothing stays
    close(own.bits(), [8.0] * 3)
    found[0](torch.tensor([0.5]))
    own.set_ranges()
    close(own.q_m()[:1], [5 * DECAY])


def test_ranges_stay_where_they_are_in_eval_mode_and_when_it_is_over():
    (quantizer,) = quantizers(1.0)
    own = bank([quantizer])
    own.follow(True)
    quantizer.eval()(torch.tensor([9.0]))
    own.set_ranges()
    close(own.q_m(), [1.0])
    own.follow(False)
    quantizer.train()(torch.tensor([9.0]))
    own.set_ranges()
    close(own.q_m(), [1.0])


def test_a_bank_of_none_does_nothing():
    own = bank([])
    own.clamp()
    own.set_ranges()
    assert len(own) == 0 and own.bits().shape == (0,) and own.parameters() == []


@pytest.mark.parametrize("exponents", [(), (0.5, 2.0, 1.3, 1.0)])
def test_a_range_gets_the_gradient_of_the_step_it_sets(exponents):
    bits = torch.tensor([3.0, 4.0, 4.0, 6.0], dtype=torch.float64)
    found = [q.double() for q in quantizers(*RANGES, exponents=exponents)]
    own = bank(found, 2)
    own.fix(bits)
    torch.manual_seed(0)
    data = [torch.randn(40, dtype=torch.float64) * q_m / 4 for q_m in RANGES]  # some are above the range
    expected = []
    for quantizer, x, b in zip(found, data, bits, strict=True):
        q_m, t = (p.detach().clone().requires_grad_() for p in (quantizer.q_m, quantizer.t))
        power = q_m**t if exponents else q_m
        values = {"d": power / (2 ** (b - 1) - 1), "q_m": q_m, "t": t}
        torch.func.functional_call(quantizer, values, (x,)).square().sum().backward()
        expected.append((q_m.grad, t.grad))
    for quantizer, x in zip(found, data, strict=True):
        quantizer(x).square().sum().backward()
    own.tie(bits)
    for quantizer, (of_q_m, of_t) in zip(found, expected, strict=True):
        torch.testing.assert_close(quantizer.q_m.grad, of_q_m, rtol=1e-6, atol=0)
        if exponents:
            torch.testing.assert_close(quantizer.t.grad, of_t, rtol=1e-6, atol=1e-12)


def test_a_range_that_nothing_exceeds_has_a_gradient_only_through_its_step():
    (quantizer,) = found = quantizers(1.0, bits=4)
    own = bank(found)
    quantizer(torch.tensor([0.3, -0.2, 0.95])).sum().backward()
    assert quantizer.q_m.grad == 0 and quantizer.d.grad != 0
    own.tie(torch.tensor([4.0], dtype=torch.float64))
    torch.testing.assert_close(quantizer.q_m.grad, quantizer.d.grad / 7)


def test_without_gradients_nothing_is_tied():
    own = bank(quantizers(*RANGES))
    own.tie(own.high)
    assert all(q.q_m.grad is None for q in own.quantizers)
