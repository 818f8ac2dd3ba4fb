"""Which layers onnxruntime runs on integers, and the reasons for those that it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnxruntime")

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.errors import ExportError
from graphcomp.ir.graph import set_argument
from graphcomp.quantization.ops import dequantize_per_tensor, quantize_per_tensor
from graphcomp.targets.onnxruntime.export import export_onnx
from graphcomp.targets.onnxruntime.kernels import KernelProof, prove
from tests.marks import in_ci, slow
from tests.targets.lowered import Quantization, lower


class Block(nn.Module):
    """(n, 3, 8, 8) -> (n, 5)"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(x.mean((2, 3)))


class SelfAttention(nn.Module):
    """(n, t, 8) -> (n, t, 3)"""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.last = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.last(torch.tanh(self.out(y)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)).eval()


IMAGE, ROWS, TOKENS = (2, 3, 8, 8), (4, 12), (2, 3, 12)


def proof(folder: Path, model: nn.Module, shape: tuple[int, ...], how: Quantization | None = None) -> KernelProof:
    x = torch.randn(shape)
    export_onnx(lower(model.eval(), x, how), (x,), None, folder / "m.onnx")
    return prove(folder / "m.onnx")


@pytest.mark.parametrize("bits", [(8, 8), (4, 2), *slow((4, 8), (8, 4), (3, 2))])
@pytest.mark.slow
@pytest.mark.ci
def test_every_layer_of_a_residual_convnet(tmp_path: Path, bits: tuple[int, int]) -> None:
    found = proof(tmp_path, Block(), IMAGE, Quantization(*bits))
    assert (found.integer["QLinearConv"], found.integer["QGemm"]) == (3, 1)
    assert (found.share, dict(found.float_), found.stayed_float) == (1.0, {}, ())


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.slow
@pytest.mark.ci
def test_attention_in_one_op_is_named(tmp_path: Path, attention: bool) -> None:
    """Written out, its products run on integers like others."""
    model, x = SelfAttention().eval(), torch.randn(2, 5, 8)
    config = gc.QuantConfig(attention=attention)
    small = gc.compress(model, x, sparsity=0, ignore="last", quantization=gc.PostTraining(config, ("last",)))
    small.export(tmp_path / "m.onnx")
    assert small.export_report is not None and small.export_report.kernels is not None
    found = small.export_report.kernels
    reasons = sorted(reason[:20] for _, reason in found.unquantized)
    assert reasons == [*["a product of two act"] * (0 if attention else 2), "its weight is float"]
    assert sum(found.integer.values()) == (4 if attention else 2) and found.stayed_float == ()
    left = [note for note in small.report.notes if " float: " in note]
    assert left == (["'last' stays float: ignored"] if attention else left) and len(left) == 2 - attention


