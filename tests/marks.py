"""Marks for parts of a sweep."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """The values of one parameter that only `-m slow` runs: the ends and the ordinary ones stay in the default run."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
