"""The mask pass: a masked unit is as if it never existed, with every tensor at its full size.

One 0/1 vector per group (a buffer of the new module). Where an op sums units away, one operand is multiplied by the
vector; where it takes statistics, its masked form takes its place; implied constants are pinned.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.coupling.axis import Axis, Factor, all_leaves, coordinates, length
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.coupling.propagate import Coupling
from graphcomp.ir.graph import argument_at, bind, clone, set_argument, set_argument_at, value
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import Maker, before
from graphcomp.ops.answers import keeps_zeros, masked_form, parameter_behind
from graphcomp.ops.call import Call
from graphcomp.pruning.slice import check_kept

PREFIX = "graphcomp_mask_"


class AxisMask(nn.Module):
    """The 0/1 vector of one axis from those of the groups it is made of.

    `rows` are (length,) int64: which unit of the group an index belongs to, -1 where it belongs to none.
    """

    def __init__(self, rows: Sequence[Tensor], shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        for k, row in enumerate(rows):
            self.register_buffer(f"row_{k}", row, persistent=False)

    def forward(self, *masks: Tensor) -> Tensor:
        """Group masks, each (units,) -> the axis' mask, viewed to broadcast with the operand."""
        result: Tensor | None = None
        for k, mask in enumerate(masks):
            row = self.get_buffer(f"row_{k}")
            own = torch.where(row >= 0, mask[row.clamp(min=0)], mask.new_ones(()))
            result = own if result is None else result * own
        assert result is not None
        return result.view(self.shape)


@dataclass(frozen=True)
class InsertMasks(GraphPass):
    """Give the graph one mask buffer per group, all ones, and let every op that mixes units heed it.

    With `held` the parameters of masked units are held at zero by whoever sets the masks (in training, where a mask on
    every weight would cost time): what reads a weight then needs none.
    """

    coupling: Coupling
    groups: Sequence[ChannelGroup]
    held: bool = False
    name: ClassVar[str] = "insert masks"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """A new module that shares the tensors of `module`; `set_masks` says which units stay."""
        masked, new_node = clone(module)
        masks = _MaskNodes(masked, self.groups, _float_dtype(masked))
        masks.held = self._held() if self.held else set()
        for node, call in self.coupling.calls.items():
            if node in new_node:
                self._rewrite(node, new_node[node], call, masks)
        masked.recompile()
        return masked

    def _rewrite(self, old: fx.Node, new: fx.Node, call: Call, masks: _MaskNodes) -> None:
        arguments, form = bind(old), masked_form(old.target)
        for key, dims in call.contracted.items():
            operand = argument_at(arguments, key)
            axes = self.coupling.axes[operand][0]
            present = [dim for dim in dims if masks.has(axes[dim])]
            if not present or (form is None and operand in masks.held):  # zeros count in a mean
                continue
            make, pairs = before(new), [(dim, axes[dim]) for dim in present]
            mask = masks.broadcast(make, pairs, len(axes), value(operand).dtype)
            if form is not None:  # takes arguments by name
                new.target, new.args, new.kwargs = form, (mask,), bind(new)
                return
            set_argument_at(new, key, make(torch.ops.aten.mul.Tensor, argument_at(bind(new), key), mask))
        if call.pins and any(leaf in masks.factors for node in old.all_input_nodes for leaf in self._leaves(node)):
            for name, constant in call.pins.items():
                set_argument(new, name, constant)

    def _held(self) -> set[fx.Node]:
        """The operands that are parameters which `hold_masks` holds at zero."""
        computed, parameters = computed_with(self.coupling), self.coupling.parameters
        names = {node: parameter_behind(node, parameters) for node in self.coupling.sources}
        return {node for node, name in names.items() if name and name not in computed}

    def _leaves(self, node: fx.Node) -> list[Factor]:
        return [leaf for axes in self.coupling.axes.get(node, []) for leaf in all_leaves(axes)]


def set_masks(masked: nn.Module, groups: Sequence[ChannelGroup], kept: Kept) -> None:
    """Set the masks of a module made by `InsertMasks(…, groups)`: 1 for the kept units, 0 for the others."""
    check_kept(kept)
    for k, group in enumerate(groups):
        mask = masked.get_buffer(f"{PREFIX}{k}")
        mask.fill_(1 if group not in kept else 0)
        if group in kept:
            mask[kept[group].to(mask.device)] = 1


def hold_masks(masked: nn.Module, groups: Sequence[ChannelGroup], kept: Kept, computed: Collection[str] = ()) -> None:
    """As `set_masks`, for a module made with `held`: the parameters of masked units become zero, in place; but for
    those in `computed`, see `computed_with`."""
    set_masks(masked, groups, kept)
    tensors = dict(masked.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, dim, indices in gone(kept, computed):
            tensors[name].index_fill_(dim, indices.to(tensors[name].device), 0)


def computed_with(coupling: Coupling) -> frozenset[str]:
    """The parameters that a weight is computed of, by more than moving their elements: a weight norm divides by the
    norm of a row, which must not become zero. Masks stand on what is computed."""
    found: set[str] = set()
    for node, names in coupling.sources.items():
        if node.op == "call_function" and not keeps_zeros(node):
            found |= names
    return frozenset(found)


def gone(kept: Kept, computed: Collection[str] = ()) -> list[tuple[str, int, Tensor]]:
    """(parameter, dim, indices) of all elements that belong to units which are not kept, those that slicing removes; of
    parameters that are not in `computed`."""
    found = []
    for group, units in kept.items():
        removed = torch.ones(group.size, dtype=torch.bool)
        removed[units] = False
        if not bool(removed.any()):
            continue
        for member in group.members:
            if member.is_parameter and member.name not in computed:
                found.append((member.name, member.dim, member.indices(removed.nonzero().flatten())))
    return found


def _float_dtype(module: fx.GraphModule) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


class _MaskNodes:
    """Makes mask nodes, each axis once."""

    def __init__(self, module: fx.GraphModule, groups: Sequence[ChannelGroup], dtype: torch.dtype) -> None:
        self.module = module
        self.dtype = dtype
        self.factors: dict[Factor, fx.Node] = {}
        self.held: set[fx.Node] = set()  # of the graph before: operands that need no mask
        self.count = 0
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        make = before(next(iter(module.graph.nodes)))
        for k, group in enumerate(groups):
            mask = torch.ones(group.size, dtype=dtype, device=device)
            self.factors[group.factor] = make.tensor(module, f"{PREFIX}{k}", mask)

    def has(self, axis: Axis) -> bool:
        """Whether some index of `axis` belongs to a unit of a masked group."""
        return any(leaf in self.factors for leaf in all_leaves([axis]))

    def broadcast(self, make: Maker, dims: Sequence[tuple[int, Axis]], rank: int, dtype: torch.dtype) -> fx.Node:
        """The product of the masks of several dims of an operand of `rank` dims, as a node that `make` makes."""
        result = None
        for dim, axis in dims:
            rows = [(factor, row) for factor, row in coordinates(axis) if factor in self.factors]
            shape = [length(axis) if d == dim else 1 for d in range(rank)]
            name = f"{PREFIX}axis_{self.count}"
            self.count += 1
            self.module.add_submodule(name, AxisMask([row for _, row in rows], shape))
            factors = [self.factors[factor] for factor, _ in rows]
            node = make.submodule(name, *factors, val=value(factors[0]).new_empty(shape))
            result = node if result is None else make(torch.ops.aten.mul.Tensor, result, node)
        assert result is not None
        if dtype != self.dtype and dtype.is_floating_point:
            result = make(torch.ops.aten.to.dtype, result, dtype)
        return result
