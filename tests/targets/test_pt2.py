"""Captured and lowered graphs as torch.export programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphcomp.capture.capture import capture
from graphcomp.errors import ExportError
from graphcomp.targets.pt2 import export_program, save_program
from tests.marks import in_ci, slow
from tests.targets.lowered import Quantization, lower
from tests.targets.models import Residual

ROOT = Path(__file__).parents[2]


class Named(nn.Module):
    """(n, 6), (n, 6) -> {"sum": (n, 6), "both": (n, 12)}"""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, a: Tensor, *, b: Tensor) -> dict[str, Tensor]:
        return {"sum": self.norm(a + b), "both": torch.cat([a, b], 1)}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.slow
@pytest.mark.ci
def test_a_file_reloads_and_takes_other_batches(tmp_path: Path, batch: int, quantized: bool) -> None:
    model, x = Residual().eval(), torch.randn(batch, 3, 8, 8)
    module = lower(model, x, Quantization(4, 8)) if quantized else model
    export_program(module, (x,), path=tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    for n in (1, 5):
        y = torch.randn(n, 3, 8, 8)
        assert torch.equal(loaded(y), module(y))
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.parametrize("bits", [*in_ci(4), *slow(2, 3, 8)])
def test_a_quantized_file_in_another_process(tmp_path: Path, bits: int) -> None:
    """It takes `import graphcomp`, and no more: that registers the ops."""
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    module = lower(model, x, Quantization(bits, 8))
    export_program(module, (x,), path=tmp_path / "m.pt2")
    torch.save((x, module(x)), tmp_path / "expected.pt")
    without = run_elsewhere(tmp_path, "torch")
    assert without.returncode != 0 and "deserializing the saved file" in without.stderr
    assert "quantized_decomposed" in without.stderr
    done = run_elsewhere(tmp_path, "torch, graphcomp")
    assert done.returncode == 0, done.stderr


def run_elsewhere(folder: Path, imports: str) -> subprocess.CompletedProcess[str]:
    code = f"""
import {imports}
torch.set_num_threads({torch.get_num_threads()})
x, expected = torch.load("expected.pt")
assert torch.equal(torch.export.load("m.pt2").module()(x), expected)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_keywords_nested_outputs_and_the_mode_of_a_graph() -> None:
    model, a, b = Named(), torch.randn(1, 6), torch.randn(1, 6)
    graph = capture(model, a, {"b": b}).module
    graph.train()
    program = export_program(graph, (a,), {"b": b})
    assert graph.training
    a, b = torch.randn(3, 6), torch.randn(3, 6)
    result, expected = program.module()(a, b=b), model.eval()(a, b=b)
    assert list(result) == ["sum", "both"]
    assert torch.equal(result["sum"], expected["sum"]) and torch.equal(result["both"], expected["both"])


def test_other_inputs_than_the_graph_has() -> None:
    graph = capture(Residual(), torch.randn(1, 3, 8, 8)).module
    with pytest.raises(ExportError, match="1 inputs, the example inputs are 2"):
        export_program(graph, (torch.randn(1, 3, 8, 8), torch.randn(1)))


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = export_program(nn.Linear(2, 2), (torch.randn(1, 2),))
    old = tmp_path / "m.pt2"
    old.write_bytes(b"old")

    def half(_program: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", half)
    with pytest.raises(ExportError, match="disk full"):
        save_program(program, old)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"] and old.read_bytes() == b"old"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    program = export_program(nn.Linear(2, 2), (torch.randn(1, 2),))
    with pytest.raises(ExportError, match="cannot write"):
        save_program(program, tmp_path / "file" / "m.pt2")
    with pytest.raises(ExportError, match="is a folder"):
        save_program(program, tmp_path)
