"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def test_quick_start() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    before, after = ([p.numel() for p in names[model].parameters()] for model in ("model", "small"))
    assert sum(after) < sum(before)
    assert names["logits"].shape == (2, 10)
