"""The multiply-accumulates of an op follow from its coupling rule, whole and cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.cost import CostModel, macs
from graphcomp.ops.registry import forget


class Products(nn.Module):
    """Two products of an activation and a parameter, written with `product`."""

    def __init__(self, product: Callable[..., Tensor], first: tuple[int, ...], second: tuple[int, ...]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(first)), nn.Parameter(torch.randn(second))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4) -> (n, 3), but for products of vectors."""
        return self.product(torch.relu(self.product(x, self.a)), self.b)


N, I, H, O = 2, 4, 8, 3  # noqa: E741
BOTH = N * I * H + N * H * O

CASES: dict[str, tuple[nn.Module, Tensor, int, int]] = {
    "tensordot": (
        Products(lambda x, w: torch.tensordot(x, w, dims=([1], [1])), (H, I), (O, H)), torch.randn(N, I), BOTH, 1
    ),
    "inner": (Products(torch.inner, (H, I), (O, H)), torch.randn(N, I), BOTH, 1),
    "multi_dot": (
        Products(lambda x, w: torch.linalg.multi_dot([x, w]), (I, H), (H, O)), torch.randn(N, I), BOTH, 1
    ),
    "vecdot": (
        Products(lambda x, w: torch.linalg.vecdot(x[:, None], w), (H, I), (O, H)), torch.randn(N, I), BOTH, 1
    ),
    "addmv": (
        Products(lambda x, w: torch.addmv(torch.ones(len(w)), w, x), (H, I), (O, H)), torch.randn(I), BOTH // N, 1
    ),
    "addbmm": (
        Products(lambda x, w: torch.addbmm(torch.ones(x.shape[0], w.shape[2]), x.expand(5, -1, -1), w), (5, I, H),
                 (5, H, O)),
        torch.randn(N, I), 5 * BOTH, 1,
    ),
    "cdist": (Products(torch.cdist, (H, I), (O, H)), torch.randn(N, I), BOTH, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_products_count_by_hand_and_as_their_sliced_network(name: str) -> None:
    model, x, whole, groups = CASES[name]
    plan = gc.analyze(model, x)
    costs = CostModel(plan)
    assert (costs.macs(), costs.uncounted, len(plan.groups)) == (whole, (), groups)
    assert {"a", "b"} <= costs.weights
    kept = {group: torch.arange(group.size - 3) for group in plan.groups}
    small = gc.slice_groups(plan, kept)
    assert macs(plan, kept) == whole * (H - 3) // H == macs(gc.analyze(small.module, x))
    assert small.report.macs.after == whole * (H - 3) // H


def test_a_budget_counts_products_of_every_op() -> None:
    model, x, whole, _ = CASES["tensordot"]
    for limit in ({"macs": 0.5}, {"bops": 0.5}):
        small = gc.compress(model, x, budget=gc.Budget(**limit), progress=False)
        assert small.report.units_removed == H // 2
        assert (small.report.macs.before, small.report.macs.after) == (whole, whole // 2)


def test_chains_of_matrices_are_multiplied_in_the_cheapest_order() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(100, 5)), nn.Parameter(torch.randn(5, 50))

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.multi_dot([x, self.a, self.b])

    assert macs(gc.analyze(Chain(), torch.randn(10, 100))) == 10 * 100 * 5 + 10 * 5 * 50
    assert macs(gc.analyze(Chain(), torch.randn(1000, 100))) == 1000 * 100 * 5 + 1000 * 5 * 50


def test_letters_that_one_operand_has_alone_are_summed_before_the_product() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nti,io->no", x, self.w)

    assert macs(gc.analyze(Summed(), torch.randn(2, 5, 4))) == 2 * 4 * 6


class EinsumAndGru(nn.Module):
    """A product by einsum in front of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6))
        self.gru, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, 4) -> (b, t, 3)."""
        return self.head(self.gru(torch.einsum("bti,io->bto", x, self.w))[0])


def test_einsum_and_gru() -> None:
    costs = CostModel(gc.analyze(EinsumAndGru(), torch.randn(2, 7, 4)))
    assert costs.macs_by_kind() == {
        "convolution": 0,
        "linear": 2 * 7 * (4 * 6 + 5 * 3),
        "attention": 0,
        "recurrent": 2 * 7 * 3 * 5 * (6 + 5),
    }


# ------------------------------------------------------------------------------------------------ the user's own ops
@torch.library.custom_op("graphcomp_products::dense", mutates_args=())
def dense(x: Tensor, w: Tensor) -> Tensor:
    """A linear layer that nothing but a rule knows."""
    return x @ w.t()


@dense.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


def own(x: Tensor, w: Tensor) -> Any:
    return torch.ops.graphcomp_products.dense(x, w)


def test_an_op_of_the_users_own_counts_by_its_rule() -> None:
    model, x = Products(own, (H, I), (O, H)), torch.randn(N, I)
    unknown = CostModel(gc.analyze(model, x))
    assert [op.op for op in unknown.uncounted] == ["graphcomp_products.dense.default"] * 2
    gc.rule("graphcomp_products::dense", "... i, o i -> ... o")
    try:
        plan = gc.analyze(model, x)
        costs = CostModel(plan)
        (group,) = plan.groups
        assert (costs.macs(), costs.uncounted) == (BOTH, ())
        assert costs.macs({group.factor: 2}) == N * (I * 2 + 2 * O)
    finally:
        forget("graphcomp_products::dense")
