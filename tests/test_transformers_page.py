"""The loop of docs/transformers.md generates what the class generates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime")

import graphcomp as gc
from tests.targets.decoders import decoder, generated, prompt

PAGE = Path(__file__).parents[1] / "docs" / "transformers.md"


@pytest.mark.slow
@pytest.mark.ci
def test_the_loop_over_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    (loop,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "InferenceSession" in block)
    ids, _ = prompt(rows=1, padding=0)
    small = gc.compress(decoder("llama", num_hidden_layers=1), {"input_ids": ids}, progress=False, sparsity=0.3)
    small.export("model.onnx", cache=True)
    names: dict[str, Any] = {"tokens": {"input_ids": ids}}
    exec(compile(loop, str(PAGE), "exec"), names)
    expected = generated(small.module, ids, torch.ones_like(ids), 16)
    assert torch.equal(torch.from_numpy(names["tokens"])[:, ids.shape[1] :], expected)
