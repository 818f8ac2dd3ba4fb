"""From a prepared module some of whose units are gone to one without them, that trains faster; and back.

The two are programs with tensors of the same names; the smaller one's are those of the whole one at the indices that
were kept. `CutFrom` holds these, and maps tensors both ways.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.coupling.analysis import Analysis, analyze_captured, analyze_rewritten
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import PlanError, VerificationError
from graphcomp.ir.graph import all_tensors, value
from graphcomp.ir.module import bound_model
from graphcomp.pruning.mask import PREFIX, gone
from graphcomp.pruning.slice import SliceGroups, kept_of_tensors, scatter, select
from graphcomp.system.threads import one_at_a_time
from graphcomp.torch_compat import pytree
from graphcomp.training.masked import with_masks
from graphcomp.training.prepared import SESSION, Prepared
from graphcomp.training.session import Session

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


@dataclass(frozen=True, eq=False)
class CutFrom:
    """The module that a smaller one was cut from, and where the tensors of the smaller one lie in those of the whole.

    Attributes:
        whole: the module as it was when it was cut.
        units: the units of each group of `whole` that were kept.
        kept: tensor -> dim -> indices that were kept, of the dims that got shorter.
    """

    whole: Prepared
    units: Kept
    kept: Mapping[str, Mapping[int, Tensor]]

    @staticmethod
    def of(ready: Prepared) -> CutFrom:
        """Return how `ready` is cut to the units that its masks leave; `whole` is a copy of `ready`."""
        whole, units = copy.deepcopy(ready), ready.kept()
        whole.zero_grad()
        return CutFrom(whole, units, kept_of_tensors(ready.session.quantized.coupling, units))

    def select(self, name: str, value: Tensor) -> Tensor:
        """Return a copy of what belongs to a tensor of the whole module, without what that loses.

        A dim of size 1 is of all indices, as in the rows and columns of Adafactor.
        """
        shape = self.whole.get_parameter(name).shape
        return select(value, {d: own for d, own in self.kept.get(name, {}).items() if value.shape[d] == shape[d]})

    def scatter(self, name: str, whole: Tensor, part: Tensor) -> Tensor:
        """Return a copy of `whole` that holds `part` at the indices that were kept."""
        return scatter(whole, self.kept.get(name, {}), part)

    def state(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an optimizer holds of a parameter, without what the parameter loses.

        Raises:
            PlanError: a value does not say what a unit's part is.
        """
        if name not in self.kept:
            return dict(values)
        return {key: self._entry(name, key, value) for key, value in values.items()}

    def _entry(self, name: str, key: str, value: Any) -> Any:
        shape = self.whole.get_parameter(name).shape
        dims = value.shape if isinstance(value, Tensor) else ()
        if len(dims) == len(shape) and all(own in (1, size) for own, size in zip(dims, shape, strict=True)):
            return self.select(name, value)
        strange = next((t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.numel() > 1), None)
        if strange is not None:
            raise PlanError(
                "the optimizer's state cannot be shrunk",
                at=f"state '{key}' of {name}",
                why=f"it is {tuple(strange.shape)}, and the parameter {tuple(shape)}",
                fix="train on with masks; or graphcomp.shrink(ready) and a new optimizer",
            )
        return value

    @torch.no_grad()
    def grown(self, small: Prepared) -> Prepared:
        """Return the whole module with tensors that hold what `small` has learned; units that went are zero."""
        learned, like = dict(all_tensors(small)), next(small.parameters())
        full: dict[int, Tensor] = {}
        found: dict[str, Tensor] = {}
        for name, old in all_tensors(self.whole):
            if id(old) not in full:
                own = None if name.startswith(PREFIX) else learned.get(name)
                full[id(old)] = self._grown(name, old, own, like)
            found[name] = full[id(old)]
        ready, left = self.whole.bind(found), {group.name: units for group, units in small.kept().items()}
        ready.keep({group: own[left[group.name]] if group.name in left else own for group, own in self.units.items()})
        return ready

    def _grown(self, name: str, old: Tensor, learned: Tensor | None, like: Tensor) -> Tensor:
        """Return a tensor of the whole module; without what was learned, a copy, floats in the dtype of `like`."""
        if learned is None:
            data, trained = old.detach().clone().to(like if old.is_floating_point() else like.device), old.requires_grad
        else:
            data, trained = self.scatter(name, old.detach().to(learned), learned.detach()), learned.requires_grad
        return nn.Parameter(data, trained) if isinstance(old if learned is None else learned, nn.Parameter) else data


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
        cut = analyze_rewritten(cut, replace(session.quantized.captured.rewritten(graph), original=model))
        quantized = _named_as(session.quantized, kept, cut)
    groups = tuple(group for group in quantized.groups if group.name in units)
    cut_from = CutFrom.of(ready)
    small = with_masks(replace(session, plan=plan, quantized=quantized, groups=groups, cut_from=cut_from))
    small.meta[SESSION] = small.session.bind(small)  # one set of smaller tensors for graph, model and module
    small.elements = {name: cut_from.select(name, mask) for name, mask in ready.elements.items()}
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
