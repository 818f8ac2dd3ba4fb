"""The user's own model, run at full size as if the removed units never existed.

A recorded graph holds for one path. With fewer units the model may take another (other boxes survive), so the reference
for its cut is the model itself: copied, with zeros where a parameter would read a removed unit, and with masks where an
op sums or takes statistics over activations. Those ops are found again by where they stand (`OpSite`), on whatever path
the run takes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.capture.record import OP_SITE, OpSite, OpSites, op_by_op
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.axis import Axis, Factor, all_leaves, kept_indices, length
from graphcomp.coupling.groups import Kept, consumed_and_made
from graphcomp.coupling.propagate import Coupling
from graphcomp.ir.graph import argument_at, assign, bind
from graphcomp.ir.module import copied, tensor_names
from graphcomp.ops.answers import masked_form, parameter_behind
from graphcomp.ops.call import Call
from graphcomp.pruning.mask import computed_with
from graphcomp.pruning.slice import by_factor
from graphcomp.torch_compat import OpOverload, TorchDispatchMode, refresh_flat_weights, schema_of


def masked_model(analysis: Analysis, kept: Kept) -> nn.Module:
    """A copy of the user's model in which nothing reads the units that go."""
    model = copy.deepcopy(analysis.model)
    _zero_what_reads(model, kept)
    return MaskedRun(model, _masks(analysis, by_factor(kept)))


def zeroed_model(analysis: Analysis, kept: Kept) -> nn.Module | None:
    """Return a copy of the user's model with zeros where a parameter would read a removed unit.

    The copy is the masked model on every path, whatever the inputs are. None where zeros are not enough: an op sums
    or takes statistics over activations that hold removed units, or over a weight that is computed.
    """
    cut = by_factor(kept)
    if any(_needs_masks(coupling, cut) for coupling in (analysis.coupling, *analysis.coupling.beside)):
        return None
    model = copied(analysis.model, share=True)  # what is written into gets memory of its own
    _zero_what_reads(model, kept)
    for coupling in analysis.coupling.beside:
        _zero_what_is_read_beside(model, coupling, cut)
    return model


def _needs_masks(coupling: Coupling, cut: Mapping[Factor, Tensor]) -> bool:
    computed = computed_with(coupling)
    for call in coupling.calls.values():
        arguments = bind(call.node)
        for key, dims in call.contracted.items():
            operand = argument_at(arguments, key)
            axes = coupling.axes[operand][0]
            if not any(leaf in cut for dim in dims for leaf in all_leaves([axes[dim]])):
                continue
            name = parameter_behind(operand, coupling.parameters)
            if masked_form(call.node.target) or not name or name in computed:
                return True
    return False


def _zero_what_is_read_beside(model: nn.Module, coupling: Coupling, cut: Mapping[Factor, Tensor]) -> None:
    """Zero what the tensors read of removed units that the captured graph does not hold."""
    tensors = tensor_names(model)
    consumed, _ = consumed_and_made(coupling)
    gone: list[tuple[str, int, Tensor]] = []
    for name, dim in consumed:
        stays = _stays(coupling.attributes[name][dim], cut)
        if stays is not None and name in tensors:
            gone.append((name, dim, (~stays).nonzero().flatten()))
    _zero(model, gone)


def _zero_what_reads(model: nn.Module, kept: Kept) -> None:
    gone: list[tuple[str, int, Tensor]] = []
    for group, units in kept.items():
        removed = torch.ones(group.size, dtype=torch.bool)
        removed[units] = False
        gone += [(m.name, m.dim, m.indices(removed.nonzero().flatten())) for m in group.consumers]
    _zero(model, gone)


def _zero(model: nn.Module, gone: Sequence[tuple[str, int, Tensor]]) -> None:
    """Put zeros into tensors of a model, which may be shared with another model: those are replaced, under all names.

    Args:
        gone: name of a tensor, dim, indices.
    """
    tensors = tensor_names(model)
    new: dict[int, Tensor] = {}
    for name, dim, indices in gone:
        old = tensors[name]
        if id(old) not in new:
            new[id(old)] = old.detach().clone()
        new[id(old)].index_fill_(dim, indices.to(old.device), 0)
    for name, old in tensors.items():
        if id(old) in new:
            own = new[id(old)]
            assign(model, name, nn.Parameter(own, old.requires_grad) if isinstance(old, nn.Parameter) else own)
    for module in model.modules() if new else ():
        refresh_flat_weights(module)