@pytest.mark.parametrize("shape", [ROWS, TOKENS])
@pytest.mark.parametrize("bits", [(8, 8), *slow((4, 6))])
@pytest.mark.slow
@pytest.mark.ci
def test_every_layer_of_an_mlp(tmp_path: Path, shape: tuple[int, ...], bits: tuple[int, int]) -> None:
    found = proof(tmp_path, mlp(), shape, Quantization(*bits))
    assert (found.share, dict(found.float_), found.stayed_float) == (1.0, {}, ())


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("shape", [(2, 3, 32), *in_ci((4, 32))])
def test_blocks_without_quantized_activations(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """onnxruntime's kernel for weights in blocks takes 16 indices to the block and more, on two and on three dims."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    found = proof(tmp_path, model, shape, Quantization(4, None, groups=torch.arange(32) // 16))
    assert (dict(found.integer), dict(found.float_), found.stayed_float) == ({"MatMulNBits": 2}, {}, ())


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("shape", "how", "count", "reason"),
    [
        (ROWS, Quantization(8, None), 2, "the activation is not quantized"),
        (ROWS, Quantization(8, 8, float_bias=True), 1, "the bias is float, and the output is not quantized"),
        (ROWS, Quantization(8, 12), 2, "integers of 16 bits have no kernel"),
        (ROWS, Quantization(12, 8), 2, "integers of 16 bits have no kernel"),
        (ROWS, Quantization(4, 8, groups=torch.arange(12) // 4), 2, "group-wise weights with quantized activations"),
        (ROWS, Quantization(4, 8, groups=torch.arange(12) // 5), 2, "group-wise weights with quantized activations"),
    ],
)
def test_reasons(tmp_path: Path, shape: tuple[int, ...], how: Quantization, count: int, reason: str) -> None:
    found = proof(tmp_path, mlp(), shape, how)
    assert [reason in said for _, said in found.stayed_float] == [True] * count, found
    assert sum(found.float_.values()) == count
    assert found.share == pytest.approx(1 - count / 2)


class Ends(nn.Module):
    """A convolution whose output nothing quantizes, and one that a ReLU follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


def written(folder: Path, change: Any) -> KernelProof:
    x = torch.randn(IMAGE)
    module = lower(Ends().eval(), x)
    quantizers = module.graph.find_nodes(op="call_function", target=quantize_per_tensor)
    change(module, quantizers)
    module.graph.eliminate_dead_code()
    module.recompile()
    export_onnx(module, (x,), None, folder / "m.onnx")
    return prove(folder / "m.onnx")


def test_an_output_that_is_not_quantized(tmp_path: Path) -> None:
    def drop_last(module: Any, quantizers: Any) -> None:
        (back,) = quantizers[-1].users
        back.replace_all_uses_with(quantizers[-1].args[0])

    found = written(tmp_path, drop_last)
    assert [said for _, said in found.stayed_float] == ["the output is not quantized"]
    assert found.stayed_float[0][0].startswith("last_weight") and found.share == 0.5


def test_a_zero_point_above_the_lowest_code_after_relu(tmp_path: Path) -> None:
    def move(module: Any, quantizers: Any) -> None:
        (back,) = quantizers[1].users
        for node in (quantizers[1], back):
            set_argument(node, "zero_point", 7)

    found = written(tmp_path, move)
    assert [said for _, said in found.stayed_float] == ["after ReLU the zero point is not the lowest code"]


def test_an_output_that_is_used_twice(tmp_path: Path) -> None:
    def also_float(module: Any, quantizers: Any) -> None:
        relu = quantizers[1].args[0]
        back = next(iter(quantizers[-1].users))
        with module.graph.inserting_after(back):
            total = module.graph.call_function(torch.ops.aten.add.Tensor, (back, relu))
        back.replace_all_uses_with(total)
        total.args = (back, relu)

    found = written(tmp_path, also_float)
    assert [said for _, said in found.stayed_float] == ["the output is also used before it is quantized"]


def test_a_transposed_convolution(tmp_path: Path) -> None:
    x = torch.randn(IMAGE)
    module = lower(Ends().eval(), x)
    (last,) = [n for n in module.graph.nodes if n.target is torch.ops.aten.conv2d.default][1:]
    last.target = torch.ops.aten.conv_transpose2d.input
    module.recompile()
    export_onnx(module, (x,), None, tmp_path / "m.onnx")
    found = prove(tmp_path / "m.onnx")
    assert [said for _, said in found.stayed_float] == ["onnxruntime has no integer kernel for ConvTranspose"]
    assert found.float_ == {"ConvTranspose": 1}


class Product(nn.Module):
    """(n, s, 12), (n, s, 12) -> (n, s, s)"""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b.transpose(1, 2)


@pytest.mark.parametrize(("dtype", "stays"), [(torch.uint8, False), (torch.uint16, True)])
def test_a_product_of_activations(tmp_path: Path, dtype: torch.dtype, stays: bool) -> None:
    inputs = torch.rand(2, 3, 12), torch.rand(2, 3, 12)
    module = capture(Product(), inputs).module
    parameters = (0.01, 0, 0, torch.iinfo(dtype).max, dtype)
    for place in module.graph.find_nodes(op="placeholder"):
        with module.graph.inserting_after(place):
            codes = module.graph.call_function(quantize_per_tensor, (place, *parameters))
        with module.graph.inserting_after(codes):
            back = module.graph.call_function(dequantize_per_tensor, (codes, *parameters))
        place.replace_all_uses_with(back)
        codes.args = (place, *parameters)
    module.recompile()
    export_onnx(module, inputs, None, tmp_path / "m.onnx")
    found = prove(tmp_path / "m.onnx")
    assert found.share == (0.0 if stays else 1.0)
    assert ["integers of 16 bits" in reason for _, reason in found.stayed_float] == [True] * stays


def test_a_float_model_and_json(tmp_path: Path) -> None:
    x = torch.randn(ROWS)
    export_onnx(mlp(), (x,), None, tmp_path / "m.onnx")
    found = prove(tmp_path / "m.onnx")
    assert (found.share, found.stayed_float, sum(found.float_.values())) == (0.0, (), 2)
    assert json.loads(json.dumps(found.to_dict()))["float"] == dict(found.float_)


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    export_onnx(nn.Identity(), (torch.randn(2, 2),), None, tmp_path / "identity.onnx")
    assert prove(tmp_path / "identity.onnx").share == 1.0
    with pytest.raises(ExportError, match="onnxruntime cannot load"):
        prove(tmp_path / "m.onnx")


class Recurrent(nn.Module):
    """An LSTM over rows that are looked up, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.r, self.o = nn.Embedding(10, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.o(self.r(self.e(ids))[0])


@pytest.mark.slow
@pytest.mark.ci
def test_recurrent_layers_and_float_tables_count_as_float(tmp_path: Path) -> None:
    ids = torch.randint(10, (2, 5))
    options = gc.PostTraining(gc.QuantConfig(embeddings=None))
    small = gc.compress(Recurrent().eval(), ids, sparsity=0, quantization=options, calibration=[ids])
    small.export(tmp_path / "m.onnx")
    assert small.export_report is not None and small.export_report.kernels is not None
    found = small.export_report.kernels
    assert (found.share, dict(found.float_)) == (1 / 3, {"LSTM": 1})
    assert [reason for _, reason in found.unquantized] == ["LSTM has no integer form", "its table is float"]
