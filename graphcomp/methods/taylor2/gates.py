"""A gate on each unit, where the unit is read: 1 or 0 forward, and in the backward pass the first-order score.

A gate z stands on every weight that reads the unit, in front of the product, and on the mask nodes of all other readers
(attention, statistics of norms). Behind a linear reader dL/dz = sum of w dL/dw over the weights that read the unit,
which is the sum of y dL/dy over the unit's values y, and behind a norm and a ReLU gamma dL/dgamma + beta dL/dbeta.
Without the unit the loss is greater by L(z=0) - L(z=1) = -dL/dz + d2L/dz2 / 2 - ….

The gate never stands on the filter that makes the unit: a batch norm in training mode takes the scale of the filter
out, so that the sum of w dL/dw over the filter is 0 whatever the unit is worth.

Where the gate is 0, the weights that read the unit get the gradient of the weights in force, and go on learning: the
gate's derivative stays what it would be, and the unit can return.

Source: Molchanov et al. 2017 (arXiv 1611.06440) and 2019 (arXiv 1906.10771), gates behind norms. Ours is the place, one
rule for channels, heads and features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphcomp.coupling.groups import ChannelGroup, Kept, Member
from graphcomp.methods.qst.units import spread
from graphcomp.pruning.mask import PREFIX
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.training.prepared import Prepared


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, levels: Tensor, *gates: Tensor) -> Tensor:
        ctx.save_for_backward(levels, *gates)
        return weight * math.prod(gates[1:], start=gates[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        levels, *gates = ctx.saved_tensors
        products = grad * levels
        found = []
        for k, gate in enumerate(gates):
            others = math.prod((own for j, own in enumerate(gates) if j != k), start=products)
            found.append(others.sum_to_size(gate.shape))
        return grad, None, *found


def gated(weight: Tensor, levels: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Return the weight times its gates; the weight gets the gradient of the product as it is, straight through.

    Args:
        weight: any shape.
        levels: of the same shape, what the model multiplies with behind the gates, the weight or what the weight is
            quantized to: the derivative of a gate is the sum of levels times gradient, where the other gates are open.
        gates: 0 or 1, each broadcasts with the weight; one at least.
    """
    return _Gated.apply(weight, levels, *gates)  # type: ignore[no-any-return, no-untyped-call]


class Gates:
    """The gates of a module's groups.

    Attributes:
        groups: whose units have gates.
        values: name of a group -> (size,) parameter, 0 or 1, whose gradient is the derivative by the gates.

    Args:
        ready: the module that is trained.
        groups: of its session.
    """

    def __init__(self, ready: Prepared, groups: Sequence[ChannelGroup]) -> None:
        self.ready, self.groups = ready, tuple(groups)
        like = next(ready.parameters())
        self.values = {group.name: nn.Parameter(like.new_ones(group.size)) for group in self.groups}
        self._readers: dict[str, list[tuple[ChannelGroup, Member]]] = {}
        for group in self.groups:
            for member in group.consumers:
                if member.is_parameter and member.name not in ready.session.computed:
                    self._readers.setdefault(member.name, []).append((group, member))
        read = {str(node.target) for node in ready.graph.find_nodes(op="get_attr")}
        at = {group: f"{PREFIX}{k}" for k, group in enumerate(ready.session.groups)}
        self._masks = {at[group]: group for group in self.groups if at[group] in read}
        self._quantizers: dict[str, Quantizer] = {
            site.parameter: quantizer for site, quantizer in ready.quantizers() if site.is_weight and site.parameter
        }

    def views(self, quantized: bool) -> dict[str, Tensor]:
        """Return the weights that read units, and the masks that other readers heed, behind the gates.

        Args:
            quantized: whether the quantizers of weights are on.
        """
        found: dict[str, Tensor] = {}
        for name, readers in self._readers.items():
            weight = self.ready.get_parameter(name)
            quantizer = self._quantizers.get(name) if quantized else None
            with torch.no_grad():
                levels = weight if quantizer is None else quantizer(weight)
            gates = [spread(self.values[group.name], member) for group, member in readers]
            found[name] = gated(weight, levels.detach(), gates)
        for name, group in self._masks.items():
            found[name] = self.values[group.name].to(self.ready.get_buffer(name).dtype)
        return found

    def derivatives(self) -> dict[ChannelGroup, Tensor]:
        """Return dL/dz of each unit since gradients were last cleared: (size,), zeros without any."""
        values = {group: self.values[group.name] for group in self.groups}
        return {group: torch.zeros_like(own) if own.grad is None else own.grad for group, own in values.items()}

    @torch.no_grad()
    def set(self, kept: Kept) -> None:
        """Open the gates of units that are kept, and close all others."""
        for group in self.groups:
            own = self.values[group.name].fill_(0)
            own[kept[group].to(own.device)] = 1
