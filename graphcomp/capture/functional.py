"""In-place ops become functional, so that a value never changes after the node that defines the value.

    n = relu_(v)                 n = relu(v), and later readers of v read n
    n = relu_(slice(v, …))       n = relu(slice(v, …)); v' = slice_scatter(v, n, …), and later readers of v read v'

A pass that puts a node behind a definition (a quantizer, say) would else come before the write. What stays in place:
writes into parameters, buffers and inputs, which outlive the run; ops without a functional twin; views without an
inverse.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.capture.record import OP_SITE
from graphcomp.ir.graph import bind, value
from graphcomp.ir.memory import Memory, is_writing
from graphcomp.ir.rewrite import after, before
from graphcomp.torch_compat import OpOverload, pytree, schema_of

log = logging.getLogger("graphcomp.capture")
aten = torch.ops.aten


def make_functional(graph: fx.Graph) -> None:
    """Turn in-place ops into functional ones, and let later readers of the memory read the result.

    Which values share memory is read off the storages of their fake tensors.
    """
    names = _Writes(graph)
    for node in list(graph.nodes):
        op = functional(node.target)
        if op is None or not _same_result(node, op):
            continue
        if names.is_unobserved(node):
            names.replace(node, op)
        elif names.is_followed(node):
            names.write(node, op)


# ---------------------------------------------------------------------------------------------- twins
def functional(target: Any) -> OpOverload | None:
    """The functional twin of an in-place op: aten.relu_.default -> aten.relu.default."""
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    name = schema_of(target).name.removeprefix("aten::")
    written = [a for a in schema_of(target).arguments if a.alias_info is not None and a.alias_info.is_write]
    if [a.name for a in written] != [a.name for a in schema_of(target).arguments[:1]]:
        return None
    twin = "__" + name[3:] if name.startswith("__i") else name.removesuffix("_")
    packet = getattr(aten, twin, None) if twin != name else None
    overload = getattr(packet, schema_of(target).overload_name or "default", None)
    return overload if isinstance(overload, OpOverload) and not schema_of(overload).is_mutable else None


def _same_result(node: fx.Node, op: OpOverload) -> bool:
    """Whether `op` gives the dtype of `node`: in-place ops do not promote, their twins do."""
    expected = node.meta.get("val")
    mode = getattr(expected, "fake_mode", None)
    if not isinstance(expected, Tensor) or mode is None:
        return False
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    if any(t.device != expected.device and t.dim() for t in pytree.tree_leaves(args) if isinstance(t, Tensor)):
        return False  # only a copy takes operands of several devices
    try:
        with mode, torch.no_grad():
            found = op(*args, **kwargs)
    except Exception as error:  # whatever a fake kernel refuses: the op then stays in place, which is always right
        log.debug("%s stays in place: %s", node.format_node(), error)
        return False
    return isinstance(found, Tensor) and found.dtype == expected.dtype and found.dim() == expected.dim()


# ---------------------------------------------------------------------------------------------- views
def _regrouped(parent: fx.Node, _view: fx.Node, part: fx.Node) -> fx.Node:
    return after(part)(aten.reshape_as.default, part, parent)


def _reordered(_parent: fx.Node, view: fx.Node, part: fx.Node) -> fx.Node:
    """Undo a permutation, which is read off the strides that the op gives to a tensor with a stride of its own per
    dim."""
    rank = value(part).dim()
    probe = torch.empty([2] * rank, device="meta")
    given = view.target(probe, *view.args[1:], **view.kwargs).stride()  # type: ignore[operator]
    inverse = [given.index(stride) for stride in probe.stride()]
    return after(part)(aten.permute.default, part, inverse)


def _sliced(parent: fx.Node, view: fx.Node, part: fx.Node) -> fx.Node:
    bound = bind(view)
    return after(part)(
        aten.slice_scatter.default, parent, part, *(bound[name] for name in ("dim", "start", "end", "step"))
    )


def _selected(parent: fx.Node, view: fx.Node, part: fx.Node) -> fx.Node:
    bound = bind(view)
    return after(part)(aten.select_scatter.default, parent, part, bound["dim"], bound["index"])


def _diagonal(parent: fx.Node, view: fx.Node, part: fx.Node) -> fx.Node:
    bound = bind(view)
    return after(part)(
        aten.diagonal_scatter.default, parent, part, *(bound[name] for name in ("offset", "dim1", "dim2"))
    )


def _same(_parent: fx.Node, _view: fx.Node, part: fx.Node) -> fx.Node:
    return part


Undo = Callable[[fx.Node, fx.Node, fx.Node], fx.Node]
"""From the operand of a view, the view, and another value for the view, to another value for the operand."""

UNDO: dict[Any, Undo] = {
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.diagonal.default: _diagonal,
    **dict.fromkeys((aten.alias.default, aten.contiguous.default, aten.to.dtype, aten.to.dtype_layout), _same),
    **dict.fromkeys(
        (
            aten.view.default, aten.view_as.default, aten.reshape.default, aten.reshape_as.default,
            aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default,
            aten.squeeze.dim, aten.squeeze.dims,
        ),
        _regrouped,
    ),
    **dict.fromkeys(
        (
            aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default, aten.numpy_T.default,
            aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist,
            aten.swapaxes.default, aten.swapdims.default,
        ),
        _reordered,
    ),
}  # fmt: skip
"""How a value is put back where a view took the value from. A view of another op is not written through."""


# ---------------------------------------------------------------------------------------------- who shares memory
class _Writes:
    """Which nodes share memory, by the fake tensors of the graph as it was captured.

    A family is a node that made memory, and all views of that node. Dropout in eval mode returns the memory of its
    operand without being a view: it begins a family, as it makes memory of its own in training mode.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: k for k, node in enumerate(graph.nodes)}
        self.memory = Memory(graph)
        self.views: set[fx.Node] = set()
        for node in self.order:
            if self._is_view(node):
                self.views.add(node)

    def is_unobserved(self, node: fx.Node) -> bool:
        """Whether nobody reads the memory that `node` writes under another, older name."""
        written, relatives = _first(node), self._relatives(node)
        if written is None or not relatives or _outlives(relatives | {written}):
            return False
        older = (other for other in relatives if self.order[other] < self.order[node] and other is not written)
        return not any(self._readers(other, node) for other in older)

    def is_followed(self, node: fx.Node) -> bool:
        """Whether the view that `node` writes can be undone, and each other name of the memory made again."""
        written, relatives = _first(node), self._relatives(node)
        if written is None or not relatives or _outlives(relatives | {written}) or OP_SITE in node.meta:
            return False
        root = self._root(written)
        strangers = [other for other in relatives if other is not node and self._root(other) is not root]
        if any(self._observes(other, node, relatives) for other in strangers):
            return False
        writers = [other for other in relatives if is_writing(other)]
        return all(self.order[w] >= self.order[node] and self._has_twin(w) for w in writers)

    def replace(self, node: fx.Node, op: OpOverload) -> None:
        """Let `node` compute what it writes, and those who read the written value after `node` read the result."""
        written = _operand(node)
        self._call(node, op)
        self._give(written, node, after=node)

    def write(self, node: fx.Node, op: OpOverload) -> None:
        """Let `node` compute what it writes, put this in the place of the memory, and make later views of that."""
        written, keys = _operand(node), self.memory.of(node)
        root = self._root(written)
        aliases = [other for other in self.order if self._root(other) is root]
        chain = self._chain(written)
        self._call(node, op)
        whole = node
        for view in chain:
            whole = self._add(UNDO[view.target](_operand(view), view, whole), node, keys)
        made = {root: whole}
        for alias in aliases:
            if self.order[alias] < self.order[node] and self._readers(alias, node):
                self._give(alias, self._again(alias, made, node, keys), after=node)
        if whole is not node and self._readers(node, node):
            self._give(node, self._again(written, made, node, keys), after=node)

    def _call(self, node: fx.Node, op: OpOverload) -> None:
        """Let `node` call `op` in place of the in-place twin; a copy, which has no derivative, is written out."""
        if op is not aten.copy.default or OP_SITE in node.meta:
            node.target = op
            return
        source, wanted, written = bind(node)["src"], value(node), _operand(node)
        if value(source).dtype != wanted.dtype:
            source = self._add(before(node)(aten.to.dtype, source, wanted.dtype), node)
        if _lengths(value(source)) != _lengths(wanted):
            source = self._add(before(node)(aten.expand_as.default, source, written), node)
        node.target, node.args, node.kwargs = aten.clone.default, (source,), {}

    def _again(self, alias: fx.Node, made: dict[fx.Node, fx.Node], like: fx.Node, keys: Iterable[int]) -> fx.Node:
        """Return the view `alias` of the memory as it is after `like`."""
        if alias not in made:
            source = self._again(_operand(alias), made, like, keys)
            new = after(source, like=alias)(alias.target, source, *alias.args[1:], **alias.kwargs)
            made[alias] = self._add(new, like, keys)
            self.views.add(made[alias])
        return made[alias]

    def _add(self, new: fx.Node, like: fx.Node, keys: Iterable[int] = ()) -> fx.Node:
        """Note a node that stands beside `like`, and the memory that the node stands for."""
        if new not in self.order:
            self.order[new] = self.order[like]
            for key in keys:
                self.memory.sharing[key].append(new)
        return new

    def _has_twin(self, node: fx.Node) -> bool:
        op, written = functional(node.target), _first(node)
        if op is None or written is None or not _same_result(node, op):
            return False
        return all(view.target in UNDO for view in self._chain(written))

    def _observes(self, other: fx.Node, node: fx.Node, relatives: set[fx.Node]) -> bool:
        """Whether `other`, which is no view of what `node` writes, shows the write all the same."""
        if isinstance(value(other), (list, tuple)):  # of several tensors: those that the memory is of are read by item
            return any(user in relatives for user in self._readers(other, node))
        return self.order[other] < self.order[node] and bool(self._readers(other, node))

    def _relatives(self, node: fx.Node) -> set[fx.Node]:
        """All nodes that shared the memory that `node` writes when the graph was captured."""
        return {other for key in self.memory.of(node) for other in self.memory.sharing[key]}

    def _readers(self, node: fx.Node, after: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if self.order[user] > self.order[after]]

    def _give(self, old: fx.Node, new: fx.Node, after: fx.Node) -> None:
        """Let those who read `old` after the node `after` read `new`."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: self.order[user] > self.order[after])

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """The views from `node` back to the memory that they are views of."""
        found = []
        while node in self.views:
            found.append(node)
            node = _operand(node)
        return found

    def _is_view(self, node: fx.Node) -> bool:
        """Whether the value of `node` is the memory of its first operand, in every mode of the model."""
        source = _first(node)
        if source is None or not set(self.memory.of(node)) & set(self.memory.of(source)):
            return False
        if node.target is operator.getitem:
            return source in self.views
        if not isinstance(node.target, OpOverload) or node.target.namespace != "aten" or node.target is STRIDED:
            return False
        returns = schema_of(node.target).returns
        alias = returns[0].alias_info if returns else None
        return alias is not None and not alias.is_write

    def _root(self, node: fx.Node) -> fx.Node:
        """The node that made the memory that `node` is a view of: `node`, where it is none."""
        chain = self._chain(node)
        return _operand(chain[-1]) if chain else node


def _lengths(tensor: Tensor) -> list[Any]:
    """The lengths as expressions, as to compare symbolic lengths would put a condition on them."""
    return [n if isinstance(n, int) else n.node.expr for n in tensor.shape]


STRIDED = aten.as_strided.default
"""Addresses memory, whatever view the operand is of it."""


def _outlives(nodes: Iterable[fx.Node]) -> bool:
    """Whether the memory is there before the run, and after."""
    return any(node.op in ("placeholder", "get_attr") for node in nodes)


def _first(node: fx.Node) -> fx.Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _operand(node: fx.Node) -> fx.Node:
    first = _first(node)
    assert first is not None, node.format_node()
    return first
