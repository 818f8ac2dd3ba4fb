"""Attention written out, so that its two products are quantized like others.

scaled_dot_product_attention(q, k, v, mask)  ->  softmax((q scale) @ kᵀ + mask) @ v
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphcomp.graph import bind, clone, value

aten = torch.ops.aten

FUSED = frozenset(
    {
        aten.scaled_dot_product_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""Attention in one op."""


@dataclass(frozen=True)
class WriteOutAttention:
    """Replace every `scaled_dot_product_attention` without dropout by two products and a softmax.

    It computes the same up to rounding, but for queries whose mask hides every key, as padding has them: they get the
    mean of all values, where the one op gives 0. To find them would take more time than integers save.
    """

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        """A new module, which shares the tensors of `module`."""
        written, _ = clone(module)
        for node in written.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            if bind(node)["dropout_p"] == 0:
                _write_out(node)
        written.graph.lint()
        written.recompile()
        return written


def _write_out(node: fx.Node) -> None:
    arguments = bind(node)
    query, key, val, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    scale, lowest = arguments["scale"], torch.finfo(value(query).dtype).min
    with node.graph.inserting_before(node):
        if arguments["enable_gqa"]:
            each = value(query).shape[-3] // value(key).shape[-3]
            key, val = (_call(node, aten.repeat_interleave.self_int, t, each, -3) for t in (key, val))
        scaled = _call(node, aten.mul.Scalar, query, value(query).shape[-1] ** -0.5 if scale is None else scale)
        scores = _call(node, aten.matmul.default, scaled, _call(node, aten.transpose.int, key, -2, -1))
        if arguments["is_causal"]:
            lower = _call(node, aten.tril.default, _call(node, aten.ones_like.default, scores))
            scores = _hide(node, scores, lower, lowest)
        if mask is not None and value(mask).dtype is torch.bool:
            scores = _hide(node, scores, mask, lowest)
        elif mask is not None:
            scores = _call(node, aten.add.Tensor, scores, _call(node, aten.clamp_min.default, mask, lowest))
        weights = _call(node, aten.softmax.int, scores, -1)
    # the node keeps its name, by which costs find it
    node.target, node.args, node.kwargs = aten.matmul.default, (weights, val), {}


def _hide(node: fx.Node, scores: fx.Node, seen: fx.Node, lowest: float) -> fx.Node:
    """`lowest` where `seen` is 0 or false; not -inf, of which a whole row would become NaN."""
    return _call(node, aten.masked_fill.Scalar, scores, _call(node, aten.eq.Scalar, seen, 0), lowest)


def _call(like: fx.Node, target: Any, *arguments: Any) -> fx.Node:
    """A node where the graph inserts, that says it comes from where `like` does."""
    node = like.graph.call_function(target, arguments)
    node.meta = {key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta}
    node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in arguments))
    return node
