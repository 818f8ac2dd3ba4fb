"""Bits of each output channel, 0 among them, and how two controllers give them: by one importance.

    importance   I_c = mean |W_c| of output channel c of a layer; of a unit, the mean over the channels that make one
    layer        a in (0, 1): of each group, the a * most units of least importance get 0 bits
    channel      bits of the channels that stay, monotone in importance: around a mean, within a spread ("spread"), or
                 one action per channel, sorted ("channel")

Units are those of dependency groups: channels that are coupled across layers go together, or stay.

Source: AJPQ (Tang, Wei and Li 2020, arXiv 2011.06231), reconstructed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.pruning.multiples import step_of
from graphcomp.quantization.quantizers.mixed import MixedQuantizer
from graphcomp.quantization.sites import Site
from graphcomp.training.prepared import Prepared

Controller: TypeAlias = Literal["spread", "channel"]
"""How the channel controller says bits: by two actions per layer, or by one per channel."""
CONTROLLERS: tuple[Controller, ...] = get_args(Controller)


# ------------------------------------------------------------------------------------------------ a plan
@dataclass(frozen=True, eq=False)
class ChannelPlan:
    """Which units stay, and the bits of each channel.

    Attributes:
        left: for each group (size,) bool, True for units that stay.
        bits: for each planned weight (c,) int64, 0 where the channel goes.
    """

    left: tuple[Tensor, ...]
    bits: tuple[Tensor, ...]

    @cached_property
    def key(self) -> str:
        """The same of the same plans alone."""
        digest = hashlib.sha256()
        for own in (*self.left, *self.bits):
            digest.update(own.to(torch.uint8).numpy().tobytes() + b"|")
        return digest.hexdigest()[:24]

    def kept(self, groups: Sequence[ChannelGroup]) -> Kept:
        """Return the units of each group that stay."""
        return {group: own.nonzero().flatten() for group, own in zip(groups, self.left, strict=True)}


class Layout:
    """The channels of a prepared module that get bits, the units that may go, and what both are worth.

    Attributes:
        groups: whose units may go.
        steps: so many units of each group go together at least; what stays is a multiple.
        sites: the quantizers of weights whose channels get bits.
        shapes: of these weights.
        importance: (c,) float64 of the channels of each weight.
        worth: (size,) float64 of the units of each group.

    Args:
        ready: prepared with a `MixedQuantizer` on each weight, or in floats.
        round_to: the lengths of the dims of each group are multiples of it.
    """

    def __init__(self, ready: Prepared, groups: Sequence[ChannelGroup], round_to: int = 1) -> None:
        self.groups = tuple(groups)
        self.steps = tuple(step_of(group, round_to) for group in groups)
        self.sites: tuple[Site, ...] = tuple(
            site for site, own in ready.quantizers() if isinstance(own, MixedQuantizer) and site.parameter
        )
        tensors = dict(ready.named_parameters(remove_duplicate=False))
        self.shapes = tuple(tuple(tensors[site.parameter].shape) for site in self.sites)
        self._axes = [
            self._dims(site.parameter, len(shape)) for site, shape in zip(self.sites, self.shapes, strict=True)
        ]
        self.importance = tuple(_mean_magnitudes(tensors[site.parameter], _dim(site)) for site in self.sites)
        self.worth = tuple(_worth(group, tensors) for group in groups)

    def _dims(self, parameter: str, rank: int) -> list[list[tuple[int, Tensor]]]:
        """For each dim of a parameter the groups in it, by position, and which unit each index belongs to."""
        found: list[list[tuple[int, Tensor]]] = [[] for _ in range(rank)]
        for k, group in enumerate(self.groups):
            for member in group.members:
                if member.name == parameter:
                    found[member.dim].append((k, member.unit_of))
        return found

    def whole(self, bits: int) -> ChannelPlan:
        """Return the plan in which all stays, at so many bits."""
        left = tuple(torch.ones(group.size, dtype=torch.bool) for group in self.groups)
        return ChannelPlan(left, tuple(torch.full_like(own, bits, dtype=torch.int64) for own in self.importance))

    def alive(self, left: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return for each weight and each of its dims which indices stay, (length,) bool."""
        found = []
        for shape, axes in zip(self.shapes, self._axes, strict=True):
            masks = [torch.ones(length, dtype=torch.bool) for length in shape]
            for mask, own in zip(masks, axes, strict=True):
                for k, unit_of in own:
                    for row in unit_of:
                        mask &= (row < 0) | left[k][row.clamp(min=0)]
            found.append(masks)
        return found

    def channels(self, left: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """Return for each weight which channels stay, (c,) bool, and how many elements one of these has left."""
        found = []
        for site, masks in zip(self.sites, self.alive(left), strict=True):
            elements = 1
            for dim, mask in enumerate(masks):
                elements *= 1 if dim == _dim(site) else int(mask.sum())
            found.append((masks[_dim(site)], elements))
        return found


def _dim(site: Site) -> int:
    assert site.dim is not None, "bits of channels have a dim"
    return site.dim


def _mean_magnitudes(weight: Tensor, dim: int) -> Tensor:
    """Return mean |W_c| of each index of a dim, (c,) float64."""
    return weight.detach().double().abs().movedim(dim, 0).flatten(1).mean(1).cpu()


def _worth(group: ChannelGroup, tensors: dict[str, torch.nn.Parameter]) -> Tensor:
    """Return the mean over the channels that make each unit of their importance, (size,) float64.

    Channels are those of weights; a group that vectors alone make is ranked by these.
    """
    made = [member for member in group.producers if member.is_parameter]
    makers = [member for member in made if len(member.shape) > 1] or made
    total, count = (torch.zeros(group.size + 1, dtype=torch.float64) for _ in range(2))
    for member in makers:
        tensor = tensors[member.name]
        values = _mean_magnitudes(tensor[:, None] if tensor.dim() == 1 else tensor, member.dim)
        for row in member.unit_of:
            at = torch.where(row >= 0, row, group.size)  # the last entry takes what belongs to no unit
            total.index_add_(0, at, values)
            count.index_add_(0, at, torch.ones_like(values))
    return (total / count.clamp(min=1))[:-1]


# ------------------------------------------------------------------------------------------------ controllers
def bits_of(actions: Tensor, low: int, high: int) -> Tensor:
    """Return whole bits from `low` to `high` of actions in (0, 1): each number has an equal share of the actions."""
    return (low - 0.5 + actions * (high - low + 1)).round().clamp(low, high).long()


def spread_bits(importance: Tensor, mean: float, spread: float, low: int, high: int) -> Tensor:
    """Return bits in a line over the ranks of the importance: from `mean` - `spread` to `mean` + `spread`, rounded.

    Args:
        importance: (k,) of the channels that stay; equal ones share a rank.
        mean, spread: in bits.
    """
    order = torch.unique(importance)  # sorted
    rank = torch.searchsorted(order, importance).double()
    place = 2 * rank / max(len(order) - 1, 1) - 1 if len(order) > 1 else torch.zeros_like(rank)
    return (mean + spread * place).round().clamp(low, high).long()


def sorted_bits(importance: Tensor, bits: Tensor) -> Tensor:
    """Return the same bits, handed out so that a channel of higher importance never has fewer."""
    found = torch.empty_like(bits)
    found[importance.argsort(stable=True)] = bits.sort().values
    return found


class Actions:
    """From a vector of actions in (0, 1) to a plan.

    The actions are, in order: one per group (the share of its units that go, where units may); and, where bits are in a
    range, per weight the mean and the spread of its bits, or one per channel.

    Args:
        layout: the channels and units.
        bits: the fewest and the most bits of channels that stay; None: nothing is quantized.
        prunes: whether units may go.
        most: share of each group that may go at most.
        controller: see `Controller`.
    """

    def __init__(
        self, layout: Layout, bits: tuple[int, int] | None, *, prunes: bool, most: float, controller: Controller
    ) -> None:
        self.layout, self.bits, self.most, self.controller = layout, bits, most, controller
        self.units = len(layout.groups) if prunes else 0
        ranged = bits is not None and bits[0] < bits[1]
        per_weight = [2 if controller == "spread" else len(own) for own in layout.importance]
        self.of_bits = per_weight if ranged else []
        self.size = self.units + sum(self.of_bits)

    def uniform(self, share: float, mean: float) -> Tensor:
        """Return the actions that take one share of each group, and give all channels one `mean`, in 0 … 1."""
        found = torch.full((self.size,), mean, dtype=torch.float64)
        found[: self.units] = share
        if self.controller == "spread":
            found[self.units + 1 :: 2] = 0.0
        return found

    def plan(self, actions: Tensor, shift: float = 0.0) -> ChannelPlan:
        """Return the plan of a vector of actions.

        Args:
            actions: (size,), values outside of 0 … 1 count as the nearest end.
            shift: is added to what costs: to the means (or to all bits) and taken off the shares that go; so that a
                higher shift costs more.
        """
        layout = self.layout
        left = [torch.ones(group.size, dtype=torch.bool) for group in layout.groups]
        if self.units:
            shares = (actions[: self.units] - shift).clamp(0, 1).tolist()
            for k, share in enumerate(shares):
                left[k] = self._left(k, share)
        bits = []
        rest = list(torch.split(actions[self.units :], self.of_bits)) if self.of_bits else []
        for k, (stays, _) in enumerate(layout.channels(left)):
            own = torch.zeros_like(stays, dtype=torch.int64)
            if self.bits is not None:
                own[stays] = self._bits_of(rest[k] if rest else None, layout.importance[k], stays, shift)
            bits.append(own)
        return ChannelPlan(tuple(left), tuple(bits))

    def _left(self, k: int, share: float) -> Tensor:
        """Return which units stay where a share of `most` goes: a multiple of the step, or all; one at least."""
        size, step = self.layout.groups[k].size, self.layout.steps[k]
        stay = size - int(share * self.most * size + 1e-9)
        stay = min(size, max(1, -(-stay // step)) * step)
        found = torch.zeros(size, dtype=torch.bool)
        found[self.layout.worth[k].argsort(stable=True, descending=True)[:stay]] = True
        return found

    def _bits_of(self, actions: Tensor | None, importance: Tensor, stays: Tensor, shift: float) -> Tensor:
        assert self.bits is not None
        low, high = self.bits
        own = importance[stays]
        if actions is None:
            return torch.full((len(own),), low)
        if self.controller == "channel":
            return sorted_bits(own, bits_of((actions[stays] + shift).clamp(0, 1), low, high))
        mean, spread = float((actions[0] + shift).clamp(0, 1)), float(actions[1].clamp(0, 1))
        return spread_bits(own, low + (high - low) * mean, (high - low) / 2 * spread, low, high)
