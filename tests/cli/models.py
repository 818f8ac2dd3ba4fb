"""Models that the command line finds by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


class Two(nn.Module):
    """Reads two named inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.out = nn.Embedding(20, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.table(ids) + self.up(x)))


def two() -> nn.Module:
    torch.manual_seed(0)
    return Two()


def frozen() -> nn.Module:
    return nn.Linear(4, 3)


def no_model() -> int:
    return 3


NUMBER = 3
