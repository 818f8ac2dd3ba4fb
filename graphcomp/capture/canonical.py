"""One form for what a captured graph can say in several ways.

    inline_regions    no_grad and autocast(enabled=False) sub-graphs become part of the graph
    drop_checks       runtime assertions leave
    rewrite           chunk, split, narrow, unsafe_*, … become one op each (the table REWRITES)
    make_functional   in-place ops, on views too, become functional (see `functional`)

Every pass keeps `meta["val"]`, `meta["stack_trace"]` and `meta["nn_module_stack"]` of the nodes it changes.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from graphcomp.capture.functional import make_functional
from graphcomp.capture.record import OP_SITE, READS
from graphcomp.ir.graph import bind, fetch
from graphcomp.ir.rewrite import before, replace_node
from graphcomp.torch_compat import OpOverload, pytree

log = logging.getLogger("graphcomp.capture")
aten = torch.ops.aten

KEPT_META = ("val", "stack_trace", "nn_module_stack", "torch_fn", OP_SITE)


def canonicalize(module: fx.GraphModule) -> None:
    """Bring the graph of `module` into canonical form, in place."""
    inline_regions(module)
    drop_checks(module.graph)
    rewrite(module.graph)
    make_functional(module.graph)
    tidy_meta(module.graph)
    module.graph.eliminate_dead_code(lambda node: node.is_impure() or is_read(node))


def is_read(node: fx.Node) -> bool:
    """Whether a recorded model took a number from tensors here: what the run did then depends on them."""
    return OP_SITE in node.meta and node.target in READS


# ---------------------------------------------------------------------------------------------- regions
def inline_regions(module: fx.GraphModule) -> None:
    """Replace calls of no_grad and disabled-autocast sub-graphs by the sub-graph's nodes.

    The results of a no_grad region that would otherwise carry gradients are detached. A region under *enabled*
    autocast computes in another dtype than its ops say, so it is left as it is, like `cond` and other control flow.
    """
    for node in list(module.graph.nodes):
        body = _region(node)
        if body is None:
            continue
        region = fetch(module, str(body.target))
        inline_regions(region)
        _inline(module, node, region, inputs=node.args[node.args.index(body) + 1 :])


def _region(node: fx.Node) -> fx.Node | None:
    """The get_attr of the sub-graph, if `node` calls a region that can be inlined."""
    if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        return _as_node(node.args[1])
    if node.target is not torch.ops.higher_order.wrap_with_autocast:
        return None
    _device, _dtype, enabled, _cache, body, *_ = node.args
    if enabled:
        log.info("a region under torch.autocast is kept as a sub-graph: %s", node.format_node())
        return None
    return _as_node(body)


def _inline(module: fx.GraphModule, node: fx.Node, region: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Copy the nodes of `region` in front of `node` and hand its results to the users of `node`."""
    without_grad = node.target is torch.ops.higher_order.wrap_with_set_grad_enabled and not node.args[0]
    placeholders = region.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    results: list[Any] = []
    with module.graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op == "output":
                results = [copies[r] if isinstance(r, fx.Node) else r for r in pytree.tree_leaves(inner.args[0])]
            elif inner.op != "placeholder":
                copies[inner] = _copy_node(module, region, inner, copies)
        if without_grad and any(_requires_grad(copies[p]) for p in placeholders):
            results = [_detached(node, r) for r in results]
    for user in list(node.users):
        # a sub-graph returns a tuple, so its users are all getitem
        assert user.target is operator.getitem, user.format_node()
        replace_node(user, results[int(user.args[1])])  # type: ignore[arg-type]
    module.graph.erase_node(node)


