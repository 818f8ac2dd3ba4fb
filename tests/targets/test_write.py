"""CompressedModel.export: files by suffix, run before they are put in place."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")

import graphcomp as gc
from graphcomp.errors import ExportError
from graphcomp.result import CompressedModel
from graphcomp.targets import write
from graphcomp.targets.runtime import Agreement, run
from tests.targets.lowered import Quantization, lower
from tests.targets.models import Mlp, Residual


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
@pytest.mark.slow
@pytest.mark.ci
def test_a_pruned_model_of_its_own_class(tmp_path: Path, name: str) -> None:
    small = gc.compress(Residual().eval(), torch.randn(1, 3, 8, 8), sparsity=0.5)
    assert small.form == "native" and small.export_report is None
    small.export(tmp_path / name)
    report = small.export_report
    assert report is not None and report.agreement.within_a_step
    assert report.bytes == (tmp_path / name).stat().st_size and report.to_dict()["path"].endswith(name)
    x = torch.randn(3, 3, 8, 8)
    if name == "m.onnx":
        (found,) = run(tmp_path / name, (x,))
        assert report.kernels is not None and report.kernels.share == 0
    else:
        found = torch.export.load(tmp_path / name).module()(x)
    assert torch.allclose(found, small(x), atol=1e-5)


def test_a_lowered_graph(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    module = lower(Mlp().eval(), x, Quantization(4, 8))
    small = CompressedModel(module, form="graph", kept={}, report={}, example_args=(x,))
    assert list(small.state_dict()) == [f"module.{name}" for name in module.state_dict()]
    small.export(tmp_path / "m.onnx")
    report = small.export_report
    assert report is not None and report.agreement.within_a_step
    assert report.kernels is not None and report.kernels.share == 1.0


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("bits", [8, 4])
def test_files_are_as_large_as_their_bits(tmp_path: Path, bits: int) -> None:
    """Codes and what else a layer stores, and little beside it: the graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 32)).eval()
    small = gc.compress(model, torch.randn(2, 64), sparsity=0, bits=bits)
    layers, sizes = small.report.layers, small.report.sizes
    weights = {name: p.numel() for name, p in model.named_parameters() if name.endswith("weight")}
    expected = sum(weights[f"{layer.name}.weight"] * layer.weight_bits for layer in layers) / 8
    small.export(tmp_path / "m.onnx")
    small.save(tmp_path / "folder")
    stored = expected + sizes["remainder"]
    for file in (tmp_path / "m.onnx", tmp_path / "folder" / "model.safetensors"):
        assert expected < file.stat().st_size < stored + 12_000, file


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
@pytest.mark.parametrize("bits", [9, 16])
def test_wide_weights_with_a_zero_point(tmp_path: Path, bits: int, name: str) -> None:
    spec = gc.QuantSpec(bits, symmetric=False, granularity="channel")
    model, ids = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).eval(), torch.arange(9)
    options = gc.PostTraining(gc.QuantConfig(spec, None, embeddings=spec))
    small = gc.compress(model, ids, sparsity=0, quantization=options)
    small.export(tmp_path / name)
    assert small.export_report is not None and small.export_report.agreement.error < 1e-6


def test_a_scope_is_exported_with_the_whole_model(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    whole = nn.Sequential(nn.Linear(6, 6), Mlp()).eval()
    small = gc.compress(whole, x, sparsity=0.5, scope="1")
    small.export(tmp_path / "m.pt2")
    assert torch.allclose(torch.export.load(tmp_path / "m.pt2").module()(x), small(x))


@pytest.mark.slow
@pytest.mark.ci
def test_a_folder_and_example_inputs_after_loading(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    small = gc.compress(Mlp().eval(), x, sparsity=0.5)
    small.export(tmp_path / "folder")
    assert small.export_report is None
    loaded = gc.load(tmp_path / "folder")
    assert str(loaded.report) == str(small.report) and loaded.report.to_dict() == small.report.to_dict()
    with pytest.raises(ExportError, match=r"no example inputs"):
        loaded.export(tmp_path / "m.onnx")
    assert loaded.report.kernels is None
    loaded.export(tmp_path / "m.onnx", example_inputs=x)
    assert loaded.report.kernels == loaded.export_report.kernels.to_dict() and "on integers" in str(loaded.report)
    assert loaded.export_report is not None and loaded.export_report.agreement.within_a_step


def test_bfloat16_is_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    small = gc.compress(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).bfloat16(), x, sparsity=0.5)
    with pytest.raises(ExportError, match="bfloat16"):
        small.export(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    small.export(tmp_path / "m.pt2")


@pytest.mark.slow
@pytest.mark.ci
def test_nothing_is_left_of_a_file_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = gc.compress(Mlp().eval(), torch.randn(2, 6), sparsity=0.5)

    def fail(*_args: object, **_kwargs: object) -> None:
        raise ExportError("it does not run")

    monkeypatch.setattr(write, "compare", fail)
    with pytest.raises(ExportError, match="does not run"):
        small.export(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == [] and small.export_report is None


@pytest.mark.parametrize(("exact", "default", "said"), [(3.0, 3.0, "3 quantization steps"), (0.1, 9.0, "saturate")])
@pytest.mark.slow
@pytest.mark.ci
def test_a_file_that_is_off_is_logged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    exact: float,
    default: float,
    said: str,
) -> None:
    small = gc.compress(Mlp().eval(), torch.randn(2, 6), sparsity=0.5)

    def off(*_args: object, **options: bool) -> Agreement:
        return Agreement(1.0, exact if options.get("exact", True) else default)

    monkeypatch.setattr(write, "compare", off)
    with caplog.at_level(logging.INFO, "graphcomp.export"):
        small.export(tmp_path / "m.onnx")
    messages = [record.getMessage() for record in caplog.records if record.name == "graphcomp.export"]
    assert len(messages) == 1 and said in messages[0]


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_recorded_model_is_written_with_fixed_sizes_and_says_so(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class ByValue(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.b(self.a(x if x.sum() > 0 else -x).relu())

    small = gc.compress(ByValue().eval(), torch.rand(4, 8), progress=False)
    small.export(tmp_path / f"small{suffix}")
    assert any("example's sizes alone" in note for note in small.export_report.notes)
    assert any("example's sizes alone" in note for note in small.report.notes)
    assert "example's sizes alone" in caplog.text
