"""Moving averages of activations, and the ranges that quantizers get of them."""

from __future__ import annotations

import pytest
import torch

from graphcomp.quantization.quantizers.affine import AffineQuantizer
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.spec import QuantSpec
from graphcomp.training.moving_ranges import NEW, MovingRanges

X = torch.tensor([0.0, 1.0, 3.0, 0.0, 2.0])  # mean of nonzero magnitudes: 2


def affine(low: float = 0.0, high: float = 15.0) -> AffineQuantizer:
    quantizer = AffineQuantizer(QuantSpec(4, symmetric=False))
    quantizer.set_range(torch.tensor(low), torch.tensor(high))
    quantizer.enabled = False
    return quantizer


def test_averages_begin_with_the_calibrated_range_and_move_with_the_steps():
    quantizer = affine()
    ranges = MovingRanges({"a": quantizer}, {"a": 1.25})
    assert ranges.averages.isnan().tolist() == [[True, False, False]] and ranges.averages[0, 1:].tolist() == [0, 15]
    with ranges.watching(clipped=True):
        assert torch.equal(quantizer(X), X)  # no average yet
    ranges.update()
    assert ranges.averages[0].tolist() == pytest.approx([2.0, 0.0, NEW * 3 + (1 - NEW) * 15])
    with ranges.watching(clipped=True):
        assert quantizer(X).tolist() == [0, 1, 2.5, 0, 2]
        quantizer(3 * X)  # two passes make a step
    with ranges.watching(clipped=False):
        assert torch.equal(quantizer(X), X)
    ranges.update()
    now = (2 + 6 + 2) / 3
    assert float(ranges.averages[0, 0]) == pytest.approx(NEW * now + (1 - NEW) * 2)
    before = ranges.averages.clone()
    ranges.update()  # nothing was seen
    assert torch.equal(ranges.averages, before) and not quantizer._forward_pre_hooks


def test_values_that_are_not_finite_change_nothing():
    quantizer = affine()
    ranges = MovingRanges({"a": quantizer}, {})
    with ranges.watching(clipped=False):
        quantizer(X)
    ranges.update()
    before = ranges.averages.clone()
    with ranges.watching(clipped=False):
        quantizer(torch.tensor([1.0, torch.inf]))
    ranges.update()
    assert float(ranges.averages[0, 1]) == pytest.approx((1 - NEW) * float(before[0, 1]) + NEW)
    assert torch.equal(ranges.averages[0, [0, 2]], before[0, [0, 2]])


def test_ranges_reach_as_far_as_values_are_not_clipped():
    quantizers = {"clipped": affine(), "free": affine(), "signed": affine(-1, 1)}
    ranges = MovingRanges(quantizers, {"clipped": 2.0, "signed": 2.0})
    ranges.load(torch.tensor([[1.5, 0.0, 9.0], [1.5, 0.0, 9.0], [1.0, -0.5, 7.0]]))
    ranges.set_ranges({"clipped": 2.0})
    assert [float(q.scale.detach()) * 15 for q in quantizers.values()] == pytest.approx([3.0, 15.0, 2.0])
    ranges.set_ranges()
    assert [float(q.scale.detach()) * 15 for q in quantizers.values()] == pytest.approx([3.0, 9.0, 2.5])


def test_symmetric_quantizers_half_floats_and_none():
    quantizer = SymmetricQuantizer(QuantSpec(4))
    quantizer.set_range(torch.tensor(-7.0), torch.tensor(7.0))
    quantizer.enabled = False
    ranges = MovingRanges({"a": quantizer}, {})
    assert ranges.averages[0, 1:].tolist() == [-7, 7]
    with ranges.watching(clipped=True):
        quantizer(torch.full((40_000,), 3.0, dtype=torch.bfloat16))
    ranges.update()
    assert ranges.averages.dtype == torch.float32 and float(ranges.averages[0, 0]) == 3.0
    empty = MovingRanges({}, {})
    with empty.watching(clipped=True):
        pass
    empty.update()
    empty.set_ranges()
    assert empty.averages.shape == (0, 3)
