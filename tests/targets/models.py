"""Models of a few lines, importable by another process."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.capture.capture import capture
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.groups import ChannelGroup


class Mlp(nn.Module):
    """(n, 6) -> (n, 3)"""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Opaque(Mlp):
    """A constructor argument that leaves no trace."""

    def __init__(self, size: int) -> None:
        super().__init__(2 * size)


class Residual(nn.Module):
    """(n, 3, 8, 8) -> (n, 5), a block with batch norm and a grouped and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.back, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.back(F.relu(self.depthwise(F.relu(self.grouped(x)))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """(n, s, 16) -> (n, s, 16): heads and head_dim are attributes that `view` reads, and have equal lengths."""

    def __init__(self, heads: int = 4, head_dim: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.scale = head_dim**-0.5
        self.q, self.k, self.v = (nn.Linear(16, heads * head_dim) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, s, _ = x.shape
        q = self.q(x).view(n, s, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(n, s, self.heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(n, s, self.heads, self.head_dim).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2)
        return self.out(attended.reshape(n, s, self.heads * self.head_dim))


class TorchAttention(nn.Module):
    """(n, s, 16) -> (n, s, 16)"""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class Recurrent(nn.Module):
    """(n, s, 6) -> (n, 3)"""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


class Tied(nn.Module):
    """(n, s) ids -> (n, s, 11), one matrix at both ends, and a table that is not saved by state_dict."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("position", torch.randn(32, width), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids) + self.position[: ids.shape[1]])


class Grouped(nn.Module):
    """(n, 3, 8, 8) -> (n, 5) with group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Branching(nn.Module):
    """(n, 6) -> (n, 3) in a way that export refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        return self.down(h) if float(x.sum()) > -1e9 else self.down(-h)


INPUTS: dict[str, tuple[Tensor, ...]] = {
    "Mlp": (torch.randn(4, 6),),
    "Residual": (torch.randn(2, 3, 8, 8),),
    "Attention": (torch.randn(2, 5, 16),),
    "TorchAttention": (torch.randn(2, 5, 16),),
    "Recurrent": (torch.randn(2, 5, 6),),
    "Tied": (torch.randint(11, (2, 5)),),
    "Grouped": (torch.randn(2, 3, 8, 8),),
    "Branching": (torch.randn(4, 6),),
}


def import_transformers() -> Any:
    """transformers; the test is skipped where it is not installed."""
    from tests.vision import import_torchvision

    with suppress(ImportError):
        import_torchvision()  # transformers imports it, too, and cannot where its compiled part does not fit
    return pytest.importorskip("transformers")


def analysed(model: nn.Module, *inputs: Tensor) -> Analysis:
    """Captured and coupled."""
    return analyze_captured(capture(model, inputs))


def some(analysis: Analysis, *leave: str) -> dict[ChannelGroup, Tensor]:
    """Every second unit of each group, the first one always; roles in `leave` stay whole."""
    return {g: torch.arange(0, g.size, 2) for g in analysis.groups if g.role not in leave}


class Outer(nn.Module):
    """(n, 6) -> (n, 2), around an Mlp."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: nn.Module = Mlp()
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))
