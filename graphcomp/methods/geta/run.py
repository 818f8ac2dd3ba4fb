"""GETA's run: units are forgotten and bits lowered, step by step, by the joint rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphcomp.arguments import check_callable, check_instance, check_word, is_number, shown
from graphcomp.coupling.groups import Kept
from graphcomp.errors import NothingToPrune, PlanError
from graphcomp.methods.geta.joint_rule import Entry, Forgetting, Rule
from graphcomp.methods.geta.quantizer_group import Bank
from graphcomp.methods.geta.steering import Target
from graphcomp.methods.geta.units import (
    Units,
    check_sparsity,
    frozen_note,
    makers,
    nothing_trainable,
    trainable,
)
from graphcomp.pruning.allocation import Budget, Normalize
from graphcomp.pruning.saliency import Activation, Saliency, named
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.sites import Site
from graphcomp.quantization.spec import check_bits
from graphcomp.torch_compat import foreach_clamp_max_, foreach_clamp_min_
from graphcomp.training.identity import name_of
from graphcomp.training.lsq import lsq_groups
from graphcomp.training.optimizer import grouped
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Run
from graphcomp.training.schedule import Moment, Schedule, Stage, fewest_steps
from graphcomp.training.session import Session


class GetaRun(Run):
    """Reaches a sparsity and a range of bits exactly, by the end of a schedule. Arguments as of `QASSO`."""

    name: ClassVar[str] = "qasso"
    shrinks: ClassVar[bool] = True

    def __init__(
        self,
        ready: Prepared,
        schedule: Schedule,
        *,
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
    ) -> None:
        session = ready.session
        if budget is not None:
            check_instance("budget", budget, Budget, "budget=graphcomp.Budget(macs=0.5)")
        sparsity = 0.5 if sparsity is None and budget is None else sparsity
        check_sparsity(sparsity, budget)
        ranked = named(saliency) if isinstance(saliency, str) else saliency
        check_callable("saliency", ranked, 'saliency="geta"')
        _check_options(eta, xi, forgetting, sparsity != 0, max_quantizer_gradient, session)
        groups = trainable(ready, session.groups)
        if sparsity != 0 and not groups:
            raise nothing_trainable()
        self.units = Units(session, groups, sparsity, ranked, normalize, round_to, max_group_sparsity)
        super().__init__(ready, self.units.groups, lr_quant=lr_quant)
        self.schedule, self.sparsity, self._params = schedule, sparsity, params
        self.settles = schedule.ends[2] + 1
        self.max_quantizer_gradient = max_quantizer_gradient
        self._parameters = dict(ready.named_parameters())
        self._sites = [site for site, q in ready.quantizers() if isinstance(q, GetaQuantizer)]
        self.bank = _bank(ready, *_range(self._sites, bits))
        self._learned = _learned(ready)
        if lr_quant is not None:
            _check_rate(lr_quant)
        self.rule = Rule(eta, xi, forgetting == "uniform")
        self.chosen: Kept = self.kept  # what is left when the current period ends
        self._active: Forgetting | None = None
        self._fixed: Tensor | None = None  # bits of the cool-down
        self._foreseen: Tensor | None = None  # the bits that a budget will leave
        self.bank.follow(schedule.moment(0).stage == Stage.WARMUP)
        if budget is not None:
            self.units.target = Target(session, budget, self.groups, self._sites, self.bank.low)
        self._check_reachable()
        notes = (frozen_note(session, groups), *self.units.notes)
        ready.remarks = tuple(note for note in notes if note)
        asked = {"budget": budget, "saliency": saliency, "forgetting": forgetting, "round_to": round_to}
        self.about = {
            "sparsity": str(sparsity),
            **{name: name_of(value) if callable(value) else str(value) for name, value in asked.items()},
            "schedule": str(schedule),
        }

    def param_groups(self, base: type[Optimizer], lr: Any) -> list[dict[str, Any]]:
        """The caller's groups, and one of what GETA's quantizers learn."""
        rate = (1e-4 if self.ready.session.has_attention else 1e-3) if self.lr_quant is None else self.lr_quant
        # The scalars of all quantizers move in a few operations instead of a few each; decay would draw d to 0.
        own = [{"params": self._learned, "lr": rate, "weight_decay": 0.0, "foreach": True}] if self._learned else []
        params, self._params = self._params, None
        return grouped(self.ready, params, [*own, *lsq_groups(self._with_steps, base, lr, self.lr_quant)])

    # ------------------------------------------------------------------------------------------ where it stands
    @property
    def target(self) -> Target | None:
        """The budget."""
        return self.units.target

    def stage(self, step: int) -> str:
        """The stage of the schedule."""
        return stage_name(self.schedule.moment(step).stage)

    def bits(self) -> Tensor:
        """As learned so far."""
        return self.bank.bits() if len(self.bank) else super().bits()

    def most_bits(self, step: int) -> Tensor:
        """(l,) the most bits that each quantizer of `bank` may have in a step."""
        return self.schedule.most_bits(step, self.bank.low, self.bank.high, self._foreseen)

    # ------------------------------------------------------------------------------------------ a step
    def before_step(self, step: int) -> None:
        """Take down what the step is measured by, and tie and clamp the gradients of quantizers."""
        super().before_step(step)
        moment = self.schedule.moment(step)
        begins = moment.stage == Stage.JOINT and moment.first and self.units.final > self.removed
        if self._fixed is not None:
            self.bank.tie(self._fixed)
        self._clamp_gradients()
        self._weights_before: dict[str, Tensor] | None = None
        if begins or self._foresees(moment):
            self._weights_before = {name: self._parameters[name].clone() for name in self.units.makers}
        self._sums_before = self._active.gather() if self._active is not None else None
        self._d_before = self.bank.d()

    def after_step(self, step: int) -> None:
        """What the stage adds: choose units, forget some of each, bound the bits."""
        moment = self.schedule.moment(step)
        self.bank.clamp()
        super().after_step(step)
        weights, old, self._weights_before = self._weights_before, self._sums_before, None
        if weights is not None and self._foresees(moment):
            self._foresee(weights)
        elif weights is not None:
            self._choose(moment, step, weights)
            old = self._active.gather(weights) if self._active is not None else None
        if self._active is not None and old is not None:
            self._active.apply(old, self._d_before, self.most_bits(step), moment.remaining, self.rule)
        else:
            self._constrain(moment, step)
        if moment.stage == Stage.JOINT and moment.last and self.chosen is not self.kept:
            self.kept, self._active = self.chosen, None  # what was chosen is gone

    def _clamp_gradients(self) -> None:
        gradients = [p.grad for p in self._learned if p.grad is not None]
        if gradients:
            foreach_clamp_min_(gradients, -self.max_quantizer_gradient)
            foreach_clamp_max_(gradients, self.max_quantizer_gradient)

    def _constrain(self, moment: Moment, step: int) -> None:
        """What the stage asks of the bits."""
        if not len(self.bank):
            return
        if moment.stage == Stage.WARMUP:
            self.bank.set_ranges()
            if moment.last:
                self.bank.follow(False)
            return
        if moment.stage != Stage.COOLDOWN:
            self.bank.project(self.most_bits(step))
            return
        if self._fixed is None:
            most = torch.maximum(self.most_bits(step).floor(), self.bank.low)
            self._fixed = torch.clamp(self.bank.bits().round(), self.bank.low, most)
            if self.target is not None and self.target.of_bits:
                # The joint rule went down as far as a descent allows. Bits that the budget leaves are given back.
                self._fixed = self._left_by(self.target, self.kept)
        self.bank.fix(self._fixed)

    # ------------------------------------------------------------------------------------------ units
    def _choose(self, moment: Moment, step: int, weights: Mapping[str, Tensor]) -> None:
        """At the start of a period: which units it will forget."""
        units, target = self.units, self.target
        scores = self._scores(weights)
        periods_left = self.schedule.periods[1] - moment.period
        wanted: Kept | None = None
        if target is not None and self.sparsity is None:
            bits = torch.clamp(self.bank.bits(), self.bank.low, self.most_bits(step)).tolist()
            wanted = units.within_budget(target, self.kept, scores, [round(own) for own in bits])
            units.final = units.gone(wanted)
        if target is not None and self.sparsity is not None:
            scores = units.cheap_enough(target, self.kept, scores)
            wanted = units.allocate(self.kept, scores, units.final)
            if target.of_bits:
                self._foreseen = self._left_by(target, wanted)
            self.chosen = units.share_of(wanted, self.kept, scores, periods_left)
        elif wanted is not None and periods_left == 1:
            self.chosen = wanted
        else:
            count = self.removed + round((units.final - self.removed) / periods_left)
            self.chosen = units.allocate(self.kept, scores, count)
        self._activate()

    def _scores(self, weights: Mapping[str, Tensor]) -> Mapping[Any, Tensor]:
        updates = {name: weight - self._parameters[name] for name, weight in weights.items()}
        return self.units.scores(self.ready, weights, updates)

    def _foresees(self, moment: Moment) -> bool:
        """Whether it is now, before the first bit goes, that the bits which a budget will leave are found out."""
        return (
            self.target is not None
            and self.target.of_bits
            and self.sparsity is not None
            and moment.stage == Stage.PROJECTION
            and (moment.period, moment.step) == (0, 0)
        )

    def _foresee(self, weights: Mapping[str, Tensor]) -> None:
        """The bits that the budget will leave when all units that are to go are gone, as far as scores tell by now."""
        assert self.target is not None
        kept, units = self.kept, self.units
        if units.final > self.removed:
            scores = units.cheap_enough(self.target, kept, self._scores(weights))
            kept = units.allocate(kept, scores, units.final)
        self._foreseen = self._left_by(self.target, kept)

    def _left_by(self, target: Target, kept: Kept) -> Tensor:
        """(l,) what the budget leaves of the most bits, whole, that the projection ends with."""
        most = self.schedule.most_bits(self.schedule.ends[2], self.bank.low, self.bank.high)
        whole = torch.maximum(most.floor(), self.bank.low)
        return torch.tensor(target.lowered(kept, [round(bits) for bits in whole.tolist()])).to(self.bank.low)

    def _check_reachable(self) -> None:
        """Raise PlanError and BudgetError now rather than when the joint stage has begun."""
        if self.sparsity != 0:
            if self.schedule.lengths[2] == 0:
                joint = partial(replace, self.schedule, joint=self.schedule.joint or 0.2)
                steps = max(self.schedule.steps, fewest_steps(lambda steps: joint(steps=steps)))
                raise PlanError(
                    f"a schedule of {self.schedule.steps} steps has no joint stage",
                    why="units go in that stage",
                    fix=f"Schedule({steps}, joint={self.schedule.joint or 0.2})",
                )
            if isinstance(self.units.saliency, Activation):
                raise PlanError(
                    "saliency='activation' needs activations",
                    why="a step shows weights and updates",
                    fix="saliency='geta'",
                )
            own = {name: self._parameters[name].detach() for name in self.units.makers}
            self.units.scores(self.ready, own, own)  # a saliency that finds nothing to go by says so
        self.units.settle(self.kept, self.target.low if self.target else ())

    def _activate(self) -> None:
        """Index the slices of the units that are to be forgotten in this period."""
        layers = {site.parameter: k for k, site in enumerate(self._sites) if site.parameter}
        entries = []
        for position, group in enumerate(self.groups):
            leaving = self.kept[group][~torch.isin(self.kept[group], self.chosen[group])]
            forgotten = [m for m in makers(group) if m.name not in self.ready.session.computed]
            for member in forgotten if len(leaving) else ():
                layer = layers.get(member.name, -1)
                entries.append(Entry(member.name, member.dim, member.indices(leaving), position, layer))
        self._active = Forgetting(entries, self._parameters, self.bank, len(self.groups)) if entries else None

    # ------------------------------------------------------------------------------------------ states and copies
    def state_dict(self) -> dict[str, Any]:
        """What is chosen, and the bits that are fixed or foreseen."""
        return {
            "chosen": {group.name: units for group, units in self.chosen.items()},
            "final": self.units.final,
            "fixed": self._fixed,
            "foreseen": self._foreseen,
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state_dict` was taken."""
        self.chosen = {group: state["chosen"][group.name].cpu() for group in self.groups}
        self.units.final = int(state["final"])
        self._fixed = None if state["fixed"] is None else state["fixed"].to(self.bank.device)
        foreseen = state.get("foreseen")  # what earlier versions saved has none
        self._foreseen = None if foreseen is None else foreseen.to(self.bank.device)
        self.bank.follow(self.schedule.moment(step).stage == Stage.WARMUP)
        self._activate()

    def follow(self, small: Prepared) -> None:
        """Go on with what the module was shrunk to: units are settled, and no budget is left to meet."""
        super().follow(small)
        self.units.target, self.chosen = None, self.kept
        self._parameters = dict(small.named_parameters())
        self.bank = _bank(small, self.bank.low.tolist(), self.bank.high.tolist())
        self._learned = _learned(small)

    def shared(self) -> Iterable[Any]:
        """Schedule, saliency and budget, too."""
        return (self.schedule, self.units.saliency, self.target, *super().shared())


