"""Ties of counts: groups that keep equally many units, each its own best."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphcomp as gc
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import PlanError
from graphcomp.pruning.allocation import allocate, normalized
from graphcomp.pruning.evidence import Scores
from graphcomp.pruning.ties import equalized, merged

SIZES = (8, 8, 8, 12)


@pytest.fixture(name="groups")
def _groups() -> tuple[ChannelGroup, ...]:
    layers = [nn.Linear(a, b) for a, b in zip((3, *SIZES), (*SIZES, 2), strict=True)]
    return gc.analyze(nn.Sequential(*layers).eval(), torch.rand(2, 3)).groups


def _scores(groups: tuple[ChannelGroup, ...]) -> Scores:
    torch.manual_seed(0)
    scales = (1.0, 3.0, 2.0, 1.5)
    return {g: torch.rand(g.size, dtype=torch.float64) * s for g, s in zip(groups, scales, strict=True)}


def test_sets_that_share_a_member_are_one() -> None:
    sets = [frozenset({1, 2}), frozenset({3}), frozenset({4, 5}), frozenset({2, 4}), frozenset({6, 7})]
    assert set(merged(sets)) == {frozenset({1, 2, 4, 5}), frozenset({6, 7})}


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_counts_are_equal_and_the_sparsity_is_met(groups: tuple[ChannelGroup, ...], local: bool, step: int) -> None:
    scores = _scores(groups)
    scope = "local" if local else "global"
    kept = allocate(groups, scores, sparsity=0.5, scope=scope, normalize="none", round_to=step)  # type: ignore[arg-type]
    tied = equalized(kept, scores, [frozenset(groups[:2])], step=step, local=local)
    assert len(tied[groups[0]]) == len(tied[groups[1]])
    assert sum(map(len, tied.values())) == sum(map(len, kept.values())) == 18
    assert all(len(units) % step == 0 for units in tied.values())


def test_each_group_keeps_its_best_units(groups: tuple[ChannelGroup, ...]) -> None:
    scores = _scores(groups)
    kept = allocate(groups, scores, sparsity=0.5, normalize="none")
    counts = [len(kept[group]) for group in groups]
    tied = equalized(kept, scores, [frozenset(groups[:2])])
    assert counts[0] != counts[1]
    for group in groups:
        best = scores[group].argsort(descending=True)[: len(tied[group])].sort().values
        assert torch.equal(tied[group], best)


def _refuse(_left: object) -> bool:
    return False


def test_nothing_is_given_back_that_the_limit_forbids(groups: tuple[ChannelGroup, ...]) -> None:
    scores = _scores(groups)
    kept = allocate(groups, scores, sparsity=0.5, normalize="none")
    least = min(len(kept[group]) for group in groups[:2])
    tied = equalized(kept, scores, [frozenset(groups[:2])], holds=_refuse)
    assert [len(tied[group]) for group in groups[:2]] == [least, least]
    assert [len(tied[group]) for group in groups[2:]] == [len(kept[group]) for group in groups[2:]]


def test_what_an_earlier_choice_removed_stays_removed(groups: tuple[ChannelGroup, ...]) -> None:
    scores = _scores(groups)
    already = allocate(groups, scores, sparsity=0.25, normalize="none")
    other = {group: -own for group, own in normalized(scores, "mean").items()}
    kept = allocate(groups, other, sparsity=0.5, normalize="none", already=already)
    tied = equalized(kept, other, [frozenset(groups[:2])], already=already)
    assert all(bool(torch.isin(tied[group], already[group]).all()) for group in groups)


def test_groups_of_different_sizes_are_refused(groups: tuple[ChannelGroup, ...]) -> None:
    scores = _scores(groups)
    kept = allocate(groups, scores, sparsity=0.5)
    with pytest.raises(PlanError, match="different sizes"):
        equalized(kept, scores, [frozenset(groups[2:])])
