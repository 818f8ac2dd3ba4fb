"""The cross-entropy method: draw actions from a normal distribution, and move the distribution to the best of them.

AJPQ's paper searches by reinforcement learning (two DDPG agents); the cross-entropy method takes their place here, over
the same actions: there is no network to train, and a few hundred evaluations are enough to move some dozens of numbers.

Source: Rubinstein, The cross-entropy method for combinatorial and continuous optimization (1999).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ELITE = 0.25
"""Share of each generation that the distribution moves to."""
MOVE = 0.6
"""How far the distribution moves: 1 forgets all generations before."""


class CrossEntropy:
    """A normal distribution over actions in 0 … 1, and the best draws so far.

    Attributes:
        mean, deviation: (d,) float64.

    Args:
        mean: where the search begins.
        deviation: how far from there, at first.
        narrowest: the least deviation that the search goes down to.
        seed: of all draws.
    """

    def __init__(self, mean: Tensor, deviation: float, narrowest: float, seed: int) -> None:
        self.mean, self.narrowest = mean.clone(), narrowest
        self.deviation = torch.full_like(mean, deviation)
        self._draws = torch.Generator().manual_seed(seed % 2**63)
        self._best: list[tuple[float, Tensor]] = []  # elite of the generations before

    def ask(self, count: int, about: Tensor | None = None) -> Tensor:
        """Return (count, d) new actions.

        Args:
            about: (d,) in place of the mean.
        """
        noise = torch.randn(count, len(self.mean), generator=self._draws, dtype=torch.float64)
        return ((self.mean if about is None else about) + self.deviation * noise).clamp(0, 1)

    def tell(self, actions: Tensor, scores: Sequence[float]) -> None:
        """Move towards the actions with the highest scores, of these and of the elite before."""
        pairs = [*self._best, *zip(scores, actions, strict=True)]
        pairs.sort(key=lambda pair: -pair[0])  # stable: of equal scores the older ones stay
        self._best = pairs[: max(2, round(ELITE * len(actions)))]
        elite = torch.stack([action for _, action in self._best])
        self.mean += MOVE * (elite.mean(0) - self.mean)
        own = elite.std(0) if len(elite) > 1 else self.deviation
        self.deviation += MOVE * (own - self.deviation)
        self.deviation.clamp_(min=self.narrowest)
