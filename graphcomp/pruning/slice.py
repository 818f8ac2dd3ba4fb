"""The slice pass: pruned units leave every parameter, buffer and shape constant.

It knows no op. Tensors are index-selected by their axes; every shape constant in the graph is the length of an axis
(the rules say which) and is recomputed from what is kept.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import Tensor, fx

from graphcomp.arguments import check_instance, check_mapping, wrong
from graphcomp.coupling.axis import Axes, Axis, Factor, all_leaves, coordinates, kept_indices, kept_length, length
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.coupling.propagate import Coupling
from graphcomp.coupling.size import Size
from graphcomp.errors import PlanError
from graphcomp.ir.graph import (
    all_tensors,
    assign,
    bind,
    clone,
    set_argument,
    value,
)
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import before
from graphcomp.ir.streamed import StreamedTensor, in_memory, put_aside
from graphcomp.ops.call import Call
from graphcomp.torch_compat import FakeTensor


def check_kept(kept: Kept) -> None:
    """Raise PlanError where a group would be empty or an index is not one of its units."""
    check_mapping("kept units", kept, "{group: units}")
    for group, units in kept.items():
        check_instance("each group of kept units", group, ChannelGroup, "plan.group(name)")
        check_instance(f"the kept units of {group.name}", units, Tensor, "torch.tensor([0, 1, 2])")
        if units.numel() == 0:
            raise PlanError(f"{group.name} would lose all of its {group.size} units", fix="keep at least one unit")
        if bool((units[1:] <= units[:-1]).any()) or int(units[0]) < 0 or int(units[-1]) >= group.size:
            raise PlanError(
                f"the kept units of {group.name} are not ascending indices below {group.size}",
                why=f"got {units.tolist()[:8]}…",
            )


def as_kept(groups: Sequence[ChannelGroup], given: Any) -> dict[ChannelGroup, Tensor]:
    """Return what a user gives as kept units as ascending indices: (k,) int64 each.

    Args:
        groups: of the plan that is to be cut.
        given: group -> indices of the units that stay, or a mask (size,) of bools that is True for these.

    Raises:
        PlanError: a group is of another plan, or its units are neither indices nor a mask of its size.
    """
    check_mapping("kept", given, "kept={plan.groups[0]: [0, 1, 2]}")
    found: dict[ChannelGroup, Tensor] = {}
    for group, units in given.items():
        check_groups("kept", groups, [group])
        found[group] = _indices(group, units)
    check_kept(found)
    return found


def check_groups(option: str, groups: Sequence[ChannelGroup], given: Any) -> None:
    """Refuse groups that are of another plan.

    Raises:
        PlanError: an entry of `given` is none of `groups`.
    """
    check_group_list(option, given)
    for group in given:
        if any(group is own for own in groups):
            continue
        raise PlanError(
            f"{option} holds {group.name}, a group of another plan",
            why="groups of two plans are different ones, of one model too",
            fix=f"plan.group({group.name!r}) of the plan that is cut",
        )


def check_group_list(option: str, given: Any) -> None:
    """Refuse what is no sequence of groups.

    Raises:
        PlanError: `given`, or an entry, is something else.
    """
    if isinstance(given, (str, Tensor)) or not isinstance(given, Sequence):
        raise wrong(option, "a sequence of groups", given, f"{option}=plan.groups")
    for group in given:
        check_instance(f"each group of {option}", group, ChannelGroup, "plan.group(name), or one of plan.groups")


def _indices(group: ChannelGroup, units: Any) -> Tensor:
    """The units of a group as ascending indices: (k,) int64 on the CPU."""
    fix = f"indices from 0 to {group.size - 1}, or a mask of {group.size} bools"
    try:
        found = torch.as_tensor(list(units) if isinstance(units, (range, set, frozenset)) else units).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise wrong(f"the kept units of {group.name}", "indices or a mask", units, fix) from error
    if found.dtype is torch.bool:
        if tuple(found.shape) != (group.size,):
            raise PlanError(
                f"the mask of {group.name} has shape {tuple(found.shape)}, and the group {group.size} units", fix=fix
            )
        found = found.nonzero().flatten()
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dim() != 1):
        raise wrong(f"the kept units of {group.name}", "whole numbers in one dim, or bools", units, fix)
    indices: Tensor = torch.unique(found.long())
    return indices


def by_factor(kept: Kept) -> dict[Factor, Tensor]:
    """The kept units of each cut group, by its factor."""
    check_kept(kept)
    return {group.factor: units for group, units in kept.items() if units.numel() < group.size}


def kept_of_model(coupling: Coupling, kept: Kept) -> dict[str, dict[int, Tensor]]:
    """As `kept_of_tensors`, with tensors that the model reads beside the captured graph alone (in training mode)."""
    found: dict[str, dict[int, Tensor]] = {}
    for own in (*coupling.beside, coupling):
        found |= kept_of_tensors(own, kept)
    return found


def kept_of_tensors(coupling: Coupling, kept: Kept) -> dict[str, dict[int, Tensor]]:
    """Tensor name -> dim -> kept indices ((k,) int64, ascending), for the dims that get shorter."""
    units = by_factor(kept)
    found: dict[str, dict[int, Tensor]] = {}
    for name, axes in coupling.attributes.items():
        dims = {dim: kept_indices(axis, units) for dim, axis in enumerate(axes)}
        cut = {dim: indices for dim, indices in dims.items() if indices is not None}
        if cut:
            found[name] = cut
    return found


def kept_units(
    coupling: Coupling, groups: Sequence[ChannelGroup], tensors: Mapping[str, Mapping[int, Tensor]]
) -> dict[ChannelGroup, Tensor]:
    """Return the units that a cut left of each group, from the indices that it left of tensors (see `kept_of_tensors`).

    Groups that no tensor tells of are left out: they are whole.
    """
    of_factor = {group.factor: group for group in groups}
    found: dict[ChannelGroup, Tensor] = {}
    for name, dims in tensors.items():
        for dim, indices in dims.items():
            for factor, row in coordinates(coupling.attributes[name][dim]):
                if factor in of_factor and of_factor[factor] not in found:
                    units = row[indices]
                    found[of_factor[factor]] = torch.unique(units[units >= 0])
    return {group: units for group, units in found.items() if len(units) < group.size}


def select(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """A copy of `tensor` with only the given indices of the given dims."""
    result = tensor.detach()
    for dim, indices in dims.items():
        result = result.index_select(dim, indices.to(result.device))
    return result.clone(memory_format=torch.contiguous_format) if result is tensor or not dims else result


def scatter(tensor: Tensor, dims: Mapping[int, Tensor], part: Tensor) -> Tensor:
    """A copy of `tensor` that holds `part` at the given indices of the given dims: `select` the other way."""
    if isinstance(tensor, StreamedTensor):
        return put_aside(scatter(in_memory(tensor), dims, in_memory(part)))
    result = tensor.detach().clone()
    if not dims:
        return result.copy_(part)
    indices = [dims.get(dim, torch.arange(size)) for dim, size in enumerate(tensor.shape)]
    spread = [own.view([-1 if d == dim else 1 for d in range(tensor.dim())]) for dim, own in enumerate(indices)]
    return result.index_put_(tuple(own.to(tensor.device) for own in spread), part.detach().to(tensor.dtype))


@dataclass(frozen=True)
class SliceGroups(GraphPass):
    """Keep only the `kept` units of each group; groups not named stay whole.

    The result shares no memory with the module; `coupling` must be of the module's graph. Each value says afterwards
    the shape that its axes say, so that the check at the end of a pipeline compares what is computed with the axes.
    """

    coupling: Coupling
    kept: Kept
    name: ClassVar[str] = "slice groups"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """A new, smaller module."""
        units = by_factor(self.kept)
        counts = {factor: len(indices) for factor, indices in units.items()}
        small, new_node = clone(module)
        self._slice_tensors(small)
        for node, call in self.coupling.calls.items():
            if node in new_node and self._is_cut(node, counts):
                _resize(new_node[node], call, counts)
        for old, new in new_node.items():
            _update_value(new, self.coupling.axes.get(old, []), counts)
        small.recompile()
        return small

    def _slice_tensors(self, small: fx.GraphModule) -> None:
        """Smaller copies in place of every tensor; one that stood under two names still does."""
        cuts = kept_of_tensors(self.coupling, self.kept)
        old = dict(all_tensors(small))
        new: dict[int, Tensor] = {}
        for name, tensor in old.items():
            if id(tensor) not in new:
                data = select(tensor, cuts.get(name, {}))
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                new[id(tensor)] = torch.nn.Parameter(data, tensor.requires_grad) if is_parameter else data
            assign(small, name, new[id(tensor)])

    def _is_cut(self, node: fx.Node, counts: Mapping[Factor, int]) -> bool:
        values = [*node.all_input_nodes, node]
        axes = [a for value in values for found in self.coupling.axes.get(value, []) for a in found]
        return any(leaf in counts for leaf in all_leaves(axes))


def _update_value(node: fx.Node, axes: Sequence[Axes], counts: Mapping[Factor, int]) -> None:
    """Give the fake tensors of meta["val"] their new shapes; dynamic lengths stay symbols."""
    remaining = iter(axes)
    old = value(node)
    if isinstance(old, Tensor):
        node.meta["val"] = _resized_fake(old, next(remaining, ()), counts)
    elif isinstance(old, (list, tuple)):
        node.meta["val"] = [_resized_fake(v, next(remaining, ()), counts) if isinstance(v, Tensor) else v for v in old]


def _resized_fake(fake: Tensor, axes: Axes, counts: Mapping[Factor, int]) -> Tensor:
    before, after = [length(a) for a in axes], [kept_length(a, counts) for a in axes]
    if before == after:
        return fake
    shape: list[Any] = []
    for old, b, a in zip(fake.shape, before, after, strict=True):
        if isinstance(a, int) or a == b:
            shape.append(old if a == b else a)
        else:
            numerator, denominator = _ratio(b, a)
            shape.append(old // denominator * numerator)
    mode = fake.fake_mode if isinstance(fake, FakeTensor) else contextlib.nullcontext()
    with mode:
        return torch.empty(shape, dtype=fake.dtype, device=fake.device)


def _ratio(before: Size, after: Size) -> tuple[int, int]:
    numerator, denominator = (sympy.Rational(1) * after / before).as_numer_denom()
    return int(numerator), int(denominator)


def _resize(node: fx.Node, call: Call, counts: Mapping[Factor, int]) -> None:
    """Bring the shape constants of one op up to date."""
    arguments = bind(node)
    for name, axes in call.lengths.items():
        if axes is not None and name in arguments:
            set_argument(node, name, _resized(node, arguments[name], axes, counts))
    for name, constant in call.pins.items():
        set_argument(node, name, constant)


def _resized(node: fx.Node, old: Any, axes: Axis | list[Axis | None], counts: Mapping[Factor, int]) -> Any:
    if isinstance(axes, list):
        if isinstance(old, int):  # one number that stands for a list of one
            old = [old]
        return [o if a is None else _resized(node, o, a, counts) for o, a in zip(old, axes, strict=True)]
    was, will_be = length(axes), kept_length(axes, counts)
    if was == will_be or (isinstance(old, int) and old == -1 and was != -1):
        return old
    if isinstance(will_be, int):
        return will_be
    numerator, denominator = _ratio(was, will_be)
    make = before(node)
    if denominator != 1:
        old = make(operator.floordiv, old, denominator)
    return make(operator.mul, old, numerator) if numerator != 1 else old
