"""Bits of each channel's own: levels by hand, gradients of steps, what is stored and how the sizes count it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from graphcomp.cost import Polynomial
from graphcomp.cost.bops import Bits
from graphcomp.cost.conventions import SizeModel
from graphcomp.errors import PlanError
from graphcomp.quantization.quantizers.make import make_quantizer, quantizer_of
from graphcomp.quantization.quantizers.mixed import MixedQuantizer
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.quantization.spec import QuantConfig, QuantSpec
from graphcomp.quantization.stored import Affine

from .cases import check_integers, gradients

SPEC = QuantSpec(8, granularity="channel", kind="mixed")
WIDTHS = torch.tensor([2, 3, 5, 8])


def mixed(weight: Tensor, widths: Tensor = WIDTHS) -> MixedQuantizer:
    quantizer = make_quantizer(SPEC, shape=weight.shape, dim=0)
    assert isinstance(quantizer, MixedQuantizer)
    quantizer.set_widths(widths)
    quantizer.set_range(-weight.abs().flatten(1).amax(1), weight.abs().flatten(1).amax(1))
    return quantizer


def test_levels_of_each_channel_by_hand() -> None:
    weight = torch.tensor([[0.9, -0.2], [0.9, -0.2], [0.9, -0.2], [0.9, -0.2]])
    quantizer = mixed(weight)
    torch.testing.assert_close(quantizer.scale.detach(), 0.9 / torch.tensor([1.0, 3.0, 15.0, 127.0]))
    stored = check_integers(quantizer, weight)
    assert stored.values.tolist() == [[1, 0], [3, -1], [15, -3], [127, -28]]
    assert stored.values.dtype is torch.int8 and torch.equal(stored.widths, WIDTHS)
    assert float(quantizer.bits) == 4.5


def test_a_channel_is_the_quantizer_of_its_bits() -> None:
    weight = torch.randn(4, 3, 5)
    quantizer = mixed(weight)
    quantizer.scale.data.mul_(0.6)  # so that some saturate
    for k, width in enumerate(WIDTHS.tolist()):
        own = SymmetricQuantizer(QuantSpec(width))
        own.scale.data.copy_(quantizer.scale[k])
        assert torch.equal(quantizer(weight)[k], own(weight[k]))


def test_gradients_of_each_step_are_those_of_the_quantizer_of_its_bits() -> None:
    weight, upstream = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    quantizer = mixed(weight).double()
    quantizer.scale.data.mul_(0.6)
    x = weight.clone().requires_grad_()
    to_x, to_scale = gradients(quantizer(x), upstream, x, quantizer.scale)
    for k, width in enumerate(WIDTHS.tolist()):
        own = SymmetricQuantizer(QuantSpec(width)).double()
        own.scale.data.copy_(quantizer.scale[k])
        row = weight[k].clone().requires_grad_()
        wanted = gradients(own(row), upstream[k], row, own.scale)
        torch.testing.assert_close(to_x[k], wanted[0])
        torch.testing.assert_close(to_scale[k], wanted[1])  # LSQ's scale, 1 / sqrt(n L), is the channel's


def test_what_stores_a_factor_per_channel_keeps_the_bits() -> None:
    weight = torch.randn(4, 7)
    stored = mixed(weight).to_integers(weight)
    folded = stored.times(torch.tensor([-2.0, 0.5, 1.0, 0.0]), 0)
    assert torch.equal(folded.widths, WIDTHS) and folded.spec == SPEC
    again = quantizer_of(folded, SPEC)
    assert isinstance(again, MixedQuantizer) and torch.equal(again.widths, WIDTHS)
    assert torch.equal(again.to_integers(folded.dequantize()).values, folded.values)
    assert isinstance(folded, Affine) and torch.equal(folded.on_spec().widths, WIDTHS)


def test_sizes_count_the_bits_of_each_channel() -> None:
    weight = torch.randn(4, 50)
    stored = mixed(weight, torch.tensor([2, 8, 2, 5])).to_integers(weight)
    parts = stored.counted_by_width()
    assert {width: codes.total for width, codes in parts.items()} == {2: 100, 5: 50, 8: 50}
    nonzero = (stored.values != 0).sum(1).tolist()
    sizes = SizeModel({str(width): codes for width, codes in parts.items()}).sizes()
    assert sizes["C0"] == sum(n * b for n, b in zip(nonzero, [2, 8, 2, 5], strict=True)) / 8
    assert sizes["C3"] == sizes["C0"] + 200 / 8


def test_the_mean_of_bits_counts_as_a_fraction() -> None:
    """Channels of 2, 2 and 3 bits: 7/3 bits, and 3 multiply-accumulates with 8 bits are 56 bit operations, not 48."""
    per_mac = Bits(weight=Fraction(7, 3), activation=8).per_mac
    assert per_mac == Fraction(56, 3) and Polynomial({(): 3 * per_mac})({}) == 56
    assert Bits(weight=2.4, activation=8).per_mac == 16


@pytest.mark.parametrize(
    "widths", [torch.tensor([2, 3, 5]), torch.tensor([1, 3, 5, 8]), torch.tensor([2, 3, 5, 9]), WIDTHS.float()]
)
def test_bits_that_no_channel_can_have(widths: Tensor) -> None:
    with pytest.raises(PlanError, match="must be 4 whole numbers from 2 to 8"):
        mixed(torch.randn(4, 3)).set_widths(widths)


def test_specs_that_say_nothing() -> None:
    for options in ({"granularity": "tensor"}, {"granularity": "channel", "symmetric": False}):
        with pytest.raises(PlanError, match="with a step per channel"):
            QuantSpec(8, kind="mixed", **options)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="activations cannot have bits of each channel's own"):
        QuantConfig(activations=SPEC)
