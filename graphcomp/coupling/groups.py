"""ChannelGroup: units of a network that live or die together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from graphcomp.coupling.axis import (
    Axes,
    Axis,
    Concat,
    Factor,
    Product,
    Reason,
    all_leaves,
    coordinates,
    freeze,
    is_frozen,
    leaves,
    length,
    normal,
)
from graphcomp.coupling.propagate import Coupling
from graphcomp.coupling.strides import axes_in_strides
from graphcomp.ir.graph import argument_at, bind, source_line
from graphcomp.ops.call import Call

Role = Literal["channel", "head", "head_dim", "hidden", "width", "expert", "group"]
ROLES: tuple[Role, ...] = ("channel", "head", "head_dim", "hidden", "width", "expert", "group")
APART: tuple[Role, ...] = ("head_dim", "head", "expert")
"""Roles of units that are counted on their own where they divide a dim together with others."""


@dataclass(frozen=True, eq=False)
class Member:
    """One dim of one parameter or buffer in which a group's units lie.

    `unit_of` has one row per time the group's factor occurs in the dim (nearly always one): shape
    (occurrences, length of the dim), int64; entry [k, i] is the unit that index i belongs to, or -1.
    """

    name: str  # as in `named_parameters()` / `named_buffers()` of the user's model
    dim: int
    axis: Axis
    unit_of: Tensor
    consumes: bool  # the dim is contracted: the units are read here, not made
    is_parameter: bool
    shape: tuple[int, ...]  # of the whole tensor

    def indices(self, units: Tensor) -> Tensor:
        """Indices of this dim that belong to any of `units` ((u,) int64), ascending."""
        hit = torch.isin(self.unit_of, units).any(0)
        return hit.nonzero().flatten()

    @property
    def elements_per_unit(self) -> int:
        """Scalars of the tensor that one unit owns through this dim (mean over units)."""
        numel = 1
        for n in self.shape:
            numel *= n
        length = self.shape[self.dim]
        units = int(self.unit_of.max()) + 1
        return numel // length * int((self.unit_of >= 0).any(0).sum()) // max(units, 1)


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Coupled units: removing unit u removes every index of every member that belongs to u.

    Groups compare by identity; `name` is unique within one analysis and stable for one model.
    """

    name: str
    size: int  # units
    role: Role
    members: tuple[Member, ...]
    factor: Factor
    normalized: bool  # its axis takes part in layer, RMS or group norm statistics
    multiple: int = 1  # an op takes no other numbers of units but multiples of this, and all of them
    multiple_why: str = ""  # which op, and where

    @property
    def producers(self) -> tuple[Member, ...]:
        """Members whose rows make the unit (rows, biases, affine parameters, statistics)."""
        return tuple(m for m in self.members if not m.consumes)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members that contract the unit away."""
        return tuple(m for m in self.members if m.consumes)

    def __repr__(self) -> str:
        return f"ChannelGroup({self.name!r}, {self.size} {self.role} units, {len(self.members)} members)"


Kept = Mapping[ChannelGroup, Tensor]
"""For each group the units that stay: (k,) int64, ascending, at least one. Groups left out stay whole."""


@dataclass(frozen=True)
class FrozenAxis:
    """Indices of one parameter's dim that must stay."""

    name: str
    dim: int
    indices: int  # how many of the dim's indices
    reason: Reason

    def __str__(self) -> str:
        at = f"  at {self.reason.source}" if self.reason.source else ""
        return f"{self.name} dim {self.dim} ({self.indices}): {self.reason}{at}"


def find_groups(coupling: Coupling) -> tuple[ChannelGroup, ...]:
    """Every unfrozen factor that occurs in at least one parameter, in the order of the parameters.

    Units that parameters read and nothing makes (the copies that `repeat` lays end to end) are frozen here.
    """
    consumed, made = consumed_and_made(coupling)
    members: dict[Factor, list[Member]] = {}
    for name in _distinct(coupling):
        is_parameter = name in coupling.parameters
        shape = tuple(int(length(axis)) for axis in coupling.attributes[name])
        for dim, axis in enumerate(coupling.attributes[name]):
            rows: dict[Factor, list[Tensor]] = {}
            for factor, row in coordinates(axis):
                rows.setdefault(factor, []).append(row)
            for factor, found in rows.items():
                consumes = (name, dim) in consumed
                member = Member(name, dim, normal(axis), torch.stack(found), consumes, is_parameter, shape)
                members.setdefault(factor, []).append(member)
    groups: list[ChannelGroup] = []
    multiples = _multiples(coupling)
    names: Counter[str] = Counter()
    nested = nested_factors([(m.axis, _is_matrix(m)) for found in members.values() for m in found if m.is_parameter])
    for factor, found_in in members.items():
        if not any(m.is_parameter for m in found_in):
            continue
        if not any((m.name, m.dim) in made for m in found_in):
            freeze(factor, _NOT_MADE)
            continue
        role = _role(factor, factor in nested)
        if role == "width" and "head" in factor.marks and not _is_written_behind(coupling, found_in):
            role = "group" if factor in nested else "head"
        name = _name(role, found_in)
        names[name] += 1
        unique = name if names[name] == 1 else f"{name}#{names[name]}"
        multiple, why = multiples.get(factor, (1, ""))
        normalized = "normalized" in factor.marks
        groups.append(ChannelGroup(unique, factor.size, role, tuple(found_in), factor, normalized, multiple, why))
    return tuple(groups)


