"""Ternary: a codebook of -below, 0 and above. Values, gradients, codes, slicing, lowering, files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import graphcomp as gc
from graphcomp.errors import PlanError
from graphcomp.quantization.fold_scales import _times
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import lower
from graphcomp.quantization.quantizers.base import Codebook
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.quantizers.ternary import TernaryQuantizer
from graphcomp.quantization.spec import QuantSpec, with_bits
from tests.methods.learning import Stop, batches, compress, loss, net
from tests.quantization.cases import pattern

X = [-3.0, -1.01, -0.99, -0.2, 0.0, 0.2, 0.24, 0.26, 0.9]


def ternary(granularity: str = "tensor", dtype: torch.dtype = torch.float32) -> TernaryQuantizer:
    made = make_quantizer(QuantSpec(2, kind="ternary", granularity=granularity), shape=(3, 4), dim=0).to(dtype)
    assert isinstance(made, TernaryQuantizer)
    with torch.no_grad():
        made.below.copy_(torch.tensor(2.0) if granularity == "tensor" else torch.tensor([2.0, 0.3, 1.0]))
        made.above.copy_(torch.tensor(0.5) if granularity == "tensor" else torch.tensor([0.5, 0.7, 1.5]))
    return made


def levels(quantizer: TernaryQuantizer) -> tuple[float, float]:
    return float(quantizer.below.detach()), float(quantizer.above.detach())


def test_the_nearest_level_is_taken():
    found = ternary()(torch.tensor(X))
    assert torch.equal(found, torch.tensor([-2.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]))
    assert not bool(torch.signbit(found[2:7]).any())


def test_gradients_are_lsqs_on_either_side():
    """Of x: 1 between the levels. Of a level: code - x / level between, 1 or -1 beyond."""
    quantizer = ternary(dtype=torch.float64)
    x = torch.tensor(X, dtype=torch.float64, requires_grad=True)
    weights = torch.arange(1.0, 10.0, dtype=torch.float64)
    (quantizer(x) * weights).sum().backward()
    assert torch.equal(x.grad, weights * torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1, 0], dtype=torch.float64))
    scale = 9**-0.5
    below = 1 * -1 + 2 * (-1 - -1.01 / 2) + 3 * (0 - -0.99 / 2) + 4 * (0 - -0.2 / 2)
    above = 6 * (0 - 0.2 / 0.5) + 7 * (0 - 0.24 / 0.5) + 8 * (1 - 0.26 / 0.5) + 9 * 1
    torch.testing.assert_close(quantizer.below.grad, torch.tensor(below * scale, dtype=torch.float64))
    torch.testing.assert_close(quantizer.above.grad, torch.tensor(above * scale, dtype=torch.float64))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_codes_stand_for_the_floats_bit_for_bit(granularity, dtype):
    quantizer = ternary(granularity)
    x = (2 * torch.randn(3, 4, dtype=torch.float64)).to(dtype)
    x[0, 0] = 0
    stored = quantizer.stored(x)
    assert stored.values.dtype == torch.int8 and set(stored.values.unique().tolist()) <= {-1, 0, 1}
    back = stored.dequantize().to(dtype)
    assert torch.equal(pattern(back), pattern(quantizer(x).detach()))
    assert torch.equal(quantizer.stored(back).values, stored.values)  # on its own levels
    with pytest.raises(PlanError, match="no tensor of integers"):
        quantizer.to_integers(x)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_factor_per_channel_goes_into_the_levels_and_mirrors_codes(granularity):
    quantizer, x = ternary(granularity), 2 * torch.randn(3, 4)
    factor = torch.tensor([2.0, -0.5, 0.0])
    folded = _times(quantizer.stored(x), factor, 0)
    assert isinstance(folded, Codebook)
    torch.testing.assert_close(folded.dequantize(), quantizer(x).detach() * factor[:, None])
    own = TernaryQuantizer.of(folded, quantizer.spec)
    assert torch.equal(own.stored(folded.dequantize()).values, folded.values)


def test_ranges_and_bounds():
    quantizer = ternary()
    quantizer.set_range(torch.tensor(-3.0), torch.tensor(1.0))
    assert levels(quantizer) == (3.0, 1.0)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(0.5))
    assert levels(quantizer) == (0.5, 0.5)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(0.0))
    assert levels(quantizer) == (1.0, 1.0)
    with torch.no_grad():
        quantizer.below.fill_(-1.0)
    quantizer.project()
    assert levels(quantizer)[0] > 0 and float(quantizer.bits) == 2
    assert with_bits(quantizer.spec, 8) == QuantSpec(8)
    for options in ({"bits": 3}, {"symmetric": False}, {"granularity": "group", "group_size": 4}):
        with pytest.raises(PlanError, match="a ternary quantizer has 2 bits"):
            QuantSpec(**{"bits": 2, "kind": "ternary", **options})


# ------------------------------------------------------------------------------------------------ a model
def codes_of(small: gc.CompressedModel) -> dict[str, Tensor]:
    return {name: t for name, t in small.module.state_dict().items() if name.endswith("_codes")}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_trained_lowered_saved_and_exported_exactly(tmp_path, granularity):
    from graphcomp.methods.ternary import Ternary

    small = compress(Ternary(granularity), bits=2, training={"steps": 8}).eval()
    assert [layer.weight_bits for layer in small.report.layers] == [8, 2, 8]
    assert small.report.verified["trained == sliced"] < 1e-9 and small.report.verified["sliced == folded"] < 1e-6
    packed = next(codes for name, codes in codes_of(small).items() if "second" in name)
    assert packed.dtype == torch.uint8 and packed.numel() == 8 * 8 * 9 // 4  # four codes a byte
    inputs = batches()[0][0]
    expected = small(inputs)
    small.save(tmp_path / "folder")
    loaded = gc.load(tmp_path / "folder").eval()
    assert torch.equal(loaded(inputs), expected) and torch.equal(loaded.quantized.fake(inputs), expected)
    small.export(tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(inputs), expected)


@pytest.mark.slow
@pytest.mark.ci
def test_the_onnx_file_holds_the_codes_in_few_bits_and_computes_the_same(tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    small = compress("ternary", bits=2, training={"steps": 8}).eval()
    inputs = batches()[0][0]
    small.export(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    kinds = {
        onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer if list(t.dims) == [8, 8, 3, 3]
    }
    assert kinds and kinds <= {"INT2", "INT4"}
    kernels = small.report.kernels
    assert kernels["unquantized"] == [] and any(name.startswith("second.weight") for name, _ in kernels["stayed_float"])
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(inputs).detach(), rtol=1e-5, atol=1e-5)


def test_the_lowered_weight_is_the_fake_quantized_one_bit_for_bit():
    from functools import partial

    from graphcomp.api import _prepared
    from graphcomp.methods.ternary import Ternary

    source = partial(
        _prepared, net(), batches()[0][0], None, ignore=(), keep_inputs=(), prune=None, scope="", outputs=None
    )
    ready = Ternary().prepare(source, gc.Goal(bits=(2, 2), activation_bits=None)).eval()
    graph = ready.session.quantized.captured.module
    lowered = lower(graph)
    name, stored = next((n, s) for n, s in lowered.weights.items() if isinstance(s, Codebook))
    quantizer = {node.name: q for node, q in quantizer_nodes(graph)}[name]
    assert torch.equal(pattern(stored.dequantize()), pattern(quantizer(graph.second.weight).detach()))
    inputs = batches()[0][0]
    torch.testing.assert_close(lowered.module(inputs), graph(inputs), rtol=0, atol=0)


def test_units_are_pruned_from_a_ternary_model_and_levels_with_them():
    from functools import partial

    from graphcomp.api import _prepared
    from graphcomp.methods.ternary import Ternary

    source = partial(
        _prepared, net(), batches()[0][0], None, ignore=(), keep_inputs=(), prune=None, scope="", outputs=None
    )
    ready = Ternary().prepare(source, gc.Goal(bits=(2, 2), activation_bits=None)).train()
    loss(ready(batches()[0][0]), batches()[0]).backward()
    assert all(p.grad is not None for _, q in ready.quantizers() for p in q.parameters())
    ready.keep({group: torch.arange(0, group.size, 2) for group in ready.session.groups})
    small = gc.finalize(copy.deepcopy(ready).eval())
    assert small.report.units_removed == 8


def test_a_run_that_was_cut_short_ends_as_it_would_have(tmp_path):
    whole = compress("ternary", bits=2)
    with pytest.raises(Stop):
        compress("ternary", bits=2, folder=tmp_path, calls=9)
    resumed = compress("ternary", bits=2, folder=tmp_path)
    assert all(torch.equal(resumed.state_dict()[name], own) for name, own in whole.state_dict().items())
    with pytest.raises(gc.PlanError, match="must be 2"):
        compress("ternary", bits=4)
