"""Latency is measured without leaving a trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from graphcomp.cost import latency
from graphcomp.errors import PlanError


def test_latency_leaves_threads_and_mode_as_they_were() -> None:
    seen: list[tuple[int, bool]] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            seen.append((torch.get_num_threads(), self.training))
            return x * scale

    module, threads = Watched().train(), torch.get_num_threads()
    found = latency(module, (torch.ones(3),), {"scale": 2.0}, threads=1, warmup=2, repeats=5)
    assert seen == [(1, False)] * 7
    assert (torch.get_num_threads(), module.training) == (threads, True)
    assert 0 < found.p10_ms <= found.median_ms <= found.p90_ms
    assert found.runs == 5
    assert math.isfinite(latency(module, (torch.ones(3),), {"scale": 2.0}, repeats=1).p90_ms)


def test_latency_needs_weights_and_runs() -> None:
    with pytest.raises(PlanError, match="meta device"):
        latency(nn.Linear(2, 2, device="meta"), (torch.ones(1, 2, device="meta"),))
    with pytest.raises(PlanError, match="0 runs"):
        latency(nn.Identity(), (torch.ones(1),), repeats=0)
