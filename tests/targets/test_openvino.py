"""Exported files in OpenVINO: the graph's answers, on integer kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")

from graphcomp.errors import ExportError
from graphcomp.targets.onnxruntime.export import export_onnx
from graphcomp.targets.openvino import latency, prove, run
from graphcomp.targets.runtime import agreement
from tests.targets.lowered import Quantization, lower

pytestmark = [pytest.mark.slow, pytest.mark.ci]

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Exported = dict[int, tuple[nn.Module, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A convolution and a linear layer as floats, and with weights of 8 and of 7 bits: bits -> module and file."""
    pytest.importorskip("openvino", reason="needs the openvino extra")
    found: Exported = {}
    for bits in (32, 8, 7):
        torch.manual_seed(0)
        module: nn.Module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 5)).eval()
        if bits < 32:
            module = lower(module, X, Quantization(bits, 8))
        path = tmp_path_factory.mktemp("openvino") / f"{bits}.onnx"
        export_onnx(module, (X,), None, path)
        found[bits] = module, path
    return found


def test_without_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ExportError, match=r"pip install 'graphcomp\[openvino\]'"):
        run(tmp_path / "m.onnx", (X,))


def test_it_computes_what_the_graph_computes(exported: Exported) -> None:
    more = torch.cat([X, X + 1, X - 1])  # the batch is dynamic
    for bits, exact in ((32, False), (8, True), (7, False)):  # weights of 7 bits saturate on no CPU
        module, path = exported[bits]
        found = agreement(module, run(path, (more,), exact=exact), (more,))
        # integer kernels round to codes once more: with VNNI a code may be the neighbour's
        assert found.within_a_step and (bits < 32 or found.error < 1e-4), (bits, found)


def test_quantized_layers_run_on_integers(exported: Exported) -> None:
    import openvino

    if "INT8" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("OpenVINO has no integer kernels for this CPU")
    layers = {"Convolution": 1, "FullyConnected": 1}
    for bits, integer, floats, share in ((8, layers, {}, 1.0), (32, {}, layers, 0.0)):
        found = prove(exported[bits][1])
        assert (found.integer, found.float_, found.share) == (integer, floats, share)


def test_latency_and_refusals(exported: Exported, tmp_path: Path) -> None:
    _, path = exported[32]
    found = latency(path, (X,), warmup=1, repeats=5)
    assert 0 < found.p10_ms <= found.median_ms <= found.p90_ms and found.runs == 5
    with pytest.raises(ExportError, match="0 runs"):
        latency(path, (X,), repeats=0)
    with pytest.raises(ExportError, match="cannot load"):
        run(tmp_path / "none.onnx", (X,))
    with pytest.raises(ExportError, match="cannot run"):
        run(path, (X[:, :2],))
