"""A cut that a config can say: equal counts in all layers, and the entries of the config that build these lengths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import PlanError
from graphcomp.flows.held import Choose
from graphcomp.ir.inputs import copies
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.preserve import eval_copy
from graphcomp.native.config import config_edits, config_of, edited, follow_config, shapes_of
from graphcomp.native.model import NativeResult
from graphcomp.pruning.multiples import step_of
from graphcomp.pruning.prunable import Prunable
from graphcomp.pruning.slice import kept_of_model
from graphcomp.pruning.ties import Tie, merged
from graphcomp.system.threads import one_at_a_time

SHOWN = 4
"""Modules that a note names."""


@dataclass(frozen=True)
class Uniform:
    """What may go where layers must stay alike.

    Attributes:
        groups: that the config can say the lengths of; all groups where the model has no config.
        ties: sets of groups that keep equally many units.
        notes: what is left whole, and why.
    """

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
    why = (
        "the config is the whole model's" if scope else
        "integer weights stand in a graph, which has no config" if quantized else
        'exactly the units go that are zero already, which need not be equally many: saliency="zeros"' if zeros else ""
    )  # fmt: skip
    if why:
        raise PlanError("uniform=True is for whole models in floats", why=why, fix="without uniform=True")


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
        return Uniform(tuple(groups), merged(map(frozenset, kinds.values())), (note,))
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
    notes = (_left_whole(whole),) if whole else ()
    if not sayable:
        raise PlanError(
            f"uniform=True leaves nothing of {type(plan.model).__name__} to prune",
            why=_left_whole(whole),
            fix="round_to=8 where the config checks that lengths divide; or no uniform=True: config.json has a section",
        )
    stays = set(whole)
    return Uniform(
        tuple(group for group in groups if group not in stays), merged(map(frozenset, sayable)), notes
    )  # fmt: skip


def _kind(group: ChannelGroup) -> Any:
    """Return what groups have in common that do the same in other layers."""
    members = {(re.sub(r"\d+", "*", member.name), member.dim, member.consumes) for member in group.members}
    return group.role, group.size, frozenset(members)


def _edits(plan: Analysis, kind: Sequence[ChannelGroup], round_to: int) -> Any:
    """Return the entries of the config that build one unit, or one block of units, less; None where none do."""
    step = max(step_of(group, round_to) for group in kind)
    if any(group.size <= step for group in kind):
        return None
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
    return config_edits(plan.model, shapes)


def _left_whole(groups: Iterable[ChannelGroup]) -> str:
    names = list(dict.fromkeys(group.name for group in groups))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"uniform=True: no entry of the config says the length of {', '.join(names[:SHOWN])}{more}, left whole"


# ------------------------------------------------------------------------------------------------ the result
@one_at_a_time
def with_config(plan: Analysis, found: NativeResult) -> tuple[NativeResult, list[str]]:
    """Return the model with a config that builds it, and a note; as it was, where its outputs would not be the same.

    The entries are those that build the model's tensors. Ints that the class's constructor makes of them take the place
    of the model's, and outputs on the example inputs are compared bit for bit.
    """
    model = found.module
    if model is None or config_of(model) is None:
        return found, []
    edits = config_edits(model, shapes_of(model))
    if edits is None:
        return found, ["uniform=True: no entries of the config build the model; its sizes stay in a section beside it"]
    inputs = plan.captured.inputs
    before = _outputs(model, inputs.copies())
    old = {id(module): dict(vars(module)) for module in model.modules()}
    if not follow_config(model, edited(config_of(model), edits)) or not _same(before, _outputs(model, inputs.copies())):
        for module in model.modules():
            vars(module).update(old[id(module)])
        return found, ["uniform=True: the model that the config builds computes something else; a section stays"]
    said = ", ".join(map(str, edits)) or "nothing"
    return replace(found, edits=()), [f"uniform=True: the config builds the model, with {said}"]


def _outputs(model: nn.Module, inputs: tuple[Any, Any]) -> list[Tensor]:
    args, kwargs = copies(inputs)
    with eval_copy(model, real=True) as twin, torch.no_grad():
        torch.manual_seed(0)
        return list(tensor_leaves(twin(*args, **kwargs)))


def _same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    pairs = list(zip(before, after, strict=False))
    return len(before) == len(after) and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
