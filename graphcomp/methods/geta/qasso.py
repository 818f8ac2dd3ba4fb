"""QASSO, the optimizer of GETA: joint structured pruning and quantization-aware training around any base optimizer.

ready = graphcomp.prepare(model, example_inputs, bits=(4, 8))
optimizer = graphcomp.QASSO(ready, torch.optim.AdamW, lr=1e-3, sparsity=0.5, schedule=graphcomp.Schedule(steps=5000))
…                                     # your own loop: forward, backward, optimizer.step()
small = graphcomp.finalize(ready)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphcomp.arguments import check_mapping
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import PlanError
from graphcomp.methods.geta.quantizer_group import Bank
from graphcomp.methods.geta.run import GetaRun
from graphcomp.methods.geta.steering import Target
from graphcomp.pruning.allocation import Budget, Normalize
from graphcomp.pruning.saliency import Saliency
from graphcomp.training.optimizer import MethodOptimizer, check_whole
from graphcomp.training.prepared import unwrapped
from graphcomp.training.schedule import Moment, Schedule, Stage


class QASSO(MethodOptimizer):
    """Reaches a sparsity and a range of bits exactly, by the end of a schedule.

    Warm-up: the base optimizer alone; the ranges of the quantizers follow what they quantize, at the most bits.
    Projection: the bits of all quantizers are kept within a range whose upper end
    goes down. Joint: in periods, the least salient units are chosen and forgotten step by step, their quantized values
    included, while the steps of their quantizers are set so that the whole stays a descent; they are exactly zero from
    the end of the period on. Cool-down: bits are fixed whole numbers, weights, ranges and exponents go on learning.

    With a sparsity and a budget on bit operations or bytes, the projection goes down to the bits that the budget will
    leave when the units are gone, and the cool-down uses the budget up: what the joint stage took of the bits beyond
    that is given back. (GETA has no budgets: its bits are those of the joint stage, the fewest that its rule allows.)

    Learning-rate schedulers, gradient clipping, accumulation and scalers work as with the base optimizer, whose
    `param_groups` and `state` these are: the parameters given, then the quantizers' in one group more. Steps that a
    scaler skips do not count. A scheduler that sets rates of its own (`OneCycleLR(max_lr=0.1)`) sets the quantizers',
    too: give it a list, a rate for each group.

    Args:
        ready: what `graphcomp.prepare` returned, or a wrapper around it.
        base: class of the optimizer that makes the steps: SGD, Adam, AdamW, … Not one that needs a closure.
        lr: learning rate of the weights.
        lr_quant: of steps, ranges and exponents. Default: 1e-3, with attention in the model 1e-4. Of LSQ's steps and
            zero points see `lsq_groups`.
        params: the parameters to train, or groups of them as for any optimizer; default: all.
        sparsity: fraction of the units to remove, met to the unit, or with `round_to` to the nearest number that is
            possible. Or fractions by module name or "re:" pattern, as for `compress`, without a budget. Default: 0.5,
            or with a budget what it takes.
        budget: limits on the costs of the result that hold when the joint stage is over: by the number of units that
            go, where `sparsity` leaves it open, else by which units go; and by bits, which are lowered where that is
            not enough.
        schedule: the stages, or the number of steps of a default one. With `accumulation` of gradients: of optimizer
            steps.
        bits: a narrower range than the one the module was prepared with; an int: exactly these.
        saliency: how units are ranked: GETA's mix, or any of `graphcomp.pruning.saliency` that needs weights and
            gradients at most.
        normalize: what the scores of a group are divided by before groups are compared: "none" (GETA), "mean", "max",
            "l2". Without, groups of small weights go first.
        forgetting: "descent" (GETA's rule), or "uniform" (equal shares in each step, as HESSO's).
        round_to: the lengths of the dims of each group are multiples of it.
        max_group_sparsity: fraction of each group that may go, at most.
        eta, xi: see `joint_rule`.
        max_quantizer_gradient: the gradients of steps, ranges and exponents, which are sums over whole tensors, are
            clamped to this in magnitude.
        base_options: options of the base optimizer that have the name of one above: eta of LARS, …
        options: all others of the base optimizer: momentum, weight_decay, …

    Raises:
        PlanError: a module that was not prepared, parameters that are not its own, an option out of range.
        BudgetError: the sparsity cannot be met.

    Source: GETA (Qu et al. 2025, arXiv 2502.16638).
    """

    title: ClassVar[str] = "QASSO"
    run: GetaRun

    def __init__(
        self,
        ready: nn.Module,
        base: type[Optimizer] = torch.optim.SGD,
        *,
        lr: float,
        schedule: Schedule | int,
        lr_quant: float | None = None,
        params: Iterable[Any] | None = None,
        sparsity: float | Mapping[str, float] | None = None,
        budget: Budget | None = None,
        bits: int | tuple[int, int] | None = None,
        saliency: str | Saliency = "geta",
        normalize: Normalize = "none",
        forgetting: Literal["descent", "uniform"] = "descent",
        round_to: int = 1,
        max_group_sparsity: float = 1.0,
        eta: float = 0.999,
        xi: float = 0.9,
        max_quantizer_gradient: float = 1.0,
        base_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        own = unwrapped(ready)
        check_whole(own, self.title)
        if not isinstance(base, type):
            raise PlanError(f"base is a {type(base).__name__}", why="QASSO makes its own", fix="base=torch.optim.AdamW")
        if not isinstance(schedule, (int, Schedule)):
            raise PlanError(f"schedule={schedule!r}", fix="schedule=graphcomp.Schedule(steps=5000)")
        if isinstance(schedule, int):
            schedule = Schedule.of(schedule, transformer=own.session.has_attention)
        if base_options is not None:
            check_mapping("base_options", base_options, 'base_options={"eta": 1e-3}')
        run = GetaRun(
            own,
            schedule,
            lr_quant=lr_quant,
            params=params,
            sparsity=sparsity,
            budget=budget,
            bits=bits,
            saliency=saliency,
            normalize=normalize,
            forgetting=forgetting,
            round_to=round_to,
            max_group_sparsity=max_group_sparsity,
            eta=eta,
            xi=xi,
            max_quantizer_gradient=max_quantizer_gradient,
        )
        super().__init__(run, base, lr, options, base_options)

    @property
    def schedule(self) -> Schedule:
        """The stages of the run."""
        return self.run.schedule

    @property
    def moment(self) -> Moment:
        """Where the next step stands in the schedule."""
        return self.schedule.moment(self.steps)

    @property
    def stage(self) -> Stage:
        """Of the next step."""
        return self.moment.stage

    @property
    def sparsity(self) -> float | Mapping[str, float] | None:
        """Fraction of the units that go; None: as many as the budget takes."""
        return self.run.sparsity

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The groups whose units may go."""
        return self.run.groups

    @property
    def kept(self) -> Kept:
        """The units of each group that are not gone."""
        return self.run.kept

    @property
    def chosen(self) -> Kept:
        """The units that are left when the current period ends."""
        return self.run.chosen

    @property
    def bank(self) -> Bank:
        """GETA's quantizers."""
        return self.run.bank

    @property
    def target(self) -> Target | None:
        """The budget."""
        return self.run.target

    def most_bits(self) -> Tensor:
        """(l,) the most bits that each quantizer of `bank` may have in the next step."""
        return self.run.most_bits(self.steps)
