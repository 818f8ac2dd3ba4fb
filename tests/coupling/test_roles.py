"""Roles of groups: what is a stream that norms take statistics over, and stays whole by default."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc


class Chunked(nn.Module):
    """A stream whose branch pads the sequence to whole chunks, so that two symbolic lengths are added."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 16), nn.RMSNorm(16)
        self.mix, self.out = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        length = ids.shape[1]
        padded = nn.functional.pad(self.norm(x), (0, 0, 0, (8 - length % 8) % 8))
        x = x + self.mix(padded)[:, :length]
        return self.out(self.norm(x))


class GroupedConvolutions(nn.Module):
    """Convolutions in as many groups as there are heads give the stream factors that are heads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.q, self.k = nn.Conv1d(8, 16, 1), nn.Conv1d(16, 16, 1, groups=4), nn.Conv1d(16, 16, 1)
        self.v, self.mix = nn.Conv1d(16, 16, 1), nn.Conv1d(16, 16, 1, groups=4)
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = (f(x).unflatten(1, (4, 4)).transpose(-1, -2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        return self.out(self.norm((x + self.mix(y)).transpose(1, 2)))


class Features(nn.Module):
    """Channels of convolutions that a layer norm reads whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 16, 3), nn.LayerNorm(16)
        self.up, self.out = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.norm(self.first(x).transpose(1, 2))).relu())


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Chunked(), torch.randint(20, (2, 13))),
        (GroupedConvolutions(), torch.randn(2, 8, 6)),
        (Features(), torch.randn(2, 1, 12)),
    ],
    ids=["two symbolic lengths", "heads of grouped convolutions", "channels under a layer norm"],
)
def test_a_stream_under_norms_is_of_role_width(model: nn.Module, x: Tensor) -> None:
    plan = gc.analyze(model.eval(), x)
    streams = [group for group in plan.groups if group.normalized]
    assert streams
    assert {group.role for group in streams} == {"width"}


def test_the_error_names_the_role_that_is_left_whole_by_default() -> None:
    with pytest.raises(gc.NothingToPrune, match=r"prune=\('width',\)"):
        gc.compress(Chunked().eval(), torch.randint(20, (2, 13)), progress=False)


def test_channels_under_a_group_norm_and_heads_that_residuals_pool_keep_their_roles() -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(2, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    roles = {group.role for group in gc.analyze(convolutions.eval(), torch.randn(1, 3, 8, 8)).groups}
    assert "width" not in roles