def stage_name(stage: Stage) -> str:
    """Return the stage in words."""
    return {Stage.WARMUP: "warm-up", Stage.COOLDOWN: "cool-down"}.get(stage, stage.name.lower())


# ------------------------------------------------------------------------------------------------ setting up
def _bank(ready: Prepared, low: Sequence[float], high: Sequence[float]) -> Bank:
    return Bank([q for _, q in ready.quantizers() if isinstance(q, GetaQuantizer)], low, high)


def _learned(ready: Prepared) -> list[nn.Parameter]:
    """What GETA's quantizers learn."""
    found = {id(p): p for m in ready.modules() if isinstance(m, GetaQuantizer) for p in m.parameters()}
    return [p for p in found.values() if p.requires_grad]


def _check_rate(lr_quant: Any) -> None:
    """Refuse what is no learning rate; torch checks that of the weights alone.

    Raises:
        PlanError: it is not 0 or positive. A tensor of one number is taken, as torch takes one.
    """
    if isinstance(lr_quant, Tensor) and lr_quant.numel() == 1:
        lr_quant = lr_quant.item()
    if not is_number(lr_quant) or lr_quant < 0:
        raise PlanError(f"lr_quant={shown(lr_quant)} is not 0 or positive", fix="lr_quant=1e-3")


