"""PSGD: gradients scaled by the distance of a weight to where compression will move the weight.

Weights end near the grid (or near zero), so that they can be rounded (or pruned) without data once training is over.
Forward passes see floats.

Source: Position-based Scaled Gradient (Kim, Yoo, Kwak 2020, arXiv 2005.11035). Here the strength needs no tuning by
default: one over the mean distance of weights that are spread evenly over the grid, a quarter of a step, and outside of
the running range no gradient is scaled by more than at half a step. (One over the mean distance that there is speeds up
the few weights between two points when most are on one: ranges grow, and rounded models get worse.) For pruning the
strength is one over the mean magnitude. Gradients of biases are not scaled, and activations stay float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from graphcomp.arguments import check_word
from graphcomp.errors import PlanError
from graphcomp.methods.base import Goal, Method, Source, refuse
from graphcomp.pruning.evidence import Loss
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.spec import QuantConfig, QuantSpec
from graphcomp.training.elements import Allocation, masks_of, multiplied, others
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Choice, Forward, Run
from graphcomp.training.schedule import Schedule, is_number

NEW = 0.1
"""Weight of the current step in the running range of a tensor."""

MOST = 2.0
"""Largest default scale of a gradient: where a weight is half a step off the grid, twice that of the mean weight."""

COARSE = 4
"""Bits below which the first and the last layer get 8."""


def targets(weight: Tensor, peak: Tensor, levels: int) -> Tensor:
    """Return the nearest point of the grid.

    Args:
        weight: any shape.
        peak: () the largest magnitude that the grid reaches.
        levels: positive levels of the grid; 0: the only point is zero.
    """
    if not levels:
        return torch.zeros_like(weight)
    step = peak / levels
    return step * (weight / step).round().clamp(-levels, levels)


def distances(weight: Tensor, peak: Tensor, levels: int, eps: float) -> Tensor:
    """Return |weight - target| + eps, which the gradient is scaled by."""
    return (weight - targets(weight, peak, levels)).abs() + eps


class PsgdRun(Run):
    """Scales gradients of weights before each step; momentum and weight decay see the scaled gradients.

    Attributes:
        weights: parameter -> positive levels of its grid; 0: the target is zero.
        strength: what distances are multiplied by; None: four over the step of the grid, so that no scale is above
            `MOST`; without a grid one over the mean distance.
        eps: added to distances: with 0 a weight on the grid stays.
        sparsity: fraction of the weights that is pruned in the end.
        allocation: how many of each layer.
    """

    name: ClassVar[str] = "psgd"

    def __init__(
        self,
        ready: Prepared,
        *,
        strength: float | None,
        eps: float,
        sparsity: float,
        allocation: Allocation = "global",
        lr_quant: float | None = None,
    ) -> None:
        super().__init__(ready, lr_quant=lr_quant)
        self.allocation: Allocation = allocation
        self.strength, self.eps, self.sparsity = strength, eps, sparsity
        sites = {site.parameter: q for site, q in ready.quantizers() if site.is_weight and site.parameter}
        self.quantizers: dict[str, Quantizer] = sites
        parameters = dict(ready.named_parameters())
        if sites:
            self.weights: dict[str, nn.Parameter] = {name: parameters[name] for name in sites}
        else:
            self.weights = multiplied(ready)
        if not self.weights:
            raise PlanError("PSGD finds no weight that is multiplied with", fix="requires_grad_(True), or less ignore=")
        self.ranges = {name: torch.stack(weight.detach().aminmax()) for name, weight in self.weights.items()}
        options = {"strength": strength, "eps": eps, "sparsity": sparsity}
        self.about = {name: str(value) for name, value in {**options, **others(allocation)}.items()}

    def loss(self, forward: Forward, batch: Any, task: Loss) -> Tensor:
        """The loss of the task, in floats."""
        with self.ready.in_floats():
            return task(forward(batch), batch)

    def before_step(self, step: int) -> None:
        """Scale the gradients."""
        super().before_step(step)
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.mul_(self.scale(name))

    def scale(self, name: str) -> Tensor:
        """Return what the gradient of a weight is multiplied by, of its shape."""
        weight, levels = self.weights[name].detach(), self._levels(name)
        peak = self.ranges[name].abs().max()
        found = distances(weight, peak, levels, self.eps)
        if self.strength is not None:
            return found * self.strength
        tiny = torch.finfo(found.dtype).tiny
        if not levels:
            return found / found.mean().clamp(min=tiny)
        return (found / (peak / (4 * levels)).clamp(min=tiny)).clamp(max=MOST)

    def after_step(self, step: int) -> None:
        """Let the running ranges follow the weights; quantizers take the exact ones."""
        super().after_step(step)
        for name, weight in self.weights.items():
            now = torch.stack(weight.detach().aminmax())
            self.ranges[name] = NEW * now + (1 - NEW) * self.ranges[name]
            if name in self.quantizers:
                self.quantizers[name].set_range(*now)

    def _levels(self, name: str) -> int:
        return self.quantizers[name].spec.quant_max if name in self.quantizers else 0

    def choice(self) -> Choice:
        """Prune the smallest weights, where a sparsity is asked for."""
        return Choice(self.kept, masks_of(self.weights, self.sparsity, self.allocation) if self.sparsity else {})

    def state_dict(self) -> dict[str, Any]:
        """The running ranges."""
        return {"ranges": dict(self.ranges)}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state_dict` was taken."""
        self.ranges = {name: state["ranges"][name].to(own) for name, own in self.ranges.items()}


