"""Running an exported file, comparing in quantization steps, timing."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

onnxruntime = pytest.importorskip("onnxruntime")

from graphcomp.capture.capture import capture  # noqa: E402
from graphcomp.errors import ExportError  # noqa: E402
from graphcomp.targets.onnxruntime.export import export_onnx  # noqa: E402
from graphcomp.targets.runtime import (  # noqa: E402
    agreement,
    compare,
    feeds_of,
    latency,
    open_session,
    output_steps,
    run,
)
from tests.targets.lowered import Quantization, lower  # noqa: E402


class Nested(nn.Module):
    """Nested inputs and outputs."""

    def forward(self, pair: tuple[Tensor, Tensor], scale: Tensor) -> dict[str, object]:
        return {"sum": pair[0] + pair[1], "rest": [pair[0] * scale, pair[1].argmax(1)]}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


def test_nested_arguments_and_outputs(tmp_path: Path) -> None:
    model, path = Nested(), tmp_path / "m.onnx"
    args = ((torch.randn(2, 3), torch.randn(2, 3)), torch.randn(3))
    export_onnx(model, args, None, path)
    (a, b), scale = args
    for found, expected in zip(run(path, args), (a + b, a * scale, b.argmax(1)), strict=True):
        assert torch.equal(found, expected)
    assert compare(path, model, args).error == 0


def test_steps_of_outputs() -> None:
    x = torch.randn(4, 12)
    with_last = lower(mlp(), x, Quantization(8, 4, last_float=False))
    y = with_last(x)
    scale = list(with_last.graph.nodes)[-2].args[1]
    assert output_steps(with_last, [y]) == [scale]
    without = lower(mlp(), x, Quantization(8, 4))
    y = without(x).detach()
    assert output_steps(without, [y]) == pytest.approx([float(y.max() - y.min()) / 15])
    (rounding,) = output_steps(mlp(), [y])
    assert rounding < 1e-3 * float(y.abs().max())


def test_a_difference_is_seen() -> None:
    x = torch.randn(4, 12)
    module = lower(mlp(), x, Quantization(8, 8))
    y = module(x).detach()
    (step,) = output_steps(module, [y])
    for shift, within in ((0.9, True), (1.1, False)):
        actual = y.clone()
        actual[1, 2] += shift * step
        found = agreement(module, [actual], (x,))
        assert found.within_a_step is within
        assert found.steps == pytest.approx(shift, rel=1e-3) and found.error == pytest.approx(shift * step, rel=1e-3)
    assert agreement(module, [y * math.nan], (x,)).steps == math.inf
    with pytest.raises(ExportError, match="gives other outputs"):
        agreement(module, [y, y], (x,))


def test_exact_sums_do_not_saturate(tmp_path: Path) -> None:
    """127 · 255 twice does not fit in 16 bits: where the default kernels saturate, the exact ones must not."""
    layer = nn.Linear(64, 4, bias=False).eval()
    nn.init.constant_(layer.weight, 1.0)
    x, path = torch.rand(2, 64) * 0.01 + 0.99, tmp_path / "m.onnx"
    module = lower(layer, x, Quantization(8, 8))
    export_onnx(module, (x,), None, path)
    assert compare(path, module, (x,), exact=True).error < 1e-4


def test_two_layers_that_share_a_weight(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    x, path = torch.randn(2, 12), tmp_path / "m.onnx"
    module = lower(Twice().eval(), x, Quantization(8, 8, float_bias=True))
    export_onnx(module, (x,), None, path)
    assert compare(path, module, (torch.randn(5, 12),)).within_a_step


def test_latency(tmp_path: Path) -> None:
    x, path = torch.randn(2, 12), tmp_path / "m.onnx"
    export_onnx(mlp(), (x,), None, path)
    feeds = feeds_of(open_session(path), (x,), None)
    found = latency(path, feeds, warmup=1, repeats=7)
    assert 0 < found.p10_ms <= found.median_ms <= found.p90_ms and found.runs == 7
    assert latency(path, {name: torch.from_numpy(v) for name, v in feeds.items()}, repeats=1).runs == 1
    with pytest.raises(ExportError, match="0 runs"):
        latency(path, feeds, repeats=0)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, path = torch.randn(2, 12), tmp_path / "m.onnx"
    export_onnx(mlp(), (x,), None, path)
    with pytest.raises(ExportError, match="1 inputs, the example inputs hold 2"):
        run(path, (x, x))
    with pytest.raises(ExportError, match="cannot run"):
        run(path, (torch.randn(2, 13),))
    with pytest.raises(ExportError, match="cannot load"):
        run(tmp_path / "none.onnx", (x,))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"graphcomp\[onnx\]"):
        run(path, (x,))


def test_the_graph_in_training_mode_is_compared_in_eval_mode(tmp_path: Path) -> None:
    model, x, path = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 3)), torch.randn(2, 12), tmp_path / "m.onnx"
    graph = capture(model, x).module
    graph.train()
    export_onnx(graph, (x,), None, path)
    assert compare(path, graph, (x,)).within_a_step and graph.training