# ------------------------------------------------------------------------------------------------ masks of ops
@dataclass(frozen=True)
class _Mask:
    """0 and 1 per index of one dim of one argument; `rank` and the lengths say whether it fits."""

    argument: str
    dim: int
    rank: int
    stays: Tensor

    def fits(self, operand: Any) -> bool:
        """Whether the operand is like the one that was recorded."""
        is_like = isinstance(operand, Tensor) and operand.dim() == self.rank
        return is_like and operand.shape[self.dim] == self.stays.numel()

    def like(self, operand: Tensor) -> Tensor:
        """The mask, to be multiplied with the operand."""
        shape = [-1 if dim == self.dim else 1 for dim in range(self.rank)]
        return self.stays.to(operand.device, operand.dtype).view(shape)


Masks = Mapping[tuple[str, Any], Mapping[int, tuple[_Mask, ...]]]
"""(module path, op) -> number of the call -> its masks, none where the call needs none."""


def _masks(analysis: Analysis, units: Mapping[Factor, Tensor]) -> Masks:
    found: dict[tuple[str, Any], dict[int, tuple[_Mask, ...]]] = {}
    for node, call in analysis.coupling.calls.items():
        site: OpSite | None = node.meta.get(OP_SITE)
        if site is not None:
            found.setdefault((site.path, site.op), {})[site.number] = _masks_of(analysis, call, units)
    return {key: calls for key, calls in found.items() if any(calls.values())}


def _masks_of(analysis: Analysis, call: Call, units: Mapping[Factor, Tensor]) -> tuple[_Mask, ...]:
    arguments = bind(call.node)
    masks: list[_Mask] = []
    for key, dims in call.contracted.items():
        axes = analysis.coupling.axes[argument_at(arguments, key)][0]
        for dim in dims:
            stays = _stays(axes[dim], units)
            if stays is not None:
                masks.append(_Mask(key, dim, len(axes), stays))
    return tuple(masks)


def _stays(axis: Axis, units: Mapping[Factor, Tensor]) -> Tensor | None:
    kept = kept_indices(axis, units)
    return None if kept is None else torch.zeros(length(axis), dtype=torch.bool).index_fill_(0, kept, True)


# ------------------------------------------------------------------------------------------------ running
class MaskedRun(nn.Module):
    """Called like `model`, whose ops heed their masks."""

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        super().__init__()
        self.model = model
        self.masks = masks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's, without gradients."""
        sites = OpSites(self.model)
        with op_by_op(), sites.following(), _HeedMasks(sites, self.masks):
            return self.model(*args, **kwargs)


class _HeedMasks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Multiplies what an op contracts by its mask, or puts the op's masked form in its place."""

    def __init__(self, sites: OpSites, masks: Masks) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sites, self.masks = sites, masks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masks = self._find(self.sites.next(func))
        arguments = _bound(func, args, kwargs) if masks else {}
        masks = tuple(m for m in masks if m.fits(_operand(arguments, m.argument)))
        if not masks:
            return func(*args, **kwargs)
        form = masked_form(func)
        if form is not None:
            return form(_together(masks, arguments), **arguments)
        for mask in masks:
            operand = _operand(arguments, mask.argument)
            _put(arguments, mask.argument, operand * mask.like(operand))
        return _call(func, arguments)

    def _find(self, site: OpSite) -> tuple[_Mask, ...]:
        """The masks of the call; one that a longer path added has those of the last one recorded."""
        calls = self.masks.get((site.path, site.op))
        return () if calls is None else calls.get(min(site.number, max(calls)), ())


def _together(masks: tuple[_Mask, ...], arguments: Mapping[str, Any]) -> Tensor:
    """One mask over several dims of the one operand that statistics are taken of."""
    operand = _operand(arguments, masks[0].argument)
    result = masks[0].like(operand)
    for mask in masks[1:]:
        result = result * mask.like(operand)
    return result


def _bound(func: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by the names of the schema; defaults are left out."""
    names = [a.name for a in schema_of(func).arguments if not a.kwarg_only]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _call(func: OpOverload, arguments: Mapping[str, Any]) -> Any:
    positional: list[Any] = []
    for argument in schema_of(func).arguments:
        if argument.kwarg_only or argument.name not in arguments:
            break
        positional.append(arguments[argument.name])
    names = [argument.name for argument in schema_of(func).arguments[len(positional) :]]
    return func(*positional, **{name: arguments[name] for name in names if name in arguments})


def _operand(arguments: Mapping[str, Any], key: str) -> Any:
    name, _, item = key.partition(".")
    found = arguments.get(name)
    return found[int(item)] if item and isinstance(found, (list, tuple)) else found


def _put(arguments: dict[str, Any], key: str, operand: Tensor) -> None:
    name, _, item = key.partition(".")
    if item:
        items = list(arguments[name])
        items[int(item)] = operand
        arguments[name] = items
    else:
        arguments[name] = operand