def _copy_node(module: fx.GraphModule, region: fx.GraphModule, inner: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
    node = module.graph.node_copy(inner, lambda n: copies[n])
    if inner.op == "get_attr":
        node.target = _adopt(module, fetch(region, str(inner.target)), str(inner.target))
    return node


def _adopt(module: fx.GraphModule, value: Any, name: str) -> str:
    """Store `value` on `module` under a free name made from `name`."""
    free = name.replace(".", "_")
    while hasattr(module, free):
        free += "_"
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(free, value)
    else:
        setattr(module, free, value)
    return free


def _requires_grad(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    # activations that depend on parameters say requires_grad too: export traces with grad enabled
    return isinstance(value, torch.Tensor) and value.requires_grad


def _detached(region: fx.Node, result: Any) -> Any:
    value = result.meta.get("val") if isinstance(result, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return result
    return before(region, like=result)(aten.detach.default, result)


# ---------------------------------------------------------------------------------------------- checks
CHECKS: frozenset[Any] = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)


def drop_checks(graph: fx.Graph) -> None:
    """Remove runtime assertions and guards: they return nothing and say nothing about channels."""
    for node in reversed(graph.nodes):
        if node.target in CHECKS and not node.users:
            graph.erase_node(node)


# ---------------------------------------------------------------------------------------------- one op for one thing
Rewrite = tuple[OpOverload, tuple[Any, ...]] | fx.Node | None


def rewrite(graph: fx.Graph) -> None:
    """Apply the table REWRITES to every node."""
    for node in list(graph.nodes):
        rule = REWRITES.get(node.target)
        new = rule(node) if rule is not None else None
        if isinstance(new, fx.Node):
            replace_node(node, new)
        elif new is not None:
            node.target, node.args = new
            node.kwargs = {}


def _sizes(node: fx.Node, dim: int) -> list[int] | None:
    """Lengths of the parts of a split along `dim`, if all are plain ints."""
    parts = node.meta.get("val")
    sizes = [part.shape[dim] for part in parts] if isinstance(parts, (list, tuple)) else []
    return sizes if sizes and all(type(size) is int for size in sizes) else None


def _split(node: fx.Node) -> Rewrite:
    """Any way to cut a dim into parts -> split_with_sizes."""
    arguments = bind(node)
    return _into_parts(node, arguments.get("self", arguments.get("input")), arguments["dim"])


def _split_dim(dim: int) -> Callable[[fx.Node], Rewrite]:
    """hsplit and its kin, which cut dim `dim` (hsplit the only one, where there is but one) -> split_with_sizes."""

    def rewritten(node: fx.Node) -> Rewrite:
        source = _as_node(bind(node)["self"])
        return _into_parts(node, source, min(dim, source.meta["val"].dim() - 1))

    return rewritten


def _into_parts(node: fx.Node, source: Any, dim: int) -> Rewrite:
    sizes = _sizes(node, dim)
    return None if sizes is None else (aten.split_with_sizes.default, (source, sizes, dim))


def _narrow(node: fx.Node) -> Rewrite:
    """narrow(x, dim, start, length) -> slice(x, dim, start, start + length)."""
    arguments = bind(node)
    start, length = arguments["start"], arguments["length"]
    if type(start) is not int or type(length) is not int or start < 0:
        return None
    return aten.slice.Tensor, (arguments["self"], arguments["dim"], start, start + length)


def _slice(node: fx.Node) -> Rewrite:
    """A slice that takes everything -> its operand."""
    arguments = bind(node)
    whole = arguments["start"] in (None, 0) and arguments["end"] in (None, torch.iinfo(torch.int64).max)
    return _as_node(arguments["self"]) if whole and arguments["step"] == 1 else None


def _same_arguments(op: OpOverload) -> Callable[[fx.Node], Rewrite]:
    """The same op under its usual name."""
    return lambda node: (op, node.args)


REWRITES: dict[Any, Callable[[fx.Node], Rewrite]] = {
    aten.chunk.default: _split,
    aten.unsafe_chunk.default: _split,
    aten.split.Tensor: _split,
    aten.split.sizes: _split,
    aten.unsafe_split.Tensor: _split,
    aten.unsafe_split_with_sizes.default: _split,
    aten.tensor_split.sections: _split,
    aten.tensor_split.indices: _split,
    aten.hsplit.int: _split_dim(1),
    aten.hsplit.array: _split_dim(1),
    aten.vsplit.int: _split_dim(0),
    aten.vsplit.array: _split_dim(0),
    aten.dsplit.int: _split_dim(2),
    aten.dsplit.array: _split_dim(2),
    aten.narrow.default: _narrow,
    aten.slice.Tensor: _slice,
    aten._unsafe_view.default: _same_arguments(aten.view.default),
    aten._reshape_alias.default: lambda node: (aten.view.default, node.args[:2]),
    aten.lift_fresh_copy.default: _same_arguments(aten.clone.default),
}


# ---------------------------------------------------------------------------------------------- meta and names
def tidy_meta(graph: fx.Graph) -> None:
    """Keep what later passes read; a node without a source line takes the one of its first operand.

    What torch adds beside it (where a node came from, copies of the shapes) goes stale, or keeps a whole graph alive.
    """
    for node in graph.nodes:
        node.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        if node.op != "call_function":
            continue
        sources = [n.meta for n in node.all_input_nodes]
        for key, empty in (("stack_trace", ""), ("nn_module_stack", {})):
            if not node.meta.get(key):
                node.meta[key] = next((m[key] for m in sources if m.get(key)), empty)


def _as_node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node), value
    return value
