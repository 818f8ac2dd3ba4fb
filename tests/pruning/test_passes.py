"""The mask and the slice pass, seen: small graphs before and after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.errors import PlanError, VerificationError
from graphcomp.flows.one_shot import cut_groups
from graphcomp.pruning.mask import InsertMasks, set_masks
from graphcomp.pruning.slice import SliceGroups


def printed(module: fx.GraphModule) -> str:
    """One line per computed value, arguments as they stand; parameters by their names."""
    lines = []
    for node in module.graph.nodes:
        if node.op not in ("call_function", "call_module"):
            continue
        is_op = isinstance(node.target, (torch._ops.OpOverload, str))
        target = str(node.target).removesuffix(".default") if is_op else node.target.__name__
        arguments = [_shown(a) for a in node.args] + [f"{k}={_shown(v)}" for k, v in node.kwargs.items()]
        lines.append(f"{node.name} = {target}({', '.join(arguments)})")
    return "\n".join(lines)


def _shown(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return str(argument.target) if argument.op in ("get_attr", "placeholder") else argument.name
    return "[" + ", ".join(map(_shown, argument)) + "]" if isinstance(argument, (list, tuple)) else str(argument)


def text(block: str) -> str:
    return "\n".join(line.strip() for line in block.strip().splitlines())


def analysed(model: nn.Module, *inputs: Tensor) -> Analysis:
    return analyze_captured(capture(model.eval(), inputs))


def masked(analysis: Analysis) -> fx.GraphModule:
    return InsertMasks(analysis.coupling, analysis.groups)(analysis.captured.module)


def sliced(analysis: Analysis, **kept: list[int]) -> fx.GraphModule:
    """Keep some units of each group, named by its role."""
    by_role = {group.role: group for group in analysis.groups}
    units = {by_role[role]: torch.tensor(indices) for role, indices in kept.items()}  # type: ignore[index]
    return SliceGroups(analysis.coupling, units)(analysis.captured.module)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(5, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(5, 24, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1, bias=False), nn.Conv2d(12, 8, 3, groups=4, bias=False)
        self.c = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12, bias=False), nn.Linear(7, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(x[:, :7] * F.pad(x[:, 7:], (0, 2)))


def test_masks_of_a_norm_and_a_contraction() -> None:
    assert printed(masked(analysed(Normed(), torch.randn(2, 5)))) == text("""
        linear = aten.linear(x, up.weight)
        graphcomp_mask_axis_0 = graphcomp_mask_axis_0(graphcomp_mask_0)
        layer_norm = layer_norm(graphcomp_mask_axis_0, input=linear, normalized_shape=[8], weight=norm.weight, \
bias=norm.bias, eps=1e-05, cudnn_enable=False)
        graphcomp_mask_axis_1 = graphcomp_mask_axis_1(graphcomp_mask_0)
        mul_tensor = aten.mul.Tensor(down.weight, graphcomp_mask_axis_1)
        linear_1 = aten.linear(layer_norm, mul_tensor)
    """)


def test_slice_of_a_norm() -> None:
    small = sliced(analysed(Normed(), torch.randn(2, 5)), hidden=[0, 3, 5])
    assert printed(small) == text("""
        linear = aten.linear(x, up.weight)
        layer_norm = aten.layer_norm(linear, [3], norm.weight, norm.bias, 1e-05, False)
        linear_1 = aten.linear(layer_norm, down.weight)
    """)
    assert shapes(small) == {"up.weight": (3, 5), "norm.weight": (3,), "norm.bias": (3,), "down.weight": (4, 3)}


def test_masks_of_attention_zero_the_queries_and_pin_the_scale() -> None:
    lines = printed(masked(analysed(Attention(), torch.randn(2, 6, 5)))).splitlines()
    assert "\n".join(lines[7:]) == text("""
        graphcomp_mask_axis_0 = graphcomp_mask_axis_0(graphcomp_mask_1)
        mul_tensor = aten.mul.Tensor(getitem, graphcomp_mask_axis_0)
        scaled_dot_product_attention = aten.scaled_dot_product_attention(mul_tensor, getitem_1, getitem_2, scale=0.5)
        transpose = aten.transpose.int(scaled_dot_product_attention, 1, 2)
        flatten = aten.flatten.using_ints(transpose, 2)
        graphcomp_mask_axis_1 = graphcomp_mask_axis_1(graphcomp_mask_0, graphcomp_mask_1)
        mul_tensor_1 = aten.mul.Tensor(o.weight, graphcomp_mask_axis_1)
        linear_1 = aten.linear(flatten, mul_tensor_1)
    """)


def test_slice_of_attention_recomputes_the_view_and_pins_the_scale() -> None:
    small = sliced(analysed(Attention(), torch.randn(2, 6, 5)), head=[1], head_dim=[0, 1, 3])
    assert printed(small) == text("""
        linear = aten.linear(x, qkv.weight)
        view = aten.view(linear, [2, 6, 3, 1, 3])
        permute = aten.permute(view, [2, 0, 3, 1, 4])
        unbind = aten.unbind.int(permute)
        getitem = getitem(unbind, 0)
        getitem_1 = getitem(unbind, 1)
        getitem_2 = getitem(unbind, 2)
        scaled_dot_product_attention = aten.scaled_dot_product_attention(getitem, getitem_1, getitem_2, scale=0.5)
        transpose = aten.transpose.int(scaled_dot_product_attention, 1, 2)
        flatten = aten.flatten.using_ints(transpose, 2)
        linear_1 = aten.linear(flatten, o.weight)
    """)
    assert shapes(small) == {"qkv.weight": (9, 5), "o.weight": (4, 3)}


def test_masks_of_a_grouped_convolution_mask_weights_only() -> None:
    assert printed(masked(analysed(Grouped(), torch.randn(2, 3, 8, 8)))) == text("""
        conv2d = aten.conv2d(x, a.weight)
        graphcomp_mask_axis_0 = graphcomp_mask_axis_0(graphcomp_mask_1)
        mul_tensor = aten.mul.Tensor(b.weight, graphcomp_mask_axis_0)
        conv2d_1 = aten.conv2d(conv2d, mul_tensor, None, [1, 1], [0, 0], [1, 1], 4)
        graphcomp_mask_axis_1 = graphcomp_mask_axis_1(graphcomp_mask_0, graphcomp_mask_2)
        mul_tensor_1 = aten.mul.Tensor(c.weight, graphcomp_mask_axis_1)
        conv2d_2 = aten.conv2d(conv2d_1, mul_tensor_1)
    """)


def test_slice_of_a_grouped_convolution_recomputes_its_groups() -> None:
    small = sliced(analysed(Grouped(), torch.randn(2, 3, 8, 8)), group=[0, 1, 3])
    assert "conv2d_1 = aten.conv2d(conv2d, b.weight, None, [1, 1], [0, 0], [1, 1], 3)" in printed(small)
    assert shapes(small) == {"a.weight": (9, 3, 1, 1), "b.weight": (6, 3, 3, 3), "c.weight": (4, 6, 1, 1)}


def test_slice_recomputes_bounds_and_padding() -> None:
    analysis = analysed(Halves(), torch.randn(2, 5))
    first, last = analysis.groups
    assert (first.size, last.size) == (5, 2)  # the two padded columns have no partner
    kept = {first: torch.tensor([0, 2, 4]), last: torch.tensor([1])}
    small = SliceGroups(analysis.coupling, kept)(analysis.captured.module)
    assert printed(small) == text("""
        linear = aten.linear(x, up.weight)
        slice_2 = aten.slice.Tensor(linear, 1, 0, 4)
        slice_4 = aten.slice.Tensor(linear, 1, 4, 9223372036854775807)
        pad = aten.pad(slice_4, [0, 1])
        mul = aten.mul.Tensor(slice_2, pad)
        linear_1 = aten.linear(mul, down.weight)
    """)
    assert shapes(small) == {"up.weight": (7, 5), "down.weight": (4, 4)}


# ------------------------------------------------------------------------------------------------ contracts
def test_masks_can_be_set_again() -> None:
    analysis, x = analysed(Normed(), torch.randn(2, 5)), torch.randn(3, 5)
    module, (group,) = masked(analysis), analysis.groups
    dense = module(x)
    set_masks(module, analysis.groups, {group: torch.tensor([1, 2])})
    assert not torch.allclose(module(x), dense)
    set_masks(module, analysis.groups, {})
    assert torch.equal(module(x), dense)
    torch.testing.assert_close(dense, analysis.model(x))


def test_masks_share_the_tensors_and_slices_do_not() -> None:
    analysis = analysed(Normed(), torch.randn(2, 5))
    assert masked(analysis).get_parameter("up.weight") is analysis.model.get_parameter("up.weight")
    small = sliced(analysis, hidden=[0])
    small.get_parameter("down.weight").data.zero_()
    assert analysis.model.get_parameter("down.weight").abs().min() > 0


@pytest.mark.parametrize("kept", [[], [2, 1], [1, 1], [8], [-1]])
def test_kept_units_must_be_ascending_and_there(kept: list[int]) -> None:
    with pytest.raises(PlanError, match="hidden"):
        sliced(analysed(Normed(), torch.randn(2, 5)), hidden=kept)


def test_a_graph_whose_shapes_do_not_follow_its_axes_is_refused() -> None:
    """The seam: were a rule to forget a shape constant, the slice would not be handed on."""
    analysis = analysed(Attention(), torch.randn(2, 6, 5))
    for call in analysis.coupling.calls.values():
        call.lengths.clear()
    with pytest.raises(
        VerificationError, match=r"the pass 'slice groups' left a graph that is not valid\n(.|\n)*does not run"
    ):
        sliced(analysis, head_dim=[0, 1])


def test_lengths_that_depend_on_the_batch_are_cut_by_their_ratio() -> None:
    class Flat(nn.Module):
        """Channels and batch in one dim, whose length is an expression of the batch size."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(6, 16, 1), nn.Conv1d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            b, c, t = y.shape
            return self.b(torch.tanh(y.reshape(b * c, t)).reshape(b, c, t))

    model, x = Flat().eval(), torch.randn(2, 6, 5)
    plan = gc.analyze(model, x)
    (group,) = plan.groups
    kept = torch.arange(12)
    small = cut_groups(plan, {group: kept}, [group], verify=True).graph
    other = torch.randn(3, 6, 5)
    with torch.no_grad():
        wanted = model.b(torch.tanh(torch.relu(model.a(other))) * torch.isin(torch.arange(16), kept)[:, None])
        assert torch.allclose(small(other), wanted, atol=1e-5)
