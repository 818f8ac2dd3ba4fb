"""What a unit is worth, from the derivatives of its gate over minibatches: a moving average of squares or of means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import PlanError
from graphcomp.pruning.evidence import Scores

Score: TypeAlias = Literal["squares", "mean", "signed"]
"""Of the derivatives dL/dz of a gate over minibatches: the mean of squares (Molchanov et al. 2019), the magnitude of
the mean, or the negative mean: by how much the loss is greater without the unit, to first order; it may be below 0."""


class Averages:
    """Moving averages of derivatives and of their squares.

    Attributes:
        mean, squares: group -> (size,) float32; zeros before the first minibatch.
        count: minibatches so far.

    Args:
        groups: whose units are scored.
        device: where derivatives are.
        momentum: what the average before keeps at each minibatch, 0 to below 1. The first minibatches count alike, as
            the average is of those that there were.
    """

    def __init__(self, groups: Sequence[ChannelGroup], device: torch.device, momentum: float) -> None:
        self.groups, self.momentum, self.count = tuple(groups), momentum, 0
        self.mean = {group: torch.zeros(group.size, device=device) for group in self.groups}
        self.squares = {group: torch.zeros(group.size, device=device) for group in self.groups}

    @torch.no_grad()
    def add(self, derivatives: Mapping[ChannelGroup, Tensor]) -> None:
        """Take a minibatch in; a unit whose derivative is not finite keeps its average."""
        self.count += 1
        weight = max(1 - self.momentum, 1 / self.count)
        for group, own in derivatives.items():
            own = own.float()
            for average, value in ((self.mean[group], own), (self.squares[group], own.square())):
                average.lerp_(torch.where(value.isfinite(), value, average), weight)

    def scores(self, kind: Score, chosen: Kept) -> Scores:
        """Return the scores of all units: (size,) per group on the CPU, low for what can go.

        A unit whose gate is closed counts only where opening the gate lowers the loss: "squares" and "mean" are 0 where
        the mean derivative says otherwise.

        Args:
            chosen: units whose gates are open.

        Raises:
            PlanError: no minibatch was seen.
        """
        if not self.count:
            raise PlanError("units are ranked before a minibatch was seen", fix="more steps")
        mean = {group: own.cpu() for group, own in self.mean.items()}
        if kind == "signed":
            return {group: -own for group, own in mean.items()}
        found = {}
        for group, own in mean.items():
            counts = own < 0
            counts[chosen[group]] = True
            found[group] = (own.abs() if kind == "mean" else self.squares[group].cpu()).masked_fill(~counts, 0)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, by the names of the groups."""
        return {
            "count": self.count,
            "mean": {group.name: own for group, own in self.mean.items()},
            "squares": {group.name: own for group, own in self.squares.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.count = int(state["count"])
        for group in self.groups:
            self.mean[group].copy_(state["mean"][group.name])
            self.squares[group].copy_(state["squares"][group.name])
