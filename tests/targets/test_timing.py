"""Times are the least of many runs, in turns; and of files and modules as they run."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from graphcomp.api import analyze
from graphcomp.cost.pieces import computed_values, pieces_of
from graphcomp.targets.timing import LEAST_RUNS, ROUNDS, Call, EagerTimer, OnnxTimer, best_times, clock_of
from tests.marks import in_ci


class Clock:
    """A clock that calls move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float, whole: bool = False) -> Call:
        """Return a call that takes these seconds in turn, then the last ones again and again."""
        left = list(seconds)

        def run() -> None:
            self.runs.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Call(run, whole=whole)


def test_the_least_of_many_runs_counts_and_calls_take_turns() -> None:
    clock = Clock()
    calls = [clock.call("a", 9.0, 5.0, 3.0, 4.0), clock.call("b", 9.0, 7.0)]
    assert best_times(calls, clock, rounds=2) == [3000.0, 7000.0]
    turn = ["a"] * LEAST_RUNS + ["b"] * LEAST_RUNS
    assert clock.runs == ["a", "a", "b", "b", *turn, *turn]


def test_short_runs_are_many_and_networks_run_for_longer() -> None:
    clock = Clock()
    best_times([clock.call("short", 1e-3), clock.call("whole", 1e-2, whole=True), clock.call("long", 1.0)], clock)
    counts = {name: clock.runs.count(name) - 2 for name in ("short", "whole", "long")}
    assert counts["long"] == ROUNDS * LEAST_RUNS < counts["whole"] < counts["short"]


def test_what_lies_between_two_runs_takes_no_time() -> None:
    clock = Clock()
    call = clock.call("a", 1.0)
    assert best_times([Call(call.run, between=4096, near=(torch.ones(3),))], clock, rounds=1) == [1000.0]
    assert clock_of(1) is time.thread_time and clock_of(2) is time.perf_counter


@pytest.mark.parametrize("runtime", ["eager", *in_ci("onnxruntime")])
def test_pieces_and_networks_run(runtime: str) -> None:
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), torch.randn(3, 4)
    plan = analyze(net, x)
    timer = EagerTimer(1) if runtime == "eager" else OnnxTimer(1)
    module = plan.captured.module
    values = computed_values(module, [x])
    pieces = pieces_of(module, values, ["linear", "linear_1"])
    calls = [*timer.pieces(module, values, pieces, 4096), timer.whole(module, plan.captured.inputs)]
    before = torch.get_num_threads()
    times = timer.times(calls)
    assert len(times) == 3 and all(0 < ms < 1e4 for ms in times)
    assert torch.get_num_threads() == before
    assert timer.pieces(module, values, [], 0) == []
