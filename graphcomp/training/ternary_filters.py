"""Filters that become ternary: their norms, masks, scales, and views that a model sees in training."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphcomp.ir.module import trains
from graphcomp.quantization.fold import chains
from graphcomp.quantization.quantizers.gradients import straight_through
from graphcomp.quantization.quantizers.ternary import TernaryQuantizer
from graphcomp.quantization.scale_clip import filter_rows
from graphcomp.quantization.ternary_direction import best_masks, kept_means, largest_masks, unit_rows
from graphcomp.training.prepared import Prepared


@dataclass(eq=False)
class Filters:
    """A weight whose filters become ternary.

    Attributes:
        parameter: the weight.
        quantizer: ternary, with a scale per filter.
        norms: (c, 1): the norms that filters keep, as a batch norm behind the layer absorbs scales; None: filters have
            norms of their own.
        mask: (c, n) bool: True where a weight is kept.
    """

    parameter: nn.Parameter
    quantizer: TernaryQuantizer
    norms: Tensor | None
    mask: Tensor

    @property
    def rows(self) -> Tensor:
        """(c, n): one row per filter."""
        return filter_rows(self.parameter.detach(), self.quantizer.dim)

    def shaped(self, rows: Tensor) -> Tensor:
        """Return rows in the shape of the weight."""
        dim = self.quantizer.dim
        if dim is None:
            return rows.view(self.parameter.shape)
        return rows.view(self.parameter.movedim(dim, 0).shape).movedim(0, dim)

    def levels(self, rows: Tensor) -> Tensor:
        """Return the scale of each filter, (c, 1): the norm that the filter keeps over sqrt(k), or alpha."""
        if self.norms is None:
            return kept_means(rows, self.mask)[:, None]
        return self.norms / self.mask.sum(1, keepdim=True).clamp(min=1).sqrt()

    def target(self, rows: Tensor) -> Tensor:
        """Return the scaled ternary direction of each filter, (c, n)."""
        return self.levels(rows) * rows.sign() * self.mask

    def view(self, eta: float, c: float) -> Tensor:
        """Return the weight as the model sees the weight, with straight-through gradients.

        Args:
            eta: share of the ternary direction.
            c: magnitudes of v above which gradients are 0.
        """
        rows = filter_rows(self.parameter, self.quantizer.dim)
        directed = unit_rows(rows)
        seen = rows if self.norms is None else self.norms * directed
        own = seen.detach()
        value = own * self.mask
        if eta:
            value = (1 - eta) * value + eta * self.target(own)
        if c < 1:
            seen = torch.where(directed.detach().abs() <= c, seen, own)
        return self.shaped(straight_through(seen, value))

    def choose(self, count: int | None) -> None:
        """Keep the `count` largest |v|; None: what each filter's best ternary direction keeps."""
        self.mask = best_masks(self.rows) if count is None else largest_masks(self.rows, count)

    def settle(self, strength: float) -> None:
        """Move filters towards their directions by this share of the way, and bring norms back to what they were."""
        rows = self.rows
        if strength:
            rows = rows + strength * (self.target(rows) - rows)
        if self.norms is not None:
            rows = self.norms * unit_rows(rows)
        self.parameter.copy_(self.shaped(rows))

    def finish(self) -> None:
        """Set weights to their ternary values, and the quantizer to these."""
        levels, quantizer = self.levels(self.rows), self.quantizer
        self.parameter.copy_(self.shaped(self.target(self.rows)))
        scale = torch.where(levels > 0, levels, 1.0).view(quantizer.scale.shape)
        quantizer.scale.copy_(scale)
        quantizer.threshold.copy_(scale / 2)


def filters_of(ready: Prepared, name: str, quantizer: TernaryQuantizer, normed: Collection[str]) -> Filters:
    """Return the filters of a weight, all kept; scales are trained where no norm absorbs them."""
    parameter = ready.get_parameter(name)
    rows = filter_rows(parameter.detach(), quantizer.dim)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True) if name in normed else None
    if norms is not None:
        quantizer.scale.requires_grad_(False)
    return Filters(parameter, quantizer, norms, torch.ones_like(rows, dtype=torch.bool))


def in_front_of_norms(ready: Prepared) -> set[str]:
    """Return the parameters whose filters a batch norm right behind the layer scales, with statistics of the batch."""
    graph = ready.session.plan.captured.module.graph
    normed = {pair.compute for pair in chains(graph) if trains(pair.norm)}
    found, elsewhere = set[str](), set[str]()
    for node in graph.find_nodes(op="get_attr"):
        (found if normed.issuperset(node.users) else elsewhere).add(str(node.target))
    return found - elsewhere