def _check_options(eta: float, xi: float, forgetting: str, prunes: bool, clamp: float, session: Session) -> None:
    for name, value in (("eta", eta), ("xi", xi)):
        if not is_number(value) or not 0 < value < 1:
            raise PlanError(f"{name}={shown(value)} is not between 0 and 1", fix=f"{name}=0.9")
    check_word("forgetting", forgetting, ("descent", "uniform"))
    if not is_number(clamp) or not clamp > 0:
        raise PlanError(f"max_quantizer_gradient={shown(clamp)} is not positive", fix="max_quantizer_gradient=1.0")
    if prunes and not session.groups:
        raise NothingToPrune("nothing can be pruned", why=session.no_groups, fix="sparsity=0")


def _range(sites: Sequence[Site], bits: int | tuple[int, int] | None) -> tuple[Sequence[float], Sequence[float]]:
    """The fewest and the most bits of each quantizer.

    Raises:
        PlanError: `bits` is not within what the module or one of its layers was prepared with, or it has no quantizers.
    """
    ranges = [(float(site.low), float(site.high)) for site in sites]
    if bits is not None and not sites:
        raise PlanError(
            "bits of a module without quantizers that learn bits",
            why="the module has no quantizers, or those of LSQ, whose bits are fixed",
            fix="graphcomp.prepare(model, example_inputs, bits=(4, 8))",
        )
    if bits is not None:
        least, most = (bits, bits) if isinstance(bits, int) else bits
        wide = min(site.low for site in sites), max(site.high for site in sites)
        for asked in (least, most):
            check_bits(asked)
        if not wide[0] <= least <= most <= wide[1]:
            raise PlanError(
                f"bits={bits!r} are not within the {wide} that the module was prepared with", fix=f"bits={wide}"
            )
        ranges = [(max(low, least), min(high, most)) for low, high in ranges]
        for site, (low, high) in zip(sites, ranges, strict=True):
            if low > high:
                own = site.low, site.high
                raise PlanError(
                    f"bits={bits!r} are not within the {own} of {site.layer}",
                    why="the module was prepared with a range of its own for that layer",
                    fix=f"bits={wide}",
                )
    return [low for low, _ in ranges], [high for _, high in ranges]
