"""Uniform fills are free and their lengths are recorded; whatever differs from index to index is frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .rule_walk import Walk, check_law, free, frozen, same

FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: torch.zeros(*x.shape),
    "ones": lambda x: torch.ones(*x.shape),
    "full": lambda x: torch.full(x.shape, 2.0),
    "new_zeros": lambda x: x.new_zeros(x.shape),
    "new_ones": lambda x: x.new_ones(x.shape),
    "new_full": lambda x: x.new_full(x.shape, 3.0),
}


@pytest.mark.parametrize("name", FILLS)
def test_fills_are_free(name: str) -> None:
    w = Walk(lambda x: x + FILLS[name](x), x=torch.randn(3, 4))
    assert free(*w["x"])
    fill = next(call for node, call in w.coupling.calls.items() if "size" in call.lengths)
    assert [same(a, b) for a, b in zip(fill.lengths["size"], w["x"], strict=True)] == [True, True]
    assert check_law(w) == 2


SEQUENCES: dict[str, Callable[[], Any]] = {
    "arange": lambda: torch.arange(4),
    "linspace": lambda: torch.linspace(0, 1, 4),
    "eye": lambda: torch.eye(4),
    "tril_indices": lambda: torch.tril_indices(4, 4),
    "randperm": lambda: torch.randperm(4),
    "hann": lambda: torch.hann_window(4),
    "rand": lambda: torch.rand(4, 4),
    "randn": lambda: torch.randn(4, 4),
    "randint": lambda: torch.randint(0, 9, (4,)),
    "fftfreq": lambda: torch.fft.fftfreq(4),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_are_frozen(name: str) -> None:
    w = Walk(lambda x: x.sum() + SEQUENCES[name](), x=torch.randn(4))
    assert not w.coupling.unknown
    assert frozen(*w.result)


def test_scalars() -> None:
    w = Walk(lambda x: x * torch.scalar_tensor(2.0), x=torch.randn(4))
    assert free(w["x"][0])


@pytest.mark.parametrize("indexing", ["ij", "xy"])
def test_meshgrid(indexing: str) -> None:
    w = Walk(lambda a, b: torch.meshgrid(a, b, indexing=indexing), a=torch.randn(3), b=torch.randn(4))
    expected = (w["a"][0], w["b"][0]) if indexing == "ij" else (w["b"][0], w["a"][0])
    for axes in w.results:
        assert all(same(a, b) for a, b in zip(axes, expected, strict=True))
    assert check_law(w) == 2


def test_one_hot() -> None:
    w = Walk(lambda i: F.one_hot(i, 5), i=torch.tensor([0, 3, 1]))
    assert same(w["i"][0], w.result[0])
    assert free(w.result[0])
    assert frozen(w.result[1])


def test_random_in_place() -> None:
    w = Walk(lambda x: (x + 1).exponential_(), x=torch.randn(4))
    assert frozen(w["x"][0])


def test_combinations() -> None:
    w = Walk(lambda a, b: torch.cartesian_prod(a, b), a=torch.randn(3), b=torch.randn(4))
    assert frozen(w["a"][0], w["b"][0], *w.result)
