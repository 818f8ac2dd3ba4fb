"""A prepared network with bits per channel, and what plans of it are made with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import graphcomp as gc
from graphcomp.api import _prepared
from graphcomp.methods.ajpq.budget import Meter
from graphcomp.methods.ajpq.method import Ajpq, Searching
from graphcomp.methods.ajpq.plan import ChannelPlan, Layout
from graphcomp.training.prepared import Prepared
from tests.methods.learning import Net, batches, net


def searching(method: Ajpq | None = None, model: Net | None = None, **asked: Any) -> tuple[Prepared, Searching]:
    """`net()` in eval mode, and the search of what is asked, in weights alone."""
    method = method or Ajpq()
    goal = gc.Goal(**{"bits": (2, 8), "activation_bits": None, "budget": gc.Budget(bops=0.04), **asked})
    source = partial(
        _prepared, model or net(), batches()[0][0], None, ignore=(), keep_inputs=(), prune=None, scope="", outputs=None
    )
    ready = method.prepare(source, goal).eval()
    groups = () if goal.sparsity == 0 else ready.session.groups
    return ready, Searching(method, ready, goal, Layout(ready, groups, goal.round_to))


def random_plan(search: Searching, seed: int) -> ChannelPlan:
    """A plan that two random controllers say, within no budget."""
    draws = torch.Generator().manual_seed(seed)
    return search.actions.plan(torch.rand(search.actions.size, generator=draws, dtype=torch.float64))


def meter(search: Searching) -> Meter:
    assert search.meter is not None
    return search.meter


def settled() -> Net:
    """`net()` whose norms have the statistics of the data."""
    model = net().train()
    for norm in (model.one, model.two):
        norm.momentum = None
    with torch.no_grad():
        for x, _ in batches(8):
            model(x)
    return model.eval()
