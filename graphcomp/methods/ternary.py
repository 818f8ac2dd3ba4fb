"""Ternary weights: each weight is -below, 0 or above, with two learned scales per tensor or output channel.

Source: Trained Ternary Quantization (Zhu et al. 2016, arXiv 1612.01064), with thresholds at the midpoints of the levels
and the gradients of LSQ; see `graphcomp.quantization.quantizers.ternary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch.optim import SGD, Optimizer

from graphcomp.arguments import check_word
from graphcomp.errors import PlanError
from graphcomp.methods.base import Goal, Method, Source, refuse
from graphcomp.quantization.quantizers.ternary import TernaryQuantizer
from graphcomp.quantization.spec import QuantConfig, QuantSpec
from graphcomp.training.lsq import FASTER, FASTEST
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Run


class TernaryRun(Run):
    """Plain training of weights and levels, which stay positive."""

    name: ClassVar[str] = "ternary"

    def __init__(self, ready: Prepared, *, lr_quant: float | None = None) -> None:
        super().__init__(ready, lr_quant=lr_quant)
        self._ternary = [m for m in ready.modules() if isinstance(m, TernaryQuantizer)]

    def param_groups(self, base: type[Optimizer], lr: Any) -> list[dict[str, Any]]:
        """The levels, too: with adaptive optimizers each at a rate in proportion to its size."""
        found = super().param_groups(base, lr)
        levels = [level for q in self._ternary for level in q.parameters() if level.requires_grad]
        for level in levels:
            relative = min(FASTER * float(lr), FASTEST) * float(level.detach().mean())
            default = lr if issubclass(base, SGD) else relative
            rate = default if self.lr_quant is None else self.lr_quant
            found.append({"params": [level], "lr": rate, "weight_decay": 0.0})
        return found

    def after_step(self, step: int) -> None:
        """Keep levels positive."""
        super().after_step(step)
        for quantizer in self._ternary:
            quantizer.project()


@dataclass(frozen=True)
class Ternary(Method):
    """Trains ternary weights; activations stay float, and the first and the last layer have 8 bits.

    Attributes:
        granularity: one codebook per "channel", or per "tensor".
    """

    name: ClassVar[str] = "ternary"
    quantizes = True
    granularity: Literal["channel", "tensor"] = "channel"

    def __post_init__(self) -> None:
        check_word("granularity", self.granularity, ("channel", "tensor"))

    def check(self, goal: Goal) -> None:
        """Two bits, for weights."""
        others = {
            "a budget": goal.budget is not None, "a saliency": goal.saliency is not None,
            "round_to": goal.round_to != 1, "prune": goal.prune is not None,
            "sparsity by module": isinstance(goal.sparsity, Mapping),
            "a number of activation bits": goal.activation_bits not in ("same", None),
        }  # fmt: skip
        refuse(self, others, "weights become ternary, and all else stays")
        if goal.bits != (2, 2):
            raise PlanError(f"bits of ternary weights must be 2, got {goal.bits}", fix="bits=2")

    def prepare(self, source: Source, goal: Goal) -> Prepared:
        """Stand a ternary quantizer on each weight but the first and the last."""
        spec = QuantSpec(2, kind="ternary", granularity=self.granularity, observer="mse")
        ready = source(config=QuantConfig(spec, activations=None, first_and_last_bits=8))
        if goal.activation_bits is not None:
            ready.remarks = ("activations stay float: weights alone are ternary",)
        return ready

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> TernaryRun:
        """Begin a run."""
        return TernaryRun(ready, lr_quant=training.lr_quant)
