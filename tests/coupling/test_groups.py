"""Which of several factors of one dim is cut by default: exactly one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc


class Net(nn.Module):
    """A convolution of 32 channels, something on the channels, and a convolution that reads them."""

    def __init__(self, middle: nn.Module, channels: int = 32) -> None:
        super().__init__()
        self.a, self.middle, self.b = nn.Conv2d(3, 32, 3), middle, nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 5, h, w)."""
        result: Tensor = self.b(torch.relu(self.middle(self.a(x))))
        return result


class Shuffle(nn.Module):
    """Channels (4 8) become (8 4)."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h, w)."""
        return x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)


def roles(model: nn.Module) -> dict[str, list[int]]:
    """Role -> sizes of its groups."""
    found: dict[str, list[int]] = {}
    for group in gc.analyze(model, torch.randn(2, 3, 6, 6)).groups:
        found.setdefault(group.role, []).append(group.size)
    return found


@pytest.mark.parametrize(
    ("middle", "channels", "expected"),
    [
        (lambda: nn.GroupNorm(8, 32), 32, {"group": [8], "channel": [4]}),
        (lambda: nn.GroupNorm(1, 32), 32, {"channel": [32]}),
        (lambda: nn.GroupNorm(32, 32), 32, {"channel": [32]}),
        (lambda: nn.Sequential(nn.GroupNorm(4, 32), nn.GroupNorm(8, 32)), 32, {"group": [4, 2], "channel": [4]}),
        (lambda: nn.Conv2d(32, 64, 3, groups=4), 64, {"group": [4], "channel": [8, 16]}),
        (lambda: nn.Conv2d(32, 32, 3, groups=32), 32, {"channel": [32]}),
        (lambda: nn.Conv2d(32, 64, 3, groups=32), 64, {"channel": [32], "group": [2]}),
        (Shuffle, 32, {"group": [4], "channel": [8]}),
    ],
    ids=["group norm", "one group", "a group a channel", "two", "grouped", "depthwise", "multiplier", "shuffle"],
)
def test_one_factor_of_a_dim_is_cut(
    middle: Callable[[], nn.Module], channels: int, expected: dict[str, list[int]]
) -> None:
    assert roles(Net(middle(), channels)) == expected


@pytest.mark.parametrize("middle", [nn.GroupNorm(8, 32), Shuffle()], ids=["group norm", "shuffle"])
def test_half_of_the_units_is_half_of_the_channels(middle: nn.Module) -> None:
    small = gc.compress(Net(middle), torch.randn(2, 3, 6, 6), sparsity=0.5, progress=False)
    assert dict(small.module.named_parameters())["a.weight"].shape[0] == 16


def test_the_groups_are_cut_where_prune_names_them() -> None:
    plan = gc.analyze(Net(nn.GroupNorm(8, 32)), torch.randn(2, 3, 6, 6))
    assert [group.size for group in gc.prunable_groups(plan)] == [4]
    assert [group.size for group in gc.prunable_groups(plan, prune=["group"])] == [8]
