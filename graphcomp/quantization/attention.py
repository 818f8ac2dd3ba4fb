"""Attention written out: so that its two products are quantized like others, and for runtimes without the one op.

scaled_dot_product_attention(q, k, v, mask)  ->  softmax((q scale) @ kᵀ + mask) @ v
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphcomp.ir.graph import bind, call_like, clone, value
from graphcomp.ir.module import FOLLOWS_MODE
from graphcomp.ir.passes import GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class WriteOutAttention(GraphPass):
    """Replace every `scaled_dot_product_attention` without dropout by two products and a softmax.

    It computes the same up to rounding, but for queries whose mask hides every key, as padding has them.

    Attributes:
        zero_hidden: such queries get 0, as from the one op. Otherwise they get the mean of all values: what makes them
            0 stands behind the second product, where a runtime looks for the quantization that makes it one of
            integers.
    """

    zero_hidden: bool = False
    name: ClassVar[str] = "write out attention"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """A new module, which shares the tensors of `module`."""
        written, _ = clone(module)
        for node in written.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            arguments = bind(node)
            # a graph from elsewhere may not say what its nodes compute
            if arguments["dropout_p"] == 0 and all(value(arguments[name]) is not None for name in ("query", "key")):
                _write_out(node, self.zero_hidden)
        written.recompile()
        return written


def _write_out(node: fx.Node, zero_hidden: bool) -> None:
    arguments = bind(node)
    query, key, val, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    scale, lowest = arguments["scale"], torch.finfo(value(query).dtype).min
    with node.graph.inserting_before(node):
        if arguments["enable_gqa"]:
            each = value(query).shape[-3] // value(key).shape[-3]
            key, val = (call_like(node, aten.repeat_interleave.self_int, t, each, -3) for t in (key, val))
        scaled = call_like(node, aten.mul.Scalar, query, value(query).shape[-1] ** -0.5 if scale is None else scale)
        scores = call_like(node, aten.matmul.default, scaled, call_like(node, aten.transpose.int, key, -2, -1))
        if arguments["is_causal"]:
            lower = call_like(node, aten.tril.default, _ones(node, query, key))
            scores = call_like(node, aten.add.Tensor, scores, _bias(node, lower, lowest))
        if mask is not None and value(mask).dtype is torch.bool:
            scores = call_like(node, aten.add.Tensor, scores, _bias(node, mask, lowest))
        elif mask is not None:
            scores = call_like(node, aten.add.Tensor, scores, call_like(node, aten.clamp_min.default, mask, lowest))
        weights = _dropped(node, call_like(node, aten.softmax.int, scores, -1))
    # the node keeps its name, by which costs find it
    node.target, node.args, node.kwargs = aten.matmul.default, (weights, val), {}
    node.meta.pop(FOLLOWS_MODE, None)
    if mask is None or not zero_hidden:
        return
    users = list(node.users)
    with node.graph.inserting_before(node.next):
        # of the mask alone: layers that share it share this, too
        if value(mask).dtype is torch.bool:
            hidden = call_like(node, aten.logical_not.default, call_like(node, aten.any.dim, mask, -1, True))
        else:
            hidden = call_like(node, aten.eq.Scalar, call_like(node, aten.amax.default, mask, [-1], True), -torch.inf)
        result = call_like(node, aten.masked_fill.Scalar, node, hidden, 0.0)
    for user in users:
        user.replace_input_with(node, result)


def _dropped(attention: fx.Node, weights: fx.Node) -> fx.Node:
    """Return the weights behind the dropout that attention has in training mode alone; `weights` without one."""
    _, in_training = attention.meta.get(FOLLOWS_MODE, {}).get("dropout_p", (0.0, 0.0))
    if not in_training:
        return weights
    dropout = call_like(attention, aten.dropout.default, weights, in_training, False)
    dropout.meta[FOLLOWS_MODE] = {"train": (False, True)}
    return dropout


def _bias(node: fx.Node, seen: fx.Node, lowest: float) -> fx.Node:
    """0 where `seen` is not 0 or false, else `lowest`; not -inf, of which a whole row would become NaN.

    Of the shape of the mask, which has no heads: adding it takes less than filling all scores, layer by layer.
    """
    dtype = value(node).dtype
    zeros = call_like(node, aten._to_copy.default, call_like(node, aten.zeros_like.default, seen), dtype=dtype)
    return call_like(node, aten.masked_fill.Scalar, zeros, call_like(node, aten.eq.Scalar, seen, 0), lowest)


def _ones(node: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
    """(s, t) of ones, for queries (…, s, d) and keys (…, t, d)."""
    rows, columns = query, key
    for _ in range(value(query).dim() - 2):
        rows, columns = (call_like(node, aten.select.int, t, 0, 0) for t in (rows, columns))
    rows, columns = (
        call_like(node, aten.ones_like.default, call_like(node, aten.slice.Tensor, t, 1, 0, 1)) for t in (rows, columns)
    )
    return call_like(node, aten.mul.Tensor, rows, call_like(node, aten.transpose.int, columns, 0, 1))
