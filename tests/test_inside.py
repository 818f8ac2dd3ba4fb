"""Run the code of docs/inside.md and docs/ops.md from top to bottom; the pages assert what they say themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from graphcomp.ops.registry import forget

DOCS = Path(__file__).parents[1] / "docs"


def run(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": page.stem}
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        lines_before = "\n" * text.count("\n", 0, block.start(1))  # a traceback then shows the line of the page
        exec(compile(lines_before + block[1], str(page), "exec"), names)
    return names


def test_an_op_is_taught_as_the_page_says() -> None:
    torch.manual_seed(0)
    try:
        assert run(DOCS / "ops.md")["again"].report.units_removed > 0
    finally:
        forget("house::swiglu")
        forget("house::average")


@pytest.mark.slow
@pytest.mark.ci
def test_the_core_rebuilt_on_one_page() -> None:
    names = run(DOCS / "inside.md")
    assert names["found"] == [4, 6, 40] and names["integers"](names["x"]).shape == (2, 7, 5)
