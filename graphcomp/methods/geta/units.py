"""Which units go: how many in all, how many at a time, and which of them, by scores, a sparsity and a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from graphcomp.arguments import check_mapping, wrong
from graphcomp.coupling.groups import ChannelGroup, Kept, Member
from graphcomp.errors import BudgetError, NothingToPrune, PlanError
from graphcomp.methods.geta.steering import BISECTIONS, BY_COST, Target
from graphcomp.pruning.acting import acting_weights, tensors_of, with_acting
from graphcomp.pruning.allocation import Budget, Normalize, allocate, normalized, rounding_note, units_to_remove
from graphcomp.pruning.evidence import Evidence, Scores
from graphcomp.pruning.multiples import units_of_length
from graphcomp.pruning.saliency import Saliency, score_of
from graphcomp.pruning.shares import Part, parts_of
from graphcomp.training.prepared import Prepared
from graphcomp.training.session import Session


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


class Units:
    """The units of a module that are to go.

    Attributes:
        groups: whose units may go.
        target: a budget that holds in the end; None without one.
        final: units that are gone in the end, as far as is known.
        notes: how the sparsity was rounded.

    Args:
        session: of the prepared module.
        groups: whose units may go.
        sparsity: fraction of the units that go, or fractions by module; None: as many as the budget takes.
        saliency: how units are ranked.
        normalize: what the scores of a group are divided by.
        round_to: the lengths of the dims of each group are multiples of it.
        most: fraction of each group that may go, at most.
    """

    def __init__(
        self,
        session: Session,
        groups: Sequence[ChannelGroup],
        sparsity: float | Mapping[str, float] | None,
        saliency: Saliency,
        normalize: Normalize,
        round_to: int,
        most: float,
    ) -> None:
        self.parts = parts_of(session.plan.model, groups, sparsity) if isinstance(sparsity, Mapping) else []
        self.groups = tuple(group for part in self.parts for group in part.groups) if self.parts else tuple(groups)
        self.sparsity, self.saliency, self.normalize = sparsity, saliency, normalize
        self.round_to, self.most = round_to, most
        self.total = sum(group.size for group in self.groups)
        self.target: Target | None = None
        self.final = 0
        self.notes: list[str] = []
        self.finals: list[int] = []  # units of each part that are gone in the end

    @property
    def makers(self) -> list[str]:
        """The parameters whose rows make units."""
        return list(dict.fromkeys(m.name for group in self.groups for m in makers(group)))

    def gone(self, kept: Kept) -> int:
        """Return how many units are not kept."""
        return self.total - sum(len(units) for units in kept.values())

    def scores(self, ready: Prepared, weights: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> Scores:
        """Return the scores of all units.

        Args:
            weights: parameters before a step, by name.
            updates: what the step took off them.
        """
        acting = acting_weights(ready.session.quantized.coupling)
        own = with_acting(self.groups, acting)
        made = {replace(own[group], members=tuple(makers(own[group]))): group for group in self.groups}
        now = tensors_of(ready)
        before = {
            name: weight.value(lambda n: weights[n] if n in weights else now(n)) for name, weight in acting.items()
        }
        weights = {**weights, **before}
        updates = {**updates, **{name: weight - acting[name].value(now) for name, weight in before.items()}}
        evidence = Movement(ready.session.quantized, tuple(made), weights=weights, updates=updates)
        scores = self.saliency(evidence)
        check_mapping("what a saliency returns", scores, "{group: scores for group in evidence.groups}, each (size,)")
        found = {group: score_of(group, scores.get(copy), self.saliency) for copy, group in made.items()}
        return normalized(found, self.normalize)  # here: what is divided by later, such as costs, has to stay in

    def share_of(self, wanted: Kept, kept: Kept, scores: Scores, periods_left: int) -> Kept:
        """What is left when of each group its share of the units that are not `wanted` goes now, lowest scores first:
        if those that save most went first, little would be left for the rest to save, and in the end the cost would be
        far below the budget."""
        found, owed = {}, 0.0
        for group, units in kept.items():
            leaving = units[~torch.isin(units, wanted[group])]
            owed += len(leaving) / periods_left
            now = min(len(leaving), max(round(owed), 0))
            step = units_of_length(group, self.round_to)
            left = min(len(units), -(-(len(units) - now) // step) * step)
            now = len(units) - left
            owed -= now
            first = leaving[scores[group][leaving].argsort(stable=True)[:now]]
            found[group] = units[~torch.isin(units, first)]
        return found

    def within_budget(self, target: Target, kept: Kept, scores: Scores, bits: Sequence[int]) -> Kept:
        """What is left when the budget holds with the bits that there are now; with the fewest, where it cannot."""
        limits = self.round_to, self.most
        try:
            return target.units(scores, kept, bits, *limits)
        except BudgetError:
            return target.units(scores, kept, target.low, *limits)

    def cheap_enough(self, target: Target, kept: Kept, scores: Scores) -> Scores:
        """The scores divided by a power of what a unit costs, as low a one as lets the budget hold at the fewest bits
        when all units that are to go are gone."""

        def excess(power: float) -> float:
            cheaper = target.cheaper(scores, kept, power)
            return target.excess(self.allocate(kept, cheaper, self.final), target.low)

        if excess(0.0) <= 0:
            return scores
        enough = next((power for power in BY_COST if excess(power) <= 0), BY_COST[-1])
        low, high = 0.0, enough
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if excess(middle) <= 0 else (middle, high)
        return target.cheaper(scores, kept, high)

    def settle(self, kept: Kept, bits: Sequence[int]) -> None:
        """Find out how many units will be gone.

        Args:
            kept: what is left now.
            bits: the fewest of each quantizer.

        Raises:
            BudgetError: the sparsity and the budget cannot be met together.
        """
        scores = {group: torch.ones(group.size) for group in self.groups}
        if self.sparsity is not None:
            chosen = self._nearest(kept, scores, self.sparsity)
            if self.target is not None:
                cheapest = (
                    self.allocate(kept, self.cheap_enough(self.target, kept, scores), self.final)
                    if self.final
                    else chosen
                )
                excess = self.target.excess(cheapest, bits)
                if excess > 0:
                    raise BudgetError(
                        f"sparsity={self.sparsity} and the fewest bits do not meet the budget",
                        why=f"the cost is {1 + excess:.2f} times the limit at best",
                        fix="sparsity=None, which removes as many units as it takes, or a larger budget",
                    )
        elif self.target is not None:
            self.final = self.gone(self.target.units(scores, kept, bits, self.round_to, self.most))

    def _nearest(self, kept: Kept, scores: Scores, sparsity: float | Mapping[str, float]) -> Kept:
        """Settle how many units go: a share of them, or the nearest number that multiples of `round_to` allow."""
        parts = self.parts if isinstance(sparsity, Mapping) else [Part(self.groups, sparsity)]
        chosen: dict[ChannelGroup, Tensor] = {}
        for part in parts:
            found = self._allocate_part(part, scores, part.sparsity, kept, nearest=True)
            self.finals.append(sum(group.size - len(found[group]) for group in part.groups))
            self.notes.append(rounding_note(part.groups, found, part.sparsity, self.round_to, part.name))
            chosen |= found
        self.final = sum(self.finals)
        return chosen if self.final else kept

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
            max_group_sparsity=self.most,
            already={group: already[group] for group in part.groups},
            nearest=nearest,
        )
        return dict(found)

    def allocate(self, kept: Kept, scores: Scores, count: int) -> Kept:
        """`count` units gone in all, those that are gone already among them.

        Raises:
            BudgetError: that is impossible, for the last count; others are lowered until they can be met, and the last
                one after them.
        """
        if count == self.final:
            return self._exactly(scores, count, kept)
        for fewer in range(count, self.gone(kept), -1):
            with suppress(BudgetError):
                found = self._exactly(scores, fewer, kept)
                self._exactly(scores, self.final, found)  # with `round_to` what goes first decides what can go later
                return found
        return kept

    def _exactly(self, scores: Scores, count: int, already: Kept) -> Kept:
        if not self.parts:
            return self._allocate_part(Part(self.groups, 0.0), scores, count / self.total, already)
        found: dict[ChannelGroup, Tensor] = {}
        for part, final in zip(self.parts, self.finals, strict=True):
            total = sum(group.size for group in part.groups)
            so_far = total - sum(len(already[group]) for group in part.groups)
            wanted = max(final * count // max(self.final, 1), so_far)  # each part goes in step with the others
            found |= self._allocate_part(part, scores, wanted / total, already)
        return found


def makers(group: ChannelGroup) -> list[Member]:
    """The parameters whose slices a unit is made of; what reads it is none of it."""
    return [member for member in group.producers if member.is_parameter]


def trainable(ready: Prepared, groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """The groups none of whose parameters is frozen."""
    frozen = {name for name, parameter in ready.named_parameters() if not parameter.requires_grad}
    return tuple(g for g in groups if not any(m.is_parameter and m.name in frozen for m in g.members))


def groups_to_prune(ready: Prepared, fix: str) -> tuple[ChannelGroup, ...]:
    """Return the groups that may lose units.

    Args:
        fix: of the error where the module has no groups at all.

    Raises:
        NothingToPrune: there are none.
    """
    session = ready.session
    if not session.groups:
        raise NothingToPrune("nothing can be pruned", why=session.no_groups, fix=fix)
    groups = trainable(ready, session.groups)
    if not groups:
        raise nothing_trainable()
    return groups


def check_sparsity(sparsity: float | Mapping[str, float] | None, budget: Budget | None) -> None:
    """Refuse a share that is none, shares by module that are none, and shares by module beside a budget.

    Raises:
        PlanError: one of these.
    """
    if isinstance(sparsity, Mapping):
        check_by_module(sparsity, budget)
    elif sparsity is not None:
        units_to_remove(sparsity, 0)  # says what is wrong with the number


def check_by_module(sparsity: Mapping[str, float], budget: Budget | None) -> None:
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


def nothing_trainable() -> NothingToPrune:
    """Return the error where each group has a frozen parameter."""
    return NothingToPrune(
        "nothing can be pruned",
        why="each group has a parameter with requires_grad=False",
        fix="model.requires_grad_(True), or requires_grad_(True) for the layers that may get narrower; or sparsity=0",
    )


def frozen_note(session: Session, groups: Sequence[ChannelGroup]) -> str:
    """Name the groups that the sparsity is no share of; "" where there are none."""
    out = [group for group in session.groups if group not in groups]
    if not out:
        return ""
    named = ", ".join(f"{group.name} ({group.size})" for group in out[:8]) + (", …" if len(out) > 8 else "")
    return f"left whole, and out of the sparsity, for frozen parameters (requires_grad=False): {named}"
