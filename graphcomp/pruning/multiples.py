"""Numbers of units that an op can take: where a kernel wants rows of whole blocks of bytes, widths are multiples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graphcomp.coupling.axis import Concat, normal
from graphcomp.coupling.groups import ChannelGroup, Kept, Member, steps
from graphcomp.pruning.evidence import Scores

FAST = ((128, 16), (64, 8), (8, 4))
"""Size of a group from which on its widths are multiples, and of how many, where time is what counts."""

NESTED = ("head_dim", "group")
"""Roles whose units make a dim together with units of another group, which may get fewer, too."""


def step_of(group: ChannelGroup, round_to: int) -> int:
    """The number of units kept of `group` is a multiple of this, or all of the group."""
    return math.lcm(units_of_length(group, round_to), group.multiple)


def units_of_length(group: ChannelGroup, round_to: int) -> int:
    """Return of how many units the number kept is a multiple, for each dim's length to be a multiple of `round_to`.

    A head of 32 dims is a multiple of 8 by itself. Heads go one by one where no pair, triple, … of them could: what
    kernels like costs no head.
    """
    if round_to == 1:
        return 1
    whole = [m for m in group.members if _divides(m, group)] if group.role not in NESTED else []
    own = [member.shape[member.dim] // group.size for member in whole if member.is_parameter]
    step = math.lcm(*(round_to // math.gcd(round_to, length) for length in own)) if own else round_to
    return 1 if group.role == "head" and step >= group.size else step


def with_group_sizes(groups: Sequence[ChannelGroup], sizes: Mapping[str, int]) -> tuple[ChannelGroup, ...]:
    """Return the groups, those that a weight reads whose inputs are quantized in groups with a `multiple` of that size.

    A row that is one group, or ends in a smaller one before any cut, can have any length.

    Args:
        groups: all groups of an analysis.
        sizes: weight -> how many inputs share a step.
    """
    return tuple(_with_group_sizes(group, sizes) for group in groups)


def _with_group_sizes(group: ChannelGroup, sizes: Mapping[str, int]) -> ChannelGroup:
    multiple, why = group.multiple, group.multiple_why
    for member in group.members:
        size = sizes.get(member.name, 0)
        length = member.shape[member.dim]
        if member.dim != len(member.shape) - 1 or not size or length <= size or length % size:
            continue
        own = math.lcm(multiple, *(step for factor, step in steps(member.axis, size) if factor is group.factor))
        if own > multiple:
            multiple, why = own, f"group_size={size} of {member.name}"
    return group if multiple == group.multiple else replace(group, multiple=multiple, multiple_why=why)


def with_fast_widths(groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """Return the groups, those whose units are single indices of a dim with a `multiple` that vector kernels like.

    Widths between take kernels that are slower than those of the next multiple, or of the whole group.
    """
    return tuple(_with_fast_widths(group) for group in groups)


def _with_fast_widths(group: ChannelGroup) -> ChannelGroup:
    step = next((step for least, step in FAST if group.size >= least), 1)
    each = [member.shape[member.dim] // group.size for member in group.members if _divides(member, group)]
    step = max((step // math.gcd(step, own) for own in each), default=step)
    multiple = math.lcm(group.multiple, step)
    if multiple == group.multiple or multiple >= group.size:
        return group
    return replace(group, multiple=multiple, multiple_why=group.multiple_why or "kernels work on so many at once")


def _divides(member: Member, group: ChannelGroup) -> bool:
    """Whether each index of the member's dim is of one unit, and each unit has equally many."""
    return not isinstance(normal(member.axis), Concat) and member.shape[member.dim] % group.size == 0


def in_multiples(
    kept: Kept, scores: Scores, round_to: int = 1, *, at_most: bool = False
) -> tuple[dict[ChannelGroup, Tensor], list[str]]:
    """Return the choice nearest to `kept` in which every group has a number of units that its ops can take, and notes.

    Each group keeps its best units; the rounding of one group makes up for that of those before.

    Args:
        kept: a choice that meets the sparsity or the budget.
        scores: (size,) per group, of those with a `multiple`.
        round_to: all other numbers are multiples of it already.
        at_most: round down, where a budget is not to be exceeded.
    """
    found = dict(kept)
    surplus = 0
    for group, units in kept.items():
        step = step_of(group, round_to)
        if len(units) == group.size or len(units) % step == 0:
            continue
        low, high = len(units) // step * step, min(-(-len(units) // step) * step, group.size)
        down = surplus + low - len(units), low
        up = surplus + high - len(units), high
        nearest = min((up, down), key=lambda choice: abs(choice[0]))
        surplus, count = up if low == 0 else down if at_most else nearest
        found[group] = _best(units, scores[group], count)
    changed = [group for group in kept if len(found[group]) != len(kept[group])]
    return found, [_note(changed, found, kept)] if changed else []


def _best(units: Tensor, scores: Tensor, count: int) -> Tensor:
    """The `count` best units, those of `units` before all others: (count,) int64, ascending."""
    values = scores.detach().double().cpu()
    stays = torch.zeros(len(values), dtype=torch.bool)
    stays[units.cpu()] = True
    order = values.argsort(descending=True, stable=True)
    return torch.cat([order[stays[order]], order[~stays[order]]])[:count].sort().values


def _note(changed: list[ChannelGroup], found: Mapping[ChannelGroup, Tensor], asked: Kept) -> str:
    reasons = dict.fromkeys(f"a multiple of {group.multiple} ({group.multiple_why})" for group in changed)
    names = ", ".join(group.name for group in changed[:3]) + (" and others" if len(changed) > 3 else "")
    kept, wanted = (sum(len(units) for units in choice.values()) for choice in (found, asked))
    instead = f"{kept} are kept in all, not {wanted}" if kept != wanted else f"others of the {kept} are kept"
    return f"{names}: the number of units kept is {' or '.join(reasons)}, so {instead}"
