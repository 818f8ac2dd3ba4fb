"""Convolution, pooling and resampling: channels couple, batch passes, space is frozen where places move."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphcomp.coupling.axis import Factor, Product, Reason, fresh, length, normal
from graphcomp.ops.call import AxesValue, Call
from graphcomp.ops.conv import deform_conv2d, positional, roi

from .rule_walk import Walk, check_law, free, frozen, marks, same


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, "same"])
def test_plain(spatial: int, padding: Any) -> None:
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    k, s = (3,) * spatial, (5,) * spatial
    w = Walk(lambda x, w, b: conv(x, w, b, padding=padding), x=randn(2, 4, *s), w=randn(6, 4, *k), b=randn(6))
    assert same(w["w"][0], w["b"][0], w.result[1])
    assert same(w["w"][1], w["x"][1])
    assert same(w["x"][0], w.result[0])
    assert free(w["w"][0], w["w"][1], w["x"][0])
    assert frozen(*w["x"][2:], *w["w"][2:], *w.result[2:])
    assert w.contracted == {"w": {1}}
    assert marks(w["w"][0]) == marks(w["x"][1]) == {"conv"}
    assert check_law(w) == 3


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_space_passes_where_a_place_is_made_of_its_own_place(spatial: int, transposed: bool) -> None:
    size, ones = (4, 5, 6)[:spatial], (1,) * spatial
    plain = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    conv = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[spatial] if transposed else plain
    w = Walk(lambda x, w, b: conv(x, w, b), x=randn(2, 3, *size), w=randn(3, 3, *ones), b=randn(3))
    assert free(*w["x"])
    assert all(same(own, result) for own, result in zip(w["x"][2:], w.result[2:], strict=True))
    assert check_law(w) == 3 + spatial


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"stride": 2, "padding": 1}], ids=str)
@pytest.mark.parametrize("conv", [F.conv1d, F.conv_transpose1d])
def test_space_is_frozen_where_places_move(conv: Callable[..., Tensor], options: dict[str, int]) -> None:
    w = Walk(lambda x, w: conv(x, w, **options), x=randn(2, 3, 5), w=randn(3, 3, 1))
    assert frozen(w["x"][2], w.result[2])


def test_unbatched() -> None:
    w = Walk(lambda x, w, b: F.conv2d(x, w, b), x=randn(4, 5, 5), w=randn(6, 4, 3, 3), b=randn(6))
    assert same(w["x"][0], w["w"][1])
    assert same(w["w"][0], w.result[0])
    assert check_law(w) == 2


def test_grouped() -> None:
    w = Walk(lambda x, w, b: F.conv1d(x, w, b, groups=x.shape[1] // w.shape[1]),
             x=randn(2, 6, 5), w=randn(12, 2, 3), b=randn(12))  # fmt: skip
    g, i = normal(w["x"][1]).parts  # type: ignore[union-attr]
    assert (g.size, i.size) == (3, 2)
    assert same(w["w"][0], w["b"][0], w.result[1])
    assert same(normal(w["w"][0]).parts[0], g)  # type: ignore[union-attr]
    assert same(w["w"][1], i)
    assert same(w.call.lengths["groups"], g)
    assert check_law(w) == 4  # n, g, i, o


def test_depthwise() -> None:
    w = Walk(lambda x, w, b: F.conv2d(x, w, b, groups=w.shape[0]), x=randn(2, 4, 5, 5), w=randn(4, 1, 3, 3), b=randn(4))
    assert isinstance(normal(w["x"][1]), Factor)
    assert same(w["x"][1], w["w"][0], w["b"][0], w.result[1], w.call.lengths["groups"])
    assert marks(w["x"][1]) == {"conv"}
    assert check_law(w) == 2


def test_depthwise_multiplier() -> None:
    w = Walk(lambda x, w: F.conv1d(x, w, groups=x.shape[1]), x=randn(2, 4, 5), w=randn(12, 1, 3))
    channel, multiplier = normal(w["w"][0]).parts  # type: ignore[union-attr]
    assert same(w["x"][1], channel)
    assert multiplier.size == 3
    assert check_law(w) == 3


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_transposed(spatial: int) -> None:
    conv = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[spatial]
    k, s = (3,) * spatial, (5,) * spatial
    w = Walk(lambda x, w, b: conv(x, w, b, groups=b.shape[0] // w.shape[1]),
             x=randn(2, 4, *s), w=randn(4, 3, *k), b=randn(6))  # fmt: skip
    g, _ = normal(w["x"][1]).parts  # type: ignore[union-attr]
    assert same(w["x"][1], w["w"][0])
    assert same(w["b"][0], w.result[1])
    assert same(normal(w["b"][0]).parts[0], g, w.call.lengths["groups"])  # type: ignore[union-attr]
    assert w.contracted == {"w": {0}}
    assert check_law(w) == 4


@pytest.mark.parametrize("transposed", [False, True])
def test_convolution(transposed: bool) -> None:
    def convolution(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.convolution(x, w, b, [1], [0], [1], transposed, [0], 1)

    w = Walk(convolution, x=randn(2, 4, 5), w=randn(*((4, 6, 3) if transposed else (6, 4, 3))), b=randn(6))
    assert same(w["x"][1], w["w"][0 if transposed else 1])
    assert same(w["b"][0], w["w"][1 if transposed else 0], w.result[1])
    assert check_law(w) == 3


def test_tbc() -> None:
    w = Walk(lambda x, w, b: torch.conv_tbc(x, w, b), x=randn(5, 2, 4), w=randn(3, 4, 6), b=randn(6))
    assert same(w["x"][2], w["w"][1])
    assert frozen(w["x"][0], w["w"][0], w.result[0])
    assert check_law(w) == 3


POOLS: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "max1d": (1, lambda x: F.max_pool1d(x, 2)),
    "max2d": (2, lambda x: F.max_pool2d(x, 2)),
    "max3d": (3, lambda x: F.max_pool3d(x, 2)),
    "max2d_indices": (2, lambda x: F.max_pool2d(x, 2, return_indices=True)),
    "max1d_indices": (1, lambda x: F.max_pool1d(x, 2, return_indices=True)),
    "avg1d": (1, lambda x: F.avg_pool1d(x, 2)),
    "avg2d": (2, lambda x: F.avg_pool2d(x, 2)),
    "avg3d": (3, lambda x: F.avg_pool3d(x, 2)),
    "adaptive_avg1d": (1, lambda x: F.adaptive_avg_pool1d(x, 1)),
    "adaptive_avg2d": (2, lambda x: F.adaptive_avg_pool2d(x, (1, 2))),
    "adaptive_avg3d": (3, lambda x: F.adaptive_avg_pool3d(x, 2)),
    "adaptive_max2d": (2, lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)),
    "lp2d": (2, lambda x: F.lp_pool2d(x, 2, 2)),
    "reflect": (2, lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "replicate": (1, lambda x: F.pad(x, (1, 1), mode="replicate")),
    "circular": (2, lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")),
    "nearest1d": (1, lambda x: F.interpolate(x, scale_factor=2)),
    "nearest2d": (2, lambda x: F.interpolate(x, size=(7, 8))),
    "nearest3d": (3, lambda x: F.interpolate(x, scale_factor=2)),
    "bilinear": (2, lambda x: F.interpolate(x, size=(7, 8), mode="bilinear")),
    "bicubic": (2, lambda x: F.interpolate(x, size=(7, 8), mode="bicubic", antialias=True)),
    "trilinear": (3, lambda x: F.interpolate(x, scale_factor=2, mode="trilinear")),
}


@pytest.mark.parametrize("name", POOLS)
def test_space_is_frozen(name: str) -> None:
    spatial, function = POOLS[name]
    w = Walk(function, x=randn(2, 3, *(4, 6, 4)[:spatial]))
    assert not w.coupling.unknown
    assert frozen(*w["x"][2:])
    for axes in w.results:
        assert same(axes[0], w["x"][0])
        assert same(axes[1], w["x"][1])
    assert check_law(w) == 2


def test_unbatched_pool() -> None:
    w = Walk(lambda x: F.avg_pool2d(x, 2), x=randn(3, 4, 4))
    assert same(w["x"][0], w.result[0])
    assert free(w["x"][0])


def test_random_pool_is_frozen() -> None:
    w = Walk(lambda x: F.fractional_max_pool2d(x, 2, output_size=3, _random_samples=torch.full((2, 3, 2), 0.5)),
             x=randn(2, 3, 7, 7))  # fmt: skip
    assert frozen(*w["x"], *w.result)


def test_unpool() -> None:
    x = randn(2, 3, 4, 4)
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    w = Walk(lambda x, i: F.max_unpool2d(x, i, 2), x=values, i=indices)
    assert same(w["x"][1], w["i"][1], w.result[1])
    assert check_law(w) == 2


def test_unfold_and_fold() -> None:
    w = Walk(lambda x: F.unfold(x, (3, 2)), x=randn(2, 4, 5, 5))
    assert same(normal(w.result[1]).parts[0], w["x"][1])  # type: ignore[union-attr]
    assert free(w["x"][1])
    assert frozen(*w["x"][2:], w.result[2])
    assert check_law(w) == 2
    w = Walk(lambda x: F.fold(x, (5, 5), (3, 2)), x=randn(2, 24, 12))
    assert isinstance(normal(w["x"][1]), Product)
    assert same(normal(w["x"][1]).parts[0], w.result[1])  # type: ignore[union-attr]
    assert check_law(w) == 2


def test_grid_sample() -> None:
    w = Walk(lambda x, g: F.grid_sample(x, g, align_corners=False), x=randn(2, 3, 5, 5), g=randn(2, 4, 4, 2))
    assert same(w["x"][0], w["g"][0], w.result[0])
    assert same(w["x"][1], w.result[1])
    assert frozen(*w["x"][2:], *w["g"][1:], *w.result[2:])
    assert check_law(w) == 2
    w = Walk(lambda t: F.affine_grid(t, [2, 3, 4, 4], align_corners=False), t=randn(2, 2, 3))
    assert frozen(*w["t"], *w.result)


def call_for(*shapes: tuple[int, ...]) -> Call:
    return Call(None, list(shapes), Reason("addressed by position", "torchvision::op"), frozenset())  # type: ignore[arg-type]


def axes(*sizes: int) -> AxesValue:
    return AxesValue(fresh(n) for n in sizes)


def test_deform_conv2d() -> None:
    """torchvision's own ops are not there in every build, so the rule is called."""
    x, weight, bias = axes(2, 8, 5, 5), axes(6, 4, 3, 3), axes(6)
    offset, mask = axes(2, 36, 3, 3), axes(2, 18, 3, 3)
    call = call_for((2, 6, 3, 3))
    (result,) = deform_conv2d(x, weight, offset, mask, bias, groups=2, offset_groups=2, call=call)
    assert same(result[1], weight[0], bias[0])
    g, i = normal(x[1]).parts  # type: ignore[union-attr]
    assert same(weight[1], i)
    assert free(i)
    assert frozen(g, *offset[1:], *mask[1:])  # each half of the channels has its own offsets
    assert call.contracted == {"weight": (1,)}
    (product,) = call.products
    assert math.prod(map(length, product.axes)) == (2 * 6 * 3 * 3) * (4 * 3 * 3)


def test_regions() -> None:
    x, boxes = axes(2, 8, 5, 5), axes(3, 5)
    (result,) = roi(x, boxes, call=call_for((3, 8, 7, 7)))
    assert same(result[1], x[1])
    assert free(x[1])
    assert frozen(x[0], *x[2:], *boxes, result[0], *result[2:])
    (kept,) = positional(call_for((2,)), dets=boxes, scores=axes(3))
    assert frozen(*kept)
