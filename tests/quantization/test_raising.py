"""Raising is the inverse of lowering: the fake-quant graph of the same integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.quantization.lower import lower
from graphcomp.quantization.ptq import PostTraining, quantize
from graphcomp.quantization.raising import integer_graph, raised
from graphcomp.quantization.spec import ACTIVATIONS, QuantConfig, QuantSpec, with_bits
from graphcomp.quantization.verify import check_lowering
from tests.quantization.models import encoder, residual

CONFIGS = {
    "8 bits": QuantConfig(),
    "5 bits": QuantConfig(QuantSpec(5, granularity="channel"), with_bits(ACTIVATIONS, 5), first_and_last_bits=2),
    "3 bits": QuantConfig(QuantSpec(3, granularity="channel"), with_bits(ACTIVATIONS, 4), first_and_last_bits=2),
    "groups": QuantConfig(QuantSpec(4, granularity="group", group_size=4), None),
    "groups, zero points": QuantConfig(QuantSpec(6, False, "group", 4), embeddings=QuantSpec(4, False, "channel")),
    "zero points, wide": QuantConfig(QuantSpec(9, False, "channel"), embeddings=QuantSpec(9, False, "tensor")),
    "symmetric activations": QuantConfig(QuantSpec(8), QuantSpec(8), embeddings=QuantSpec(8)),
    "attention": QuantConfig(attention=True),
    "ternary": QuantConfig(QuantSpec(kind="ternary", granularity="channel"), embeddings=QuantSpec(kind="ternary")),
    "ternary, two scales": QuantConfig(QuantSpec(kind="ternary", symmetric=False), first_and_last_bits=2),
    "ternary, two scales per channel": QuantConfig(
        QuantSpec(kind="ternary", symmetric=False, granularity="channel"), None, first_and_last_bits=2
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("build", [residual, encoder])
@pytest.mark.slow
@pytest.mark.ci
def test_raised_and_lowered_again_the_integers_are_the_same(build: Callable[..., Any], name: str) -> None:
    captured = capture(*build())
    flat = captured.inputs.flat()
    found = quantize(captured, [flat], PostTraining(CONFIGS[name])).lowered
    up = raised(found.module)
    error = check_lowering(up.fake, up.lowered, flat)
    assert error.weights == 0 and error.steps <= 1
    assert len(up.lowered.weights) == len(found.weights) and len(up.lowered.activations) == len(found.activations)
    expected = [integers.dequantize() for integers in found.weights.values()]
    for integers in up.lowered.weights.values():
        assert any(torch.equal(integers.dequantize(), floats) for floats in expected)
    down = lower(up.fake).module
    with torch.no_grad():
        outputs = [graph(*captured.inputs.args, **captured.inputs.kwargs) for graph in (found.module, down)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


class Scales(nn.Module):
    """Looks up integers of its own, and scales them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("own_codes", torch.arange(40).view(20, 2).to(torch.int8))
        self.register_buffer("step", torch.tensor(0.5))
        self.hidden = nn.Linear(2, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(nn.functional.embedding(ids, self.own_codes).float() * self.step)


def test_integers_of_the_model_itself_stay() -> None:
    ids = torch.arange(20)
    config = QuantConfig(embeddings=None)
    small = gc.compress(Scales().eval(), ids, sparsity=0, quantization=PostTraining(config))
    assert small.quantized is not None
    assert list(small.quantized.lowered.weights) == ["graphcomp_quantizers_hidden_weight"]
    assert torch.equal(small.quantized.fake(ids), small(ids))


def test_after_loading_it_is_there(tmp_path: Path) -> None:
    model, x = residual()
    small = gc.compress(model, x, bits=8)
    small.save(tmp_path / "small")
    again = gc.load(tmp_path / "small")
    assert small.quantized is not None and again.quantized is not None
    assert torch.equal(again.quantized.fake(x), small.quantized.fake(x))
    assert again.quantized.lowered.layers == small.quantized.lowered.layers


def test_of_a_scope_it_is_the_part() -> None:
    model, x = residual()
    small = gc.compress(nn.Sequential(model, nn.ReLU()).eval(), x, bits=8, scope="0")
    assert small.quantized is not None and integer_graph(small.module) is small.quantized.lowered.module
    torch.testing.assert_close(small.quantized.fake(x).relu(), small(x), rtol=1e-2, atol=1e-2)


def test_the_floats_are_refused_with_the_way_to_get_them() -> None:
    small = gc.compress(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6), bits=8)
    assert small.quantized is not None
    with pytest.raises(gc.PlanError, match=r"(?s)float graph.*bits=None"):
        small.quantized.folded  # noqa: B018
    assert gc.compress(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), torch.randn(4, 6)).quantized is None


def test_what_holds_graphs_and_tensors_is_shown_in_a_line():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(4, 64)
    small = gc.compress(model, x, sparsity=0.5, bits=8, progress=False)
    ready, plan = gc.prepare(model, x), gc.analyze(model, x)
    weights = small.quantized.lowered.weights.values()
    shown = [small.quantized, small.quantized.lowered, *weights, plan, plan.captured, ready.session, gc.Choice()]
    for each in shown:
        assert "\n" not in repr(each) and len(repr(each)) < 120, type(each)
        assert repr(each).startswith(type(each).__name__)
    assert "int8 (32, 64) from -127 to 127" in repr(next(iter(weights)))
