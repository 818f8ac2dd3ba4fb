"""The pages of docs/tutorials run as they stand there, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.models import need_transformers

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"


def run(page: str) -> dict[str, Any]:
    """Run all blocks of a page, and return the names that they make."""
    need_transformers()
    pytest.importorskip("onnxruntime", reason="the tutorials end in an ONNX file")
    path, names = FOLDER / page, dict[str, Any]()
    text = path.read_text(encoding="utf-8")
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        lines_before = "\n" * text.count("\n", 0, block.start(1))  # so that a traceback shows the page's own line
        exec(compile(lines_before + block[1], str(path), "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.ci
def test_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("encoder.md")
    assert names["dense"] > 0.9 and names["cut"] > names["dense"] - 0.1
    given = {name: names["test"][name] for name in names["names"]}
    assert torch.equal(names["again"](**given).logits, names["small"](**given).logits)
    wanted = names["integers"](**{name: value[:, :12] for name, value in given.items()}).logits
    assert float((torch.from_numpy(names["logits"]) - wanted).abs().max()) < 0.1 * float(wanted.abs().max())
    assert names["integers"].report.bytes.ratio < 0.35


@pytest.mark.slow
@pytest.mark.ci
def test_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("language_model.md")
    assert names["cut"] < names["dense"] + 0.5 and names["learned"] < names["cut"] + 0.02
    assert names["quantized"] < names["learned"] + 0.3
    assert torch.equal(
        names["again"], names["words"].module.generate(names["prompt"], max_new_tokens=12, do_sample=False)
    )
    assert torch.equal(torch.from_numpy(names["said"]), names["again"])
    assert (tmp_path / "alike" / "config.json").exists()
