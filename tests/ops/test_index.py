"""What is addressed by number is frozen; what rides along passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .rule_walk import Walk, check_law, free, frozen, same


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


I3 = torch.tensor([0, 2, 1])
I23 = torch.tensor([[0, 2, 1], [1, 1, 0]])


def test_embedding() -> None:
    w = Walk(lambda w, i: F.embedding(i, w, padding_idx=0), w=randn(5, 4), i=I23)
    assert frozen(w["w"][0])
    assert same(w["w"][1], w.result[2])
    assert same(w["i"][1], w.result[1])
    assert check_law(w) == 3


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode: str) -> None:
    w = Walk(lambda w, i: F.embedding_bag(i, w, mode=mode), w=randn(5, 4), i=I23)
    assert not w.coupling.unknown
    assert frozen(w["w"][0], *w["i"])
    assert same(w["w"][1], w.result[1])
    assert check_law(w) == 1


def test_index_in_place_of_its_dim() -> None:
    w = Walk(lambda x, i: x[:, i], x=randn(2, 5, 4), i=I23)
    assert frozen(w["x"][1])
    assert [same(a, b) for a, b in zip(w.result, (w["x"][0], *w["i"], w["x"][2]), strict=True)] == [True] * 4
    assert check_law(w) == 4


def test_two_indices_broadcast() -> None:
    w = Walk(lambda x, i, j: x[:, i, j], x=randn(2, 5, 5, 4), i=I3, j=torch.tensor([[1], [0]]))
    assert frozen(*w["x"][1:3])
    expected = (w["x"][0], w["j"][0], w["i"][0], w["x"][3])
    assert all(same(a, b) for a, b in zip(w.result, expected, strict=True))
    assert check_law(w) == 4


def test_separated_indices_go_to_the_front() -> None:
    w = Walk(lambda x, i, j: x[:, i, :, j], x=randn(2, 5, 6, 5), i=I3, j=I3 + 1)
    assert same(w["i"][0], w["j"][0], w.result[0])
    assert same(w["x"][0], w.result[1])
    assert same(w["x"][2], w.result[2])
    assert check_law(w) == 3


def test_mask_is_frozen() -> None:
    def index(x: Tensor, m: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[m] = x.sum((0, 1))
        return y

    w = Walk(index, x=randn(2, 3, 4), m=torch.rand(2, 3) > 0.5)
    assert frozen(*w["m"], *w["x"][:2])
    assert free(w["x"][2])
    assert same(w["x"][2], w.result[2])


def test_index_put() -> None:
    def put(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
        return x.index_put((i,), v, accumulate=True)

    w = Walk(put, x=randn(5, 4), i=I3, v=randn(3, 4))
    assert frozen(w["x"][0], w["i"][0], w["v"][0])
    assert same(w["x"][1], w["v"][1], w.result[1])
    assert check_law(w) == 1


def test_index_select() -> None:
    w = Walk(lambda x, i: x.index_select(1, i), x=randn(2, 5, 4), i=I3)
    assert frozen(w["x"][1])
    assert same(w["i"][0], w.result[1])
    assert check_law(w) == 3


def test_gather() -> None:
    w = Walk(lambda x, i: x.gather(1, i), x=randn(2, 5), i=I23)
    assert frozen(w["x"][1])
    assert same(w["x"][0], w["i"][0], w.result[0])
    assert same(w["i"][1], w.result[1])
    assert check_law(w) == 2


def test_gather_of_a_part_freezes() -> None:
    w = Walk(lambda x, i: x.gather(1, i), x=randn(4, 5), i=I23)
    assert frozen(*w["x"], w["i"][0])
    assert check_law(w) == 1


@pytest.mark.parametrize("reduce", [None, "sum", "amax"])
def test_scatter(reduce: str | None) -> None:
    def scatter(x: Tensor, i: Tensor, s: Tensor) -> Tensor:
        return x.scatter(1, i, s) if reduce is None else x.scatter_reduce(1, i, s, reduce)

    w = Walk(scatter, x=randn(2, 5), i=torch.tensor([[0, 2, 1], [1, 3, 0]]), s=randn(2, 3))
    assert frozen(w["x"][1], w["i"][1], w["s"][1])
    assert same(w["x"][0], w["i"][0], w["s"][0], w.result[0])
    assert check_law(w) == 1


def test_take_along_dim() -> None:
    w = Walk(lambda x, i: x.take_along_dim(i, 1), x=randn(2, 5), i=I23[:1])
    assert frozen(w["x"][1])
    assert same(w["x"][0], w.result[0])
    assert check_law(w) == 2


@pytest.mark.parametrize("op", ["index_add", "index_copy"])
def test_index_add(op: str) -> None:
    w = Walk(lambda x, i, s: getattr(x, op)(1, i, s), x=randn(2, 5), i=I3, s=randn(2, 3))
    assert frozen(w["x"][1], w["i"][0], w["s"][1])
    assert same(w["x"][0], w["s"][0], w.result[0])
    assert check_law(w) == 1


ALONG: dict[str, Callable[[Tensor], Any]] = {
    "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort(descending=True),
    "argsort": lambda x: x.argsort(),
    "kthvalue": lambda x: x.kthvalue(2),
    "diff": lambda x: x.diff(),
    "fft": lambda x: torch.fft.fft(x).abs(),
    "rfft": lambda x: torch.fft.rfft(x, n=6).abs(),
    "multinomial": lambda x: x.abs().multinomial(2),
    "cumsum": lambda x: x.cumsum(-1),
    "repeat_interleave": lambda x: x.repeat_interleave(I3 + 1, 1, output_size=6),
}


@pytest.mark.parametrize("name", ALONG)
def test_along_one_dim(name: str) -> None:
    w = Walk(ALONG[name], x=randn(2, 3))
    assert not w.coupling.unknown
    assert frozen(w["x"][1])
    assert all(same(axes[0], w["x"][0]) for axes in w.results)
    if name != "multinomial":  # random
        assert check_law(w) == 1


def test_all_fft_dims() -> None:
    w = Walk(lambda x: torch.fft.fft2(x).real, x=randn(2, 3, 4))
    assert free(w["x"][0])
    assert frozen(*w["x"][1:])
    w = Walk(lambda x: torch.fft.fftn(x).real, x=randn(2, 3))
    assert frozen(*w["x"])


def test_boundaries() -> None:
    w = Walk(lambda x, b: torch.bucketize(x, b), x=randn(2, 3), b=randn(5).sort().values)
    assert frozen(w["b"][0])
    assert check_law(w) == 2
    w = Walk(lambda s, x: torch.searchsorted(s, x), s=randn(2, 5).sort().values, x=randn(2, 3))
    assert frozen(w["s"][1])
    assert same(w["s"][0], w["x"][0], w.result[0])
    assert check_law(w) == 2
    w = Walk(lambda x, s: torch.isin(x, s), x=I23, s=I3[:2])
    assert frozen(w["s"][0])
    assert check_law(w) == 2


def test_cross_and_cdist() -> None:
    w = Walk(lambda a, b: torch.linalg.cross(a, b), a=randn(2, 3), b=randn(2, 3))
    assert frozen(w["a"][1], w["b"][1])
    assert check_law(w) == 1
    w = Walk(lambda a, b: torch.cdist(a, b), a=randn(2, 5, 4), b=randn(2, 6, 4))
    assert same(w["a"][2], w["b"][2])
    assert w.contracted == {"a": {2}, "b": {2}}
    assert check_law(w) == 4


WHOLE: dict[str, Callable[[Tensor], Any]] = {
    "take": lambda x: x.take(I3),
    "histc": lambda x: x.histc(4),
    "quantile": lambda x: x.quantile(0.5),
    "pairwise": lambda x: F.pairwise_distance(x, x + 1),
    "trapezoid": lambda x: torch.trapezoid(x),
    "renorm": lambda x: x.renorm(2, 0, 1.0),
    "gradient": lambda x: torch.gradient(x)[0],
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole(name: str) -> None:
    w = Walk(WHOLE[name], x=randn(3, 4))
    assert not w.coupling.unknown
    assert frozen(*w["x"])
