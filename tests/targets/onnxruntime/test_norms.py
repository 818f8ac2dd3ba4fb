"""Residual sums in front of layer norms: what is written, and what onnxruntime makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_ir as ir

import graphcomp as gc
from graphcomp.targets.onnxruntime.export import export_onnx
from graphcomp.targets.runtime import compare, open_session
from tests.marks import in_ci


class Block(nn.Module):
    """(n, s, 16) -> (n, s, 16), attention and feed-forward, normalised after each sum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.down = (nn.Linear(16, n) for n in (48, 16, 16, 16))
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0), attn_mask=mask)
        x = self.first(x + self.out(attended.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(F.gelu(self.up(x))))


def masked(rows: int) -> tuple[Tensor, Tensor]:
    """Inputs whose last query sees nothing; (n, s, 16) and (n, 1, s, s)."""
    mask = torch.rand(rows, 1, 5, 5) > 0.3
    mask[..., 0], mask[:, :, -1] = True, False
    return torch.randn(rows, 5, 16), mask


@pytest.mark.parametrize("bits", [None, *in_ci(8)])
@pytest.mark.slow
@pytest.mark.ci
def test_no_kernel_of_sum_and_norm(tmp_path: Path, bits: int | None) -> None:
    path, best = tmp_path / "m.onnx", tmp_path / "best.onnx"
    model, inputs = Block().eval(), masked(2)
    small = gc.compress(model, inputs, sparsity=0, bits=bits, progress=False)
    small.export(path)
    written = [node.op_type for node in ir.load(path).graph.all_nodes()]
    assert written.count("Sum") == 2
    open_session(path, optimized=best)
    runs = [node.op_type for node in ir.load(best).graph.all_nodes()]
    assert "SkipLayerNormalization" not in runs and runs.count("LayerNormalization") == 2
    if bits is not None:
        kernels = small.export_report.kernels
        assert sum(kernels.integer.values()) == 4 and not kernels.stayed_float


@pytest.mark.slow
@pytest.mark.ci
def test_queries_that_see_nothing(tmp_path: Path) -> None:
    path, model = tmp_path / "m.onnx", Block().eval()
    export_onnx(model, masked(2), None, path)
    assert compare(path, model, masked(3)).within_a_step
    assert "IsNaN" not in [node.op_type for node in ir.load(path).graph.all_nodes()]


@pytest.mark.slow
@pytest.mark.ci
def test_a_sum_that_is_quantized_stays_an_add(tmp_path: Path) -> None:
    class Two(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = x + self.out(x)
            return self.first(x) + self.up(x)

    path = tmp_path / "m.onnx"
    gc.compress(Two().eval(), masked(2), sparsity=0, bits=8, progress=False).export(path)
    graph = ir.load(path).graph
    adds = [node for node in graph.all_nodes() if node.op_type in ("Add", "Sum")]
    sums = [a for a in adds if any(u.op_type == "LayerNormalization" for u, _ in a.outputs[0].uses())]
    assert [node.op_type for node in sums] == ["Add"]


class RootMeanSquare(nn.Module):
    """(n, s, 16) -> (n, s, 16), a root mean square norm as transformers writes them, and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.out(self.weight * (x * torch.rsqrt(variance + 1e-6)))


def test_root_mean_square_norms_are_one_kernel(tmp_path: Path) -> None:
    path, best = tmp_path / "m.onnx", tmp_path / "best.onnx"
    model, x = RootMeanSquare().eval(), torch.randn(2, 5, 16)
    export_onnx(model, (x,), {}, path)
    assert compare(path, model, (x,)).within_a_step
    written = [node.op_type for node in ir.load(path).graph.all_nodes()]
    assert "Div" in written and "Reciprocal" not in written
    open_session(path, optimized=best)
    runs = [node.op_type for node in ir.load(best).graph.all_nodes()]
    assert runs.count("SimplifiedLayerNormalization") == 1 and "ReduceMean" not in runs


def test_other_reciprocals_of_roots_stay(tmp_path: Path) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    path, x = tmp_path / "m.onnx", torch.randn(2, 5, 16)
    export_onnx(Other().eval(), (x,), {}, path)
    assert "Reciprocal" in [node.op_type for node in ir.load(path).graph.all_nodes()]
