"""Rows count what they do for the outputs: those that a mask hides count nothing, and leave no trace in a repair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.coupling.analysis import Analysis
from graphcomp.errors import CalibrationError
from graphcomp.flows.repaired import flat_batches
from graphcomp.ir.graph import all_tensors
from graphcomp.pruning.consumers import Consumers
from graphcomp.pruning.influence import Influences
from graphcomp.pruning.least_squares import Problem
from graphcomp.pruning.repair import layer_influences, repair_cut
from graphcomp.pruning.slice import SliceGroups

WIDTH = 8


class Pooled(nn.Module):
    """Two layers on tokens, and their weighted sum: (n, t, 6), (n, t) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        tokens = self.second(torch.tanh(self.first(x)))
        found: Tensor = self.head((tokens * weight[..., None]).sum(1))
        return found


class Chosen(nn.Module):
    """No output depends on the layers by a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).argmax(1).float()


def batches(lengths: int, *, junk: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return sentences of as many tokens, and as many of junk behind them, which the weight hides."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(3):
        x = torch.randn(20, lengths, 6, generator=generator)
        noise = 50 * torch.randn(20, junk, 6, generator=torch.Generator().manual_seed(7))
        found.append((torch.cat([x, noise], 1), torch.cat([torch.ones(20, lengths), torch.zeros(20, junk)], 1)))
    return found


def of(model: nn.Module, plan: Analysis, data: list[tuple[Tensor, ...]]) -> Influences:
    return layer_influences(plan, flat_batches(plan, data))


def test_a_row_counts_as_the_norm_of_the_outputs_gradient() -> None:
    model = Pooled().eval()
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2))
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0]).expand(4, 5)
    plan = gc.analyze(model, (x, weight))
    found = of(model, plan, [(x, weight)])
    assert not found.why and len(found.rows) == 3
    second = list(found.rows.values())[1][0].view(4, 5)
    assert torch.allclose(second / second[:, :1], weight, atol=1e-5)
    assert second[second > 0].mean() == pytest.approx(1.0, abs=1e-5)


def test_rows_of_padding_leave_no_trace() -> None:
    model = Pooled().eval()
    plan = gc.analyze(model, batches(4)[0])
    (group,) = [group for group in gc.prunable_groups(plan) if group.size == WIDTH]
    kept = {group: torch.arange(WIDTH // 2)}
    small = SliceGroups(plan.coupling, kept).rewrite(plan.captured.module)
    alone, padded = (repair_cut(plan, kept, small, flat_batches(plan, batches(4, junk=junk))) for junk in (0, 3))
    assert alone.layers and not alone.alike
    assert {name: layer.rows for name, layer in padded.layers.items()} == {n: v.rows for n, v in alone.layers.items()}
    for name, tensor in all_tensors(alone.graph):
        assert torch.allclose(dict(all_tensors(padded.graph))[name], tensor, rtol=1e-3, atol=1e-4), name


def test_outputs_without_a_gradient_let_rows_count_alike() -> None:
    model = Chosen().eval()
    data = [batch[0][:, 0] for batch in batches(1)]
    plan = gc.analyze(model, data[0])
    found = of(model, plan, [(x,) for x in data])
    assert not found.rows and "no output has a gradient" in found.why
    small = gc.compress(model, data[0], sparsity=0.5, calibration=data, verify=False)
    assert any("count alike, as no output has a gradient" in note for note in small.report.notes)


@pytest.mark.parametrize("way", [{"saliency": "repairable"}, {"ranking": "sensitivity"}], ids=["saliency", "probes"])
def test_scores_and_probes_say_where_rows_count_alike(way: dict[str, Any]) -> None:
    data = [batch[0][:, 0] for batch in batches(1)]
    options: dict[str, Any] = {"sparsity": 0.5, "calibration": data, "verify": False, "repair": None, "progress": False}
    small = gc.compress(Chosen().eval(), data[0], **options, **way)
    (said,) = (note for note in small.report.notes if "count alike" in note)
    assert said.startswith(("saliency 'repairable': rows", "sensitivity: rows"))
    assert "as no output has a gradient: " in said
    weighted = batches(4)
    options["calibration"] = [{"x": x, "weight": weight} for x, weight in weighted]
    small = gc.compress(Pooled().eval(), weighted[0], **options, **way)
    assert not any("count alike" in note for note in small.report.notes)


def test_why_rows_of_a_layer_count_alike() -> None:
    model, data = Pooled().eval(), batches(4)
    plan = gc.analyze(model, data[0])
    found = of(model, plan, list(data))
    consumers = Consumers(plan.captured.module, plan.coupling.sources).at.values()
    assert found.alike([c for c in consumers if c.node in found.rows]) == ""
    assert replace(found, rows={}).alike(consumers) == "no output depends on what a layer returns"
    assert Influences(why="the outputs have no gradient").alike(consumers) == "the outputs have no gradient"
    assert found.alike([]) == ""


def test_the_model_gets_no_gradients() -> None:
    model = Pooled().eval()
    plan = gc.analyze(model, batches(4)[0])
    of(model, plan, batches(4))
    assert all(p.grad is None for p in (*model.parameters(), *plan.captured.module.parameters()))


def test_a_row_that_counts_twice_is_a_row_that_stands_there_twice() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    x, t = (torch.randn(40, n, generator=torch.Generator().manual_seed(n)) for n in (6, 5))
    plan = gc.analyze(model, x)
    (node,) = [n for n in plan.captured.module.graph.nodes if n.target is torch.ops.aten.linear.default]
    problem = Problem.between(node, ("input", x), ("weight", torch.zeros(5, 6)), True)
    assert isinstance(problem, Problem)
    twice = torch.where(torch.arange(40) % 3 == 0, 2.0, 1.0)
    every = torch.arange(40)
    found = problem.moments(x, t, every, counts=twice)
    again = problem.moments(x, t, torch.cat([every, every[::3]]))
    for name in ("xx", "xt"):
        assert torch.allclose(getattr(found, name), getattr(again, name))
    assert found.tt == pytest.approx(again.tt)


def test_a_batch_that_does_not_fit_is_named_by_the_run_that_follows() -> None:
    model = Pooled().eval()
    data = batches(4)
    plan = gc.analyze(model, data[0])
    (group,) = [group for group in gc.prunable_groups(plan) if group.size == WIDTH]
    kept = {group: torch.arange(WIDTH // 2)}
    small = SliceGroups(plan.coupling, kept).rewrite(plan.captured.module)
    with pytest.raises(CalibrationError, match="batch 1"):
        repair_cut(plan, kept, small, [list(data[0]), [data[1][0][..., :5], data[1][1]]])
