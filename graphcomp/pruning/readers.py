"""Readers of a group: the layers that sum its units away, with the unit that each element of a weight belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.axis import leaves
from graphcomp.coupling.groups import ChannelGroup, Member
from graphcomp.ir.graph import argument_at, bind
from graphcomp.ops.design import Design
from graphcomp.pruning.consumers import Consumer, Consumers


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads units of a group.

    Attributes:
        consumer: the layer.
        unit_of: shaped like the weight: which unit of the group an element belongs to, -1 where to none.
    """

    consumer: Consumer
    unit_of: Tensor

    def features(self, design: Design) -> Tensor | None:
        """Return the unit of each feature, (g, n) int64; None where the elements of a feature are of several units."""
        units = design.matrices(self.unit_of)
        first = units[..., 0]
        return first if bool((units == first[..., None]).all()) else None


@dataclass(frozen=True, eq=False)
class Readers:
    """The readers of each group, in the order of the graph.

    Attributes:
        consumers: of the graph.
        of: group -> readers, of the groups whose units are summed away by layers with a closed form alone.
        left: group -> why it is none of these.
    """

    consumers: Consumers
    of: dict[ChannelGroup, tuple[Reader, ...]]
    left: dict[ChannelGroup, str]


def find_readers(plan: Analysis, groups: Sequence[ChannelGroup]) -> Readers:
    """Return the readers of `groups`, which are of `plan`."""
    coupling, captured = plan.coupling, plan.captured
    consumers = Consumers(captured.module, coupling.sources, captured.outside.reads)
    by_factor = {group.factor: group for group in groups}
    found: dict[ChannelGroup, dict[Consumer, Reader]] = {group: {} for group in groups}
    left: dict[ChannelGroup, str] = {}
    for node, call in coupling.calls.items():
        arguments = bind(node) if call.contracted else {}
        for key, dims in call.contracted.items():
            axes = coupling.axes[argument_at(arguments, key)][0]
            for factor in {leaf for dim in dims for leaf in leaves(axes[dim])} & by_factor.keys():
                group = by_factor[factor]
                reader = _reader(consumers.at.get(node), group, coupling.first_names)
                if reader is None:
                    left[group] = f"{node.name} sums its units, and has no closed form"
                else:
                    found[group].setdefault(reader.consumer, reader)
    for group, own in found.items():
        if not own:
            left.setdefault(group, "no layer sums its units")
    return Readers(consumers, {g: tuple(own.values()) for g, own in found.items() if g not in left}, left)


def _reader(consumer: Consumer | None, group: ChannelGroup, first_names: dict[str, str]) -> Reader | None:
    """Return a consumer as a reader of a group; None where its weight does not say which units it reads."""
    if consumer is None:
        return None
    name = first_names[consumer.tensor]
    members = [member for member in group.members if member.name == name and member.consumes]
    if len(members) != 1:
        return None
    (member,) = members
    units = _alone(member)
    if units is None:
        return None
    shape = [-1 if dim == member.dim else 1 for dim in range(len(member.shape))]
    return Reader(consumer, units.view(shape).expand(member.shape).flatten()[consumer.index])


def _alone(member: Member) -> Tensor | None:
    """Return the unit of each index of a dim, -1 for none; None where an index belongs to several."""
    units = member.unit_of.max(0).values
    several = (member.unit_of >= 0) & (member.unit_of != units)
    return None if bool(several.any()) else units


def removed_features(units: Tensor, gone: Tensor) -> Tensor | None:
    """Return which features (g, n) belong to units that are `gone`, (k,); None where matrices lose unequal numbers."""
    found = torch.isin(units, gone)
    counts = found.sum(1)
    return found if bool((counts == counts[0]).all()) else None