@dataclass(frozen=True)
class Psgd(Method):
    """Trains in floats for weights that can be rounded at `bits`, or pruned at `sparsity` (of the weights), afterwards.

    Attributes:
        strength: see `PsgdRun`; the authors take 150 for 4 bits.
        eps: see `PsgdRun`.
        allocation: how many weights of each layer are pruned: "global" ranks all together, "opq" as OPQ plans.
    """

    name: ClassVar[str] = "psgd"
    prunes = True
    quantizes = True
    strength: float | None = None
    eps: float = 1e-5
    allocation: Allocation = "global"

    def __post_init__(self) -> None:
        check_word("allocation", self.allocation, get_args(Allocation))
        for name, value, least in (("strength", self.strength, 0.0), ("eps", self.eps, 0.0)):
            if value is not None and not (is_number(value) and value >= least):
                raise PlanError(f"Psgd({name}={value!r}): must be a number, {least} at least", fix=f"{name}=1e-4")

    def takes(self, goal: Goal) -> Collection[str]:
        """Nothing: single weights are pruned or rounded, whatever unit they belong to."""
        return ()

    def check(self, goal: Goal) -> None:
        """One number of bits, or a share of the weights."""
        if (goal.bits is None) == (not goal.sparsity):
            raise PlanError(
                'method="psgd" needs bits or a sparsity, and not both',
                why="the target of each weight is the grid of the bits, or zero",
                fix="bits=4, or sparsity=0.9" if goal.bits is None else "sparsity=None; or Pqk, which does both",
            )
        if goal.bits is not None and goal.bits[0] != goal.bits[1]:
            raise PlanError(f"bits must be one number for PSGD, got {goal.bits}", fix=f"bits={goal.bits[0]}")

    def prepare(self, source: Source, goal: Goal) -> Prepared:
        """Stand one symmetric quantizer per tensor on each weight."""
        if goal.bits is None:
            return source()
        bits = goal.bits[0]
        config = QuantConfig(QuantSpec(bits), activations=None, first_and_last_bits=8 if bits < COARSE else bits)
        ready = source(config=config)
        if goal.activation_bits is not None:
            ready.remarks = ("activations stay float: PSGD rounds weights alone",)
        return ready

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> PsgdRun:
        """Begin a run."""
        refuse(self, {"a Schedule": isinstance(training.schedule, Schedule)}, "its stages are GETA's; give steps")
        sparsity = goal.sparsity if isinstance(goal.sparsity, float) else 0.0
        return PsgdRun(
            ready,
            strength=self.strength,
            eps=self.eps,
            sparsity=sparsity,
            allocation=self.allocation,
            lr_quant=training.lr_quant,
        )
