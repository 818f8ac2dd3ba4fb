"""Plain training: nothing is pruned or quantized; units that are gone stay out."""

from __future__ import annotations

from typing import ClassVar

from graphcomp.methods.base import Goal, Method
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Run


class PlainRun(Run):
    """Trains weights as they are."""

    name: ClassVar[str] = "finetune"


class Finetune(Method):
    """Trains a model that was cut before."""

    name: ClassVar[str] = "finetune"
    compares: ClassVar[bool] = True

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> PlainRun:
        """Begin a run."""
        return PlainRun(ready, ())
