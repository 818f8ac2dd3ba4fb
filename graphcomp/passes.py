"""What a pass is: a frozen dataclass with one verb, its fields its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx


class Pass(Protocol):
    """Turns a module into another one; its argument stays as it was."""

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        """The rewritten module, linted and recompiled."""
        ...


@dataclass(frozen=True)
class Pipeline:
    """Passes one after the other."""

    passes: Sequence[Pass]

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        """The module after the last pass."""
        for step in self.passes:
            module = step(module)
            module.graph.lint()
        return module
