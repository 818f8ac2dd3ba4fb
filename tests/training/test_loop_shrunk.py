"""The cool-down of a run trains what is left: the same result, in less time, and it goes on after a kill."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import graphcomp as gc
from graphcomp.training import loop
from tests.marks import in_ci
from tests.training.test_loop import IMAGES, LABELS, STAGES, STEPS, Stopped, compress, loss, run, same, stopping

COOLDOWN = STAGES.ends[2]
"""The first step of the cool-down, counted from 0."""


@pytest.fixture(autouse=True)
def from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few steps are left."""
    monkeypatch.setattr(loop, "SHRINK_FROM", 1)


def test_what_is_left_is_trained_from_the_second_step_of_the_cool_down_on(monkeypatch):
    seen = []
    forward = gc.Prepared.__call__

    def counting(self, *args, **kwargs):
        if self.training:
            seen.append(sum(p.numel() for p in self.parameters()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(gc.Prepared, "__call__", counting)
    run()
    whole, small = seen[0], seen[-1]
    assert seen == [whole] * (COOLDOWN + 1) + [small] * (STEPS - COOLDOWN - 1) and small < 0.9 * whole


@pytest.mark.slow
@pytest.mark.ci
def test_it_is_the_same_training():
    """In float64, and without dropout, whose draws depend on the shape."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    ).double()
    batches = [(images.double(), labels) for images, labels in zip(IMAGES.split(5), LABELS.split(5), strict=True)]
    found = [
        gc.compress(
            model, batches[0][0], data=batches, loss=loss, method="hesso", sparsity=0.5, progress=False,
            training=gc.Training(schedule=STAGES, lr=0.05, shrink=shrink),
        )
        for shrink in (True, False)
    ]  # fmt: skip
    shrunk, masked = found
    assert shrunk.report.units_removed == masked.report.units_removed == 7
    x = IMAGES.double()
    torch.testing.assert_close(shrunk(x), masked(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("step", [COOLDOWN + 6, *in_ci(COOLDOWN, COOLDOWN + 1)])
@pytest.mark.slow
@pytest.mark.ci
def test_a_run_that_was_cut_short_ends_as_it_would_have(tmp_path, step):
    whole = run()
    with pytest.raises(Stopped):
        run(loss=stopping(step), folder=tmp_path)
    again = run(folder=tmp_path)
    assert _same_where_units_are(again, whole)


def _same_where_units_are(first, second) -> bool:
    """Of units that are gone, batch norms have whatever statistics they had."""
    return same(gc.shrink(first), gc.shrink(second))


@pytest.mark.slow
@pytest.mark.ci
def test_the_prepared_module_is_handed_back_whole():
    ready = run()
    masked = {group.name: len(units) for group, units in ready.kept().items()}
    assert sum(masked.values()) == 7
    small = gc.finalize(ready)
    assert (small.report.units_removed, small.report.units_total) == (7, 14)


def test_metrics_count_the_units_of_the_whole(tmp_path):
    compress(folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["units"] for line in lines] == [14] * len(lines)
    assert lines[-1]["units_removed"] == 7 and lines[-1]["stage"] == "cool-down"
    assert 4 <= lines[-1]["weight_bits"] <= 8


class Outer(nn.Module):
    """A model in which a part is compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.part(x).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.ci
def test_a_part_of_a_model(tmp_path):
    model = Outer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = gc.Training(schedule=STAGES, lr=0.05, clip_norm=1.0, folder=tmp_path / "cut", save_every=1)
    with pytest.raises(Stopped):
        compress(model, loss=stopping(COOLDOWN + 4), scope="part", training=training)
    again = compress(model, scope="part", training=training)
    whole = compress(model, scope="part", training=gc.Training(schedule=STAGES, lr=0.05, clip_norm=1.0))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(again(IMAGES), whole(IMAGES))
    assert not torch.equal(whole.module.head.weight, model.head.weight)  # trained along


@pytest.mark.slow
@pytest.mark.ci
def test_both_runs_of_a_sequence():
    small = compress(method="sequential", training=gc.Training(steps=80))
    assert small.report.units_removed == 7 and small.report.verified["trained == sliced"] <= 1e-9


def test_a_run_too_short_for_it_is_trained_with_masks(monkeypatch):
    monkeypatch.setattr(loop, "SHRINK_FROM", STEPS)
    monkeypatch.setattr(gc.QASSO, "shrink", lambda self: pytest.fail("shrunk"))
    run()


class Rows(torch.optim.SGD):
    """Remembers one number per row, in a dim less."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.dim() > 1):
            self.state[parameter]["rows"] = parameter.flatten(1).mean(1)
        return super().step(closure)


def test_with_a_state_that_cannot_be_cut_it_goes_on_with_masks(caplog):
    caplog.set_level("INFO", "graphcomp")
    training = gc.Training(schedule=STAGES, lr=0.05, optimizer=Rows, options={})
    assert compress(training=training).report.units_removed == 7
    assert [r.getMessage().startswith("the cool-down goes on with masks: the opt") for r in caplog.records] == [True]
