"""Other ways to run a model than one call of its forward, found by folders of a higher rank for models of libraries."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from graphcomp.capture.capture import Captured


class ModelRun(NamedTuple):
    """One way to run a model.

    `name` completes "native == masked, on". `run` takes a module in eval mode, which may change, and returns what is
    compared, by name; floats of the inputs become float64 where the module is of float64.
    """

    name: str
    run: Callable[[nn.Module], dict[str, Tensor]]


Finder: TypeAlias = Callable[[Captured], Iterator[ModelRun]]

FINDERS: list[Finder] = []
"""Each yields the runs that a captured model may have, none for models of other libraries."""

KNOWN = {"transformers": "graphcomp.hf.paths"}
"""Library -> module of this package that adds finders for the library's models."""


def other_runs(captured: Captured) -> list[ModelRun]:
    """Return the other ways to run a model; a library that nobody has imported has no model here."""
    for library, home in KNOWN.items():
        if library in sys.modules:
            importlib.import_module(home)
    return [run for find in FINDERS for run in find(captured)]
