"""Channels of activations of few bits, scaled to one range between two layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.errors import GraphcompError
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.quantization import even as passes
from graphcomp.quantization.even import MOST, even_activations
from graphcomp.quantization.in_force import Rounding
from graphcomp.quantization.spec import ACTIVATIONS, WEIGHTS, QuantConfig, QuantSpec, with_bits

CONV = torch.ops.aten.conv2d.default
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """A convolution, a clip, and a depthwise or another convolution; the channels span two orders of magnitude."""

    def __init__(self, clip: Any, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.clip = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=groups), clip
        with torch.no_grad():
            for tensor in (self.a.weight, self.a.bias):
                tensor.mul_(torch.logspace(-2, 0, 6).view(-1, *[1] * (tensor.dim() - 1)))
            self.b.weight.div_(torch.logspace(-2, 0, 6).view(-1, 1, 1, 1) if groups > 1 else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.clip(self.a(x)))


def config(weights: int = 4, activations: int = 4, **options: Any) -> QuantConfig:
    return QuantConfig(with_bits(WEIGHTS, weights), with_bits(ACTIVATIONS, activations), **options)


def evened(model: nn.Module, options: QuantConfig, x: Tensor = X) -> tuple[fx.GraphModule, fx.GraphModule, int, int]:
    module = capture(model.eval(), x).module
    return module, *even_activations(module, options, (), [(x,)])


def read(module: fx.GraphModule, x: Tensor = X) -> Tensor:
    """What the second convolution reads."""
    node = module.graph.find_nodes(op="call_function", target=CONV)[1].all_input_nodes[0]
    found: dict[fx.Node, Tensor] = {}
    run_tapped(module, (x,), see=lambda seen, value: found.update({seen: value}))
    return found[node]


@pytest.mark.parametrize("clip", [functional.relu, functional.relu6, nn.Identity()], ids=["relu", "relu6", "none"])
@pytest.mark.parametrize("groups", [1, 6], ids=["dense", "depthwise"])
def test_the_function_is_the_same_on_calibration_data(clip: Any, groups: int) -> None:
    module, equal, count, clipped = evened(Chain(clip, groups), config())
    assert (count, clipped) == (1, int(clip is functional.relu6))
    torch.testing.assert_close(equal(X), module(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [functional.relu, nn.Identity()], ids=["relu", "none"])
def test_what_a_depthwise_convolution_reads_spans_one_range(clip: Any) -> None:
    module, equal, *_ = evened(Chain(clip, 6), config())
    before, after = (read(found).abs().amax((0, 2, 3)) for found in (module, equal))
    assert before.max() / before.min() > 20
    grown = (before.max() / before).clamp(max=MOST)
    torch.testing.assert_close(after, before * grown, rtol=1e-4, atol=0)


def test_no_channel_grows_above_a_fixed_clip() -> None:
    module, equal, *_ = evened(Chain(functional.relu6, 6), config())
    before, after = (read(found).amax((0, 2, 3)) for found in (module, equal))
    torch.testing.assert_close(after, before * (6 / before).clamp(1, MOST), rtol=1e-4, atol=0)
    assert float(after.max()) <= 6


def test_a_dense_layer_gains_on_balance() -> None:
    """All of the factors would spoil the rows of the second weight: the exponent has the least error of the result."""
    model = Chain(functional.relu)
    options = config(4, 4)
    plain, even = (
        gc.compress(
            model,
            X,
            sparsity=0,
            calibration=[X],
            progress=False,
            repair=None,
            quantization=gc.PostTraining(options, even_activations=even),
        )
        for even in (False, True)
    )
    wanted = model(X).detach()
    errors = [float((small(X).detach() - wanted).norm()) for small in (plain, even)]
    assert errors[1] <= errors[0]


def test_the_error_of_a_trial_is_that_of_the_bits_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 bits, the last layer has 8, and so has what the last layer reads."""
    seen: list[tuple[list[int], int]] = []

    def factors(module: Any, pair: Any, x: Tensor, rounding: Rounding) -> Any:
        assert rounding.weight is not None
        seen.append(([spec.bits for spec in rounding.value], rounding.weight.bits))
        return lambda s: 0.0

    monkeypatch.setattr(passes, "_trial", factors)
    for bits in (4, 8):
        evened(Chain(functional.relu), config(4, 4, first_and_last_bits=bits))
    evened(Chain(functional.relu), config(4, 4, overrides={"b": (with_bits(WEIGHTS, 3), with_bits(ACTIVATIONS, 5))}))
    assert seen == [([4], 4), ([8], 8), ([5], 3)]


def test_activations_of_few_bits_ask_for_even_channels() -> None:
    model = Chain(functional.relu6, 6)

    def notes(bits: int, even: bool | None = None) -> bool:
        quantization = gc.PostTraining(config(4, bits, first_and_last_bits=4), even_activations=even)
        small = gc.compress(model, X, sparsity=0, quantization=quantization, calibration=[X], progress=False)
        assert small.report.verified["integers == fake-quant, in steps"] <= 1
        return any(note.startswith("channels of 1 value between") for note in small.report.notes)

    assert notes(4) and not notes(4, even=False) and not notes(8)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Chain(functional.silu, 6), config()),
        (Chain(lambda x: functional.hardtanh(x, -1, 1), 6), config()),
        (Chain(functional.relu, 6), config(4, 8)),
        (Chain(functional.relu, 6), QuantConfig(QuantSpec(4), with_bits(ACTIVATIONS, 4))),
        (Chain(functional.relu, 6), config(overrides={"b": (None, None)})),
    ],
    ids=["no clip", "clip below 0", "many bits", "one step for the weight", "float"],
)
def test_what_does_not_scale_stays(model: nn.Module, options: QuantConfig) -> None:
    module, equal, count, _ = evened(model, options)
    assert count == 0
    torch.testing.assert_close(equal(X), module(X), rtol=0, atol=0)


def test_a_value_with_another_reader_stays() -> None:
    class Sum(Chain):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.clip(self.a(x))
            return self.b(functional.pad(hidden, [1] * 4)) + hidden

    assert evened(Sum(functional.relu, 6), config())[2] == 0


def test_even_activations_is_a_flag() -> None:
    with pytest.raises(GraphcompError, match="even_activations"):
        gc.PostTraining(even_activations="yes")  # type: ignore[arg-type]
