"""Shares of units to remove: one of all groups, or one for each of several parts of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import PlanError
from graphcomp.pruning.allocation import Scope, allocate, rounding_note
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.names import by_module_name
from graphcomp.pruning.prunable import makes_units


class RoleShares(dict[str, float]):
    """Shares of units to remove by the roles of groups; groups of other roles stay whole."""


@dataclass(frozen=True)
class Part:
    """Groups that one share is of.

    Attributes:
        groups: whose units count.
        sparsity: share of these units to remove.
        name: the name or pattern that the share was given for; "" for all groups.
    """

    groups: tuple[ChannelGroup, ...]
    sparsity: float
    name: str = ""


def parts_of(model: nn.Module, groups: Sequence[ChannelGroup], sparsity: float | Mapping[Any, float]) -> list[Part]:
    """Return the parts that `sparsity` makes of the groups; groups that no entry names are in none.

    A group belongs to the last entry that matches a module which makes its units.

    Raises:
        PlanError: an entry is of no module, or of none that makes units of the groups.
    """
    if not isinstance(sparsity, Mapping):
        return [Part(tuple(groups), sparsity)]
    if isinstance(sparsity, RoleShares):
        return _by_role(groups, sparsity)
    shares = by_module_name(model, sparsity, "sparsity")
    entry_of = {group: entry for group in groups for entry in shares if makes_units(entry, group)}
    for entry in shares:
        if not any(makes_units(entry, group) for group in groups):
            raise PlanError(
                f"sparsity names {entry!r}, which makes no units that may go",
                why="its outputs are frozen, or left whole by ignore=, keep_inputs= or prune=",
                fix="see graphcomp.analyze(…).report() for the groups, and why the others are frozen",
            )
    members = {entry: tuple(g for g in groups if entry_of.get(g) == entry) for entry in shares}
    return [Part(members[entry], share, entry) for entry, share in shares.items() if members[entry]]


def _by_role(groups: Sequence[ChannelGroup], shares: RoleShares) -> list[Part]:
    found = [Part(tuple(g for g in groups if g.role == role), share, role) for role, share in shares.items()]
    for part in found:
        if not part.groups:
            raise PlanError(
                f"sparsity names the role {part.name!r}, and no units of the role may go",
                why="the model has none, or they are frozen, or left whole by ignore= or keep_inputs=",
                fix="see graphcomp.analyze(…).report() for the groups, and why the others are frozen",
            )
    return found


def allocate_parts(
    parts: Sequence[Part], scores: Scores, *, scope: Scope, round_to: int, already: Kept | None = None
) -> tuple[dict[ChannelGroup, Any], list[str]]:
    """Remove each part's share, or the nearest that `round_to` allows; return the units that stay, and notes.

    What an earlier choice removed (`already`) stays removed, and counts.

    Raises:
        BudgetError: no choice of units comes near a share.
    """
    kept: dict[ChannelGroup, Any] = {}
    notes = []
    for part in parts:
        found: Kept = allocate(
            part.groups,
            scores,
            sparsity=part.sparsity,
            scope=scope,
            round_to=round_to,
            already=already,
            nearest=True,
        )
        kept |= found
        notes.append(rounding_note(part.groups, found, part.sparsity, round_to, part.name))
    return kept, [note for note in notes if note]
