"""Pointwise ops, products, movement and reductions, one law for all: sliced operands give the sliced result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphcomp.coupling.axis import normal

from .rule_walk import Walk, check_law, free, frozen, same


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


A, B = {"a": randn(3, 4)}, {"b": randn(3, 4)}
LAW: dict[str, tuple[int, Callable[..., Any], dict[str, Tensor]]] = {
    # name: (free factors, function, operands)
    "add": (2, lambda a, b: a + b, A | B),
    "broadcast": (2, lambda a, b: a * b, A | {"b": randn(4)}),
    "stretch": (3, lambda a, b: a * b, {"a": randn(3, 1, 2), "b": randn(4, 1)}),
    "where": (2, lambda a, b: torch.where(a > 0, a, b), A | B),
    "type_as": (2, lambda a, b: a.type_as(b), A | {"b": torch.tensor(1.0)}),
    "polar": (2, lambda a, b: torch.polar(a, b).real, A | B),
    "linear": (3, lambda x, w, b: F.linear(x, w, b), {"x": randn(2, 4), "w": randn(3, 4), "b": randn(3)}),
    "matmul": (4, lambda a, b: a @ b, {"a": randn(2, 3, 4), "b": randn(2, 4, 5)}),
    "matvec": (2, lambda a, b: a @ b, {"a": randn(3, 4), "b": randn(4)}),
    "addmm": (3, lambda c, a, b: torch.addmm(c, a, b), {"c": randn(5), "a": randn(3, 4), "b": randn(4, 5)}),
    "addmv": (2, lambda c, a, b: torch.addmv(c, a, b), {"c": randn(3), "a": randn(3, 4), "b": randn(4)}),
    "addr": (2, lambda c, a, b: torch.addr(c, a, b), {"c": randn(3, 4), "a": randn(3), "b": randn(4)}),
    "addbmm": (4, lambda c, a, b: torch.addbmm(c, a, b), {"c": randn(3, 5), "a": randn(2, 3, 4), "b": randn(2, 4, 5)}),
    "inner": (3, lambda a, b: torch.inner(a, b), A | {"b": randn(2, 4)}),
    "tensordot": (4, lambda a, b: torch.tensordot(a, b, ([1, 0], [0, 2])), {"a": randn(3, 4, 2), "b": randn(4, 5, 3)}),
    "vecdot": (2, lambda a, b: torch.linalg.vecdot(a, b), A | B),
    "vecdot, a dim stretched": (2, lambda a, b: torch.linalg.vecdot(a, b), A | {"b": randn(1)}),
    "multi_dot": (4, lambda a, b, c: torch.linalg.multi_dot([a, b, c]),
                  {"a": randn(2, 3), "b": randn(3, 4), "c": randn(4, 5)}),
    "outer": (2, lambda a, b: torch.outer(a, b), {"a": randn(3), "b": randn(4)}),
    "einsum": (4, lambda a, b: torch.einsum("bij,bjk->bki", a, b), {"a": randn(2, 3, 4), "b": randn(2, 4, 5)}),
    "einsum, a dim stretched": (2, lambda a, b: torch.einsum("ij,j->i", a, b), {"a": randn(3, 4), "b": randn(1)}),
    "einsum, ...": (4, lambda a, b: torch.einsum("...ij,...kj->...ik", a, b), {"a": randn(2, 3, 4), "b": randn(5, 4)}),
    "einsum, ... summed": (3, lambda a, b: torch.einsum("...i,i->i", a, b), {"a": randn(2, 3, 4), "b": randn(4)}),
    "einsum, no result": (4, lambda a, b: torch.einsum("bji,bkj", a, b), {"a": randn(2, 3, 4), "b": randn(2, 5, 3)}),
    "cat": (3, lambda a, b: torch.cat([a, b]), {"a": randn(3, 4), "b": randn(2, 4)}),
    "hstack": (3, lambda a, b: torch.hstack([a, b]), {"a": randn(3, 4), "b": randn(3, 2)}),
    "hstack_vectors": (2, lambda a, b: torch.hstack([a, b]), {"a": randn(3), "b": randn(2)}),
    "vstack": (3, lambda a, b: torch.vstack([a, b]), {"a": randn(3, 4), "b": randn(2, 4)}),
    "vstack_vectors": (1, lambda a, b: torch.vstack([a, b]), {"a": randn(3), "b": randn(3)}),
    "dstack": (2, lambda a, b: torch.dstack([a, b]), A | B),
    "column_stack": (2, lambda a, b: torch.column_stack([a, b]), {"a": randn(3), "b": randn(3, 2)}),
    "atleast_3d": (1, lambda a: torch.atleast_3d(a), {"a": randn(3)}),
    "block_diag": (4, lambda a, b: torch.block_diag(a, b), {"a": randn(2, 3), "b": randn(4, 5)}),
    "kron": (4, lambda a, b: torch.kron(a, b), {"a": randn(2, 3), "b": randn(4, 5)}),
    "moveaxis": (3, lambda a: a.moveaxis(0, 2), {"a": randn(2, 3, 4)}),
    "mH": (3, lambda a: a.mH, {"a": randn(2, 3, 4)}),
    "swapdims": (2, lambda a: a.swapdims(0, 1), A),
    "ravel": (2, lambda a: a.ravel(), A),
    "unfold": (1, lambda a: a.unfold(-1, 2, 1), A),
    "fliplr": (1, lambda a: a.fliplr(), A),
    "complex": (2, lambda a: torch.view_as_real(torch.view_as_complex(a)), {"a": randn(3, 4, 2)}),
    "glu": (2, lambda a: F.glu(a), A),
    "sum": (2, lambda a: a.sum(1), A),
    "any": (1, lambda a: (a > 0).any(1), A),
    "max": (1, lambda a: a.max(1), A),  # positions are read
    "amax": (1, lambda a: a.amax(1), {"a": randn(3, 4)}),
    "cosine_similarity": (2, lambda a, b: F.cosine_similarity(a, b, 1), A | B),
    "cosine_similarity, fewer dims": (3, lambda a, b: F.cosine_similarity(a, b, 2), A | {"b": randn(5, 1, 4)}),
    "cosine_similarity, a dim stretched": (1, lambda a, b: F.cosine_similarity(a, b, -1), A | {"b": randn(1)}),
    "median": (0, lambda a: a.median(), A),
    "softmax": (1, lambda a: a.softmax(1), A),
    "cumprod": (1, lambda a: a.cumprod(1), A),
    "norm": (2, lambda a: a.norm(), A),
    "std_mean": (1, lambda a: torch.std_mean(a, dim=1), A),
    "nanmean": (1, lambda a: a.nanmean(0), A),
}  # fmt: skip


@pytest.mark.parametrize("name", LAW)
def test_law(name: str) -> None:
    count, function, tensors = LAW[name]
    w = Walk(function, **tensors)
    assert not w.coupling.unknown
    assert check_law(w) == count


def test_view_splits_a_factor() -> None:
    w = Walk(lambda a: a.view(3, 2, 4), a=randn(3, 8))
    assert same(w["a"][0], w.result[0])
    assert [part.size for part in normal(w["a"][1]).parts] == [2, 4]  # type: ignore[union-attr]
    assert w.call.lengths["size"][2] is w.result[2]


def test_halves_of_a_gate_couple() -> None:
    w = Walk(lambda a: F.glu(a), a=randn(3, 8))
    left, right = normal(w["a"][1]).parts  # type: ignore[union-attr]
    assert same(left, right, w.result[1])


def test_split_by_sections_freezes() -> None:
    w = Walk(lambda a: a.hsplit(2), a=randn(3, 4))
    assert frozen(w["a"][1])
    assert free(w["a"][0])


def test_attention() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    w = Walk(attention, q=randn(2, 4, 5, 8), k=randn(2, 2, 5, 8), v=randn(2, 2, 5, 6))
    kv, repeat = normal(w["q"][1]).parts  # type: ignore[union-attr]
    assert same(kv, w["k"][1], w["v"][1])
    assert repeat.size == 2
    assert same(w["q"][3], w["k"][3])
    assert same(w["v"][3], w.result[3])
    assert frozen(w["q"][2], w["k"][2])
    assert w.call.pins["scale"] == pytest.approx(8**-0.5)
