"""Regularised training before a cut: a penalty draws whole units to zero, units go, and what is left trains on.

R is over the groups g and units u of the network, w_gu all parameters of a unit (what makes the unit, and what reads
the unit), n_gu their number:

    "lasso"     R = Σ √n_gu ‖w_gu‖              group lasso (Yuan and Lin 2006; of coupled units: Wen et al. 2016,
                                                arXiv 1608.03665)
    "weighted"  R = Σ 2^(4 (M_g − ‖w_gu‖) / (M_g − m_g)) ‖w_gu‖²
                                                M_g, m_g the largest and the least norm of the group: small units feel
                                                16 times as much (DepGraph, Fang et al. 2023, arXiv 2301.12900,
                                                equations 8 and 9)
    "growing"   R = t/T Σ ½ ‖w_gu‖²             over the units that are to go alone, from step 0 to step T of the cut
                                                (Wang et al. 2021, arXiv 2012.09243)
    "scales"    R = Σ |γ_gu|                    of the scales of norms (network slimming, Liu et al. 2017, arXiv
                                                1708.06519)

How we differ: the gradient of `strength` · R is added to that of the loss in closed form, so that the loss which is
reported is that of the task; "growing" grows in each step, and its units are chosen before the first one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graphcomp.arguments import check_word, is_number, shown
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import PlanError
from graphcomp.methods.base import Goal, Method, refuse
from graphcomp.methods.geta.steering import Target
from graphcomp.methods.geta.units import (
    Units,
    check_sparsity,
    frozen_note,
    groups_to_prune,
)
from graphcomp.methods.takes import UNITS
from graphcomp.pruning.saliency import named, norm_weights
from graphcomp.training.identity import name_of
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Run
from graphcomp.training.schedule import Schedule

Kind = Literal["lasso", "weighted", "growing", "scales"]
KINDS: tuple[Kind, ...] = ("lasso", "weighted", "growing", "scales")

STRENGTHS: Mapping[Kind, float] = {"lasso": 1e-4, "weighted": 5e-4, "growing": 1.0, "scales": 1e-4}
"""What R is multiplied by, by default: the order of magnitude of the papers' and of weight decay."""

STEEPNESS = 4.0
"""Exponent of two by which the smallest unit of a group feels more than the largest ("weighted")."""


