"""A cut that a config can say: equal counts in all layers, and the entries of the config that build these lengths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import PlanError
from graphcomp.flows.held import Choose
from graphcomp.native.config import config_edits, config_of, entry_of, shapes_of
from graphcomp.pruning.multiples import step_of
from graphcomp.pruning.prunable import Prunable
from graphcomp.pruning.slice import kept_of_model
from graphcomp.pruning.ties import Tie, merged
from graphcomp.system.threads import one_at_a_time

SHOWN = 4
"""Modules that a note names."""

MOST_STEPS = 128
"""Largest multiple that is tried where the config takes no other lengths: a width is one of the number of heads."""


@dataclass(frozen=True)
class Uniform:
    """What may go where layers must stay alike.

    Attributes:
        plan: the analysis, with groups that are cut in larger steps where the config takes multiples alone.
        groups: that the config can say the lengths of; all groups where the model has no config.
        ties: sets of groups that keep equally many units.
        notes: what is left whole, and why.
    """

    plan: Analysis
    groups: tuple[ChannelGroup, ...]
    ties: tuple[Tie, ...]
    notes: tuple[str, ...]

    def of(self, prunable: Prunable) -> Prunable:
        """Return these groups, with the notes of both."""
        return Prunable(self.groups, (*prunable.notes, *self.notes))

    def choose(self, choose: Choose) -> Choose:
        """Return a function as `choose`, which adds these ties to those it is given."""
        return lambda ties: choose(merged([*self.ties, *ties]))


def check_uniform(scope: str, quantized: bool, zeros: bool) -> None:
    """Refuse what a config cannot say.

    Raises:
        PlanError: a part of the model, integer weights, or a choice that leaves no choice.
    """
    without = "without uniform=True"
    why, fix = (
        ("the config is the whole model's", without) if scope else
        ("engines that read sizes from a config read floats, and integers stand in a section",
         "compress(model, …, uniform=True), and bits=… with sparsity=0.0 for the result's module") if quantized else
        ('exactly the units go that are zero already, which need not be equally many: saliency="zeros"', without)
        if zeros else ("", "")
    )  # fmt: skip
    if why:
        raise PlanError("uniform=True is for whole models in floats", why=why, fix=fix)


@one_at_a_time
def alike_layers(plan: Analysis, groups: Sequence[ChannelGroup], round_to: int = 1) -> Uniform:
    """Return the groups that a config can say when they are cut alike, as found by its class's constructor.

    Groups are alike that have the same members in other layers (names that differ in numbers). Where one entry of the
    config stands for several kinds (feed-forward layers of encoder and decoder), these are tied to each other.

    Raises:
        PlanError: the config can say none of them.
    """
    kinds: dict[Any, list[ChannelGroup]] = {}
    for group in groups:
        kinds.setdefault(_kind(group), []).append(group)
    if config_of(plan.model) is None:
        note = "uniform=True: alike layers keep equally many units; the model holds no config that could say how many"
        return Uniform(plan, tuple(groups), merged(map(frozenset, kinds.values())), (note,))
    sayable = [kind for kind in kinds.values() if _edits(plan, kind, round_to) is not None]
    rest: dict[Any, list[list[ChannelGroup]]] = {}
    for kind in kinds.values():
        if kind not in sayable:
            rest.setdefault((kind[0].role, kind[0].size), []).append(kind)
    whole: list[ChannelGroup] = []
    for alike in rest.values():
        together = [group for kind in alike for group in kind]
        if len(alike) > 1 and _edits(plan, together, round_to) is not None:
            sayable.append(together)
        else:
            whole += together
    coarser: dict[ChannelGroup, ChannelGroup] = {}
    for kind in [kind for kind in kinds.values() if whole and kind[0] in whole]:
        step = _taken_step(plan, kind, round_to)
        if step is not None:
            coarser |= {
                g: replace(g, multiple=step, multiple_why="the config takes no other width") for g in kind
            }  # fmt: skip
            sayable.append(kind)
    whole = [group for group in whole if group not in coarser]
    notes = (_left_whole(whole),) if whole else ()
    if not sayable:
        raise PlanError(
            f"uniform=True leaves nothing of {type(plan.model).__name__} to prune",
            why=_left_whole(whole),
            fix="no uniform=True: config.json gets a section, which from_pretrained reads where graphcomp is imported",
        )
    stays = set(whole)
    return Uniform(
        replace(plan, groups=tuple(coarser.get(group, group) for group in plan.groups)),
        tuple(coarser.get(group, group) for group in groups if group not in stays),
        merged(frozenset(coarser.get(group, group) for group in kind) for kind in sayable),
        notes,
    )


def _taken_step(plan: Analysis, kind: Sequence[ChannelGroup], round_to: int) -> int | None:
    """Return the least number of units that can go at once where the config checks that lengths divide."""
    size, first = kind[0].size, max(step_of(group, round_to) for group in kind)
    for step in range(2 * first, min(size, MOST_STEPS * first), first):
        if size % step == 0 and entry_of(plan.model, _shapes(plan, kind, step)) is not None:
            return step
    return None


def _kind(group: ChannelGroup) -> Any:
    """Return what groups have in common that do the same in other layers."""
    members = {(re.sub(r"\d+", "*", member.name), member.dim, member.consumes) for member in group.members}
    return group.role, group.size, frozenset(members)


def _edits(plan: Analysis, kind: Sequence[ChannelGroup], round_to: int) -> Any:
    """Return the entries of the config that build one unit, or one block of units, less; None where none do."""
    step = max(step_of(group, round_to) for group in kind)
    if any(group.size <= step for group in kind):
        return None
    return config_edits(plan.model, _shapes(plan, kind, step))


def _shapes(plan: Analysis, kind: Sequence[ChannelGroup], step: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's tensors once `step` units of each group are gone."""
    kept = {group: torch.arange(group.size - step) for group in kind}
    shapes = shapes_of(plan.model)
    for name, dims in kept_of_model(plan.coupling, kept).items():
        if name in shapes:
            cut = list(shapes[name])
            for dim, indices in dims.items():
                cut[dim] = len(indices)
            shapes[name] = tuple(cut)
    for names in plan.captured.aliases.values():
        short = min((shapes[name] for name in names if name in shapes), default=None)
        shapes |= {name: short for name in names if name in shapes and short is not None}
    return shapes


def _left_whole(groups: Iterable[ChannelGroup]) -> str:
    names = list(dict.fromkeys(group.name for group in groups))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"uniform=True: no entry of the config says the length of {', '.join(names[:SHOWN])}{more}, left whole"
