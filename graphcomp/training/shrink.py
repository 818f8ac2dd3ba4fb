"""From a prepared module some of whose units are gone to one without them, that trains faster; and back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import PlanError, VerificationError
from graphcomp.ir.graph import all_tensors, value
from graphcomp.ir.module import bound_model
from graphcomp.pruning.mask import PREFIX, gone
from graphcomp.pruning.slice import SliceGroups, kept_of_tensors, select
from graphcomp.system.threads import one_at_a_time
from graphcomp.torch_compat import pytree
from graphcomp.training.prepared import SESSION, Prepared, Session, with_masks

REMNANT = 0.1
"""Of the largest magnitude in a parameter: what an average, for the most part of cool-down steps, may hold of units
that are gone."""


def _check_settled(ready: Prepared) -> None:
    """Raise PlanError where a schedule was begun and has not come to its cool-down."""
    done, needed = ready.progress
    if done < needed:
        raise PlanError(
            f"training stopped at step {done}, before the cool-down",
            why=f"which units go, and bits that are whole, is settled at step {needed}",
            fix=f"train on to step {needed} at least; an average (EMA) begins when optimizer.settled",
        )


@torch.no_grad()
def settled(ready: Prepared, *, verify: bool = True) -> Prepared:
    """`ready`; where it is an average, in which masks are almost 0 or 1, or units that are gone are not quite zero, a
    copy in which they are.

    Raises:
        PlanError: a schedule was begun and has not come to its cool-down, or an average reaches back to before it.
        VerificationError: with `verify`, units that are gone are far from zero.
    """
    kept = ready.kept()
    _check_settled(ready)
    masks = (ready.get_buffer(f"{PREFIX}{k}") for k in range(len(kept)))
    exactly = all(bool((mask == mask.round()).all()) for mask in masks)
    for name, dim, indices in gone(kept, ready.session.computed):
        parameter = ready.get_parameter(name)
        left = float(parameter.index_select(dim, indices.to(parameter.device)).abs().max())
        exactly = exactly and not left
        if verify and left > REMNANT * float(parameter.abs().max()):
            raise VerificationError(
                "the small model does not compute what the trained model computes",
                at=name,
                why=f"it holds up to {left:.2g} for units that are gone; an average (EMA) begun before they were?",
                fix="begin an average when optimizer.settled; finalize(ready, verify=False) goes on without them",
            )
    for name, mask in ready.elements.items():
        parameter = ready.get_parameter(name)
        pruned = parameter[~mask.to(parameter.device)]
        left = float(pruned.abs().max()) if len(pruned) else 0.0
        exactly = exactly and not left
        if verify and left > REMNANT * float(parameter.abs().max()):
            raise VerificationError(
                "the small model does not compute what the trained model computes",
                at=name,
                why=f"it holds up to {left:.2g} for elements that are pruned: trained on by another optimizer?",
                fix="ready.hold_elements() after each step; finalize(ready, verify=False) goes on without them",
            )
    if exactly:
        return ready
    exact = copy.deepcopy(ready)
    exact.keep(kept)
    exact.hold_elements()
    return exact


@one_at_a_time
def shrunk(ready: Prepared) -> Prepared:
    """A smaller copy without the units that are gone; see `graphcomp.shrink`.

    Law: it computes what `ready` computes, and has the same gradients where it has elements.

    Raises:
        PlanError, VerificationError: see `settled`.
    """
    ready = settled(ready)
    session = session_of(ready)
    kept = ready.kept()
    units = {group.name: own for group, own in kept.items()}
    in_floats = {group: units[group.name] for group in session.plan.groups if group.name in units}
    floats = SliceGroups(session.plan.coupling, in_floats)(session.plan.captured.module)
    model = bound_model(session.plan.model, dict(all_tensors(floats)))
    cut = analyze_captured(replace(session.plan.captured.rewritten(floats), original=model))
    plan = quantized = _named_as(session.plan, in_floats, cut)
    if session.bits is not None:
        graph = SliceGroups(session.quantized.coupling, kept)(session.quantized.captured.module)
        cut = analyze_captured(replace(session.quantized.captured.rewritten(graph), original=model))
        quantized = _named_as(session.quantized, kept, cut)
    groups = tuple(group for group in quantized.groups if group.name in units)
    whole = copy.deepcopy(ready)
    whole.zero_grad()
    small = with_masks(replace(session, plan=plan, quantized=quantized, groups=groups, whole=whole))
    small.meta[SESSION] = small.session.bind(small)  # one set of smaller tensors for graph, model and module
    cuts = kept_of_tensors(ready.session.quantized.coupling, kept)
    small.elements = {name: select(mask, cuts.get(name, {})) for name, mask in ready.elements.items()}
    small.set_progress(*ready.progress)
    small.recompute, small.norms_frozen, small.remarks = ready.recompute, ready.norms_frozen, ready.remarks
    small.train(ready.training)
    return small


def _named_as(before: Analysis, kept: Kept, cut: Analysis) -> Analysis:
    """`cut`, of the graph that was cut to `kept`, with the groups' names of `before`. One that is left with one unit is
    none any more, and names count those that are alike."""
    rest = [(group, len(kept[group]) if group in kept else group.size) for group in before.groups]
    names = {group.name for group, _ in rest}
    found = []
    for group in cut.groups:
        twins = (k for k, (old, size) in enumerate(rest) if size == group.size and _places(group) == _places(old))
        k = next(twins, None)
        name = rest.pop(k)[0].name if k is not None else group.name if group.name not in names else f"{group.name}*"
        found.append(replace(group, name=name))
    return replace(cut, groups=tuple(found))


def _places(group: ChannelGroup) -> set[tuple[str, int]]:
    return {(member.name, member.dim) for member in group.members}


@torch.no_grad()
def expanded(small: Prepared) -> Prepared:
    """Return the module that `small` was cut from, with all that `small` has learned since in its place."""
    whole = small.session.whole
    assert whole is not None
    kept, units = whole.kept(), {group.name: own for group, own in small.kept().items()}
    cuts = kept_of_tensors(whole.session.quantized.coupling, kept)
    learned, like = dict(all_tensors(small)), next(small.parameters())
    full: dict[int, Tensor] = {}
    for name, old in all_tensors(whole):
        if id(old) not in full:
            own = None if name.startswith(PREFIX) else learned.get(name)
            full[id(old)] = _grown(old, cuts.get(name, {}), own, like)
    found = copy.deepcopy(whole, dict(full))
    found.keep({group: own[units[group.name]] if group.name in units else own for group, own in kept.items()})
    return found


def _grown(old: Tensor, cut: Mapping[int, Tensor], learned: Tensor | None, like: Tensor) -> Tensor:
    """Return a copy of `old` with what was learned at the indices that were not cut; floats in the dtype of `like`."""
    if learned is None:
        data = old.detach().clone().to(like if old.is_floating_point() else like.device)
        return nn.Parameter(data, old.requires_grad) if isinstance(old, nn.Parameter) else data
    data = _filled(old.detach().to(learned), cut, learned.detach())
    return nn.Parameter(data, learned.requires_grad) if isinstance(learned, nn.Parameter) else data


@torch.no_grad()
def move(
    param_groups: Iterable[dict[str, Any]], state: MutableMapping[Any, Any], ready: Prepared, small: Prepared
) -> None:
    """Let an optimizer's groups and state, which are changed, be of `small` instead of `ready`: what it holds of a
    parameter is cut as that is. Parameters of neither stay.

    Raises:
        PlanError: what it holds does not say what a unit's part is; nothing is changed then.
    """
    cuts, new = kept_of_tensors(ready.session.quantized.coupling, ready.kept()), dict(small.named_parameters())
    names = {id(p): name for name, p in ready.named_parameters()}
    moved = {}
    for old, values in state.items():
        name = names.get(id(old), "")
        cut = cuts.get(name, {})
        moved[new.get(name, old)] = {
            key: _cut(value, old, cut, f"state '{key}' of {name}") if cut else value for key, value in values.items()
        }
    for group in param_groups:
        group["params"] = [new[names[id(p)]] if id(p) in names else p for p in group["params"]]
    state.clear()
    state.update(moved)


def _cut(value: Any, parameter: Tensor, cut: Mapping[int, Tensor], at: str) -> Any:
    """What an optimizer holds of a parameter, without what the parameter loses. A dim of size 1 is of all units, as in
    Adafactor's rows and columns.

    Raises:
        PlanError: it is of another shape, or no tensor but holds some.
    """
    if isinstance(value, Tensor) and value.dim() == parameter.dim():
        pairs = list(zip(value.shape, parameter.shape, strict=True))
        if all(own in (1, size) for own, size in pairs):
            return select(value, {dim: kept for dim, kept in cut.items() if pairs[dim][0] == pairs[dim][1]})
    strange = next((t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.numel() > 1), None)
    if strange is not None:
        raise PlanError(
            "the optimizer's state cannot be shrunk",
            at=at,
            why=f"it is {tuple(strange.shape)}, and the parameter {tuple(parameter.shape)}",
            fix="train on with masks; or graphcomp.shrink(ready) and a new optimizer",
        )
    return value


def give_back(small: Prepared, ready: Prepared) -> None:
    """Let `ready`, which `small` was cut from, hold what `small` has learned since; in place."""
    ready.load_state_dict(expanded(small).state_dict())
    ready.set_progress(*small.progress)


def _filled(full: Tensor, cuts: Mapping[int, Tensor], values: Tensor) -> Tensor:
    """A copy of `full` with `values` at the indices `cuts` of its dims."""
    result = full.clone()
    if not cuts:
        return result.copy_(values)
    indices = [cuts.get(dim, torch.arange(size)) for dim, size in enumerate(full.shape)]
    spread = [own.view([-1 if d == dim else 1 for d in range(full.dim())]) for dim, own in enumerate(indices)]
    return result.index_put_(tuple(own.to(full.device) for own in spread), values)


def session_of(ready: Prepared) -> Session:
    """Return the session of `ready` with the tensors that `ready` holds now.

    Raises:
        PlanError: the module is in another dtype than it was prepared in.
    """
    tensors = dict(all_tensors(ready))
    for node in ready.session.plan.captured.module.graph.find_nodes(op="get_attr"):
        was, now = value(node), tensors.get(str(node.target))
        if isinstance(was, Tensor) and now is not None and now.dtype != was.dtype:
            before, after = (str(t.dtype).removeprefix("torch.") for t in (was, now))
            raise PlanError(
                f"the module was prepared in {before}, and is in {after}",
                at=str(node.target),
                why="its graph takes example inputs of the dtype it was captured with",
                fix=f"ready.to(torch.{before}); or prepare the model and its example inputs in {after}",
            )
    return ready.session.bind(ready)
