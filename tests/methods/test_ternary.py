"""Method ternary: trained, lowered, saved, exported, resumed."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

import graphcomp as gc
from graphcomp.api import _prepared
from graphcomp.methods.ternary import Ternary
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import lower
from graphcomp.quantization.stored import Affine, Codebook
from graphcomp.training.lsq import steps_of, with_steps
from tests.methods.learning import Stop, batches, compress, loss, net
from tests.quantization.cases import pattern


def prepared(method: Ternary) -> Any:
    source = partial(
        _prepared, net(), batches()[0][0], None, ignore=(), keep_inputs=(), prune=None, scope="", outputs=None
    )
    return method.prepare(source, gc.Goal(bits=(2, 2), activation_bits=None))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.slow
@pytest.mark.ci
def test_trained_lowered_saved_and_exported_exactly(tmp_path, granularity, symmetric):
    small = compress(Ternary(granularity, symmetric), bits=2, training={"steps": 8}).eval()
    assert [layer.weight_bits for layer in small.report.layers] == [8, 2, 8]
    assert small.report.verified["trained == sliced"] < 1e-9 and small.report.verified["sliced == folded"] < 1e-6
    packed = next(t for name, t in small.module.state_dict().items() if name.endswith("_codes") and "second" in name)
    assert packed.dtype == torch.uint8 and packed.numel() == 8 * 8 * 9 // 4  # four codes a byte
    stored = next(own for name, own in small.quantized.lowered.weights.items() if "second" in name)
    assert isinstance(stored, Affine if symmetric else Codebook)
    inputs = batches()[0][0]
    expected = small(inputs)
    small.save(tmp_path / "folder")
    loaded = gc.load(tmp_path / "folder").eval()
    assert torch.equal(loaded(inputs), expected)
    torch.testing.assert_close(loaded.quantized.fake(inputs), expected)
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
    assert kinds and kinds <= {"UINT2", "UINT4"}
    kernels = small.report.kernels
    assert kernels["unquantized"] == [] and any(name.startswith("second.weight") for name, _ in kernels["stayed_float"])
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(inputs).detach(), rtol=1e-5, atol=1e-5)


def test_the_lowered_weight_is_the_fake_quantized_one_bit_for_bit():
    ready = prepared(Ternary()).eval()
    graph = ready.session.quantized.captured.module
    lowered = lower(graph)
    name, stored = next((n, s) for n, s in lowered.weights.items() if isinstance(s, Codebook))
    quantizer = {node.name: q for node, q in quantizer_nodes(graph)}[name]
    assert torch.equal(pattern(stored.dequantize()), pattern(quantizer(graph.second.weight).detach()))
    inputs = batches()[0][0]
    torch.testing.assert_close(lowered.module(inputs), graph(inputs), rtol=0, atol=0)


def test_scales_are_trained_and_stay_positive():
    ready = prepared(Ternary())
    run = Ternary().begin(ready, gc.Goal(bits=(2, 2)), gc.Training(steps=3), 3)
    steps = steps_of(with_steps(ready))
    groups = run.param_groups(torch.optim.SGD, 0.1)
    trained = {id(p) for group in groups for p in group["params"]}
    assert len(steps) == 4 and all(id(step) in trained for step in steps)  # one, two, and one scale


def test_units_are_pruned_from_a_ternary_model_and_scales_with_them():
    ready = prepared(Ternary()).train()
    loss(ready(batches()[0][0]), batches()[0]).backward()
    assert all(p.grad is not None for _, q in ready.quantizers() for p in q.parameters())
    ready.keep({group: torch.arange(0, group.size, 2) for group in ready.session.groups})
    small = gc.finalize(copy.deepcopy(ready).eval())
    assert small.report.units_removed == 8


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_that_was_cut_short_ends_as_it_would_have(tmp_path):
    whole = compress("ternary", bits=2)
    with pytest.raises(Stop):
        compress("ternary", bits=2, folder=tmp_path, calls=9)
    resumed = compress("ternary", bits=2, folder=tmp_path)
    assert all(torch.equal(resumed.state_dict()[name], own) for name, own in whole.state_dict().items())
    with pytest.raises(gc.PlanError, match="must be 2"):
        compress("ternary", bits=4)
