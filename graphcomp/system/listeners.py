"""Who is told of a result: folders of a higher rank that `result` cannot import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RESULTS: list[Callable[[Any], None]] = []
"""Called in order with each CompressedModel, at the end of its constructor."""


class Remade:
    """Base of what a listener hangs on a module of a result: a checkpoint leaves this out, as it is made anew."""
