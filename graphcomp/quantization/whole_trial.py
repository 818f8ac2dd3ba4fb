"""The model as a whole, learned: towards the float model's outputs and the values that blocks hand on.

Block by block, what is left of one block is an input of the next, and learned on the same few samples again. Here the
whole fake-quant graph is computed at once, weights on their levels from the first step on. Rounding, biases and steps
of activations are learned, and the loss is the relative squared error of the outputs, plus the mean of that error over
the exits of all blocks. The outputs of few samples alone are few numbers; the exits have one for each position.

Sources: Hinton et al. 2015 (arXiv 1503.02531) for learning from a model, Romero et al. 2015 (FitNets, arXiv 1412.6550)
for the values inside; Bengio et al. 2013 (arXiv 1308.3432), the straight-through estimator; Esser et al. 2020 (LSQ,
arXiv 1902.08153), gradients of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphcomp.arguments import wrong
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.numerics.compare import floating_tensors
from graphcomp.quantization.block_trial import BlockTrial, squared
from graphcomp.quantization.reconstruction import Augment

RATES = (3e-3, 5e-3, 5e-3)
"""Adam's learning rates at the start: of V, of biases relative to their size, and of steps relative to theirs. Three
times those of biases and steps are worse after 60 steps; V passes the middle of two levels where gradients agree."""


@dataclass(eq=False)
class WholeTrial(BlockTrial):
    """What the whole model learns.

    Attributes:
        exits: nodes whose values are compared, too -> the float node of each.
        augment: gives other samples for those of a step; None: as they are.
    """

    exits: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    augment: Augment | None = None

    rates: ClassVar[tuple[float, float, float]] = RATES
    decays: ClassVar[bool] = True

    def _loss(self, k: int, done: float, start: float, generator: torch.Generator) -> Tensor:
        """Return the relative error of the outputs of one piece, plus the mean of that over the exits."""
        placeholders = self.setting.fake.graph.find_nodes(op="placeholder")
        piece: Sequence[Any] = [self.data.given[k][node] for node in placeholders]
        if self.augment is not None:
            piece = self._augmented(piece, generator)
        wanted, inside = self._floats(piece)
        values: dict[fx.Node, Any] = dict(zip(placeholders, piece, strict=True))
        values |= {node: soft.between(0.0) for node, soft in self.softs.items()}
        values |= self.biases
        loss = _relative(self._run(values), wanted)
        if not inside:
            return loss
        return loss + torch.stack([_relative([values[node]], [t]) for node, t in inside.items()]).mean()

    def _augmented(self, piece: Sequence[Any], generator: torch.Generator) -> Sequence[Any]:
        """Return other inputs in place of those of a piece.

        Raises:
            PlanError: they are not of the same number and kind.
        """
        assert self.augment is not None
        found = self.augment(piece, generator)
        kinds = [[_kind(t) for t in each] if isinstance(each, Sequence) else None for each in (found, piece)]
        if kinds[0] != kinds[1]:
            raise wrong("what `augment` returns", f"inputs as they were given, {kinds[1]}", kinds[0], "augment=None")
        return found

    @torch.no_grad()
    def _floats(self, piece: Sequence[Any]) -> tuple[list[Tensor], dict[fx.Node, Tensor]]:
        """Return the outputs of the float graph, and its values at the exits."""
        found: dict[fx.Node, Tensor] = {}

        def see(node: fx.Node, value: Any) -> None:
            if node in twins:
                found[node] = value

        twins = set(self.exits.values())
        outputs = floating_tensors(run_tapped(self.setting.folded, piece, see=see))
        return outputs, {node: found[twin] for node, twin in self.exits.items()}


def _kind(value: Any) -> Any:
    return (tuple(value.shape[1:]), value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return Σ ||y - t||² / Σ ||t||²."""
    error, norm = squared(found, wanted)
    return error / norm.clamp(min=torch.finfo(norm.dtype).tiny)
