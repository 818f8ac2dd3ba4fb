"""Averages of the weights (EMA, SWA) of a module that QASSO trains: finalized as it is, or refused with the fix."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import graphcomp as gc
from tests.training.runs import SCHEDULE, ready_of, train

Average = Callable[[gc.Prepared], tuple[nn.Module, Callable[[], None]]]


def averaged(decay: float, **options: bool) -> Average:
    """torch's; without `use_buffers` buffers are those of the last step."""

    def begin(ready: gc.Prepared) -> tuple[nn.Module, Callable[[], None]]:
        average = AveragedModel(ready, multi_avg_fn=get_ema_multi_avg_fn(decay), **options)
        return average, lambda: average.update_parameters(ready)

    return begin


def of_the_state(decay: float) -> Average:
    """timm's: all that state_dict holds."""

    def begin(ready: gc.Prepared) -> tuple[nn.Module, Callable[[], None]]:
        average = copy.deepcopy(ready)

        def update() -> None:
            with torch.no_grad():
                for mean, value in zip(average.state_dict().values(), ready.state_dict().values(), strict=True):
                    mean.copy_(mean * decay + value * (1 - decay))

        return average, update

    return begin


def run(begin: Average, at: int, steps: int = 40) -> tuple[nn.Module, gc.QASSO]:
    """An average begun after `at` steps, of a run of so many."""
    ready = ready_of("mlp", bits=(4, 8))
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=0.05, momentum=0.9, sparsity=0.5, schedule=SCHEDULE)
    train(optimizer, ready, "mlp", at)
    average, update = begin(ready)
    for step in range(at, steps):
        train(optimizer, ready, "mlp", range(step, step + 1))
        update()
    return average, optimizer


@pytest.mark.parametrize("begin", [averaged(0.9), averaged(0.999, use_buffers=True), of_the_state(0.999)])
def test_begun_in_the_cool_down_it_is_what_training_made(begin):
    average, optimizer = run(begin, at=SCHEDULE.ends[2] + 1)
    assert optimizer.settled
    result = gc.finalize(average)
    assert result.report.units_removed == optimizer.removed == 12 and result.report.verified["trained == sliced"] < 1e-9


@pytest.mark.parametrize("at", [0, 11])
def test_units_that_it_has_seen_leave_count_as_zero(at):
    average, optimizer = run(averaged(0.9), at, steps=80)
    held = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    result = gc.finalize(average)
    assert result.report.units_removed == optimizer.removed and result.report.verified["trained == sliced"] < 1e-9
    assert gc.finalize(gc.shrink(average)).report.units_removed == optimizer.removed
    assert all(torch.equal(tensor, held[name]) for name, tensor in average.state_dict().items())


@pytest.mark.parametrize(
    ("begin", "at", "what"),
    [
        (averaged(0.9, use_buffers=True), 0, "neither 0 nor 1"),
        (of_the_state(0.9), 0, "neither 0 nor 1"),
        (averaged(0.99), 0, "for units that are gone"),
        (of_the_state(0.0), 11, "stopped at step 11"),
    ],
)
def test_begun_before_it_is_refused_with_the_fix(begin, at, what):
    average, _ = run(begin, at)
    with pytest.raises((gc.PlanError, gc.VerificationError), match=what) as caught:
        gc.finalize(average)
    assert "when optimizer.settled" in caught.value.fix
