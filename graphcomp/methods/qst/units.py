"""Thresholds on units: a unit is gone where the root mean square of the weights that make the unit is below its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from graphcomp.coupling.groups import ChannelGroup, Member
from graphcomp.methods.geta.units import makers, nothing_trainable, trainable
from graphcomp.methods.qst.gates import gated, step
from graphcomp.methods.qst.weights import shift
from graphcomp.pruning.allocation import allocate, rounding_note
from graphcomp.pruning.mask import PREFIX
from graphcomp.quantization.quantizers.gradients import scale_gradient
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Choice


class UnitGates:
    """One threshold per unit of each group.

    Attributes:
        groups: whose units may go.
        thresholds: name of a group -> (size,).

    Args:
        ready: the module that is trained.
        dense: whether weights of units that are gone get gradients, so that units can return.
        round_to: lengths of dims are multiples of it in the end.
        scaled: whether gradients of thresholds are divided by the root of the number of weights that make a unit.
    """

    def __init__(self, ready: Prepared, *, dense: bool, round_to: int, scaled: bool = True) -> None:
        self.ready, self.dense, self.round_to, self.scaled = ready, dense, round_to, scaled
        self.groups = trainable(ready, ready.session.groups)
        if not self.groups:
            raise nothing_trainable()
        like = next(ready.parameters())
        self.thresholds = {group.name: nn.Parameter(like.new_zeros(group.size)) for group in self.groups}

    @property
    def total(self) -> int:
        """Units that may go."""
        return sum(group.size for group in self.groups)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the thresholds, by name."""
        return self.thresholds

    def norms(self, group: ChannelGroup) -> Tensor:
        """Return the root mean square over the weights that make each unit: (size,)."""
        made = makers(group)
        matrices = [member for member in made if len(member.shape) > 1] or made
        total = count = self.thresholds[group.name].detach() * 0
        for member in matrices:
            weight = self.ready.get_parameter(member.name)
            others = [dim for dim in range(weight.dim()) if dim != member.dim]
            squares = weight.square()
            sums = squares.sum(others) if others else squares
            for row in member.unit_of.to(weight.device):
                inside = row >= 0
                place = row.clamp(min=0)
                zeros = weight.new_zeros(group.size)
                total = total + zeros.index_add(0, place, sums * inside)
                each = weight.numel() // weight.shape[member.dim]
                count = count + zeros.index_add(0, place, inside.to(weight.dtype) * each)
        return (total / count.clamp(min=1)).clamp(min=torch.finfo(total.dtype).tiny).sqrt()

    def views(self, quantized: bool) -> dict[str, Tensor]:
        """Return all parameters and masks of groups with units that are below their thresholds at zero."""
        found: dict[str, Tensor] = {}
        session = self.ready.session
        for k, group in enumerate(session.groups):
            if group not in self.groups:
                continue
            norms = self.norms(group)
            threshold: Tensor = self.thresholds[group.name]
            if self.scaled:
                made = sum(member.elements_per_unit for member in makers(group))
                threshold = scale_gradient(threshold, max(made, 1) ** -0.5)
            gate = step((norms.detach() if self.dense else norms) - threshold)
            found[f"{PREFIX}{k}"] = gate.detach().to(self.ready.get_buffer(f"{PREFIX}{k}").dtype)
            for member in group.members:
                if member.is_parameter and member.name not in session.computed:
                    weight = found.get(member.name, self.ready.get_parameter(member.name))
                    found[member.name] = gated(weight, spread(gate, member), self.dense)
        return found

    @torch.no_grad()
    def margins(self) -> dict[ChannelGroup, Tensor]:
        """Return how far each unit is above its threshold: (size,) per group."""
        return {group: self.norms(group) - self.thresholds[group.name] for group in self.groups}

    def stays(self) -> int:
        """Return how many units are above their thresholds."""
        return sum(int((margin > 0).sum()) for margin in self.margins().values())

    @torch.no_grad()
    def hold(self, share: float) -> None:
        """Keep thresholds at 0 at least, and the largest unit of each group above its own."""
        for group in self.groups:
            threshold, norms = self.thresholds[group.name], self.norms(group)
            threshold.clamp_(min=0)
            if not bool((norms > threshold).any()):
                best = (norms - threshold).argmax()
                threshold[best] = norms[best] / 2

    @torch.no_grad()
    def shift(self, count: int) -> None:
        """Move all thresholds by one number, so that `count` units are above theirs; none falls below 0."""
        shift(list(self.thresholds.values()), list(self.margins().values()), count)

    def choice(self, count: int | None) -> Choice:
        """Return the `count` units farthest above their thresholds; None: all that are above."""
        margins = self.margins()
        share = (self.stays() if count is None else count) / self.total
        already = self.ready.kept()
        kept = allocate(
            self.groups,
            {group: margin - min(float(own.min()) for own in margins.values()) for group, margin in margins.items()},
            sparsity=1 - share,
            normalize="none",
            round_to=self.round_to,
            already=already,
            nearest=True,
        )
        if note := rounding_note(self.groups, kept, 1 - share, self.round_to):
            self.ready.remarks = (*self.ready.remarks, note)
        return Choice({**already, **kept})

    def quantized_weights(self) -> Iterator[tuple[SymmetricQuantizer, Tensor]]:
        """Yield each quantizer with the weight that it reads, zero where units are gone."""
        views = self.views(False)
        for site, quantizer in self.ready.quantizers():
            if site.is_weight and site.parameter and isinstance(quantizer, SymmetricQuantizer):
                yield quantizer, views.get(site.parameter, self.ready.get_parameter(site.parameter)).detach()


def spread(gate: Tensor, member: Member) -> Tensor:
    """Return the gates of a member's indices, spread to broadcast with its tensor; 1 where an index is of no unit."""
    found: Tensor | None = None
    for row in member.unit_of.to(gate.device):
        own = torch.where(row >= 0, gate[row.clamp(min=0)], gate.new_ones(()))
        found = own if found is None else found * own
    assert found is not None
    return found.view([-1 if dim == member.dim else 1 for dim in range(len(member.shape))])
