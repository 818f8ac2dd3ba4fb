"""When what happens: stages, periods, and the most bits allowed in each step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import graphcomp as gc
from graphcomp.training.schedule import Schedule, Stage

LOW, HIGH = torch.tensor([4.0]), torch.tensor([16.0])


def trace(schedule: Schedule, low: float = 4, high: float = 16) -> list[float]:
    """The most bits allowed, once per change, up to the end."""
    bits = [schedule.most_bits(k, torch.tensor([low]), torch.tensor([high])).item() for k in range(schedule.steps)]
    return [b for k, b in enumerate(bits) if k == 0 or b != bits[k - 1]]


# ------------------------------------------------------------------------------------------------ bits
def test_bits_go_down_by_two_thirds_of_the_range():
    assert trace(Schedule(100)) == [16, 14, 12, 10, 8]


def test_bits_go_down_at_the_start_of_each_period_but_the_first():
    schedule = Schedule(100, warmup=10, projection=40, joint=20, projection_periods=4, bit_reduction=2)
    bits = [schedule.most_bits(k, LOW, HIGH).item() for k in range(100)]
    assert bits == [16] * 20 + [14] * 10 + [12] * 10 + [10] * 60


def test_bits_never_go_below_the_fewest():
    assert trace(Schedule(100, bit_reduction=5)) == [16, 11, 6, 4]
    assert trace(Schedule(100, bit_reduction=5), low=8, high=8) == [8]


def test_each_layer_has_its_own_range():
    bits = Schedule(100).most_bits(60, torch.tensor([4.0, 2, 8]), torch.tensor([16.0, 8, 8]))
    assert bits.tolist() == [8, 4, 8]


def test_one_period_takes_nothing_off():
    assert trace(Schedule(100, projection_periods=1)) == [16]


def test_without_projection_all_bits_are_allowed():
    assert trace(Schedule(100, projection=0)) == [16]


@pytest.mark.parametrize("options", [{}, {"bit_reduction": 1}])
def test_bits_that_are_to_be_fewer_in_the_end_are_come_to_in_the_same_periods(options):
    schedule = Schedule(100, **options)
    end = torch.tensor([6.0])
    bits = [schedule.most_bits(k, LOW, HIGH, end).item() for k in range(100)]
    assert list(dict.fromkeys(bits)) == [16, 13.5, 11, 8.5, 6]
    assert bits[14:] == [6] * 86


def test_bits_that_are_to_be_more_in_the_end_change_nothing():
    schedule = Schedule(100)
    for k in range(100):
        assert schedule.most_bits(k, LOW, HIGH, torch.tensor([9.0])) == schedule.most_bits(k, LOW, HIGH)


def test_in_one_period_the_end_comes_with_the_joint_stage():
    schedule = Schedule(100, projection_periods=1)
    bits = [schedule.most_bits(k, LOW, HIGH, torch.tensor([6.0])).item() for k in range(100)]
    assert bits == [16] * 15 + [6] * 85


# ------------------------------------------------------------------------------------------------ stages and periods
def test_stages_follow_each_other_and_the_cool_down_has_no_end():
    schedule = Schedule(20, warmup=3, projection=6, joint=6, projection_periods=3, pruning_periods=2)
    stages = [schedule.moment(k).stage for k in range(30)]
    assert stages == [Stage.WARMUP] * 3 + [Stage.PROJECTION] * 6 + [Stage.JOINT] * 6 + [Stage.COOLDOWN] * 15


@pytest.mark.parametrize(("length", "periods"), [(6, 2), (7, 3), (5, 5), (23, 7), (4, 1)])
def test_periods_fill_the_stage_and_differ_by_a_step_at_most(length, periods):
    schedule = Schedule(100, warmup=0, projection=0, joint=length, pruning_periods=periods)
    moments = [schedule.moment(k) for k in range(length)]
    assert [m.period for m in moments if m.first] == list(range(periods))
    assert [m.period for m in moments if m.last] == list(range(periods))
    assert max(m.length for m in moments) - min(m.length for m in moments) <= 1
    counted = [sum(m.period == p for m in moments) for p in range(periods)]
    assert counted == [next(m.length for m in moments if m.period == p) for p in range(periods)]
    assert all(m.remaining == m.length - m.step for m in moments)


@pytest.mark.parametrize("steps", [4, 12, 30, 300])
def test_a_short_stage_has_a_period_a_step(steps):
    schedule = Schedule(steps)
    _, projection, joint, _ = schedule.lengths
    assert schedule.periods == (min(5, max(1, projection)), min(5, max(1, joint)))
    joint_moments = [m for m in map(schedule.moment, range(steps)) if m.stage is Stage.JOINT]
    assert len({m.period for m in joint_moments}) == min(5, joint)


def test_numpys_numbers_are_numbers():
    assert Schedule(np.int64(100), joint=np.float64(0.25)) == Schedule(100, joint=0.25)


def test_periods_that_are_asked_for_by_their_number_are_the_same_run():
    assert str(Schedule(100)) == str(Schedule(100, projection_periods=5, pruning_periods=5))
    assert str(Schedule(100)) != str(Schedule(100, pruning_periods=4))


def test_fractions_are_of_the_whole_run():
    assert Schedule(1000, warmup=0.1, projection=0.25, joint=300).lengths == (100, 250, 300, 350)


@pytest.mark.parametrize("transformer", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 50, 1000])
def test_a_default_fits_into_any_run(steps, transformer):
    schedule = Schedule.of(steps, transformer=transformer)
    assert sum(schedule.lengths) == steps
    assert schedule.lengths[3] >= 0.4 * steps - 1  # lengths are rounded


def test_transformers_take_longer_to_come_back():
    assert Schedule.of(1000, transformer=True).lengths == (100, 200, 250, 450)
    assert Schedule.of(1000).lengths == (50, 100, 200, 650)


# ------------------------------------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("steps", "options", "why"),
    [
        (0, {}, "at least one step"),
        (-5, {}, "at least one step"),
        *((steps, {}, "whole number") for steps in (10.0, "a", True, None, 2.5)),
        (100, {"warmup": -1}, "number of steps"),
        *((100, {"joint": length}, "number of steps") for length in ("a", True, None, float("inf"))),
        (100, {"joint": 1.0}, "number of steps"),
        (100, {"projection": 2.5}, "number of steps"),
        (100, {"warmup": float("nan")}, "number of steps"),
        (100, {"bit_reduction": -2}, "bit_reduction"),
        (100, {"bit_reduction": float("nan")}, "bit_reduction"),
        *((100, {"bit_reduction": bits}, "bit_reduction") for bits in (float("inf"), "2", True)),
        (100, {"projection_periods": 0}, "projection_periods"),
        *((100, {"pruning_periods": periods}, "pruning_periods") for periods in (2.5, 2.0, "2", True)),
        (100, {"pruning_periods": -1}, "pruning_periods"),
        (100, {"projection": 4, "projection_periods": 5}, "each period has at least one step"),
        (100, {"joint": 4, "pruning_periods": 5}, "each period has at least one step"),
        (100, {"warmup": 50, "projection": 30, "joint": 20}, r"50 \+ 30 \+ 20 = 100"),
        (100, {"warmup": 0.5, "projection": 0.5, "joint": 0.5}, r"50 \+ 50 \+ 50 = 150"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_the_reason(steps, options, why):
    with pytest.raises(gc.PlanError, match=why) as caught:
        Schedule(steps, **options)
    assert caught.value.fix
