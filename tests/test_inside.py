"""Run the code of docs/inside.md from top to bottom; the page asserts both laws itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "inside.md"


@pytest.mark.slow
@pytest.mark.ci
def test_the_core_rebuilt_on_one_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    names: dict[str, Any] = {}
    for block in blocks:
        lines_before = "\n" * text.count("\n", 0, block.start(1))  # a traceback then shows the line of the page
        exec(compile(lines_before + block[1], str(PAGE), "exec"), names)
    assert names["found"] == [4, 6, 40] and names["integers"](names["x"]).shape == (2, 7, 5)
