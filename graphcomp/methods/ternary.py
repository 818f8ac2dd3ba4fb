"""Ternary weights: each weight is -n, 0 or p, with learned scales per tensor or output channel.

Source: Trained Ternary Quantization (Zhu et al. 2017, arXiv 1612.01064), and with one scale Ternary Weight Networks (Li
et al. 2016, arXiv 1605.04711); see `graphcomp.quantization.quantizers.ternary` for what differs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

from graphcomp.arguments import check_flag, check_word
from graphcomp.errors import PlanError
from graphcomp.methods.base import Goal, Method, Source
from graphcomp.quantization.spec import TERNARY_BITS, QuantConfig, QuantSpec
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Run


class TernaryRun(Run):
    """Plain training of weights and scales."""

    name: ClassVar[str] = "ternary"


def check_two_bits(goal: Goal) -> None:
    """Refuse bits of ternary weights other than two.

    Raises:
        PlanError: others, or none, are asked for.
    """
    if goal.bits != (TERNARY_BITS, TERNARY_BITS):
        raise PlanError(f"bits of ternary weights must be 2, got {goal.bits}", fix="bits=2")


def with_ternary_weights(
    source: Source, goal: Goal, granularity: Literal["channel", "tensor"], *, symmetric: bool, ends: int = 8
) -> Prepared:
    """Return a model with a ternary quantizer on each weight but the first and the last.

    Args:
        granularity: scales per "channel", or per "tensor".
        symmetric: one scale for both sides of 0; False: two.
        ends: bits of the first and the last layer; with 2 these are ternary, too.
    """
    spec = QuantSpec(kind="ternary", symmetric=symmetric, granularity=granularity)
    ready = source(config=QuantConfig(spec, activations=None, first_and_last_bits=ends))
    if goal.activation_bits is not None:
        ready.remarks = (*ready.remarks, "activations stay float: weights alone are ternary")
    return ready


@dataclass(frozen=True)
class Ternary(Method):
    """Trains ternary weights; activations stay float, and the first and the last layer have 8 bits.

    Attributes:
        granularity: scales per "channel", or per "tensor".
        symmetric: one scale for both sides of 0, which integer kernels read; False: two scales.
    """

    name: ClassVar[str] = "ternary"
    quantizes = True
    granularity: Literal["channel", "tensor"] = "channel"
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_word("granularity", self.granularity, ("channel", "tensor"))
        check_flag("symmetric", self.symmetric)

    def takes(self, goal: Goal) -> Collection[str]:
        """Nothing: weights become ternary, and all else stays."""
        return ()

    def check(self, goal: Goal) -> None:
        """Two bits, for weights."""
        check_two_bits(goal)

    def prepare(self, source: Source, goal: Goal) -> Prepared:
        """Stand a ternary quantizer on each weight but the first and the last."""
        return with_ternary_weights(source, goal, self.granularity, symmetric=self.symmetric)

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> TernaryRun:
        """Begin a run."""
        return TernaryRun(ready, lr_quant=training.lr_quant)
