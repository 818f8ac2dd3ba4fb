"""Attention written out: so that its two products are quantized like others, and for runtimes without the one op.

scaled_dot_product_attention(q, k, v, mask)  ->  softmax((q scale) @ kᵀ + mask) @ v
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphcomp.ir.graph import bind, clone, value
from graphcomp.ir.module import FOLLOWS_MODE
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import Maker, after, become, before, redirect

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
    make = before(node)
    if arguments["enable_gqa"]:
        each = value(query).shape[-3] // value(key).shape[-3]
        key, val = (make(aten.repeat_interleave.self_int, t, each, -3) for t in (key, val))
    scaled = make(aten.mul.Scalar, query, value(query).shape[-1] ** -0.5 if scale is None else scale)
    scores = make(aten.matmul.default, scaled, make(aten.transpose.int, key, -2, -1))
    if arguments["is_causal"]:
        scores = make(aten.add.Tensor, scores, _bias(make, make(aten.tril.default, _ones(make, query, key)), lowest))
    if mask is not None and value(mask).dtype is torch.bool:
        scores = make(aten.add.Tensor, scores, _bias(make, mask, lowest))
    elif mask is not None:
        scores = make(aten.add.Tensor, scores, make(aten.clamp_min.default, mask, lowest))
    become(node, aten.matmul.default, _dropped(make, make(aten.softmax.int, scores, -1)), val)
    node.meta.pop(FOLLOWS_MODE, None)
    if mask is None or not zero_hidden:
        return
    users = list(node.users)
    make = after(node)
    # of the mask alone: layers that share it share this, too
    if value(mask).dtype is torch.bool:
        hidden = make(aten.logical_not.default, make(aten.any.dim, mask, -1, True))
    else:
        hidden = make(aten.eq.Scalar, make(aten.amax.default, mask, [-1], True), -torch.inf)
    redirect(users, node, make(aten.masked_fill.Scalar, node, hidden, 0.0))


def _dropped(make: Maker, weights: fx.Node) -> fx.Node:
    """Return the weights behind the dropout that attention has in training mode alone; `weights` without one."""
    _, in_training = make.like.meta.get(FOLLOWS_MODE, {}).get("dropout_p", (0.0, 0.0))
    if not in_training:
        return weights
    dropout = make(aten.dropout.default, weights, in_training, False)
    dropout.meta[FOLLOWS_MODE] = {"train": (False, True)}
    return dropout


def _bias(make: Maker, seen: fx.Node, lowest: float) -> fx.Node:
    """0 where `seen` is not 0 or false, else `lowest`; not -inf, of which a whole row would become NaN.

    Of the shape of the mask, which has no heads: adding it takes less than filling all scores, layer by layer.
    """
    zeros = make(aten._to_copy.default, make(aten.zeros_like.default, seen), dtype=value(make.like).dtype)
    return make(aten.masked_fill.Scalar, zeros, make(aten.eq.Scalar, seen, 0), lowest)


def _ones(make: Maker, query: fx.Node, key: fx.Node) -> fx.Node:
    """(s, t) of ones, for queries (…, s, d) and keys (…, t, d)."""
    rows, columns = query, key
    for _ in range(value(query).dim() - 2):
        rows, columns = (make(aten.select.int, t, 0, 0) for t in (rows, columns))
    rows, columns = (make(aten.ones_like.default, make(aten.slice.Tensor, t, 1, 0, 1)) for t in (rows, columns))
    return make(aten.mul.Tensor, rows, make(aten.transpose.int, columns, 0, 1))
