"""Quantization-aware training: LSQ at fixed bits; with a range of bits, GETA's quantizers, which learn their bits."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from graphcomp.methods.base import Goal, Method
from graphcomp.methods.geta.method import Geta
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Run

LEARNS_BITS = Geta("qat", prunes=False)
"""The method with a range of bits."""


class QatRun(Run):
    """Plain training of weights and LSQ's quantizers."""

    name: ClassVar[str] = "qat"
    former: ClassVar[tuple[str, ...]] = ("qasso",)


class Qat(Method):
    """LSQ (Esser et al. 2020, arXiv 1902.08153) for weights and LSQ+ (arXiv 2004.09576) for activations."""

    name: ClassVar[str] = "qat"
    quantizes = True
    calibrated: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    def takes(self, goal: Goal) -> Collection[str]:
        """All options of post-training quantization; with a range of bits what GETA takes to quantize."""
        return super().takes(goal) if goal.start is not None else LEARNS_BITS.takes(goal)

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> Run:
        """Begin a run; nothing is pruned."""
        if ready.session.learns_bits:
            return LEARNS_BITS.begin(ready, goal, training, steps)
        return QatRun(ready, lr_quant=training.lr_quant)
