"""Biases are what integer kernels add, and as fine beside few bits as beside seven."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from graphcomp.capture.capture import Captured, capture
from graphcomp.ir.graph import bind, fetch
from graphcomp.ir.run_nodes import Constants
from graphcomp.ops.answers import operands_of
from graphcomp.quantization.biases import FitBiases, biased_layers
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.ptq import PostTraining, Quantized, quantize
from graphcomp.quantization.spec import ACTIVATIONS, WEIGHTS, QuantConfig, with_bits
from graphcomp.quantization.stored import SMALLEST_STEP
from graphcomp.quantization.verify import check_lowering
from tests.marks import in_ci
from tests.quantization.models import residual


@functools.cache
def captured_once(build) -> Captured:
    """Capturing takes longer than all the rest; quantize leaves what was captured as it is."""
    return capture(*build())


def quantized(bits: int, *, build=residual, **weights) -> tuple[Quantized, list]:
    captured = captured_once(build)
    spec = replace(with_bits(WEIGHTS, bits), **weights)
    flat = captured.inputs.flat()
    config = QuantConfig(spec, with_bits(ACTIVATIONS, 8), with_bits(WEIGHTS, bits), first_and_last_bits=2)
    return quantize(captured, [flat], PostTraining(config)), flat


def stored(found: Quantized, layer: str) -> tuple[Tensor, Tensor]:
    """The weight that a layer of the integer graph reads, and the unit of its bias."""
    module = found.lowered.module
    node = next(n for n in module.graph.nodes if n.name == layer)
    values = Constants(module)
    bias = bind(node)[operands_of(node).bias]
    return values.of(bind(node)["weight"]), values.of(bias.args[1])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 6, 8, *in_ci(4, 5, 7)])
def test_the_unit_of_a_bias(bits: int, granularity: str) -> None:
    found, flat = quantized(bits, granularity=granularity)
    layers = list(biased_layers(found.fake))
    assert len(layers) >= 4
    for layer in layers:
        weight, unit = stored(found, layer.node.name)
        assert torch.equal(weight, Constants(found.fake).of(layer.weight))  # bit for bit, shifted or not
        expected = layer.quantizer.scale.detach() * layer.step / 2 ** max(0, 7 - bits)
        assert torch.allclose(unit, expected.expand_as(unit), rtol=1e-6, atol=0)
        bias = Constants(found.fake).of(layer.bias)
        assert torch.allclose(bias / unit, torch.round(bias / unit), rtol=0, atol=0.02)
    assert check_lowering(found.fake, found.lowered, flat).steps <= 1.001


@pytest.mark.parametrize("bits", [3, 5])
def test_biases_stay_where_they_were(bits: int) -> None:
    """By half a unit at most."""
    found, _ = quantized(bits)
    fake = found.fake
    for layer in biased_layers(fake):  # biases that nothing has rounded yet
        fetch(fake, str(layer.bias.target)).data.uniform_(-1, 1)
    before = {layer.node.name: Constants(fake).of(layer.bias).clone() for layer in biased_layers(fake)}
    FitBiases()(fake)
    for layer in biased_layers(fake):
        unit = layer.quantizer.scale * layer.step / 2**layer.shift
        moved = (Constants(fake).of(layer.bias) - before[layer.node.name]).abs().detach()
        assert bool((moved <= unit * 0.501).all()) and float(moved.max()) > 0


@pytest.mark.parametrize("bits", [5, 6])
def test_codes_in_bytes_are_stored_shifted(bits: int) -> None:
    found, _ = quantized(bits)
    codes = found.lowered.module.get_buffer("block.conv1.weight_codes")
    assert codes.dtype is torch.int8 and bool((codes % 2 ** (7 - bits) == 0).all())
    assert 32 < int(codes.abs().max()) < 64
    report = found.lowered.weights[_fake_weight(found.fake, "block.conv1.weight").name]
    assert int(report.values.abs().max()) < 2 ** (bits - 1)  # what has so many bits, for the conventions of sizes


def _fake_weight(fake: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n, _ in quantizer_nodes(fake) if str(n.all_input_nodes[0].target) == name)


def test_zero_points_leave_codes_alone():
    found, _ = quantized(4, symmetric=False)
    assert {layer.shift for layer in biased_layers(found.fake)} == {0}


class Tied(nn.Module):
    """A table that is looked up, and multiplied with beside a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.embed(ids)))


def test_a_table_that_is_looked_up_stays_as_it_is():
    found, flat = quantized(4, build=lambda: (Tied().eval(), torch.randint(0, 40, (2, 8))))
    (layer,) = biased_layers(found.fake)
    assert layer.shift == 0
    assert check_lowering(found.fake, found.lowered, flat).weights == 0


def test_steps_stay_normal_numbers():
    """A step that is next to the smallest there is can be divided by 16 and stay exact."""
    model, x = residual()
    model.pointwise.weight.data[0] *= 1e-38
    model.pointwise.bias.data[0] = 0
    captured = capture(model, x)
    flat = captured.inputs.flat()
    config = QuantConfig(with_bits(WEIGHTS, 3), with_bits(ACTIVATIONS, 8), first_and_last_bits=2)
    found = quantize(captured, [flat], PostTraining(config, correct_bias=False))
    scale = found.lowered.module.get_buffer("pointwise.weight_scale")
    assert float(scale.min()) >= SMALLEST_STEP
    assert check_lowering(found.fake, found.lowered, flat).weights == 0
