"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    (block,) = re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    lines_before = "\n" * text.count("\n", 0, block.start(1))  # so that a traceback shows the README's own line
    names: dict[str, Any] = {}
    exec(compile(lines_before + block[1], str(README), "exec"), names)
    before, after = ([p.numel() for p in names[model].parameters()] for model in ("model", "small"))
    assert sum(after) < sum(before)
    assert names["logits"].shape == (2, 10)