_NOT_MADE = Reason("copies that the forward makes, as many as it says: no parameter or buffer holds what they are")
_ALONE = Reason("cut until every index stands alone: the ops that read it group it in ways that do not nest")


def _is_matrix(member: Member) -> bool:
    return sum(length > 1 for length in member.shape) > 1


def nested_factors(dims: Sequence[tuple[Axis, bool]]) -> set[Factor]:
    """Factors that divide units which another factor counts already: cutting both would cut one dim twice.

    In a dim of 128 = (32 4) channels, as group norm and grouped convolutions make, one factor alone is cut by default:
    those that are all of some matrix's dim (a depthwise convolution's, whose filters are several a channel), else the
    innermost. Heads and the channels in them are apart: each is cut once.

    Args:
        dims: axis of each dim of each parameter, and whether the parameter is a matrix.
    """
    cut = {leaf for axis, is_matrix in dims if is_matrix for leaf in _not_nested(normal(axis))}
    nested: set[Factor] = set()
    for nest in (nest for axis, _ in dims for nest in _nests(normal(axis))):
        if not any(rank & cut for rank in nest):
            cut |= nest[-1] - nested
        nested.update(*(rank - cut for rank in nest))
    return nested


def _nests(axis: Axis) -> Iterator[list[set[Factor]]]:
    """The unfrozen factors of each product in `axis`, outermost first, apart for each kind of unit."""
    if isinstance(axis, Factor):
        return
    if isinstance(axis, Product):
        ranks = [{leaf for leaf in leaves(part) if not leaf.frozen} for part in axis.parts]
        for kind in dict.fromkeys(_kind(leaf) for rank in ranks for leaf in rank):
            of_kind = [{leaf for leaf in rank if _kind(leaf) == kind} for rank in ranks]
            if len(nest := [rank for rank in of_kind if rank]) > 1:
                yield nest
    for part in axis.parts:
        yield from _nests(part)


def _not_nested(axis: Axis) -> set[Factor]:
    """The factors of `axis` that stand in no product with others of their kind."""
    return set(leaves(axis)) - {leaf for nest in _nests(axis) for rank in nest for leaf in rank}


def _kind(factor: Factor) -> str:
    return next((mark for mark in APART if mark in factor.marks), "")


def _multiples(coupling: Coupling) -> dict[Factor, tuple[int, str]]:
    """Factor -> the number that its count of units must be a multiple of, and the op that says so."""
    found: dict[Factor, tuple[int, str]] = {}
    for node, call in coupling.calls.items():
        strides = axes_in_strides(coupling, node.all_input_nodes[0]) if call.strides > 1 else ()
        for axis, multiple in (*call.multiples, *((axis, call.strides) for axis in strides)):
            for factor, own in steps(normal(axis), multiple):
                before, why = found.get(factor, (1, f"{node.target}, {source_line(node)}"))
                found[factor] = math.lcm(before, own), why
    return {factor: own for factor, own in found.items() if own[0] > 1}


