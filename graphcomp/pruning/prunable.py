"""Which groups a method may cut: all, but those that the user or the defaults leave whole."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphcomp.arguments import wrong
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.axis import Axes, Factor, all_leaves, leaves, length
from graphcomp.coupling.groups import ROLES, ChannelGroup
from graphcomp.coupling.text import why_nothing
from graphcomp.errors import NothingToPrune, PlanError
from graphcomp.pruning.blocks import DEPTH
from graphcomp.pruning.names import module_names
from graphcomp.quantization.spec import matches

WHOLE_BY_DEFAULT = ("head_dim", "group")
"""Roles that are pruned where `prune=` names them alone."""

IGNORE, KEEP_INPUTS = " by ignore=", " by keep_inputs="
RANKS = ", as ranks of adapters beside a frozen network (prune=('hidden',) cuts them)"
"""Why a group is left whole, for the notes."""

NAMED = 8
"""Groups that a note names before it counts the rest."""


@dataclass(frozen=True)
class Prunable:
    """The groups that may be cut, and notes on those that `ignore=` and `keep_inputs=` took out."""

    groups: tuple[ChannelGroup, ...]
    notes: tuple[str, ...]


def find_prunable(
    analysis: Analysis, ignore: Any = (), keep_inputs: Any = (), prune: Sequence[str] | None = None
) -> Prunable:
    """Find the groups that a method may cut; the arguments are those of `graphcomp.prunable_groups`.

    Raises:
        PlanError: an entry of `ignore` or `keep_inputs` is of no module, or `prune` holds no role.
        NothingToPrune: no group is left.
    """
    check_roles(prune)
    if prune is not None and set(prune) & set(DEPTH):
        raise PlanError(
            f"prune={tuple(prune)!r} is for compress in one shot",
            why="training and groups of channels know no whole blocks",
            fix='compress(…, prune=("block",), calibration=batches) first',
        )
    ignored = module_names(analysis.model, ignore, "ignore")
    held = module_names(analysis.model, keep_inputs, "keep_inputs")
    by_role = [group for group in analysis.groups if _is_pruned(group, prune)]
    reasons = {group: _taken_out(group, ignored, held) for group in by_role}
    if prune is None:
        reasons |= dict.fromkeys(adapter_ranks(analysis, by_role), RANKS)
    groups = tuple(group for group in by_role if not reasons[group])
    if not groups:
        raise _nothing(analysis, prune)
    notes = [_note(why, [g for g in by_role if reasons[g] == why]) for why in (IGNORE, KEEP_INPUTS, RANKS)]
    notes += [_no_effect(entry) for entry in ignored if not any(makes_units(entry, group) for group in by_role)]
    return Prunable(groups, tuple(note for note in notes if note))


def check_roles(prune: Any) -> None:
    """Refuse roles that do not exist.

    Raises:
        PlanError: `prune` is no series of roles.
    """
    if prune is None:
        return
    if isinstance(prune, str) or not isinstance(prune, Iterable):
        raise wrong("prune", "a series of roles", prune, 'prune=("channel", "head", "hidden")')
    for role in prune:
        if role not in (*ROLES, *DEPTH):
            near = difflib.get_close_matches(str(role), (*ROLES, *DEPTH), n=1)
            raise PlanError(
                f"prune holds {role!r}, which is no role", fix=f"one of {', '.join(near or (*ROLES, *DEPTH))}"
            )


def _is_pruned(group: ChannelGroup, prune: Sequence[str] | None) -> bool:
    if prune is not None:
        return group.role in prune
    return group.role not in WHOLE_BY_DEFAULT and not (group.role == "width" and group.normalized)


def _taken_out(group: ChannelGroup, ignored: Sequence[str], held: Sequence[str]) -> str:
    """Return why a group is left whole; "" where it is not."""
    if any(makes_units(entry, group) for entry in ignored):
        return IGNORE
    readers = [_owner(member.name) for member in group.consumers]
    reads = any(matches(entry, owner) for entry in held for owner in readers)
    return KEEP_INPUTS if reads or any(makes_units(entry, group) for entry in held) else ""


def makes_units(entry: str, group: ChannelGroup) -> bool:
    """Whether a module that `entry` names makes units of the group."""
    return any(matches(entry, _owner(member.name)) for member in group.producers)


def _no_effect(entry: str) -> str:
    return f"ignore={entry!r} leaves no group whole: its outputs are not cut; keep_inputs= keeps what a module reads"


def adapter_ranks(analysis: Analysis, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return the groups that are only ranks of adapters (LoRA, bottlenecks): few trainable units in a frozen network.

    Every matrix of such a group is trainable, reads or writes a dim that frozen parameters have, too, and is narrower
    than the dim. Where no parameter is trainable (a network with its adapter, loaded for inference), ranks are those of
    pairs of matrices beside a matrix that reads and writes what the pair does (LoRA).
    """
    parameters = dict(analysis.model.named_parameters(remove_duplicate=False))
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    axes = analysis.coupling.attributes
    if frozen and len(frozen) == len(parameters):
        return [group for group in groups if _is_beside_a_matrix(group, axes, frozen)]
    if 2 * sum(parameters[name].numel() for name in frozen) < sum(p.numel() for p in parameters.values()):
        return []
    beside = {leaf for name in frozen & axes.keys() for leaf in all_leaves(axes[name])}
    return [group for group in groups if _is_rank(group, axes, frozen, beside)]