class RegularizedRun(Run):
    """Adds the gradient of a penalty until the cut, then trains without it.

    Attributes:
        cut: number of steps before the units go.
        units: which of them go.
        leaving: units of each group that "growing" draws to zero.
    """

    name: ClassVar[str] = "regularized"
    shrinks: ClassVar[bool] = True

    def __init__(self, ready: Prepared, method: Regularized, goal: Goal, cut: int, lr_quant: float | None) -> None:
        session = ready.session
        sparsity = 0.5 if goal.sparsity is None and goal.budget is None else goal.sparsity
        check_sparsity(sparsity, goal.budget)
        groups = groups_to_prune(ready, 'method="qat"')
        scales = norm_weights(session.quantized.coupling)
        scaled = [g for g in groups if any(m.name in scales for m in g.members)]
        if method.kind == "scales" and len(scaled) < len(groups):
            bare = ", ".join(g.name for g in groups if g not in scaled)
            raise PlanError(
                f'kind="scales" cannot regularise {len(groups) - len(scaled)} of {len(groups)} groups',
                why=f"no norm with a weight scales {bare[:300]}",
                fix='Regularized("lasso"), or ignore= these layers',
            )
        ranked = goal.saliency or ("bn_scale" if method.kind == "scales" else "l2")
        ranked = named(ranked) if isinstance(ranked, str) else ranked
        self.units = Units(session, groups, sparsity, ranked, "mean", goal.round_to, 1.0)
        super().__init__(ready, self.units.groups, lr_quant=lr_quant)
        self.kind, self.strength, self.cut, self.settles = method.kind, method.strength_used, cut, cut
        self.only = scales if method.kind == "scales" else None
        if goal.budget is not None:
            self.units.target = Target(session, goal.budget, self.groups, [], torch.zeros(0))
        self.units.settle(self.kept, ())
        weights = {name: p.detach() for name, p in ready.named_parameters()}
        self.leaving: Kept = {}
        chosen = self._choose(weights, weights)  # also: a saliency that finds nothing to go by says so
        self.leaving = {g: u[~torch.isin(u, chosen[g])] for g, u in self.kept.items()}
        notes = (frozen_note(session, groups), *self.units.notes)
        ready.remarks = tuple(note for note in notes if note)
        self.about = {
            "kind": self.kind, "strength": str(self.strength), "cut": str(cut), "sparsity": str(sparsity),
            "budget": str(goal.budget), "saliency": name_of(ranked), "round_to": str(goal.round_to),
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------ a step
    def before_step(self, step: int) -> None:
        """Add the gradient of the penalty; before the cut take down what units are ranked by."""
        super().before_step(step)
        self._evidence: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        if step >= self.cut:
            return
        if step + 1 == self.cut:
            own = {name: p for name, p in self.ready.named_parameters() if name in self.units.makers}
            gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in own.items()}
            self._evidence = {name: p.detach().clone() for name, p in own.items()}, gradients
        for parameter, gradient in self.gradients(step):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def gradients(self, step: int) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
        """Yield parameters, and what the penalty adds to their gradients; one that is in two groups comes twice."""
        parameters = dict(self.ready.named_parameters())
        for group in self.groups:
            members = [m for m in group.members if m.is_parameter and (self.only is None or m.name in self.only)]
            held = [(member, parameters[member.name].detach()) for member in members if member.name in parameters]
            held = [(member, tensor) for member, tensor in held if tensor.is_floating_point()]
            if not held:
                continue
            factor = self.strength * self._factors(group, held, step)
            for member, tensor in held:
                spread = _spread(factor, member.unit_of.to(tensor.device), member.dim, tensor.dim())
                own = tensor.sign() if self.kind == "scales" else tensor
                yield parameters[member.name], (own * spread).to(tensor.dtype)

    def _factors(self, group: ChannelGroup, held: list[tuple[Any, Tensor]], step: int) -> Tensor:
        """Return what the weights of each unit are multiplied by in the gradient of R: (size,) float32."""
        device = held[0][1].device
        stays = torch.zeros(group.size, device=device)
        stays[self.kept[group].to(device)] = 1
        if self.kind == "scales":
            return stays
        if self.kind == "growing":
            goes = torch.zeros(group.size, device=device)
            goes[self.leaving[group].to(device)] = 1
            return goes * (step + 1) / self.cut
        squares, sizes = torch.zeros(group.size, device=device), torch.zeros(group.size, device=device)
        for member, tensor in held:
            rows = tensor.float().square().movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1)
            squares += _gathered(rows.sum(1), member.unit_of.to(device), group.size)
            sizes += _gathered(
                torch.full((len(rows),), float(rows.shape[1]), device=device), member.unit_of.to(device), group.size
            )
        norms = squares.sqrt()
        if self.kind == "lasso":
            return torch.where(norms > 0, sizes.sqrt() / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0) * stays
        alive = norms[stays > 0]
        most, least = alive.max(), alive.min()
        share = (most - norms) / (most - least).clamp(min=torch.finfo(norms.dtype).tiny)
        return 2 * 2 ** (STEEPNESS * share.clamp(0, 1)) * stays

    def after_step(self, step: int) -> None:
        """Let the units go where the penalty ends."""
        super().after_step(step)
        evidence, self._evidence = self._evidence, None
        if evidence is not None:
            self.kept = self._choose(*evidence)

    def _choose(self, weights: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> Kept:
        """Return the units that stay; of "growing" those that were not drawn to zero."""
        if self.kind == "growing" and self.leaving:
            return {g: u[~torch.isin(u, self.leaving[g])] for g, u in self.kept.items()}
        scores = self.units.scores(self.ready, weights, updates)
        target = self.units.target
        if target is None:
            return self.units.allocate(self.kept, scores, self.units.final)
        if self.units.sparsity is None:
            return self.units.within_budget(target, self.kept, scores, ())
        return self.units.allocate(self.kept, self.units.cheap_enough(target, self.kept, scores), self.units.final)

    # ------------------------------------------------------------------------------------------ where it stands
    def stage(self, step: int) -> str:
        """Before the cut, or after it."""
        return "regularised" if step < self.cut else "without units"

    def state_dict(self) -> dict[str, Any]:
        """Which units are drawn to zero."""
        return {"leaving": {group.name: units for group, units in self.leaving.items()}, "final": self.units.final}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on where `state_dict` was taken."""
        self.leaving = {
            group: state["leaving"][group.name].cpu() for group in self.groups if group.name in state["leaving"]
        }
        self.units.final = int(state["final"])

    def follow(self, small: Prepared) -> None:
        """Go on with what the module was shrunk to: no units go any more."""
        super().follow(small)
        self.units.target, self.leaving = None, {}

    def shared(self) -> Iterable[Any]:
        """Saliency and budget, too."""
        return (self.units.saliency, self.units.target, *super().shared())


def _gathered(values: Tensor, unit_of: Tensor, size: int) -> Tensor:
    """Return the sum of `values` (length,) over the indices of each unit: (size,)."""
    total = values.new_zeros(size + 1)  # the last entry takes what belongs to no unit
    for row in unit_of:
        total.index_add_(0, torch.where(row >= 0, row, size), values)
    return total[:size]


def _spread(factor: Tensor, unit_of: Tensor, dim: int, dims: int) -> Tensor:
    """Return the factor of the unit of each index of a dim, 0 where an index has none; broadcasts with the tensor."""
    padded = torch.cat([factor, factor.new_zeros(1)])
    found = padded[torch.where(unit_of >= 0, unit_of, len(factor))].sum(0)
    return found.view([-1 if d == dim else 1 for d in range(dims)])


@dataclass(frozen=True)
class Regularized(Method):
    """Draws units to zero, removes them, and trains what is left.

    Attributes:
        kind: the penalty, see the file.
        strength: what the penalty is multiplied by, 0 at least; None: as `STRENGTHS` has it.
        until: share of the steps with the penalty, above 0 and at most 1; the units go then.
    """

    name: ClassVar[str] = "regularized"
    prunes: bool = field(default=True, init=False)
    kind: Kind = "lasso"
    strength: float | None = None
    until: float = 0.5

    def __post_init__(self) -> None:
        check_word("kind", self.kind, KINDS)
        if self.strength is not None and not (is_number(self.strength) and self.strength >= 0):
            raise PlanError(
                f"strength must be a number, 0 at least, got {shown(self.strength)}",
                fix=f"Regularized({self.kind!r}, strength={STRENGTHS[self.kind]})",
            )
        if not is_number(self.until) or not 0 < self.until <= 1:
            raise PlanError(f"until must be above 0 and at most 1, got {shown(self.until)}", fix="until=0.5")

    @property
    def strength_used(self) -> float:
        """As given, or the default."""
        return STRENGTHS[self.kind] if self.strength is None else self.strength

    def takes(self, goal: Goal) -> Collection[str]:
        """What units go by."""
        return UNITS

    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> RegularizedRun:
        """Begin a run."""
        refuse(self, {"a Schedule": isinstance(training.schedule, Schedule)}, "its stages are GETA's; give steps")
        return RegularizedRun(ready, self, goal, max(1, round(self.until * steps)), training.lr_quant)
