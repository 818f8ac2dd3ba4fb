"""The masked forms of ops that take statistics: what the op gives on the kept indices alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphcomp.ops import registry
from graphcomp.ops.answers import masked_form
from graphcomp.torch_compat import pytree

aten = torch.ops.aten
KEPT = [0, 2, 3, 6]
FORMS = {op: form for op in registry.registered() if (form := masked_form(op)) is not None}


def x() -> Tensor:
    return torch.randn(3, 8, 5, dtype=torch.float64)


def mask(*shape: int) -> Tensor:
    kept = torch.zeros(8, dtype=torch.float64)
    kept[KEPT] = 1
    return kept.view(shape)


@pytest.mark.parametrize("dims", [(1,), (1, 2), (0, 1)])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(
    "op", [aten.mean.dim, aten.var.dim, aten.std.dim, aten.var.correction, aten.std.correction, aten.var_mean.dim,
           aten.var_mean.correction, aten.std_mean.dim, aten.std_mean.correction,
           aten.amax.default, aten.amin.default, aten.logsumexp.default], ids=str
)  # fmt: skip
def test_reductions(op: Callable[..., Any], dims: Sequence[int], keepdim: bool) -> None:
    value = x()
    expected = op(value[:, KEPT], dims, keepdim=keepdim)
    torch.testing.assert_close(FORMS[op](mask(1, 8, 1), self=value, dim=dims, keepdim=keepdim), expected)


@pytest.mark.parametrize("correction", [0, 1, 2, None])
def test_corrections(correction: float | None) -> None:
    value = x()
    expected = torch.var_mean(value[:, KEPT], 1, correction=1 if correction is None else correction)
    form = FORMS[aten.var_mean.correction]
    torch.testing.assert_close(form(mask(1, 8, 1), self=value, dim=[1], correction=correction), expected)


@pytest.mark.parametrize("kept", [range(8), KEPT], ids=["all", "some"])
@pytest.mark.parametrize(
    "op", [aten.std.dim, aten.std.correction, aten.std_mean.dim, aten.std_mean.correction], ids=str
)  # fmt: skip
def test_deviations_have_the_gradients_of_torch(op: Callable[..., Any], kept: Sequence[int]) -> None:
    value = x()
    value[0], value[1, :, 0] = 0, 2  # constant over the channels: the deviation is 0
    value.requires_grad_()
    own = torch.zeros(8, dtype=torch.float64).index_fill(0, torch.tensor(kept), 1).view(1, 8, 1)

    def gradient(result: Any) -> Tensor:
        (found,) = torch.autograd.grad([t.sum() for t in pytree.tree_leaves(result)], value)
        return found

    expected = gradient(op(value[:, kept], [1]))
    assert expected.isfinite().all()
    torch.testing.assert_close(gradient(FORMS[op](own, self=value, dim=[1])), expected)


@pytest.mark.parametrize("keepdim", [False, True])
def test_extremes_of_one_dim(keepdim: bool) -> None:
    value, kept = x(), x()[:, KEPT]
    value[:, KEPT] = kept
    for op in (aten.max.dim, aten.min.dim):
        torch.testing.assert_close(
            FORMS[op](mask(1, 8, 1), self=value, dim=1, keepdim=keepdim)[0], op(kept, 1, keepdim)[0]
        )
    found = FORMS[aten.aminmax.default](mask(1, 8, 1), self=value, dim=1, keepdim=keepdim)
    torch.testing.assert_close(found, tuple(torch.aminmax(kept, dim=1, keepdim=keepdim)))


@pytest.mark.parametrize(
    "op", [aten.mean.default, aten.var.default, aten.std.default, aten.var_mean.default, aten.std_mean.default,
           aten.max.default,
           aten.min.default], ids=str
)  # fmt: skip
def test_reductions_of_everything(op: Callable[..., Any]) -> None:
    value = x()
    torch.testing.assert_close(FORMS[op](mask(1, 8, 1), self=value), op(value[:, KEPT]))


@pytest.mark.parametrize("affine", [False, True])
def test_norms_over_the_last_dim(affine: bool) -> None:
    value = x().mT
    weight, bias = (torch.randn(8).double(), torch.randn(8).double()) if affine else (None, None)
    cut = [None if t is None else t[KEPT] for t in (weight, bias)]
    kept = value[..., KEPT]
    layer = FORMS[aten.layer_norm.default](mask(8), value, [8], weight, bias)
    torch.testing.assert_close(layer[..., KEPT], F.layer_norm(kept, [4], *cut))
    native = FORMS[aten.native_layer_norm.default](mask(8), value, [8], weight, bias, 1e-5)
    expected = torch.native_layer_norm(kept, [4], *cut, 1e-5)
    torch.testing.assert_close((native[0][..., KEPT], *native[1:]), expected)
    rms = FORMS[aten.rms_norm.default](mask(8), value, [8], weight)
    torch.testing.assert_close(rms[..., KEPT], F.rms_norm(kept, [4], cut[0]))
    fused = FORMS[aten._fused_rms_norm.default](mask(8), value, [8], weight, 1e-6)
    torch.testing.assert_close(
        (fused[0][..., KEPT], fused[1]), aten._fused_rms_norm(kept, [4], cut[0], 1e-6), check_dtype=False
    )


def test_group_norm_over_kept_channels_of_each_group() -> None:
    value, weight, bias = x(), torch.randn(8).double(), torch.randn(8).double()
    kept = [0, 2, 5, 7]  # two of each half
    own = torch.zeros(8).double().index_fill(0, torch.tensor(kept), 1).view(1, 8, 1)
    found = FORMS[aten.group_norm.default](own, value, 2, weight, bias)
    torch.testing.assert_close(found[:, kept], F.group_norm(value[:, kept], 2, weight[kept], bias[kept]))
    native = FORMS[aten.native_group_norm.default](own, value, weight, bias, 3, 8, 5, 2, 1e-5)
    expected = torch.native_group_norm(value[:, kept].contiguous(), weight[kept], bias[kept], 3, 4, 5, 2, 1e-5)
    torch.testing.assert_close((native[0][:, kept], *native[1:]), expected)


@pytest.mark.parametrize("op", FORMS, ids=str)
def test_every_form_takes_the_arguments_of_its_op(op: Any) -> None:
    assert registry.find(op) is not None
    names = {a.name for a in op._schema.arguments}
    parameters = dict(list(inspect.signature(FORMS[op]).parameters.items())[1:])
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert open_ended or names <= set(parameters), "the mask pass hands over every argument by its name"


FURTHER: dict[Any, dict[str, Any]] = {
    **{op: {"dim": [1]} for op in (
        aten.mean.dim, aten.var.dim, aten.std.dim, aten.var_mean.dim, aten.std_mean.dim, aten.var.correction,
        aten.std.correction, aten.var_mean.correction, aten.std_mean.correction, aten.amax.default,
        aten.amin.default, aten.logsumexp.default)},
    **{op: {"dim": 1} for op in (aten.max.dim, aten.min.dim, aten.aminmax.default)},
    aten.layer_norm.default: {"normalized_shape": [4]},
    aten.native_layer_norm.default: {"normalized_shape": [4], "weight": None, "bias": None, "eps": 1e-5},
    aten.rms_norm.default: {"normalized_shape": [4]},
    aten._fused_rms_norm.default: {"normalized_shape": [4], "weight": None, "eps": 1e-5},
    aten.group_norm.default: {"num_groups": 2},
    aten.native_group_norm.default: {"weight": None, "bias": None, "N": 2, "C": 6, "HxW": 20, "group": 2, "eps": 1e-5},
    aten.batch_norm.default: {
        "weight": None, "bias": None, "running_mean": None, "running_var": None, "training": True, "momentum": 0.0,
        "eps": 1e-5, "cudnn_enabled": False,
    },
    aten.instance_norm.default: {
        "weight": None, "bias": None, "running_mean": None, "running_var": None, "use_input_stats": True,
        "momentum": 0.0, "eps": 1e-5, "cudnn_enabled": False,
    },
}  # fmt: skip
"""Op -> arguments beside the input (2, 6, 5, 4)."""


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 3, 2), (3, 2, 1, 0)], ids=str)
@pytest.mark.parametrize("op", FORMS, ids=str)
def test_results_stand_in_memory_as_those_of_the_op(op: Any, order: tuple[int, ...]) -> None:
    """A view that follows the op in the graph needs the layout that the op gives."""
    sizes = [(2, 6, 5, 4)[d] for d in order]
    value = torch.randn(sizes).permute([order.index(d) for d in range(4)])
    if op is aten.native_group_norm.default and order not in ((0, 1, 2, 3), (0, 2, 3, 1)):
        pytest.skip("the op refuses other layouts itself")
    name = op._schema.arguments[0].name
    wanted = pytree.tree_leaves(op(**{name: value}, **FURTHER.get(op, {})))
    dims = [1, 1, 1, 4] if "normalized_shape" in FURTHER.get(op, {}) else [1, 6, 1, 1]
    found = pytree.tree_leaves(FORMS[op](torch.ones(dims), **{name: value}, **FURTHER.get(op, {})))
    assert [_in_memory(t) for t in found] == [_in_memory(t) for t in wanted]


def _in_memory(tensor: Tensor) -> list[tuple[int, int]]:
    """Return length and stride of the dims that are longer than 1."""
    return [(n, step) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
