"""Law 3: weights bit for bit, activations within one step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcomp.capture.capture import Captured, capture
from graphcomp.errors import VerificationError
from graphcomp.numerics.compare import relative_error
from graphcomp.quantization import ops
from graphcomp.quantization.ptq import PostTraining, Quantized, quantize
from graphcomp.quantization.spec import ACTIVATIONS, WEIGHTS, QuantConfig, QuantSpec, with_bits
from graphcomp.quantization.verify import check_lowering
from tests.marks import in_ci, slow
from tests.quantization.models import encoder, residual

aten = torch.ops.aten
MODELS = {"residual": residual, "encoder": encoder}


def quantized(model: nn.Module, x: Tensor, config: QuantConfig, **options: Any) -> tuple[Quantized, list[Any]]:
    captured = capture(model, x)
    flat = captured.inputs.flat()
    return quantize(captured, [flat], PostTraining(config, **options)), flat


@functools.cache
def captured_once(build: Callable[[], tuple[nn.Module, Tensor]]) -> Captured:
    """Capturing takes longer than all the rest; quantize leaves what was captured as it is."""
    return capture(*build())


def lowered(build: Callable[[], tuple[nn.Module, Tensor]], config: QuantConfig) -> tuple[Quantized, list[Any]]:
    captured = captured_once(build)
    flat = captured.inputs.flat()
    return quantize(captured, [flat], PostTraining(config)), flat


def config(bits: int, activations: int | None = None, **more: Any) -> QuantConfig:
    acts = with_bits(ACTIVATIONS, activations or bits)
    return QuantConfig(with_bits(WEIGHTS, bits), acts, first_and_last_bits=2, **more)


@pytest.mark.parametrize("bits", [2, 4, 8, 16, *in_ci(3, 5, 6, 7), *slow(12)])
@pytest.mark.parametrize("name", MODELS)
def test_law_3(name: str, bits: int) -> None:
    found, flat = lowered(MODELS[name], config(bits))
    error = check_lowering(found.fake, found.lowered, flat)
    assert error.weights == 0 and error.steps <= 1.001


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_law_3_for_every_granularity(name: str, symmetric: bool, granularity: Any) -> None:
    spec = QuantSpec(6, symmetric, granularity, 4 if granularity == "group" else 0)
    found, flat = lowered(MODELS[name], QuantConfig(spec, ACTIVATIONS, embeddings=None))
    error = check_lowering(found.fake, found.lowered, flat)
    assert error.weights == 0 and error.steps <= 1.001


@pytest.mark.parametrize("bits", [9, 16, *slow(12)])
@pytest.mark.parametrize("granularity", ["channel", *slow("tensor", "group")])
def test_law_3_for_wide_weights_with_a_zero_point(bits: int, granularity: Any) -> None:
    spec = QuantSpec(bits, False, granularity, 4 if granularity == "group" else 0)
    config = QuantConfig(spec, ACTIVATIONS, embeddings=QuantSpec(bits, False, "channel"))
    found, flat = lowered(encoder, config)
    error = check_lowering(found.fake, found.lowered, flat)
    assert error.weights == 0 and error.steps <= 1.001
    integers = found.lowered.weights.values()
    assert all(i.values.dtype is torch.int16 for i in integers) and any(bool(i.zero_point.any()) for i in integers)


@pytest.mark.parametrize("name", MODELS)
def test_law_3_for_geta(name: str) -> None:
    spec = QuantSpec(5, kind="geta")
    found, flat = lowered(MODELS[name], QuantConfig(spec, spec, embeddings=None))
    with torch.no_grad():
        for module in found.fake.modules():
            if hasattr(module, "t"):
                module.t.fill_(0.8)
    from graphcomp.quantization.lower import lower

    error = check_lowering(found.fake, lower(found.fake), flat)
    assert error.weights == 0 and error.steps <= 1.001


def test_law_3_fails_where_a_code_is_wrong():
    found, flat = lowered(residual, config(8))
    name = next(iter(found.lowered.weights))
    found.lowered.weights[name].values.view(-1)[0] += 1
    with pytest.raises(VerificationError, match="integers of"):
        check_lowering(found.fake, found.lowered, flat)


def test_law_3_fails_where_a_scale_is_wrong():
    found, flat = lowered(residual, config(8))
    buffer = found.lowered.module.get_buffer("stem.weight_scale")
    buffer *= 1.2
    with pytest.raises(VerificationError, match="steps off"):
        check_lowering(found.fake, found.lowered, flat)


@pytest.mark.parametrize("moved", [1, 2])
def test_one_code_of_sixteen_bits_is_one_step(moved: int) -> None:
    """Though float32 holds 1.0 above the code 40000 no better than to 0.004."""
    found, flat = lowered(residual, config(16))
    module = found.lowered.module
    quantize = next(n for n in module.graph.nodes if n.target == ops.quantize_per_tensor and _reads(n, "pointwise"))
    step = quantize.args[1]
    codes, unit = module.get_buffer("pointwise.bias_codes"), module.get_buffer("pointwise.bias_scale")
    codes += torch.round(moved * step / unit).to(codes.dtype)
    if moved == 1:
        assert check_lowering(found.fake, found.lowered, flat).steps == pytest.approx(1, abs=0.01)
    else:
        with pytest.raises(VerificationError, match=r"2\.00 quantization steps off"):
            check_lowering(found.fake, found.lowered, flat)


def _reads(node: Any, layer: str) -> bool:
    return layer in str(node.args[0].meta.get("nn_module_stack", "")) and "conv" in str(node.args[0].target)


def test_stored_dtypes():
    found, _ = lowered(residual, config(8))
    state = found.lowered.module.state_dict()
    assert state["stem.weight_codes"].dtype is torch.int8
    assert state["stem.bias_codes"].dtype is torch.int32
    assert not [name for name, t in state.items() if t.is_floating_point() and not name.endswith("_scale")]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_bits_are_packed(bits: int, symmetric: bool) -> None:
    found, _ = lowered(residual, QuantConfig(replace(WEIGHTS, bits=bits, symmetric=symmetric), None))
    codes = found.lowered.module.get_buffer("block.conv1.weight_codes")
    assert codes.dtype is torch.uint8 and codes.numel() == 8 * 8 * 9 * bits // 8
    assert found.lowered.module.graph.find_nodes(op="call_function", target=torch.ops.graphcomp.unpack.default)


def test_clips_in_front_of_a_quantizer_go():
    found, _ = lowered(residual, config(8))
    targets = [n.target for n in found.lowered.module.graph.nodes]
    assert aten.relu.default not in targets and aten.hardtanh.default not in targets
    assert aten.relu.default in [n.target for n in found.fake.graph.nodes]


def test_a_clip_inside_the_range_stays():
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.clamp(self.a(x), -0.1, 0.1))

    torch.manual_seed(0)
    found, flat = quantized(Clipped().eval(), torch.randn(4, 2, 5, 5), config(8))
    node = next(n for n, _ in _quantizers(found) if "clamp" in str(n.target))
    found.fake.get_submodule(str(node.target)).set_range(torch.tensor(-0.5), torch.tensor(0.5))
    from graphcomp.quantization.lower import lower

    lowered = lower(found.fake)
    assert aten.clamp.default in [n.target for n in lowered.module.graph.nodes]
    assert check_lowering(found.fake, lowered, flat).steps <= 1.001


def _quantizers(found: Quantized) -> Any:
    from graphcomp.quantization.insert import quantizer_nodes

    return quantizer_nodes(found.fake)


def test_embedding_table_is_looked_up_as_integers():
    found, flat = lowered(encoder, config(8))
    graph = found.lowered.module.graph
    tables = [n.args[0].meta["val"].dtype for n in graph.find_nodes(op="call_function", target=aten.embedding.default)]
    assert torch.int8 in tables
    assert relative_error(found.fake(*flat), found.lowered.module(*flat)) < 0.05


def test_tied_table_is_stored_once():
    found, _ = lowered(encoder, config(8))
    tables = [name for name, t in found.lowered.module.state_dict().items() if tuple(t.shape) == (40, 16)]
    assert len(tables) == 1


class Prototypes(nn.Module):
    """Products with vectors that are transposed where they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.vectors = nn.Linear(12, 12), nn.Parameter(torch.randn(5, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu() @ nn.functional.normalize(self.vectors, dim=-1).mT


def test_what_is_stored_is_laid_out_as_it_is_loaded():
    found, _ = quantized(Prototypes().eval(), torch.randn(6, 12), config(8))
    stored = found.lowered.module.state_dict()
    assert any(tuple(t.shape) == (12, 5) for t in stored.values())
    assert all(t.is_contiguous() for t in stored.values())


def test_a_channel_with_a_tiny_weight_and_a_large_bias():
    model, x = residual()
    model.depthwise.weight.data[0] = 1e-12
    model.depthwise.bias.data[0] = 3.0
    found, flat = quantized(model, x, config(8), correct_bias=False)
    assert check_lowering(found.fake, found.lowered, flat).steps <= 1.001
    state = found.lowered.module.state_dict()
    stored = state["depthwise.bias_codes"][0] * state["depthwise.bias_scale"][0]
    assert float(stored) == pytest.approx(3.0, rel=1e-6)  # the channel's own step, though all its codes are 0


def test_fake_quant_graph_shares_nothing_with_the_model():
    model, x = residual()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    quantized(model, x, config(4), correct_bias=True)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("bits", [8, *in_ci(3), *slow(2, 4, 16)])
@pytest.mark.parametrize("name", MODELS)
def test_compiles(name: str, bits: int) -> None:
    """In one graph, packed codes or not."""
    found, flat = lowered(MODELS[name], config(bits))
    torch.compiler.reset()
    compiled = torch.compile(found.lowered.module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(found.lowered.module(*flat), compiled(*flat)) < 1e-4


def test_ops_are_those_that_torch_exchanges():
    found, _ = lowered(residual, config(8))
    used = {n.target for n in found.lowered.module.graph.nodes if "quantized_decomposed" in str(n.target)}
    assert used == {ops.quantize_per_tensor, ops.dequantize_per_tensor, ops.dequantize_per_channel}


def test_symmetric_activations_are_unsigned_and_start_at_0_behind_a_clip():
    found, flat = lowered(residual, QuantConfig(WEIGHTS, QuantSpec(8)))
    assert check_lowering(found.fake, found.lowered, flat).steps <= 1.001
    quantizers = found.lowered.module.graph.find_nodes(op="call_function", target=ops.quantize_per_tensor)
    read = {node.args[0].name: node.args[2:] for node in quantizers}
    assert len(set(read.values())) == 2
    # the convolutions whose clips are gone, and the pool, whose quantizer is that of the first of them
    assert {name for name, how in read.items() if how == (0, 0, 127, torch.uint8)} == {
        "conv2d", "max_pool2d", "conv2d_1", "add", "conv2d_3",
    }  # fmt: skip
    assert {how for name, how in read.items() if name in ("x", "conv2d_2")} == {(128, 1, 255, torch.uint8)}
