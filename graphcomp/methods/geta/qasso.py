"""QASSO, the optimizer of GETA: joint structured pruning and quantization-aware training around any base optimizer.

ready = graphcomp.prepare(model, example_inputs, bits=(4, 8))
optimizer = graphcomp.QASSO(ready, torch.optim.AdamW, lr=1e-3, sparsity=0.5, schedule=graphcomp.Schedule(steps=5000))
…                                     # your own loop: forward, backward, optimizer.step()
small = graphcomp.finalize(ready)
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphcomp.arguments import check_callable, check_instance, check_mapping, check_word, is_number, shown, wrong
from graphcomp.coupling.groups import ChannelGroup, Kept, Member
from graphcomp.errors import BudgetError, CheckpointError, NothingToPrune, PlanError
from graphcomp.methods.geta.joint_rule import Entry, Forgetting, Rule
from graphcomp.methods.geta.quantizer_group import Bank
from graphcomp.methods.geta.steering import BISECTIONS, BY_COST, Target
from graphcomp.methods.qat import hold_steps, lsq_groups, uniform
from graphcomp.pruning.acting import acting_weights, tensors_of, with_acting
from graphcomp.pruning.allocation import Budget, Normalize, allocate, normalized, rounding_note, units_to_remove
from graphcomp.pruning.evidence import Evidence, Scores
from graphcomp.pruning.mask import gone
from graphcomp.pruning.saliency import Activation, Saliency, named, score_of
from graphcomp.pruning.shares import Part, parts_of
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.geta import GetaQuantizer
from graphcomp.quantization.spec import check_bits
from graphcomp.torch_compat import foreach_clamp_max_, foreach_clamp_min_
from graphcomp.training.prepared import Prepared, Session, Site, unwrapped
from graphcomp.training.schedule import Moment, Schedule, Stage
from graphcomp.training.shrink import move, shrunk

FORMAT = 1
"""Of what `QASSO.state_dict` returns."""


@dataclass(frozen=True, eq=False)
class Movement(Evidence):
    """Evidence read off a training step: the weights before it, and what the optimizer took off them, in place of
    gradients (GETA's search gradient v times the learning rate; with SGD without momentum, the gradient)."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    updates: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def has_gradients(self) -> bool:
        """True."""
        return True

    def weight(self, name: str) -> Tensor:
        """As float32."""
        return self.weights[name].float()

    def gradient(self, name: str) -> Tensor:
        """As float32, times the learning rate."""
        return self.updates[name].float()


class QASSO(Optimizer):
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
        round_to: the number of units kept of each group is a multiple of it.
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
        self.ready = unwrapped(ready)
        _check_whole(self.ready)
        session = self.ready.session
        if not isinstance(base, type):
            raise PlanError(f"base is a {type(base).__name__}", why="QASSO makes its own", fix="base=torch.optim.AdamW")
        if not isinstance(schedule, (int, Schedule)):
            raise PlanError(f"schedule={schedule!r}", fix="schedule=graphcomp.Schedule(steps=5000)")
        self.schedule = (
            Schedule.of(schedule, transformer=session.has_attention) if isinstance(schedule, int) else schedule
        )
        if budget is not None:
            check_instance("budget", budget, Budget, "budget=graphcomp.Budget(macs=0.5)")
        if base_options is not None:
            check_mapping("base_options", base_options, 'base_options={"eta": 1e-3}')
        sparsity = 0.5 if sparsity is None and budget is None else sparsity
        if isinstance(sparsity, Mapping):
            _check_by_module(sparsity, budget)
        elif sparsity is not None:
            units_to_remove(sparsity, 0)  # says what is wrong with the number
        self.sparsity, self.round_to, self.max_group_sparsity = sparsity, round_to, max_group_sparsity
        self.saliency = named(saliency) if isinstance(saliency, str) else saliency
        check_callable("saliency", self.saliency, 'saliency="geta"')
        self.normalize = normalize
        self.max_quantizer_gradient = max_quantizer_gradient
        _check_options(eta, xi, forgetting, sparsity != 0, max_quantizer_gradient, session)
        self.groups = _trainable(self.ready, session.groups)
        if sparsity != 0 and not self.groups:
            raise _nothing_trainable()
        frozen = _frozen_note(session, self.groups)
        self.parts = parts_of(session.plan.model, self.groups, sparsity) if isinstance(sparsity, Mapping) else []
        if self.parts:
            self.groups = tuple(group for part in self.parts for group in part.groups)
        self._finals: list[int] = []  # units of each part that are gone in the end
        self.total = sum(group.size for group in self.groups)
        self._parameters = dict(self.ready.named_parameters())
        self._sites = [site for site, q in self.ready.quantizers() if isinstance(q, GetaQuantizer)]
        self.bank = _bank(self.ready, *_range(self._sites, bits))
        self._learned = _learned(self.ready)
        if lr_quant is not None:
            _check_rate(lr_quant)
        self._uniform = uniform(self.ready)
        geta = (1e-4 if session.has_attention else 1e-3) if lr_quant is None else lr_quant
        # The scalars of all quantizers move in a few operations instead of a few each; decay would draw d to 0.
        own = [{"params": self._learned, "lr": geta, "weight_decay": 0.0, "foreach": True}] if self._learned else []
        rate = lr if isinstance(lr, (int, float, Tensor)) else 0.0  # the base optimizer refuses all else
        groups = _param_groups(self.ready, params, [*own, *lsq_groups(self._uniform, base, rate, lr_quant)])
        self.base = _base_optimizer(base, groups, lr, options, base_options)
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share_with_base()
        self.rule = Rule(eta, xi, forgetting == "uniform")
        self.steps = 0
        masks = self.ready.kept()  # after an earlier run some units may be gone: they stay gone, and count
        self.kept: Kept = {group: masks[group] for group in self.groups}
        self.chosen: Kept = self.kept  # what is left when the current period ends
        self._ungrouped = 0  # units that stay, of groups that shrinking dissolved
        self._shrunk: dict[str, Tensor] | None = None  # what was left of each group when the module was shrunk
        self._active: Forgetting | None = None
        self._zeros: list[tuple[Tensor, int, Tensor]]  # parameter, dim, indices of all that is gone
        self._index_zeros()
        self._fixed: Tensor | None = None  # bits of the cool-down
        self.bank.follow(self.stage == Stage.WARMUP)
        self.target: Target | None = None
        if budget is not None:
            self.target = Target(session, budget, self.groups, self._sites, self.bank.low)
        self._rounding: list[str] = []  # how the sparsity was rounded
        self._final = 0  # units that are gone in the end, as far as is known
        self._foreseen: Tensor | None = None  # the bits that a budget will leave
        self._check_reachable()
        self.ready.remarks = tuple(note for note in (frozen, *self._rounding) if note)

    # ------------------------------------------------------------------------------------------ where it stands
    @property
    def moment(self) -> Moment:
        """Where the next step stands in the schedule."""
        return self.schedule.moment(self.steps)

    @property
    def stage(self) -> Stage:
        """Of the next step."""
        return self.moment.stage

    @property
    def removed(self) -> int:
        """Units that are gone."""
        return self.total - sum(len(units) for units in self.kept.values()) - self._ungrouped

    @property
    def settled(self) -> bool:
        """Whether units and bits are those of the end: from the first step of the cool-down on."""
        return self.steps > self.schedule.ends[2]

    def most_bits(self) -> Tensor:
        """(l,) the most bits that each quantizer of `bank` may have in the next step."""
        return self.schedule.most_bits(self.steps, self.bank.low, self.bank.high, self._foreseen)

    # ------------------------------------------------------------------------------------------ a step
    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the schedule: the base optimizer's, and what the stage adds to it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moment = self.moment
        begins = moment.stage == Stage.JOINT and moment.first and (self._final > self.removed)
        foresees = self._foresees(moment)
        if self._fixed is not None:
            self.bank.tie(self._fixed)
        self._clamp_gradients()
        weights = {name: self._parameters[name].clone() for name in self._made} if begins or foresees else None
        old = self._active.gather() if self._active is not None else None
        d = self.bank.d()
        steps = [quantizer.scale.clone() for quantizer in self._uniform]
        self.base.step()
        self.bank.clamp()
        hold_steps(self._uniform, steps)
        if weights is not None and foresees:
            self._foresee(weights)
        if weights is not None and begins:
            self._choose(moment, weights)
            old = self._active.gather(weights) if self._active is not None else None
        if self._active is not None and old is not None:
            self._active.apply(old, d, self.most_bits(), moment.remaining, self.rule)
        else:
            self._constrain(moment)
        if moment.stage == Stage.JOINT and moment.last and self.chosen is not self.kept:
            self._commit()
        self._hold_zeros()
        self.steps += 1
        self.ready.set_progress(self.steps, self.schedule.ends[2] + 1)
        return loss

    def _clamp_gradients(self) -> None:
        gradients = [p.grad for p in self._learned if p.grad is not None]
        if gradients:
            foreach_clamp_min_(gradients, -self.max_quantizer_gradient)
            foreach_clamp_max_(gradients, self.max_quantizer_gradient)

    def _constrain(self, moment: Moment) -> None:
        """What the stage asks of the bits."""
        if not len(self.bank):
            return
        if moment.stage == Stage.WARMUP:
            self.bank.set_ranges()
            if moment.last:
                self.bank.follow(False)
            return
        if moment.stage != Stage.COOLDOWN:
            self.bank.project(self.most_bits())
            return
        if self._fixed is None:
            most = torch.maximum(self.most_bits().floor(), self.bank.low)
            self._fixed = torch.clamp(self.bank.bits().round(), self.bank.low, most)
            if self.target is not None and self.target.of_bits:
                # The joint rule went down as far as a descent allows. Bits that the budget leaves are given back.
                self._fixed = self._left_by(self.target, self.kept)
        self.bank.fix(self._fixed)

    # ------------------------------------------------------------------------------------------ units
    @property
    def _made(self) -> list[str]:
        """The parameters whose rows make units."""
        return list(dict.fromkeys(m.name for group in self.groups for m in _makers(group)))

    def _choose(self, moment: Moment, weights: Mapping[str, Tensor]) -> None:
        """At the start of a period: which units it will forget."""
        scores = self._scores(weights, {name: weight - self._parameters[name] for name, weight in weights.items()})
        periods_left = self.schedule.periods[1] - moment.period
        wanted: Kept | None = None
        if self.target is not None and self.sparsity is None:
            wanted = self._within_budget(self.target, scores)
            self._final = self.total - sum(len(units) for units in wanted.values())
        if self.target is not None and self.sparsity is not None:
            scores = self._cheap_enough(self.target, scores)
            wanted = self._allocate(scores, self._final)
            if self.target.of_bits:
                self._foreseen = self._left_by(self.target, wanted)
            self.chosen = self._share_of(wanted, scores, periods_left)
        elif wanted is not None and periods_left == 1:
            self.chosen = wanted
        else:
            self.chosen = self._allocate(scores, self.removed + round((self._final - self.removed) / periods_left))
        self._activate()

    def _scores(self, weights: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> Scores:
        acting = acting_weights(self.ready.session.quantized.coupling)
        own = with_acting(self.groups, acting)
        made = {replace(own[group], members=tuple(_makers(own[group]))): group for group in self.groups}
        now = tensors_of(self.ready)
        before = {
            name: weight.value(lambda n: weights[n] if n in weights else now(n)) for name, weight in acting.items()
        }
        weights = {**weights, **before}
        updates = {**updates, **{name: weight - acting[name].value(now) for name, weight in before.items()}}
        evidence = Movement(self.ready.session.quantized, tuple(made), weights=weights, updates=updates)
        scores = self.saliency(evidence)
        check_mapping("what a saliency returns", scores, "{group: scores for group in evidence.groups}, each (size,)")
        found = {group: score_of(group, scores.get(copy), self.saliency) for copy, group in made.items()}
        return normalized(found, self.normalize)  # here: what is divided by later, such as costs, has to stay in

    def _share_of(self, wanted: Kept, scores: Scores, periods_left: int) -> Kept:
        """What is left when of each group its share of the units that are not `wanted` goes now, lowest scores first:
        if those that save most went first, little would be left for the rest to save, and in the end the cost would be
        far below the budget."""
        found, owed = {}, 0.0
        for group, units in self.kept.items():
            leaving = units[~torch.isin(units, wanted[group])]
            owed += len(leaving) / periods_left
            now = min(len(leaving), max(round(owed), 0))
            left = min(len(units), -(-(len(units) - now) // self.round_to) * self.round_to)
            now = len(units) - left
            owed -= now
            first = leaving[scores[group][leaving].argsort(stable=True)[:now]]
            found[group] = units[~torch.isin(units, first)]
        return found

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
        kept = self.kept
        if self._final > self.removed:
            scores = self._scores(weights, {name: weight - self._parameters[name] for name, weight in weights.items()})
            kept = self._allocate(self._cheap_enough(self.target, scores), self._final)
        self._foreseen = self._left_by(self.target, kept)

    def _left_by(self, target: Target, kept: Kept) -> Tensor:
        """(l,) what the budget leaves of the most bits, whole, that the projection ends with."""
        most = self.schedule.most_bits(self.schedule.ends[2], self.bank.low, self.bank.high)
        whole = torch.maximum(most.floor(), self.bank.low)
        return torch.tensor(target.lowered(kept, [round(bits) for bits in whole.tolist()])).to(self.bank.low)

    def _within_budget(self, target: Target, scores: Scores) -> Kept:
        """What is left when the budget holds with the bits that there are now; with the fewest, where it cannot."""
        now = [round(bits) for bits in torch.clamp(self.bank.bits(), self.bank.low, self.most_bits()).tolist()]
        limits = self.round_to, self.max_group_sparsity
        try:
            return target.units(scores, self.kept, now, *limits)
        except BudgetError:
            return target.units(scores, self.kept, target.low, *limits)

    def _cheap_enough(self, target: Target, scores: Scores) -> Scores:
        """The scores divided by a power of what a unit costs, as low a one as lets the budget hold at the fewest bits
        when all units that are to go are gone."""

        def excess(power: float) -> float:
            cheaper = target.cheaper(scores, self.kept, power)
            return target.excess(self._allocate(cheaper, self._final), target.low)

        if excess(0.0) <= 0:
            return scores
        enough = next((power for power in BY_COST if excess(power) <= 0), BY_COST[-1])
        low, high = 0.0, enough
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if excess(middle) <= 0 else (middle, high)
        return target.cheaper(scores, self.kept, high)

    def _check_reachable(self) -> None:
        """Raise PlanError and BudgetError now rather than when the joint stage has begun."""
        if self.sparsity != 0:
            if self.schedule.lengths[2] == 0:
                raise PlanError(
                    "the schedule has no joint stage", why="that is where units go", fix="Schedule(steps, joint=0.2)"
                )
            if isinstance(self.saliency, Activation):
                raise PlanError(
                    "saliency='activation' needs activations",
                    why="a step shows weights and updates",
                    fix="saliency='geta'",
                )
            own = {name: self._parameters[name].detach() for name in self._made}
            self._scores(own, own)  # a saliency that finds nothing to go by says so
        scores = {group: torch.ones(group.size) for group in self.groups}
        if self.sparsity is not None:
            chosen = self._nearest(scores, self.sparsity)
            if self.target is not None:
                cheapest = (
                    self._allocate(self._cheap_enough(self.target, scores), self._final) if self._final else chosen
                )
                excess = self.target.excess(cheapest, self.target.low)
                if excess > 0:
                    raise BudgetError(
                        f"sparsity={self.sparsity} and the fewest bits do not meet the budget",
                        why=f"the cost is {1 + excess:.2f} times the limit at best",
                        fix="sparsity=None, which removes as many units as it takes, or a larger budget",
                    )
        elif self.target is not None:
            wanted = self.target.units(scores, self.kept, self.target.low, self.round_to, self.max_group_sparsity)
            self._final = self.total - sum(len(units) for units in wanted.values())

    def _nearest(self, scores: Scores, sparsity: float | Mapping[str, float]) -> Kept:
        """Settle how many units go: a share of them, or the nearest number that multiples of `round_to` allow."""
        parts = self.parts if isinstance(sparsity, Mapping) else [Part(self.groups, sparsity)]
        chosen: dict[ChannelGroup, Tensor] = {}
        for part in parts:
            found = self._allocate_part(part, scores, part.sparsity, self.kept, nearest=True)
            self._finals.append(sum(group.size - len(found[group]) for group in part.groups))
            self._rounding.append(rounding_note(part.groups, found, part.sparsity, self.round_to, part.name))
            chosen |= found
        self._final = sum(self._finals)
        return chosen if self._final else self.kept

    def _allocate_part(
        self, part: Part, scores: Scores, sparsity: float, already: Kept, *, nearest: bool = False
    ) -> dict[ChannelGroup, Tensor]:
        """Let `sparsity` of the units of a part be gone, those that are gone `already` among them."""
        if not units_to_remove(sparsity, sum(group.size for group in part.groups)):
            return {group: already[group] for group in part.groups}
        found = allocate(
            part.groups,
            scores,
            sparsity=sparsity,
            normalize="none",
            round_to=self.round_to,
            max_group_sparsity=self.max_group_sparsity,
            already={group: already[group] for group in part.groups},
            nearest=nearest,
        )
        return dict(found)

    def _allocate(self, scores: Scores, count: int) -> Kept:
        """`count` units gone in all, those that are gone already among them.

        Raises:
            BudgetError: that is impossible, for the last count; others are lowered until they can be met, and the last
                one after them.
        """
        if count == self._final:
            return self._exactly(scores, count, self.kept)
        for fewer in range(count, self.removed, -1):
            with suppress(BudgetError):
                found = self._exactly(scores, fewer, self.kept)
                self._exactly(scores, self._final, found)  # with `round_to` what goes first decides what can go later
                return found
        return self.kept

    def _exactly(self, scores: Scores, count: int, already: Kept) -> Kept:
        if not self.parts:
            return self._allocate_part(Part(self.groups, 0.0), scores, count / self.total, already)
        found: dict[ChannelGroup, Tensor] = {}
        for part, final in zip(self.parts, self._finals, strict=True):
            total = sum(group.size for group in part.groups)
            gone = total - sum(len(already[group]) for group in part.groups)
            wanted = max(final * count // max(self._final, 1), gone)  # each part goes in step with the others
            found |= self._allocate_part(part, scores, wanted / total, already)
        return found

    def _activate(self) -> None:
        """Index the slices of the units that are to be forgotten in this period."""
        layers = {site.parameter: k for k, site in enumerate(self._sites) if site.parameter}
        entries = []
        for position, group in enumerate(self.groups):
            leaving = self.kept[group][~torch.isin(self.kept[group], self.chosen[group])]
            forgotten = [m for m in _makers(group) if m.name not in self.ready.session.computed]
            for member in forgotten if len(leaving) else ():
                layer = layers.get(member.name, -1)
                entries.append(Entry(member.name, member.dim, member.indices(leaving), position, layer))
        self._active = Forgetting(entries, self._parameters, self.bank, len(self.groups)) if entries else None

    def _commit(self) -> None:
        """At the end of a period: what was chosen is gone, and its momentum with it."""
        self.kept, self._active = self.chosen, None
        self._index_zeros()
        for parameter, dim, indices in self._zeros:
            for state in self.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    state.index_fill_(dim, indices, 0)

    def _index_zeros(self) -> None:
        self.ready.keep(self.kept)
        found = [
            (self._parameters[name], dim, indices)
            for name, dim, indices in gone(self.kept, self.ready.session.computed)
        ]
        self._zeros = [(parameter, dim, indices.to(parameter.device)) for parameter, dim, indices in found]

    def _hold_zeros(self) -> None:
        for parameter, dim, indices in self._zeros:
            parameter.index_fill_(dim, indices, 0)

    # ------------------------------------------------------------------------------------------ shrinking
    @torch.no_grad()
    def shrink(self) -> Prepared:
        """The module without the units that are gone (`graphcomp.shrink`), which this optimizer goes on with.

        What the base optimizer remembers of the rest stays, and learning-rate schedulers and scalers of this optimizer
        go on. Wrappers around the module, such as DistributedDataParallel or a compiled one, are to be made anew.

        Raises:
            PlanError: units or bits are not settled yet, which they are after the first step of the cool-down; or the
                base optimizer's state cannot be cut. Nothing is changed then.
        """
        if not self.settled:
            raise PlanError(
                f"after step {self.steps} nothing can be shrunk",
                why=f"which units go, and bits that are whole, is settled at step {self.schedule.ends[2] + 1}",
                fix="optimizer.shrink() after the first step of the cool-down",
            )
        return self._shrink()

    def _shrink(self) -> Prepared:
        small, left = shrunk(self.ready), self.total - self.removed
        move(self.param_groups, self.state, self.ready, small)
        earlier = self._shrunk or {}
        kept = {group.name: units for group, units in self.kept.items()}
        self._shrunk = {**earlier, **{n: earlier[n][units] if n in earlier else units for n, units in kept.items()}}
        names = {group.name for group in self.groups}
        self.ready, self.target = small, None
        self.groups = tuple(group for group in small.session.groups if group.name in names)
        self._parameters = dict(small.named_parameters())
        self.bank = _bank(small, self.bank.low.tolist(), self.bank.high.tolist())
        self._learned, self._uniform = _learned(small), uniform(small)
        self.kept = self.chosen = {group: torch.arange(group.size) for group in self.groups}
        self._ungrouped = left - sum(group.size for group in self.groups)
        self._index_zeros()
        return small

    # ------------------------------------------------------------------------------------------ saving
    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, and under "qasso" where the schedule stands: with the module's own, all that a run
        needs to go on bit for bit."""
        for prepare in self._optimizer_state_dict_pre_hooks.values():
            prepare(self)
        names = {group: group.name for group in self.groups}
        own = {
            "format": FORMAT,
            "base": type(self.base).__name__,
            "steps": self.steps,
            "sizes": {name: group.size for group, name in names.items()},
            "kept": {names[g]: units for g, units in self.kept.items()},
            "chosen": {names[g]: units for g, units in self.chosen.items()},
            "final": self._final,
            "fixed": self._fixed,
            "foreseen": self._foreseen,
            "shrunk": self._shrunk,
        }
        state = {**self.base.state_dict(), "qasso": own}
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state)
            state = state if changed is None else changed
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. A module that had been shrunk is shrunk so again, and is then `ready`.

        The module's own state is to be loaded, too: then, into `ready`.

        Raises:
            CheckpointError: it is of another optimizer, of another model, or of a newer graphcomp. Nothing is changed
                then.
        """
        state_dict = dict(state_dict)
        for prepare in self._optimizer_load_state_dict_pre_hooks.values():
            changed = prepare(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = state_dict.get("qasso")
        if own is None:
            raise CheckpointError("the state is not of QASSO", why=f"it holds {', '.join(state_dict)}")
        if own["format"] > FORMAT:
            raise CheckpointError(f"the state has format {own['format']}", why=f"this graphcomp knows up to {FORMAT}")
        _check_base(self.base, own.get("base"), state_dict["param_groups"])
        self._shrink_as(own.get("shrunk"), int(own["steps"]))
        sizes = {group.name: group.size for group in self.groups}
        if set(own["kept"]) != set(sizes):
            raise CheckpointError(
                "the state is of another model",
                why=f"its groups are {', '.join(own['kept'])[:300]}; here they are {', '.join(sizes)[:300]}",
            )
        other = [name for name, size in own.get("sizes", sizes).items() if size != sizes[name]]
        if other:
            raise CheckpointError(
                "the state is of another model",
                why=f"'{other[0]}' had {own['sizes'][other[0]]} units, and has {sizes[other[0]]} here",
            )
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "qasso"})
        self._share_with_base()
        self.steps = int(own["steps"])
        self.kept = {group: own["kept"][group.name].cpu() for group in self.groups}
        self.chosen = {group: own["chosen"][group.name].cpu() for group in self.groups}
        self._final = int(own["final"])
        self._fixed = None if own["fixed"] is None else own["fixed"].to(self.bank.device)
        foreseen = own.get("foreseen")  # what earlier versions saved has none
        self._foreseen = None if foreseen is None else foreseen.to(self.bank.device)
        self.bank.follow(self.stage == Stage.WARMUP)
        self._index_zeros()
        self._activate()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _shrink_as(self, left: Mapping[str, Tensor] | None, steps: int) -> None:
        """Let the module be without the units that are not `left`, as it was when a state was taken."""
        if left is None and self._shrunk is None:
            return
        if left is None or (self._shrunk is not None and not _equal(left, self._shrunk)):
            raise CheckpointError(
                "the state is of a module of another size",
                why="this optimizer's module has been shrunk since it was prepared",
                fix="load it into a new QASSO of what graphcomp.prepare returns",
            )
        names = {group.name for group in self.groups}
        if self._shrunk is None and set(left) == names:
            kept = {group: left[group.name].cpu() for group in self.groups}
            try:
                self.ready.keep(kept)
            except PlanError as error:
                raise CheckpointError("the state is of another model", why=str(error)) from error
            self.kept = kept
            self.ready.set_progress(steps, self.schedule.ends[2] + 1)
            self._shrink()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of the base optimizer."""
        if "base" in vars(self) and not any(group is param_group for group in self.base.param_groups):
            self.base.add_param_group(param_group)
            return
        super().add_param_group(param_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> QASSO:
        """With its module: `copy.deepcopy((ready, optimizer))`. Hooks, and what a scheduler wraps `step` in, stay
        behind, as with any optimizer of torch's."""
        for shared in (self.schedule, self.saliency, self.target, *self.groups):
            memo[id(shared)] = shared  # they describe; groups are told apart by identity
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        held = {k: value for k, value in vars(self).items() if k != "step" and not k.startswith("_optimizer_")}
        copied.__setstate__(copy.deepcopy(held, memo))
        return copied

    def __getstate__(self) -> NoReturn:
        raise CheckpointError(
            "a QASSO cannot be pickled",
            why="it holds the prepared module and its graph",
            fix="save optimizer.state_dict() and optimizer.ready.state_dict(), and load them into new ones",
        )

    def _share_with_base(self) -> None:
        """Schedulers and scalers act on this optimizer, and mean the base."""
        self.param_groups, self.state = self.base.param_groups, self.base.state


# ------------------------------------------------------------------------------------------------ setting up
def _check_whole(ready: Prepared) -> None:
    """Raise PlanError where parameters are sharded over processes: units are scored, forgotten and cut whole."""
    for name, parameter in ready.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor, whose module is not there in every build of torch
            raise PlanError(
                "the module is sharded (FSDP2, fully_shard), which QASSO cannot train",
                at=f"parameter '{name}'",
                why="each process holds a part of the rows, and units are scored and forgotten whole",
                fix="torch.nn.parallel.DistributedDataParallel(ready)",
            )


def _check_base(base: Optimizer, name: str | None, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise CheckpointError where the groups of a state are not those of the base optimizer.

    Args:
        name: of the class that the state is of; None: unknown, as in states of earlier versions.
        groups: as in the state.
    """
    own = type(base).__name__
    if name is not None and name != own:
        raise CheckpointError(
            f"the state is of {name}, and the base optimizer is {own}", fix=f"QASSO(ready, {name}, …)"
        )
    lengths, here = ([len(group["params"]) for group in found] for found in (groups, base.param_groups))
    if lengths != here:
        raise CheckpointError(
            "the state is of another model, or of other groups of parameters",
            why=f"they hold {lengths} parameters, and those of this optimizer {here}",
            fix="give params= and add_param_group as they were given when the state was saved",
        )


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def _bank(ready: Prepared, low: Sequence[float], high: Sequence[float]) -> Bank:
    return Bank([q for _, q in ready.quantizers() if isinstance(q, GetaQuantizer)], low, high)


def _makers(group: ChannelGroup) -> list[Member]:
    """The parameters whose slices a unit is made of; what reads it is none of it."""
    return [member for member in group.producers if member.is_parameter]


def _trainable(ready: Prepared, groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """The groups none of whose parameters is frozen."""
    frozen = {name for name, parameter in ready.named_parameters() if not parameter.requires_grad}
    return tuple(g for g in groups if not any(m.is_parameter and m.name in frozen for m in g.members))


def _check_by_module(sparsity: Mapping[str, float], budget: Budget | None) -> None:
    """Refuse shares that are none, and shares beside a budget.

    Raises:
        PlanError: either.
    """
    if not sparsity:
        raise wrong("sparsity", "a number, or shares by module name", sparsity, 'sparsity={"layer1": 0.5}')
    for share in sparsity.values():
        units_to_remove(share, 0)
    if budget is not None:
        raise PlanError(
            "sparsity by module beside a budget",
            why="a budget says which units go, whatever the module",
            fix="sparsity=0.5, or no budget",
        )


def _nothing_trainable() -> NothingToPrune:
    return NothingToPrune(
        "nothing can be pruned",
        why="each group has a parameter with requires_grad=False",
        fix="model.requires_grad_(True), or requires_grad_(True) for the layers that may get narrower; or sparsity=0",
    )


def _frozen_note(session: Session, groups: Sequence[ChannelGroup]) -> str:
    """Name the groups that the sparsity is no share of; "" where there are none."""
    out = [group for group in session.groups if group not in groups]
    if not out:
        return ""
    named = ", ".join(f"{group.name} ({group.size})" for group in out[:8]) + (", …" if len(out) > 8 else "")
    return f"left whole, and out of the sparsity, for frozen parameters (requires_grad=False): {named}"


def _learned(ready: Prepared) -> list[nn.Parameter]:
    """What GETA's quantizers learn."""
    found = {id(p): p for m in ready.modules() if isinstance(m, GetaQuantizer) for p in m.parameters()}
    return [p for p in found.values() if p.requires_grad]


def _param_groups(
    ready: Prepared, params: Iterable[Any] | None, of_quantizers: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The caller's groups without the quantizers' parameters, and then the groups of these.

    Raises:
        PlanError: a parameter that is not the module's, or none that can be trained.
    """
    learned = {id(p) for m in ready.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    names = {id(p): name for name, p in ready.named_parameters()}
    entries = list(ready.parameters()) if params is None else _listed(params)
    found: list[dict[str, Any]] = [{"params": entries}]
    if any(isinstance(entry, dict) for entry in entries):
        if not all(isinstance(entry, dict) and "params" in entry for entry in entries):
            raise PlanError(
                "params holds groups and something else, or a group without parameters",
                fix='params=[{"params": […]}, {"params": […], "weight_decay": 0.0}]',
            )
        found = [dict(group) for group in entries]
    for group in found:
        given = _listed(group["params"])
        strange = next((p for p in map(_parameter, given) if id(p) not in names), None)
        if strange is not None:
            what = f"parameter of shape {tuple(strange.shape)}" if isinstance(strange, Tensor) else repr(strange)
            raise PlanError(
                f"a {what} is none of the prepared module",
                why="the module that `prepare` returned holds copies of the model's parameters",
                fix="params=ready.parameters()",
            )
        group["params"] = [p for p in given if _parameter(p).requires_grad and id(_parameter(p)) not in learned]
    found = [group for group in found if group["params"]]
    if not found:
        raise PlanError("no parameter can be trained", why="requires_grad is False for all", fix="requires_grad_(True)")
    named = isinstance(found[0]["params"][0], tuple)  # torch asks for names in all groups or in none
    for group in of_quantizers:
        own = group["params"]
        found.append({**group, "params": [(names[id(p)], p) for p in own] if named else own})
    return found


def _check_rate(lr_quant: Any) -> None:
    """Refuse what is no learning rate; torch checks that of the weights alone.

    Raises:
        PlanError: it is not 0 or positive. A tensor of one number is taken, as torch takes one.
    """
    if isinstance(lr_quant, Tensor) and lr_quant.numel() == 1:
        lr_quant = lr_quant.item()
    if not is_number(lr_quant) or lr_quant < 0:
        raise PlanError(f"lr_quant={shown(lr_quant)} is not 0 or positive", fix="lr_quant=1e-3")


def _listed(params: Any) -> list[Any]:
    """Parameters in any form that torch takes.

    Raises:
        PlanError: in another.
    """
    if isinstance(params, Tensor):
        return [params]
    if not isinstance(params, Iterable):
        raise PlanError(f"params is a {type(params).__name__}", fix="params=ready.parameters()")
    return list(params)


def _parameter(entry: Any) -> Any:
    """The parameter of an entry of `parameters()` or of `named_parameters()`."""
    return entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry


def _base_optimizer(
    base: type[Optimizer],
    groups: list[dict[str, Any]],
    lr: float,
    options: Mapping[str, Any],
    more: Mapping[str, Any] | None,
) -> Optimizer:
    """The base optimizer.

    Raises:
        PlanError: its class refuses the options, or groups of parameters; or its steps need a closure.
    """
    try:
        made = base(groups, lr=lr, **options, **({} if more is None else more))  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        given = {**options, "base_options": more} if more else dict(options)
        raise PlanError(f"no {base.__name__} can be made of lr={lr!r} and {given}", why=str(error)) from error
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PlanError(
            f"the steps of {base.__name__} need a closure",
            why="they compute the loss several times, and what QASSO adds to a step would come in between",
            fix="base=torch.optim.AdamW",
        )
    return made


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
