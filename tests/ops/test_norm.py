"""Batch and instance norm are per channel; layer, RMS and group norm take statistics over the channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.coupling.axis import normal

from .rule_walk import Walk, check_law, free, frozen, marks, same

aten = torch.ops.aten


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


CHANNELS = {"w": randn(4), "b": randn(4), "m": randn(4), "v": torch.rand(4) + 1}


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5), (2, 4, 5, 5)])
def test_batch_norm(shape: tuple[int, ...]) -> None:
    w = Walk(lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b), x=randn(*shape), **CHANNELS)
    assert same(w["x"][1], *(w[name][0] for name in "wbmv"), w.result[1])
    assert free(*w["x"])
    assert w.contracted == {}
    assert check_law(w) == len(shape)


def test_batch_norm_in_training_freezes_the_batch() -> None:
    w = Walk(lambda x, w, b: aten.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False), False, ("x",),
             x=randn(2, 4, 5), w=randn(4), b=randn(4))  # fmt: skip
    assert frozen(w["x"][0], w["x"][2])
    assert check_law(w) == 1


def test_batch_norm_of_a_weight_takes_statistics_of_its_inputs() -> None:
    w = Walk(lambda x, w, b: aten.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False),
             x=randn(2, 4, 5), w=randn(4), b=randn(4))  # fmt: skip
    assert free(*w["x"]) and marks(w["x"][2]) == set()
    assert w.contracted == {"x": {0, 2}}


def test_native_batch_norm() -> None:
    w = Walk(lambda x, w, b, m, v: aten._native_batch_norm_legit_no_training(x, w, b, m, v, 0.1, 1e-5),
             x=randn(2, 4, 5), **CHANNELS)  # fmt: skip
    assert not w.coupling.unknown
    assert same(w["x"][1], w["v"][0], w.results[0][1])


def test_instance_norm() -> None:
    w = Walk(
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b), False, ("x",),
        x=randn(2, 4, 5, 5), w=randn(4), b=randn(4),
    )  # fmt: skip
    assert same(w["x"][1], w["w"][0], w["b"][0], w.result[1])
    assert frozen(*w["x"][2:])
    assert check_law(w) == 2


@pytest.mark.parametrize("native", [False, True])
def test_layer_norm(native: bool) -> None:
    def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return aten.native_layer_norm(x, w.shape, w, b, 1e-5) if native else F.layer_norm(x, w.shape, w, b)

    w = Walk(layer_norm, False, ("x",), x=randn(2, 3, 4), w=randn(4), b=randn(4))
    assert same(w["x"][2], w["w"][0], w["b"][0], w.result[2], w.call.lengths["normalized_shape"][0])
    assert marks(w["x"][2]) == {"normalized", "layer_norm"}
    assert marks(w["x"][1]) == set()
    assert w.contracted == {"x": {2}}
    assert check_law(w) == 2


def test_layer_norm_over_two_dims() -> None:
    w = Walk(lambda x, w: F.layer_norm(x, w.shape, w), x=randn(2, 3, 4), w=randn(3, 4))
    assert same(w["x"][1], w["w"][0])
    assert same(w["x"][2], w["w"][1])
    assert w.contracted == {"x": {1, 2}}
    assert len(w.call.lengths["normalized_shape"]) == 2


def test_rms_norm() -> None:
    w = Walk(lambda x, w: F.rms_norm(x, w.shape, w), False, ("x",), x=randn(2, 3, 4), w=randn(4))
    assert same(w["x"][2], w["w"][0], w.result[2])
    assert marks(w["x"][2]) == {"normalized", "layer_norm"}
    assert w.contracted == {"x": {2}}


def test_group_norm() -> None:
    w = Walk(lambda x, w, b: F.group_norm(x, 3, w, b), x=randn(2, 6, 5), w=randn(6), b=randn(6))
    g, c = normal(w["x"][1]).parts  # type: ignore[union-attr]
    assert (g.size, c.size) == (3, 2)
    assert same(w["x"][1], w["w"][0], w["b"][0], w.result[1])
    assert same(w.call.lengths["num_groups"], g)
    assert marks(g) == marks(c) == {"normalized"}
    assert frozen(w["x"][2])
    assert w.contracted == {"x": {1}}


def test_group_norm_of_single_channels_takes_no_statistics_over_them() -> None:
    w = Walk(lambda x, w, b: F.group_norm(x, x.shape[1], w, b), x=randn(2, 6, 5), w=randn(6), b=randn(6))
    assert marks(w["x"][1]) == set()
    assert w.contracted == {}
    assert check_law(w) == 2


def test_native_group_norm() -> None:
    w = Walk(
        lambda x, w, b: aten.native_group_norm(x, w, b, 2, 6, 5, 3, 1e-5), x=randn(2, 6, 5), w=randn(6), b=randn(6)
    )
    assert same(w.call.lengths["C"], w["x"][1])
    assert same(w.call.lengths["group"], w.results[1][1])


def test_weight_norm() -> None:
    w = Walk(lambda v, g: torch._weight_norm(v, g, 0), v=randn(4, 3, 2), g=randn(4, 1, 1))
    assert same(w["v"][0], w["g"][0], w.result[0])
    assert w.contracted == {"v": {1, 2}}
    assert check_law(w) == 1
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3), dim=2)
    assert torch.export.export(layer, (randn(1, 4, 5),), strict=False)