def _is_rank(
    group: ChannelGroup, axes: Mapping[str, Axes], frozen: Collection[str], beside: Collection[Factor]
) -> bool:
    members = [member for member in group.members if member.is_parameter]
    matrices = [member for member in members if len(member.shape) > 1]
    if any(member.name in frozen for member in members) or not any(member.consumes for member in matrices):
        return False
    for member in matrices:
        others = [axis for dim, axis in enumerate(axes[member.name]) if dim != member.dim]
        wide = [axis for axis in others if any(leaf in beside for leaf in leaves(axis))]
        if not any(isinstance(n := length(axis), int) and n > member.shape[member.dim] for axis in wide):
            return False
    return True


def _is_beside_a_matrix(group: ChannelGroup, axes: Mapping[str, Axes], names: Collection[str]) -> bool:
    """Whether the group is all that two matrices share, and a wider matrix reads and writes what the two do."""
    members = [member for member in group.members if member.is_parameter]
    if len(members) != 2 or any(len(member.shape) != 2 for member in members):
        return False
    down, up = sorted(members, key=lambda member: member.consumes)
    if down.consumes or not up.consumes or (down.dim, up.dim) != (0, 1):
        return False
    if down.shape[0] != group.size or 2 * group.size > min(down.shape[1], up.shape[0]):
        return False
    ends = [set(leaves(axes[up.name][0])), set(leaves(axes[down.name][1]))]
    others = (axes[name] for name in names if name in axes and name not in (down.name, up.name))
    return any(len(own) == 2 and [set(leaves(axis)) for axis in own] == ends for own in others)


def _owner(name: str) -> str:
    """Return the module that holds a parameter."""
    return name.rpartition(".")[0]


def _note(why: str, groups: Sequence[ChannelGroup]) -> str:
    if not groups:
        return ""
    named = ", ".join(f"{group.name} ({group.size})" for group in groups[:NAMED])
    more = f" and {len(groups) - NAMED} more" if len(groups) > NAMED else ""
    return f"left whole{why}: {named}{more}"


def _nothing(analysis: Analysis, prune: Sequence[str] | None) -> NothingToPrune:
    count = len(analysis.groups)
    left_out = f"{count} groups are left out by ignore=, keep_inputs= and prune=; " if count else ""
    fix = "; ".join(dict.fromkeys(u.fix for u in analysis.unknown_ops if u.fix)) or "see graphcomp.analyze(…).report()"
    uncut = {g.role: None for g in analysis.groups if not _is_pruned(g, None)} if prune is None else {}
    if uncut:
        fix = f"prune={tuple(uncut)!r} cuts what is left whole by default; {fix}"
    return NothingToPrune(
        f"nothing in {type(analysis.model).__name__} can be pruned", why=left_out + why_nothing(analysis), fix=fix
    )
