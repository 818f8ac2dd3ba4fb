"""Heads of a state space: chunks of a padded sequence, a skip inside of the heads, and copies of what heads share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphcomp as gc


class StateSpace(nn.Module):
    """Two residual blocks; 4 heads of 3 dims attend within chunks of 4 steps, and add what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.ins = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.shared = nn.ModuleList(nn.Linear(8, 3) for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))
        self.skips = nn.ParameterList(nn.Parameter(torch.randn(4)) for _ in range(2))
        self.inner = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))

    def block(self, x: Tensor, k: int) -> Tensor:
        batch, steps, _ = x.shape
        heads = self.ins[k](x).view(batch, steps, 4, 3)
        both = self.shared[k](x).view(batch, steps, 1, 3).repeat_interleave(4, dim=2, output_size=4)
        pad = (4 - steps % 4) % 4
        chunks = nn.functional.pad(heads * both, (0, 0, 0, 0, 0, pad)).reshape(batch, -1, 4, 4, 3)
        scores = torch.einsum("bclhp,bcshp->bclsh", chunks, chunks)
        summed = torch.einsum("bclsh,bcshp->bclhp", scores, chunks).reshape(batch, -1, 4, 3)[:, :steps]
        found = summed + self.skips[k][:, None] * heads
        result: Tensor = self.outs[k](self.inner[k](found.reshape(batch, steps, -1)))
        return result

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, 8) -> (n, t, 8)."""
        for k in range(2):
            x = x + self.block(self.norms[k](x), k)
        return x


def test_heads_of_a_state_space_are_heads() -> None:
    torch.manual_seed(0)
    model, x = StateSpace().eval(), torch.randn(2, 10, 8)
    roles = {group.name: group.role for group in gc.analyze(model, x).groups}
    assert [name for name, role in roles.items() if role == "head"] == ["ins.0/head", "ins.1/head"]
    small = gc.compress(model, x, sparsity=0.5, ranking="local", progress=False)
    kept = [g["units"]["kept"] for g in small.report.groups if g["role"] == "head"]
    assert kept == [2, 2]
    assert "masked == sliced" in small.report.verified
