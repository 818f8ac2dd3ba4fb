"""Marks for parts of a sweep."""

from __future__ import annotations

from typing import Any

import pytest


def in_ci(*values: Any) -> list[Any]:
    """The values of one parameter that the default run leaves out and `make check` runs."""
    return [pytest.param(value, marks=(pytest.mark.slow, pytest.mark.ci)) for value in values]


def slow(*values: Any) -> list[Any]:
    """The values of one parameter that only `-m slow` runs: the ends and the ordinary ones stay in the default run."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
