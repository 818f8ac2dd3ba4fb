"""The joint rule of GETA: how fast units are forgotten, and the steps of their quantizers that keep it a descent.

All active units of all groups are one flat vector, made of *entries*: the slices that one group has in one parameter.
Sums over entries and groups are taken for all of them at once; nothing loops over units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphcomp.methods.geta.quantizer_group import Bank

TINY = 1e-8
"""Of the norm of what is to be forgotten, below which there is nothing left to forget."""


@dataclass(frozen=True)
class Entry:
    """The slices of one parameter that belong to a group's active units.

    Attributes:
        name: of the parameter.
        dim: in which they are slices.
        indices: (k,) int64 along `dim`.
        group: position of the group.
        layer: position in the bank of the parameter's quantizer; -1 without one.
    """

    name: str
    dim: int
    indices: Tensor
    group: int
    layer: int


@dataclass(frozen=True)
class Rule:
    """How active units are forgotten: by `joint_rule` with its eta and xi, or in equal shares (`uniform`, as in HESSO)
    while the bits are only projected."""

    eta: float = 0.999
    xi: float = 0.9
    uniform: bool = False


@dataclass(frozen=True)
class Sums:
    """What the rule needs to know of e entries, each (e,) float64.

    With x the weights, C the clipped part of their quantized value and d R its rounding part (x where there is no
    quantizer, and 0), and u = α v what the base optimizer takes off them:

    Attributes:
        forget: <C, u>.
        round: <R, u>.
        size: ||C||².
        update: ||u||².
    """

    forget: Tensor
    round: Tensor
    size: Tensor
    update: Tensor


def joint_rule(
    sums: Sums, group: Tensor, groups: int, low: Tensor, high: Tensor, remaining: int, eta: float, xi: float
) -> tuple[Tensor, Tensor]:
    """The share γ of each group that is forgotten in this step, and the step d of each entry's quantizer.

    The direction of the active slices is p = -u - γ (C + d R). With

        γ = 1 / remaining                       where <C, u> >= 0: equal shares, all of it in the last step
          = (1 - η) ||u||² / -<C, u>            else, and 1 / remaining at most
        d = the largest allowed                 where <R, u> >= 0, or γ = 0
          = ξ η ||u||² / (γ -<R, u>)            else, within what is allowed

    <-u, p> is at least η (1 - ξ) ||u||² in every group: forgetting never undoes the descent.

    Args:
        sums: of e entries.
        group: (e,) int64, the group of each.
        groups: how many groups there are, g.
        low, high: (e,) the smallest and the largest step allowed; of no matter for entries without a quantizer.
        remaining: steps of the period that are left, this one included.
        eta, xi: between 0 and 1.

    Returns:
        γ (g,) in [0, 1 / remaining], and d (e,) in [low, high].

    Source: GETA (Qu et al. 2025, arXiv 2502.16638), the joint stage of QASSO. It is written there with α, ||v|| and
    cosines, which is the same. How we differ: one d per layer instead of one per group; where the step that keeps the
    descent is smaller than allowed, γ shrinks by as much as is needed at once (there by factors of 0.8); γ never
    exceeds 1 / remaining; whether anything is left to forget is told by the norm of C (there by its mean, which can
    be 0 for signed weights).
    """
    which = torch.arange(groups, device=group.device)[:, None]
    member = (group == which).to(sums.forget)  # (g, e): sums over groups in a fixed order
    forget, size, update = member @ sums.forget, member @ sums.size, member @ sums.update
    share = torch.full_like(forget, 1.0 / remaining)
    slow = torch.where(forget < 0, (1 - eta) * update / -forget, share)
    gamma = torch.minimum(slow, share).masked_fill(size.sqrt() < TINY, 0)
    against = sums.round < 0
    bound = torch.where(against, xi * eta * sums.update / -sums.round, torch.inf)  # of γ d, per entry
    fastest = torch.full_like(gamma, torch.inf).scatter_reduce(0, group, bound / low, "amin")
    gamma = torch.minimum(gamma, fastest)
    d = torch.where(against & (gamma[group] > 0), bound / gamma[group], high)
    return gamma, torch.clamp(d, low, high)


class Forgetting:
    """The active units of a period.

    Args:
        entries: in any order.
        parameters: by name.
        bank: of the quantizers.
        groups: how many groups there are.
    """

    def __init__(self, entries: Sequence[Entry], parameters: Mapping[str, Tensor], bank: Bank, groups: int) -> None:
        self.entries = sorted(entries, key=lambda e: e.layer < 0)  # those with a quantizer first
        self.parameters = parameters
        self.bank = bank
        self.groups = groups
        device = parameters[self.entries[0].name].device
        self.indices = [entry.indices.to(device) for entry in self.entries]
        lengths = [self._slices(parameters, k).numel() for k in range(len(self.entries))]
        quantized = sum(entry.layer >= 0 for entry in self.entries)
        self.lengths = torch.tensor(lengths, device=device)
        self.group = torch.tensor([entry.group for entry in self.entries], device=device)
        self.layer = torch.tensor([entry.layer for entry in self.entries[:quantized]], dtype=torch.int64, device=device)
        self.split = lengths
        self.codes = sum(lengths[:quantized])  # that many scalars, at the front, have a quantizer
        of_scalar = torch.arange(len(lengths), device=device).repeat_interleave(self.lengths)
        self.group_of_scalar = self.group[of_scalar]
        self.entry_of_scalar = of_scalar
        self.layer_of_scalar = self.layer[of_scalar[: self.codes]]

    def _slices(self, tensors: Mapping[str, Tensor], k: int) -> Tensor:
        entry = self.entries[k]
        return tensors[entry.name].detach().index_select(entry.dim, self.indices[k])

    def gather(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """(n,) all active scalars, of the parameters or of other tensors shaped like them."""
        source = self.parameters if tensors is None else tensors
        return torch.cat([self._slices(source, k).flatten() for k in range(len(self.entries))])

    @torch.no_grad()
    def apply(self, old: Tensor, d: Tensor, most: Tensor, remaining: int, rule: Rule) -> None:
        """Forget, after the base optimizer's step, and set the steps of all quantizers.

        Args:
            old: what `gather` gave before that step.
            d: (l,) the bank's steps before it.
            most: (l,) the most bits allowed.
            remaining: steps of the period that are left, this one included.
            rule: how.
        """
        new = self.gather()
        clipped, residual = self._parts(old, d)
        low, high = self.bank.limits(most)
        steps = torch.clamp(self.bank.d(), low, high)
        if rule.uniform:
            gamma, chosen = low.new_full((self.groups,), 1.0 / remaining), d[self.layer]
        else:
            sums = self._sums(clipped, residual, old - new)
            unlimited = low.new_ones(len(self.entries) - len(self.layer))
            low_e, high_e = (torch.cat([limit[self.layer], unlimited]) for limit in (low, high))
            gamma, chosen = joint_rule(sums, self.group, self.groups, low_e, high_e, remaining, rule.eta, rule.xi)
            own = torch.full_like(steps, torch.inf).scatter_reduce(0, self.layer, chosen[: len(self.layer)], "amin")
            steps = torch.where(own.isfinite(), own, steps)
        clipped[: self.codes] += chosen.to(old)[self.entry_of_scalar[: self.codes]] * residual
        self._write(new - gamma.to(old)[self.group_of_scalar] * clipped)
        if len(self.bank):
            self.bank.set_d(steps)

    def _sums(self, clipped: Tensor, residual: Tensor, update: Tensor) -> Sums:
        rounding = torch.nn.functional.pad(residual * update[: self.codes], (0, len(update) - self.codes))
        return Sums(
            forget=self._sum(clipped * update),
            round=self._sum(rounding),
            size=self._sum(clipped.square()),
            update=self._sum(update.square()),
        )

    def _parts(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) C, and (codes,) R of those with a quantizer."""
        coded, layer = x[: self.codes], self.layer_of_scalar
        if not self.codes:
            return x.clone(), coded
        magnitude = torch.minimum(coded.abs(), self.bank.q_m().to(x)[layer])
        if self.bank.powers:
            magnitude = magnitude.pow(self.bank.t().to(x)[layer])
        codes = magnitude / d.to(x)[layer]
        sign = coded.sign()
        return torch.cat([sign * magnitude, x[self.codes :]]), sign * (codes.round() - codes)

    def _sum(self, values: Tensor) -> Tensor:
        """(e,) float64: the sum of each entry's scalars, in a fixed order."""
        return torch.segment_reduce(values.double(), "sum", lengths=self.lengths, unsafe=True)

    def _write(self, values: Tensor) -> None:
        for entry, indices, part in zip(self.entries, self.indices, torch.split(values, self.split), strict=True):
            parameter = self.parameters[entry.name]
            shape = list(parameter.shape)
            shape[entry.dim] = len(indices)
            parameter.index_copy_(entry.dim, indices, part.view(shape).to(parameter.dtype))
