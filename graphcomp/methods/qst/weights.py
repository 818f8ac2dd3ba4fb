"""Thresholds on single weights: the masked and quantized views, the share that stays, and bytes by a convention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from graphcomp.cost.conventions import Codes, Convention, SizeModel
from graphcomp.errors import BudgetError, NothingToPrune
from graphcomp.methods.qst.gates import Route, sparse
from graphcomp.quantization.quantizers.gradients import scale_gradient
from graphcomp.quantization.quantizers.symmetric import SymmetricQuantizer
from graphcomp.training.elements import multiplied
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Choice

Guard: TypeAlias = Literal["floor", "reset"]
"""What happens where hardly a weight of a layer is left: thresholds come down to where some are, or to 0 (DST's)."""

BELOW = 1 - 1e-6
"""A threshold this much below a weight lets the weight stay."""


class WeightGates:
    """One threshold per output channel, or per layer, of each weight that is multiplied with.

    Attributes:
        weights: parameter -> tensor.
        thresholds: parameter -> thresholds, (c,) or ().
        quantizers: parameter -> the quantizer that reads the parameter.

    Args:
        ready: the module that is trained.
        shared: what shares a threshold.
        route: of gradients.
        guard: see `Guard`.
        least: share of a layer below which the guard acts.
        scaled: whether gradients of thresholds are divided by the root of the number of weights that share one.
    """

    def __init__(
        self,
        ready: Prepared,
        *,
        shared: Literal["channel", "layer"],
        route: Route,
        guard: Guard,
        least: float,
        scaled: bool = True,
    ) -> None:
        self.weights = multiplied(ready)
        if not self.weights:
            raise NothingToPrune("QST finds no weight to prune", fix="requires_grad_(True), or less ignore=")
        own = {site.parameter: q for site, q in ready.quantizers() if site.is_weight and site.parameter in self.weights}
        self.quantizers = {name: q for name, q in own.items() if isinstance(q, SymmetricQuantizer)}
        self.route: Route = route
        self.guard: Guard = guard
        self.least, self.scaled = least, scaled
        self.thresholds = {
            name: nn.Parameter(weight.new_zeros(weight.shape[:1] if shared == "channel" and weight.dim() > 1 else ()))
            for name, weight in self.weights.items()
        }

    @property
    def total(self) -> int:
        """Weights that may go."""
        return sum(weight.numel() for weight in self.weights.values())

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the thresholds, by name."""
        return self.thresholds

    def views(self, quantized: bool) -> dict[str, Tensor]:
        """Return the masked weights, quantized or in floats; quantizers of the graph are to be off."""
        return {name: self._view(name, weight, quantized) for name, weight in self.weights.items()}

    def _view(self, name: str, weight: Tensor, quantized: bool) -> Tensor:
        threshold, levels, inside = self._threshold(name), weight.detach(), None
        if self.scaled:
            threshold = scale_gradient(threshold, (threshold.numel() / weight.numel()) ** 0.5)
        if quantized and name in self.quantizers:
            quantizer = self.quantizers[name]
            inside = (levels / quantizer.scale.detach()).abs() <= quantizer.spec.quant_max
            levels = quantizer(levels)
        return sparse(weight, levels, threshold, inside, self.route)

    def _threshold(self, name: str) -> Tensor:
        """Return the thresholds of a weight, spread to broadcast."""
        threshold = self.thresholds[name]
        return threshold.view(-1, *[1] * (self.weights[name].dim() - 1)) if threshold.dim() else threshold

    @torch.no_grad()
    def margins(self) -> dict[str, Tensor]:
        """Return how far each magnitude is above its threshold; below 0 where a weight is pruned."""
        return {name: weight.abs() - self._threshold(name) for name, weight in self.weights.items()}

    @torch.no_grad()
    def stays(self) -> int:
        """Return how many weights are above their thresholds."""
        return sum(int((margin > 0).sum()) for margin in self.margins().values())

    # ------------------------------------------------------------------------------------------ thresholds
    @torch.no_grad()
    def hold(self, share: float) -> None:
        """Keep thresholds at 0 at least, and layers from losing all but the least share.

        Args:
            share: of all weights that is to stay in the end: layers keep a tenth of that, where it is below `least`.
        """
        least = min(self.least, share / 10)
        for name, weight in self.weights.items():
            threshold = self.thresholds[name]
            threshold.clamp_(min=0)
            magnitudes = weight.abs().flatten()
            few = max(1, math.ceil(least * len(magnitudes)))
            if int((weight.abs() > self._threshold(name)).sum()) >= few:
                continue
            if self.guard == "reset":
                threshold.zero_()
            else:
                threshold.clamp_(max=float(magnitudes.topk(few).values[-1]) * BELOW)

    @torch.no_grad()
    def shift(self, count: int) -> None:
        """Move all thresholds by one number, so that `count` weights are above theirs; none falls below 0."""
        shift(list(self.thresholds.values()), list(self.margins().values()), count)

    # ------------------------------------------------------------------------------------------ what stays
    def masks(self, count: int | None) -> dict[str, Tensor]:
        """Return bool masks of the `count` weights farthest above their thresholds; None: of all that are above.

        Each layer keeps one at least.
        """
        margins = self._margins_but_the_largest()
        if count is None:
            return {name: margin > 0 for name, margin in margins.items()}
        return {name: rank < count for name, rank in _ranks(margins).items()}

    def _margins_but_the_largest(self) -> dict[str, Tensor]:
        """Return the margins, infinite of one weight of each layer, which is not to go."""
        margins = self.margins()
        for margin in margins.values():
            margin.view(-1)[margin.argmax()] = torch.inf
        return margins

    @torch.no_grad()
    def bytes_of(self, masks: Mapping[str, Tensor], convention: Convention) -> float:
        """Return the bytes of the codes of all quantized weights, as they are, but 0 outside of the masks."""
        return _bytes(self._codes(moves=False), masks, convention)

    def count_within(self, limit: float, convention: Convention, *, moves: bool = True) -> int:
        """Return how many weights can stay within so many bytes of codes.

        Args:
            limit: bytes.
            convention: of storage.
            moves: whether weights will be trained on: one that rounds to 0 now may not then, and counts as 1.

        Raises:
            BudgetError: one weight per layer takes more.
        """
        ranks, codes = _ranks(self._margins_but_the_largest()), self._codes(moves)

        def size(count: int) -> float:
            return _bytes(codes, {name: rank < count for name, rank in ranks.items()}, convention)

        low, high = len(self.weights), self.total + 1
        if (least := size(low)) > limit:
            raise BudgetError(
                f"{limit:,.0f} bytes by {convention} hold no network",
                why=f"one weight of each layer takes {least:,.0f} bytes by {convention}",
                fix='a larger budget, or convention="C0", which counts no places',
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if size(middle) <= limit else (low, middle)
        return low

    @torch.no_grad()
    def _codes(self, moves: bool) -> dict[str, Codes]:
        """Return parameter -> the codes of all its weights; `moves` see `count_within`."""
        found = {}
        for name, quantizer in self.quantizers.items():
            codes = quantizer.to_integers(self.weights[name]).counted()
            values = codes.values.masked_fill(codes.values == 0, 1) if moves else codes.values
            found[name] = replace(codes, values=values)
        return found

    def choice(self, count: int | None) -> Choice:
        """Return masks of the weights that stay."""
        return Choice(elements=self.masks(count))

    def quantized_weights(self) -> Iterator[tuple[SymmetricQuantizer, Tensor]]:
        """Yield each quantizer with the weight that it reads, zero where pruned."""
        masks = self.masks(None)
        for name, quantizer in self.quantizers.items():
            yield quantizer, self.weights[name].detach().masked_fill(~masks[name], 0)


@torch.no_grad()
def shift(thresholds: Sequence[Tensor], margins: Sequence[Tensor], count: int) -> None:
    """Move thresholds by one number, so that `count` margins are above 0; none falls below 0, and all are 0 for all."""
    flat = torch.cat([margin.flatten() for margin in margins])
    for threshold in thresholds:
        if count >= len(flat):
            threshold.zero_()
        else:
            threshold.add_(flat.kthvalue(len(flat) - count).values).clamp_(min=0)


def _ranks(margins: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the position of each weight among all, the farthest above its threshold first."""
    flat = torch.cat([margin.flatten() for margin in margins.values()])
    rank = torch.empty_like(flat, dtype=torch.int64)
    rank[flat.argsort(descending=True, stable=True)] = torch.arange(len(flat), device=flat.device)
    parts = torch.split(rank, [margin.numel() for margin in margins.values()])
    return {name: part.view(own.shape) for (name, own), part in zip(margins.items(), parts, strict=True)}


def _bytes(codes: Mapping[str, Codes], masks: Mapping[str, Tensor], convention: Convention) -> float:
    """Return the bytes of codes, 0 where a mask is False."""
    left = {name: replace(own, values=own.values.masked_fill(~masks[name], 0)) for name, own in codes.items()}
    return SizeModel(left).bits(convention) / 8
