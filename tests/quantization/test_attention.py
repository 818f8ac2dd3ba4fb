"""Attention written out computes what the one op computes, and its products are quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.ops.answers import is_fused
from graphcomp.quantization.attention import WriteOutAttention
from graphcomp.quantization.placement import place
from graphcomp.quantization.ptq import PostTraining, quantize
from graphcomp.quantization.spec import QuantConfig
from graphcomp.quantization.verify import check_lowering

aten = torch.ops.aten


class Attends(nn.Module):
    """Queries (b, 4, s, 8), keys (b, h, t, 8), values (b, h, t, 6) -> (b, 4, s, 6)."""

    def __init__(self, mask: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, **self.options)


def operands(heads: int = 4, s: int = 5, t: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, s, 8), torch.randn(2, heads, t, 8), torch.randn(2, heads, t, 6)


SEEN = torch.rand(5, 7) > 0.4
SEEN[:, 0] = True
CASES: dict[str, tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]] = {
    "plain": (Attends(), operands()),
    "scale": (Attends(scale=0.3), operands()),
    "causal": (Attends(is_causal=True), operands(s=7)),
    "causal, oblong": (Attends(is_causal=True), operands()),
    "a mask of floats": (Attends(torch.randn(5, 7)), operands()),
    "a mask of infinities": (Attends(torch.zeros(5, 7).masked_fill(~SEEN, -torch.inf)), operands()),
    "a mask of truth values": (Attends(SEEN), operands()),
    "grouped queries": (Attends(enable_gqa=True), operands(heads=2)),
}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_same(name: str) -> None:
    model, inputs = CASES[name]
    captured = capture(model, inputs).module
    before = [node.name for node in captured.graph.nodes]
    written = WriteOutAttention()(captured)
    assert not any(is_fused(node) for node in written.graph.nodes)
    assert [node.name for node in captured.graph.nodes] == before
    torch.testing.assert_close(written(*inputs), model(*inputs))
    node = next(node for node in written.graph.nodes if "scaled_dot_product_attention" in node.name)
    assert node.target is aten.matmul.default and node.meta["val"].shape[1:] == model(*inputs).shape[1:]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
@pytest.mark.ci
def test_it_computes_the_same_with_hidden_queries_in_mind(name: str) -> None:
    model, inputs = CASES[name]
    torch.testing.assert_close(
        WriteOutAttention(zero_hidden=True)(capture(model, inputs).module)(*inputs), model(*inputs)
    )


@pytest.mark.parametrize("hidden", [False, -torch.inf])
@pytest.mark.parametrize("zero_hidden", [False, True])
def test_queries_that_see_nothing_get_the_mean_of_the_values_or_zero(hidden: float, zero_hidden: bool) -> None:
    mask = SEEN.clone() if hidden is False else torch.zeros(5, 7).masked_fill(~SEEN, hidden)
    mask[2] = hidden
    model, inputs = Attends(mask), operands()
    found = WriteOutAttention(zero_hidden)(capture(model, inputs).module)(*inputs)
    expected = model(*inputs)
    others = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(found[:, :, others], expected[:, :, others])
    assert not expected[:, :, 2].any()
    torch.testing.assert_close(found[:, :, 2], expected[:, :, 2] if zero_hidden else inputs[2].mean(2))


def test_attention_with_dropout_stays() -> None:
    captured = capture(Attends(), operands()).module
    (node,) = (node for node in captured.graph.nodes if is_fused(node))
    node.kwargs = {**node.kwargs, "dropout_p": 0.1}
    written = WriteOutAttention()(captured)
    assert [node.target for node in written.graph.nodes if is_fused(node)] == [node.target]


def test_attention_between_nodes_of_no_known_value_stays() -> None:
    captured = capture(Attends(), operands()).module
    for node in captured.graph.nodes:
        node.meta.pop("val", None)
    assert [node.target for node in WriteOutAttention()(captured).graph.nodes if is_fused(node)]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", CASES)
def test_law_3(name: str) -> None:
    model, inputs = CASES[name]
    found = quantize(capture(model, inputs), [inputs], PostTraining(QuantConfig(attention=True)))
    error = check_lowering(found.fake, found.lowered, inputs)
    assert error.steps <= 1.001 and len(found.lowered.activations) >= 4
    assert [(layer.weight_bits, layer.activation_bits) for layer in found.lowered.layers] == [(8, 8)] * 2


def test_attention_that_stays_float_is_named() -> None:
    captured = capture(Attends(), operands()).module
    (reason,) = place(captured, QuantConfig()).left_float.values()
    assert "attention in one op" in reason
    assert not place(captured, QuantConfig(activations=None)).left_float


def test_bit_operations_of_attention() -> None:
    model, inputs = CASES["plain"]
    options = {"sparsity": 0, "progress": False}
    ratio = {
        flag: gc.compress(
            model, inputs, quantization=PostTraining(QuantConfig(attention=flag)), **options
        ).report.bops_attention.ratio
        for flag in (False, True)
    }
    assert ratio == {False: 1.0, True: 64 / 1024}
