"""The number of units removed is exact, or the error says what is possible."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcomp.capture.capture import capture
from graphcomp.cost import Bits, Bops, CostModel, counts_of
from graphcomp.cost.latency_table import LatencyTable
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.axis import Factor
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import BudgetError, NotBuiltError, NothingToPrune, PlanError
from graphcomp.pruning.allocation import Budget, Meter, allocate, allocate_budget, iterative, units_to_remove
from graphcomp.pruning.saliency import score


def groups_of(*sizes: int) -> list[ChannelGroup]:
    return [ChannelGroup(f"g{k}", n, "channel", (), Factor(n), False) for k, n in enumerate(sizes)]


def scored(groups: Sequence[ChannelGroup], *scores: Sequence[float]) -> dict[ChannelGroup, Tensor]:
    return {g: torch.tensor(s, dtype=torch.float32) for g, s in zip(groups, scores, strict=True)}


def drawn(groups: Sequence[ChannelGroup], seed: int = 0) -> dict[ChannelGroup, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g: torch.rand(g.size, generator=generator) for g in groups}


def removed(groups: Sequence[ChannelGroup], kept: Kept) -> list[int]:
    return [g.size - len(kept[g]) for g in groups]


def well_formed(groups: Sequence[ChannelGroup], kept: Kept, round_to: int = 1) -> bool:
    """Every group has at least one unit, ascending, in a number that is allowed."""
    ascending = all(bool((u[1:] > u[:-1]).all()) for u in kept.values())
    legal = all(len(kept[g]) == g.size or (len(kept[g]) and len(kept[g]) % round_to == 0) for g in groups)
    return set(kept) == set(groups) and ascending and legal


def reachable(sizes: Sequence[int], round_to: int) -> set[int]:
    """All numbers of units that can be removed, by trying."""
    totals = {0}
    for n in sizes:
        options = {0} | {n - k for k in range(round_to, n + 1, round_to)}
        totals = {a + b for a, b in itertools.product(totals, options)}
    return totals


# ------------------------------------------------------------------------------------------------ how many
@pytest.mark.parametrize(
    ("sparsity", "total", "units"),
    [
        (0.5, 7, 3),
        (0.5, 8, 4),
        (0.07, 50, 3),
        (0.0, 9, 0),
        (0.35, 20, 7),
        (0.51, 50, 25),
        (0.53, 50, 26),
        (1 / 3, 9, 3),
    ],
)
def test_units_to_remove_rounds_to_the_nearest_and_halves_down(sparsity: float, total: int, units: int) -> None:
    assert units_to_remove(sparsity, total) == units


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, float("nan"), True])
def test_sparsity_outside_its_range(sparsity: float) -> None:
    groups = groups_of(4)
    with pytest.raises(PlanError, match="outside"):
        allocate(groups, drawn(groups), sparsity=sparsity)


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)
SPARSITIES = st.integers(0, 99).map(lambda n: n / 100)


@settings(max_examples=40)
@given(SIZES, SPARSITIES, st.sampled_from(["global", "local"]), st.integers(0, 5))
def test_exactly_as_many_units_as_asked(sizes: list[int], sparsity: float, scope: str, seed: int) -> None:
    groups, total = groups_of(*sizes), sum(sizes)
    wanted = units_to_remove(sparsity, total)
    assert abs(wanted - Fraction(str(sparsity)) * total) <= Fraction(1, 2)
    if wanted > total - len(sizes):
        with pytest.raises(BudgetError, match=f"at most {total - len(sizes)}"):
            allocate(groups, drawn(groups, seed), sparsity=sparsity, scope=scope)
        return
    kept = allocate(groups, drawn(groups, seed), sparsity=sparsity, scope=scope)
    assert sum(removed(groups, kept)) == wanted
    assert well_formed(groups, kept)


@settings(max_examples=40)
@given(SIZES, SPARSITIES, st.sampled_from([2, 3, 4, 8]), st.sampled_from(["global", "local"]))
def test_exact_in_multiples_or_an_error_that_says_what_is_possible(
    sizes: list[int], sparsity: float, round_to: int, scope: str
) -> None:
    groups, total = groups_of(*sizes), sum(sizes)
    wanted, possible = units_to_remove(sparsity, total), reachable(sizes, round_to)
    if wanted in possible:
        kept = allocate(groups, drawn(groups), sparsity=sparsity, scope=scope, round_to=round_to)
        assert sum(removed(groups, kept)) == wanted
        assert well_formed(groups, kept, round_to)
        return
    with pytest.raises(BudgetError) as caught:
        allocate(groups, drawn(groups), sparsity=sparsity, scope=scope, round_to=round_to)
    nearest = [max(n for n in possible if n < wanted), *sorted(n for n in possible if n > wanted)[:1]]
    options = " or ".join(f"{n} (sparsity=" for n in nearest).split(" or ")
    assert all(option in str(caught.value) for option in options)
    assert f"at most {max(possible)}" in str(caught.value)


def test_the_fix_of_the_error_works() -> None:
    groups = groups_of(16, 24)
    with pytest.raises(BudgetError, match=r"16 \(sparsity=0.4\) or 24 \(sparsity=0.6\)") as caught:
        allocate(groups, drawn(groups), sparsity=0.5, round_to=8)
    sparsity = float(str(caught.value).rpartition("sparsity=")[2])
    assert sum(removed(groups, allocate(groups, drawn(groups), sparsity=sparsity, round_to=8))) in (16, 24)


# ------------------------------------------------------------------------------------------------ which ones
def test_the_lowest_scores_of_all_groups_go() -> None:
    groups = groups_of(4, 3)
    kept = allocate(groups, scored(groups, [4, 1, 3, 2], [1.5, 9, 2.5]), sparsity=3 / 7, normalize="none")
    assert [u.tolist() for u in kept.values()] == [[0, 2], [1, 2]]


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("none", [[3], [0, 1, 2, 3]]),  # 1, 2, 3 against 8 and more
        ("max", [[1, 2, 3], [2, 3]]),  # 1/4, 1/2, 3/4, 1 against 8/32, 9/32, 20/32, 1
        ("mean", [[2, 3], [2, 3]]),
        ("l2", [[2, 3], [2, 3]]),
    ],
)
def test_normalisation_decides_between_groups(normalize: str, expected: list[list[int]]) -> None:
    groups = groups_of(4, 4)
    count = sum(4 - len(units) for units in expected)
    kept = allocate(groups, scored(groups, [1, 2, 3, 4], [8, 9, 20, 32]), sparsity=count / 8, normalize=normalize)
    assert [u.tolist() for u in kept.values()] == expected


def test_blocks_are_ranked_by_their_mean() -> None:
    groups = groups_of(4, 4)
    scores = scored(groups, [0, 10, 1, 10], [2, 2, 9, 9])
    kept = allocate(groups, scores, sparsity=0.25, normalize="none", round_to=2)
    assert [u.tolist() for u in kept.values()] == [[1, 3], [0, 1, 2, 3]]


def test_local_removes_the_same_share_of_every_group() -> None:
    groups = groups_of(10, 20, 7)
    kept = allocate(groups, scored(groups, range(10), range(100, 120), range(7)), sparsity=0.4, scope="local")
    assert removed(groups, kept) == [4, 8, 3]
    assert [int(u[0]) for u in kept.values()] == [4, 8, 3]


@settings(max_examples=40)
@given(SIZES, SPARSITIES)
def test_local_shares_differ_by_less_than_a_unit(sizes: list[int], sparsity: float) -> None:
    groups = groups_of(*sizes)
    assume(units_to_remove(sparsity, sum(sizes)) <= sum(sizes) - len(sizes))
    gone = removed(groups, allocate(groups, drawn(groups), sparsity=sparsity, scope="local"))
    able = [(r, n) for r, n in zip(gone, sizes, strict=True) if r < n - 1]
    for (r, n), (s, m) in itertools.product(able, zip(gone, sizes, strict=True)):
        assert Fraction(2 * s - 1, 2 * m) <= Fraction(
            2 * r + 1, 2 * n
        )  # what m lost last came before what n loses next


def test_a_group_that_can_give_no_more_is_refilled_from_the_others() -> None:
    groups = groups_of(4, 10)
    kept = allocate(groups, scored(groups, [0.0] * 4, range(1, 11)), sparsity=0.5, normalize="none")
    assert removed(groups, kept) == [3, 4]


def test_limits_per_group() -> None:
    groups = groups_of(4, 10)
    low_first = scored(groups, [0.0] * 4, range(1, 11))
    kept = allocate(groups, low_first, sparsity=0.3, normalize="none", min_units=3)
    assert removed(groups, kept) == [1, 3]
    kept = allocate(groups, low_first, sparsity=0.5, normalize="none", max_group_sparsity=0.55)
    assert removed(groups, kept) == [2, 5]
    with pytest.raises(BudgetError, match="at most 7"):
        allocate(groups, low_first, sparsity=0.7, max_group_sparsity=0.5)
    small = groups_of(2, 20)
    assert removed(small, allocate(small, drawn(small), sparsity=0.5, min_units=5)) == [0, 11]


def test_groups_smaller_than_round_to_stay_whole() -> None:
    groups = groups_of(6, 32)
    kept = allocate(groups, drawn(groups), sparsity=16 / 38, round_to=8)
    assert removed(groups, kept) == [0, 16]


def test_equal_scores_go_in_order() -> None:
    groups = groups_of(3, 3)
    kept = allocate(groups, scored(groups, [1, 1, 1], [1, 1, 1]), sparsity=0.5)
    assert [u.tolist() for u in kept.values()] == [[2], [1, 2]]


def test_scores_of_zero_go_first() -> None:
    groups = groups_of(3, 3)
    kept = allocate(groups, scored(groups, [0, 0, 0], [1, 2, 3]), sparsity=0.5)
    assert [u.tolist() for u in kept.values()] == [[2], [1, 2]]


# ------------------------------------------------------------------------------------------------ iterations
def test_the_cubic_schedule() -> None:
    assert iterative(0.8, 4) == pytest.approx((0.8 * 37 / 64, 0.8 * 7 / 8, 0.8 * 63 / 64, 0.8))
    assert iterative(0.8, 4)[-1] == 0.8
    assert iterative(0.6, 3, power=1) == pytest.approx((0.2, 0.4, 0.6))
    assert iterative(0.6, 2, start=0.2, power=1) == pytest.approx((0.4, 0.6))
    assert iterative(0.3, 1) == (0.3,)
    for wrong in ((1.0, 3), (0.5, 0), (-0.1, 2)):
        with pytest.raises(PlanError):
            iterative(*wrong)
    with pytest.raises(PlanError):
        iterative(0.2, 2, start=0.4)


@settings(max_examples=40)
@given(st.lists(st.integers(4, 30), min_size=1, max_size=5), st.sampled_from(["global", "local"]))
def test_what_is_removed_stays_removed(sizes: list[int], scope: str) -> None:
    groups = groups_of(*sizes)
    before: Kept | None = None
    for step, sparsity in enumerate(iterative(0.7, 5)):
        kept = allocate(groups, drawn(groups, step), sparsity=sparsity, scope=scope, already=before)
        assert sum(removed(groups, kept)) == units_to_remove(sparsity, sum(sizes))
        assert before is None or all(set(kept[g].tolist()) <= set(before[g].tolist()) for g in groups)
        before = kept


def test_less_than_is_gone_already() -> None:
    groups = groups_of(4, 4)
    before = {groups[0]: torch.tensor([3])}
    with pytest.raises(BudgetError, match="3 of them gone already"):
        allocate(groups, drawn(groups), sparsity=0.25, already=before)
    assert removed(groups, allocate(groups, drawn(groups), sparsity=3 / 8, already=before)) == [3, 0]


# ------------------------------------------------------------------------------------------------ bad arguments
def test_bad_scores() -> None:
    groups = groups_of(3, 2)
    good = drawn(groups)
    with pytest.raises(PlanError, match="1 of 3 scores of g0 are NaN"):
        allocate(groups, {**good, groups[0]: torch.tensor([1.0, float("nan"), 2.0])})
    with pytest.raises(PlanError, match="g1 has 2 units"):
        allocate(groups, {**good, groups[1]: torch.ones(3)})
    with pytest.raises(PlanError, match="scores None"):
        allocate(groups, {groups[0]: good[groups[0]]})


@pytest.mark.parametrize(
    "options",
    [{"scope": "glocal"}, {"normalize": "softmax"}, {"round_to": 0}, {"min_units": 0}, {"max_group_sparsity": 1.1}],
)
def test_bad_options(options: dict[str, object]) -> None:
    groups = groups_of(3)
    with pytest.raises(PlanError):
        allocate(groups, drawn(groups), **options)


def test_no_groups() -> None:
    with pytest.raises(NothingToPrune):
        allocate([], {})


# ------------------------------------------------------------------------------------------------ budgets
class Convolutions(nn.Module):
    """Groups whose units cost very differently, at different resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.three = nn.Conv2d(24, 9, 1)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.head(torch.relu(self.three(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Analysis:
    torch.manual_seed(0)
    return analyze_captured(capture(Convolutions().eval(), torch.randn(2, 3, 8, 8)))


@pytest.mark.parametrize("limit", [0.9, 0.5, 0.2, 0.05])
@pytest.mark.parametrize("name", ["params", "macs", "bops", "bytes"])
@pytest.mark.parametrize("round_to", [1, 4])
def test_a_budget_is_met_and_no_unit_could_come_back(network: Analysis, name: str, limit: float, round_to: int) -> None:
    costs, groups = CostModel(network), network.groups
    measure = Bops(costs).layers if name == "bops" else getattr(costs, name)
    scores = score("l2", network, groups)
    if limit == 0.05 and round_to == 4:
        with pytest.raises(BudgetError, match="no choice of units meets the budget"):
            allocate_budget(network, groups, scores, Budget(**{name: 0.01}), round_to=round_to)
        return
    kept = allocate_budget(network, groups, scores, Budget(**{name: limit}), round_to=round_to)
    allowed = limit * measure({})
    assert measure(counts_of(kept)) <= allowed
    assert well_formed(groups, kept, round_to)
    for group in groups:
        if len(kept[group]) < group.size:
            one_more = counts_of(kept) | {group.factor: min(len(kept[group]) + round_to, group.size)}
            assert measure(one_more) > allowed


def test_all_limits_of_a_budget_hold(network: Analysis) -> None:
    costs, scores = CostModel(network), score("l2", network, network.groups)
    limit = costs.params({}) // 2
    counts = counts_of(allocate_budget(network, network.groups, scores, Budget(params=limit, macs=0.3)))
    assert costs.params(counts) <= limit
    assert costs.macs(counts) <= 0.3 * costs.macs({})


def test_fewer_bits_leave_more_units_within_a_budget(network: Analysis) -> None:
    """A fraction of bit operations is one of the float network's, whatever the bits."""
    costs, scores = CostModel(network), score("l2", network, network.groups)
    limit = Bops(costs).layers() // 20
    bits = {"one": Bits(8, 8), "two": Bits(8, 8), "three": Bits(8, 8)}
    kept = allocate_budget(network, network.groups, scores, Budget(bops=limit), bits=bits)
    assert Bops(costs, bits).layers(counts_of(kept)) <= limit < Bops(costs).layers(counts_of(kept))
    same = allocate_budget(network, network.groups, scores, Budget(bops=0.05), bits=bits)
    assert removed(network.groups, same) == removed(network.groups, kept)
    float_kept = allocate_budget(network, network.groups, scores, Budget(bops=limit))
    assert sum(removed(network.groups, kept)) < sum(removed(network.groups, float_kept))
    with pytest.raises(PlanError, match="'four'"):
        allocate_budget(network, network.groups, scores, Budget(bops=limit), bits={"four": Bits(8, 8)})


def test_attention_does_not_count_in_a_budget_of_bit_operations() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1) @ self.value(x)

    analysis = analyze_captured(capture(Attention().eval(), torch.randn(2, 50, 8)))
    (group,) = analysis.groups
    kept = allocate_budget(analysis, [group], {group: torch.arange(8.0)}, Budget(bops=2 * 50 * 64 * 2 * 1024))
    assert removed([group], kept) == [4]  # value: 64 a token; query and key: 64 when four of eight units are left


def test_a_budget_that_is_met_removes_nothing(network: Analysis) -> None:
    scores = score("l2", network, network.groups)
    kept = allocate_budget(network, network.groups, scores, Budget(params=1.0))
    assert removed(network.groups, kept) == [0, 0, 0]


def test_a_local_budget_keeps_the_shares_alike(network: Analysis) -> None:
    scores = score("l2", network, network.groups)
    kept = allocate_budget(network, network.groups, scores, Budget(macs=0.25), scope="local")
    shares = [len(kept[g]) / g.size for g in network.groups]
    assert max(shares) - min(shares) < 0.15


def test_the_smallest_network_is_still_too_large(network: Analysis) -> None:
    scores = score("l2", network, network.groups)
    with pytest.raises(BudgetError, match="with the fewest units that may stay there are"):
        allocate_budget(network, network.groups, scores, Budget(params=10))


def test_bad_budgets() -> None:
    with pytest.raises(PlanError, match="without a limit"):
        Budget()
    for value in (0, -1, 0.0, float("nan"), True):
        with pytest.raises(PlanError, match="positive"):
            Budget(params=value)
    for name in ("latency_ms", "speedup"):
        with pytest.raises(PlanError, match=f"{name}=-1"):
            Budget(**{name: -1})
    with pytest.raises(PlanError, match="no limit on latency"):
        Budget(params=0.5, table=LatencyTable())
    with pytest.raises(PlanError, match="table must be"):
        Budget(speedup=2, table="table.json")  # type: ignore[arg-type]


def test_a_budget_is_written_as_before_where_nothing_newer_is_given() -> None:
    assert repr(Budget(macs=0.5)) == "Budget(params=None, macs=0.5, bops=None, bytes=None, latency_ms=None)"
    assert repr(Budget(speedup=2)).endswith("latency_ms=None, speedup=2)")


def test_a_speedup_is_a_limit_once_the_original_is_timed(network: Analysis) -> None:
    assert Budget(speedup=2).limits() == {} and Budget(speedup=2).timed and not Budget(params=0.5).timed
    assert Budget(speedup=2).in_ms(10).limits() == {"latency_ms": 5}
    assert Budget(speedup=2, latency_ms=3, params=0.5).in_ms(10).limits() == {"params": 0.5, "latency_ms": 3}
    assert Budget(latency_ms=0.5).in_ms(10) == Budget(latency_ms=0.5)
    with pytest.raises(NotBuiltError, match="one shot alone"):
        Meter(CostModel(network), Budget(speedup=2), network.groups)
    meter = Meter(CostModel(network), Budget(latency_ms=0.5), network.groups, latency=lambda counts: 10.0)
    assert meter.limits == {"latency_ms": 0.5} and not meter.holds([1] * len(network.groups))  # never a share