def steps(axis: Axis, multiple: int) -> Iterator[tuple[Factor, int]]:
    """Of what each factor must be a multiple, for the length of the axis to be one of `multiple`."""
    if isinstance(axis, Factor):
        yield axis, multiple
        return
    for part in axis.parts:
        rest = _sure(axis, part)
        yield from steps(normal(part), multiple // math.gcd(multiple, rest))


def _sure(axis: Product | Concat, part: Axis) -> int:
    """A number that the length of `axis` is a multiple of, beside the length of `part`."""
    if isinstance(axis, Concat):
        first = list(leaves(axis.parts[0]))
        return len(axis.parts) if all(list(leaves(other)) == first for other in axis.parts) else 1
    others = [length(other) for other in axis.parts if other is not part and is_frozen(other)]
    return math.prod(n for n in others if isinstance(n, int))


def find_frozen(coupling: Coupling) -> tuple[FrozenAxis, ...]:
    """For each parameter and dim the frozen indices, one entry per reason; dims of length 1 are left out."""
    found: list[FrozenAxis] = []
    for name in _distinct(coupling):
        if name not in coupling.parameters:
            continue
        for dim, axis in enumerate(coupling.attributes[name]):
            size = length(axis)
            assert isinstance(size, int)
            reasons: Counter[Reason] = Counter()
            for leaf in leaves(axis):
                if leaf.frozen:
                    reasons[leaf.frozen] += leaf.size
            if size > 1 and not any(True for _ in leaves(axis)):
                found.append(FrozenAxis(name, dim, size, _ALONE))
            elif is_frozen(axis) and reasons:  # all of it: one line, the first reason
                found.append(FrozenAxis(name, dim, size, next(iter(reasons))))
            else:
                found += [FrozenAxis(name, dim, count, reason) for reason, count in reasons.items()]
    return tuple(found)


def _distinct(coupling: Coupling) -> list[str]:
    """Each tensor of the graph once, by the first name it is read under."""
    return [name for name, first in coupling.first_names.items() if name == first]


def consumed_and_made(coupling: Coupling) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """(tensor, dim) pairs that some op sums over, and those that some op reads and does not sum over."""
    canonical = coupling.first_names
    consumed: set[tuple[str, int]] = set()
    made: set[tuple[str, int]] = set()
    inside: set[tuple[str, int]] = set()  # summed over while a weight is computed
    read: set[tuple[str, int]] = set()  # by an op beside activations, which does not sum over it
    for node, call in coupling.calls.items():
        summed = summed_axes(coupling, node, call)
        for operand in node.all_input_nodes:
            for name in coupling.sources.get(operand, ()):
                axes = coupling.attributes[name]
                here = {(canonical[name], dim) for dim in (_dims_in(axes, summed) if summed else [])}
                if node in coupling.sources:
                    inside |= here
                    continue
                others = {(canonical[name], dim) for dim in range(len(axes))} - here
                consumed |= here
                made |= others
                seen = set(all_leaves(coupling.axes[operand][0]))
                read |= {(n, dim) for n, dim in others if seen & set(leaves(axes[dim]))}
    return consumed | (inside - read), made


def consumed_dims(coupling: Coupling, node: fx.Node, axes: Axes) -> list[int]:
    """Return the dims of one of the op's operands, whose axes are given, that the op sums over."""
    call = coupling.calls[node]
    summed = summed_axes(coupling, node, call)
    return _dims_in(axes, summed) if summed else []


def summed_axes(coupling: Coupling, node: fx.Node, call: Call) -> list[Axis]:
    """The axes that the op sums away."""
    if not call.contracted or (node in coupling.sources and len(node.all_input_nodes) == 1):
        return []  # the range or the norm of a parameter is a property of it, not what is computed with it
    arguments = bind(node)
    summed: list[Axis] = []
    for key, dims in call.contracted.items():
        axes = coupling.axes[argument_at(arguments, key)][0]
        results = coupling.axes[node]
        if not results or not _same_axes(axes, results[0]):  # else a norm's statistics: nothing is summed away
            summed += [axes[dim] for dim in dims]
    return summed


def _same_axes(a: Axes, b: Axes) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _dims_in(axes: Sequence[Axis], summed: Sequence[Axis]) -> list[int]:
    """Dims that are one of `summed`: the very same axis where the op reads the tensor as it is, else one that shares
    its leaves."""
    same = [dim for dim, axis in enumerate(axes) if any(axis is other for other in summed)]
    if same:
        return same
    inside = {leaf for axis in summed for leaf in leaves(axis)}
    return [dim for dim, axis in enumerate(axes) if any(leaf in inside for leaf in leaves(axis))]


def _role(factor: Factor, nested: bool) -> Role:
    if "head_dim" in factor.marks:
        return "head_dim"
    if _is_stream(factor.marks, nested):
        return "width"
    if nested:
        return "group"
    for role in APART:
        if role in factor.marks:
            return role
    if "residual" in factor.marks:
        return "width"
    return "channel" if "conv" in factor.marks else "hidden"


def _is_stream(marks: frozenset[str], nested: bool) -> bool:
    """Return whether the indices are a stream of features that norms take statistics over, or a factor of a stream.

    A stream is what residual branches add to, or the channels of a convolution that a layer or RMS norm reads whole.
    """
    if "residual" in marks:
        return "normalized" in marks
    return {"conv", "layer_norm"} <= marks and not nested and not marks & {"head", "expert"}


def _is_written_behind(coupling: Coupling, members: Sequence[Member]) -> bool:
    """Return whether a matrix adds to units that a matrix before has read, as in a stream between residual blocks.

    What heads of a state space add to their inputs is read behind all of them.
    """
    reads = {member.name for member in members if member.consumes and _is_matrix(member)}
    writes = {member.name for member in members if not member.consumes and _is_matrix(member)}
    has_read = False
    for node in coupling.calls:
        names = {coupling.first_names[name] for n in node.all_input_nodes for name in coupling.sources.get(n, ())}
        if has_read and names & writes:
            return True
        has_read = has_read or bool(names & reads)
    return False


def _name(role: Role, members: Sequence[Member]) -> str:
    """The module that makes the units first, and the role: 'layer1.0.conv1/channel'."""
    made = [m for m in members if not m.consumes and m.is_parameter] or list(members)
    made = [m for m in made if len(m.shape) > 1] or made  # rather a matrix than the scale of a norm
    owner = made[0].name.rpartition(".")[0] or made[0].name
    return f"{owner}/{role}"
