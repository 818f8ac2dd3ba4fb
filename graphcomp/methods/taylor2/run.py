"""A run in two stages: rounds of pruning with the network trained in between, then bits that go down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.methods.taylor2.bits import Progressive
from graphcomp.methods.taylor2.gates import Gates
from graphcomp.methods.taylor2.plan import Plan
from graphcomp.methods.taylor2.scores import Averages, Score
from graphcomp.pruning.evidence import Loss
from graphcomp.training import distributed
from graphcomp.training.lsq import steps_of
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Forward, Run


class Taylor2Run(Run):
    """Scores units in the backward pass, closes the gates of the lowest, and lowers bits.

    Attributes:
        gates, averages, plan: of the units; None where none go.
        chosen: units whose gates are open; those of `kept` once the last round is over.
        returned: units that were gone and came back, counted at each round.
        bits_at: steps before which each stage of bits begins.
        progressive: the quantizers; None without.
    """

    name: ClassVar[str] = "taylor2"
    shrinks: ClassVar[bool] = True

    def __init__(
        self,
        ready: Prepared,
        groups: Sequence[ChannelGroup],
        plan: Plan | None,
        *,
        score: Score,
        momentum: float,
        bits_at: Sequence[int],
        levels: Sequence[int],
        about: Mapping[str, str],
        lr_quant: float | None = None,
    ) -> None:
        super().__init__(ready, groups, lr_quant=lr_quant)
        self.plan, self.score, self.about = plan, score, about
        self.chosen: Kept = self.kept
        self.returned = self.step = self.round = 0
        self.gates: Gates | None = None
        if plan is not None:
            self.gates = Gates(ready, self.groups)
            self.averages = Averages(self.groups, next(ready.parameters()).device, momentum)
            self.gates.set(self.chosen)
        self.bits_at = tuple(bits_at)
        self.progressive = Progressive(ready, levels) if bits_at else None
        self.settles = max((plan.at[-1] if plan is not None else 0), (self.bits_at[-1] + 1 if bits_at else 0))
        self._relative: list[float] | None = None  # sizes of steps that learning rates are of; None: they are no sizes

    # ------------------------------------------------------------------------------------------ what is trained
    def param_groups(self, base: type[Optimizer], lr: Any) -> list[dict[str, Any]]:
        """The gates, too, at a learning rate of 0: their gradients are unscaled with those of all else."""
        if self.progressive is not None and not issubclass(base, SGD):
            self._relative = list(self.progressive.fitted)
        return super().param_groups(base, lr)

    def _own_groups(self) -> list[dict[str, Any]]:
        if self.gates is None:
            return []
        return [{"params": list(self.gates.values.values()), "lr": 0.0, "weight_decay": 0.0}]

    # ------------------------------------------------------------------------------------------ the loss
    @property
    def prunes(self) -> bool:
        """Whether a round of pruning is still to come."""
        return self.plan is not None and self.step < self.plan.at[-1]

    @property
    def level(self) -> int:
        """The stage of bits that the step belongs to; -1: floats."""
        return sum(self.step >= begin for begin in self.bits_at) - 1

    def loss(self, forward: Forward, batch: Any, task: Loss) -> Tensor:
        """The loss behind the gates, with quantizers at the bits of the stage."""
        level = self.level
        if self.progressive is not None and level > self.progressive.at:
            with torch.no_grad():
                views = self._views(False)
            self.progressive.fit(level, lambda: forward(batch, views))
        if self.progressive is not None and level < 0:
            with self.ready.in_floats():
                return task(forward(batch, self._views(False)), batch)
        return task(forward(batch, self._views(level >= 0)), batch)

    def _views(self, quantized: bool) -> Mapping[str, Tensor] | None:
        return self.gates.views(quantized) if self.gates is not None and self.prunes else None

    # ------------------------------------------------------------------------------------------ a step
    def before_step(self, step: int) -> None:
        """Take in the derivatives of the gates."""
        super().before_step(step)
        if self.gates is not None and self.prunes:
            distributed.average_gradients(self.gates.values.values())
            self.averages.add(self.gates.derivatives())

    def after_step(self, step: int) -> None:
        """Hold steps and gates; let units go where a round is due."""
        self._hold_rates()
        super().after_step(step)
        if self.gates is not None and self.prunes:
            self.gates.set(self.chosen)  # whatever a scheduler makes of a learning rate of 0
            assert self.plan is not None
            if step + 1 in self.plan.at:
                self._next_round()
        self.step = step + 1

    def _hold_rates(self) -> None:
        """Scale what an adaptive optimizer adds to steps: its learning rates are of the sizes that steps had at first,
        and with other bits steps have other sizes."""
        if self._relative is None or self.progressive is None or self.progressive.at < 0:
            return
        pairs = zip(steps_of(self._with_steps), self._steps_before, strict=True)
        sizes = zip(self.progressive.fitted, self._relative, strict=True)
        for (parameter, before), (now, first) in zip(pairs, sizes, strict=True):
            parameter.copy_(before + (parameter - before) * (now / first))

    def _next_round(self) -> None:
        assert self.plan is not None and self.gates is not None
        self.round += 1
        before, scores = self.chosen, self.averages.scores(self.score, self.chosen)
        self.chosen = self.plan.choose(self.round, scores, before)
        self.returned += sum(int((~torch.isin(own, before[group])).sum()) for group, own in self.chosen.items())
        self.gates.set(self.chosen)
        last = self.round == len(self.plan.at)
        if last or not self.plan.returns:
            self.kept = self.chosen
        if last and self.plan.forced:
            self.ready.remarks = (
                *self.ready.remarks,
                f"the last round took {self.plan.forced:.1%} of the units that were left, above quota="
                f"{self.plan.quota:g}: the rounds of so many steps do not reach the goal otherwise",
            )

    # ------------------------------------------------------------------------------------------ where the run stands
    @property
    def removed(self) -> int:
        """Units whose gates are closed, those that may return among them."""
        return self.total - sum(len(units) for units in self.chosen.values()) - self._ungrouped

    def bits(self) -> Tensor:
        """(l,) bits of each quantizer in the stage; 32 while weights are in floats."""
        if self.progressive is not None and self.level < 0:
            return torch.full((len(self.ready.session.sites),), 32.0)
        return torch.tensor([float(quantizer.bits.detach()) for _, quantizer in self.ready.quantizers()])

    def stage(self, step: int) -> str:
        """Pruning, the bits of a stage, both, or training of what is left in floats."""
        level = sum(step >= begin for begin in self.bits_at) - 1
        bits = f"{self.progressive.levels[level]} bits" if self.progressive is not None and level >= 0 else ""
        if self.plan is not None and step < self.plan.at[-1]:
            return f"pruning at {bits}" if bits else "pruning"
        return bits or "training"

    def metrics(self) -> dict[str, Any]:
        """How many units have returned, too."""
        return {**super().metrics(), "units_returned": self.returned}

    # ------------------------------------------------------------------------------------------ states and copies
    def state_dict(self) -> dict[str, Any]:
        """Averages, open gates, and the stage of bits."""
        found: dict[str, Any] = {"round": self.round, "returned": self.returned}
        if self.gates is not None:
            found |= {"chosen": {group.name: units for group, units in self.chosen.items()}}
            found |= {"averages": self.averages.state_dict()}
        if self.plan is not None:
            found |= {"final": self.plan.units.final}
        if self.progressive is not None:
            found |= {"level": self.progressive.at, "fitted": list(self.progressive.fitted)}
        return found

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state_dict` was taken."""
        self.step, self.round, self.returned = step, int(state["round"]), int(state["returned"])
        if self.gates is not None:
            self.chosen = {group: state["chosen"][group.name].cpu() for group in self.groups}
            self.averages.load_state_dict(state["averages"])
            self.gates.set(self.chosen)
        if self.plan is not None:
            self.plan.units.final = int(state["final"])
        if self.progressive is not None:
            if int(state["level"]) >= 0:
                self.progressive.enter(int(state["level"]))
            self.progressive.fitted = [float(size) for size in state["fitted"]]

    def follow(self, small: Prepared) -> None:
        """Go on with what the module was shrunk to: no units go, and no bits change any more."""
        super().follow(small)
        self.chosen, self.plan, self.gates = self.kept, None, None
        if self.progressive is not None:
            self.progressive.follow(small)

    def shared(self) -> Iterable[Any]:
        """What units are chosen by, too."""
        plan = self.plan
        own = () if plan is None else (plan.units.saliency, plan.units.target, plan.costs)
        return (*own, *super().shared())
