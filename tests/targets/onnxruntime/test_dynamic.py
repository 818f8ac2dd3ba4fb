"""Ranges at run time in ONNX files: which kernels onnxruntime makes of them, and that the file computes the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")

import onnx

import graphcomp as gc
from graphcomp.quantization.spec import DYNAMIC, QuantConfig, QuantSpec
from graphcomp.targets.runtime import open_session, run
from tests.quantization.test_dynamic import Block, Convnet, X, compress
from tests.targets.models import Tied

pytestmark = [pytest.mark.slow, pytest.mark.ci]


def exported(small: gc.CompressedModel, folder: Path) -> Path:
    small.export(folder / "m.onnx")
    report = small.export_report
    assert report is not None and report.agreement.steps < 0.01, report.agreement
    return folder / "m.onnx"


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_onnxruntime_makes_one_kernel_of_quantization_and_product(tmp_path: Path, sparsity: float) -> None:
    small = compress(sparsity=sparsity)
    path = exported(small, tmp_path)
    assert (kinds(path)["DynamicQuantizeLinear"], kinds(path)["MatMulInteger"]) == (3, 5)
    proof = small.export_report.kernels
    assert sum(proof.integer.values()) == 5 and proof.integer["DynamicQuantizeMatMul"] >= 2
    assert "MatMulInteger" not in proof.integer  # q, k and v read one tensor's codes: MatMulIntegerToFloat
    assert {name for name, _ in proof.unquantized} and not proof.stayed_float  # the products of attention
    assert small.report.kernels["integer"] == proof.integer


def test_ranges_per_token_run_on_integers_too(tmp_path: Path) -> None:
    small = compress("dynamic_per_token")
    exported(small, tmp_path)
    assert small.export_report.kernels.integer == {"MatMulInteger": 5}


@pytest.mark.parametrize("word", ["dynamic", "dynamic_per_token"])
def test_the_file_takes_other_batches_and_other_values(tmp_path: Path, word: str) -> None:
    small = compress(word)
    path = exported(small, tmp_path)
    for x in (X[:1], torch.cat([X, -30 * X]), torch.zeros_like(X)):
        (found,) = run(path, (x,))
        assert torch.allclose(found, small(x), atol=1e-5)


def test_a_row_of_zeros_stays_zero(tmp_path: Path) -> None:
    small = compress("dynamic_per_token", model=nn.Sequential(nn.Linear(8, 4, bias=False)).eval())
    x = X.clone()
    x[0, 0] = 0
    (found,) = run(exported(small, tmp_path), (x,))
    assert torch.equal(found[0, 0], torch.zeros(4)) and torch.allclose(found, small(x), atol=1e-6)


def test_convolutions_keep_int8_weights_and_read_floats(tmp_path: Path) -> None:
    small = compress(model=Convnet().eval(), x=torch.randn(2, 3, 6, 6))
    path = exported(small, tmp_path)
    assert kinds(path)["ConvInteger"] == 0 and kinds(path)["Conv"] == 1
    stored = {i.name: i.data_type for i in onnx.load(path).graph.initializer}
    assert stored["conv.weight_codes"] == onnx.TensorProto.INT8
    assert small.export_report.kernels.integer == {"DynamicQuantizeMatMul": 1}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_of_few_bits_stay_packed_in_the_file(tmp_path: Path, bits: int) -> None:
    weights = QuantSpec(kind="ternary", granularity="channel") if bits == 2 else QuantSpec(bits, granularity="channel")
    config = QuantConfig(weights, DYNAMIC, first_and_last_bits=2)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    small = gc.compress(model, X, sparsity=0.0, quantization=gc.PostTraining(config), progress=False)
    path = exported(small, tmp_path)
    packed = {onnx.TensorProto.INT4, onnx.TensorProto.INT2}
    assert sum(i.data_type in packed for i in onnx.load(path).graph.initializer) == 2
    assert small.export_report.kernels.integer == {"DynamicQuantizeMatMul": 2}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_at_both_ends_is_stored_once_or_turned(tmp_path: Path, bits: int) -> None:
    spec = QuantSpec(bits, granularity="channel")
    config = QuantConfig(spec, DYNAMIC, embeddings=spec, first_and_last_bits=2)
    ids = torch.randint(0, 11, (2, 7))
    small = gc.compress(Tied().eval(), ids, sparsity=0.0, quantization=gc.PostTraining(config), progress=False)
    exported(small, tmp_path)
    assert small.export_report.kernels.integer == {"DynamicQuantizeMatMul": 1}


class Twice(nn.Module):
    """(n, 8) -> (n, 8), the same layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def test_two_products_may_share_a_weight(tmp_path: Path) -> None:
    small = compress(model=Twice().eval(), x=X[0])
    path = exported(small, tmp_path)
    assert small.export_report.kernels.integer == {"DynamicQuantizeMatMul": 2}
    assert sum(i.data_type == onnx.TensorProto.INT8 for i in onnx.load(path).graph.initializer) == 1


def test_the_default_kernels_run_the_file(tmp_path: Path) -> None:
    small = compress(model=Block().eval(), reduce_range=True)
    path = exported(small, tmp_path)
    session = open_session(path)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])
    assert torch.allclose(found, small(X), atol=1e-4)
