"""Trim a vocabulary: passes that cut the rows of tables and put id maps in front, or fill the logits that go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import PlanError
from graphcomp.ir.graph import (
    all_tensors,
    assign,
    bind,
    clone,
    fetch,
    names_by_tensor,
    op_name,
    set_argument,
    source_line,
    tensor_values,
    value,
)
from graphcomp.ir.passes import GraphPass
from graphcomp.ir.rewrite import after, before, computed, redirect
from graphcomp.pruning.vocabulary import Kept, Logits, Table, table_of
from graphcomp.torch_compat import OpOverload

aten = torch.ops.aten

COPIES = (aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.alias.default)


@dataclass(frozen=True)
class TrimVocabulary(GraphPass):
    """Cut the rows of tables, and put id maps in front of the lookups and behind the heads.

    Attributes:
        tables: of the graph.
        kept: the ids that stay.
        logits: see `Logits`.
    """

    tables: tuple[Table, ...]
    kept: Kept
    logits: Logits = "wide"
    name: ClassVar[str] = "trim the vocabulary"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return the graph with fewer rows."""
        small, new = clone(module)
        cut = {table.name for table in self.tables}
        cut |= {name for table in self.tables for head in table.heads for name in (head.weight, head.bias) if name}
        _cut(small, cut, self.kept.ids)
        maps: dict[str, fx.Node] = {}
        for table in self.tables:
            for lookup in table.lookups:
                self._map_ids(small, new[lookup], maps)
            for head in table.heads:
                self._widen(small, new[head.node], maps)
        small.graph.lint()
        small.recompile()
        return small

    def _map_ids(self, module: fx.GraphModule, lookup: fx.Node, maps: dict[str, fx.Node]) -> None:
        arguments = bind(lookup)
        rows = self._read(module, "vocabulary_rows", self.kept.rows, maps)
        make, ids = before(lookup), arguments["indices"]
        ids = ids if value(ids).dtype == torch.int64 else make(aten.to.dtype, ids, torch.int64)  # ONNX indexes by these
        mapped = make(aten.index.Tensor, rows, [ids])
        set_argument(lookup, "indices", mapped)
        padding = arguments["padding_idx"]
        if padding != -1:
            set_argument(lookup, "padding_idx", int(self.kept.columns[padding % self.kept.size]))

    def _widen(self, module: fx.GraphModule, head: fx.Node, maps: dict[str, fx.Node]) -> None:
        """Let the users of a head read logits of the old width."""
        for turned in _turns(head):
            turned.meta["val"] = computed(turned)
        behind = _to_the_output(head) if self.logits == "narrow" else []
        for node in (head, *behind):  # to compute a product anew would settle lengths that are open
            node.meta["val"] = value(node)[..., : len(self.kept.ids)]
        if self.logits == "narrow":
            return
        users = list(head.users)
        same = torch.equal(self.kept.columns, self.kept.rows)
        columns = self._read(module, "vocabulary_rows" if same else "vocabulary_columns", self.kept.columns, maps)
        make = after(head)
        gone = make(aten.full_like.default, make(aten.slice.Tensor, head, -1, 0, 1), -torch.inf)
        both = make(aten.cat.default, [head, gone], -1)
        redirect(users, head, make(aten.index_select.default, both, -1, columns))

    def _read(self, module: fx.GraphModule, name: str, tensor: Tensor, maps: dict[str, fx.Node]) -> fx.Node:
        if name not in maps:
            first = next(node for node in module.graph.nodes if node.op == "placeholder")
            like = next(node for node in module.graph.nodes if node.op == "call_function")
            device = fetch(module, self.tables[0].name).device
            maps[name] = before(first, like).tensor(module, name, tensor.to(device))
        return maps[name]


def _cut(module: fx.GraphModule, cut: Iterable[str], ids: Tensor) -> None:
    """Give tensors the rows of `ids` alone, under all their names."""
    names = names_by_tensor(all_tensors(module))
    for name in cut:
        tensor = fetch(module, name)
        data = tensor.detach().index_select(0, ids.to(tensor.device))
        small = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
        for own in names[id(tensor)]:
            assign(module, own, small)
        for node in module.graph.find_nodes(op="get_attr"):
            if fetch(module, str(node.target)) is small:
                fake = value(node)
                node.meta["val"] = fake[: len(ids)] if isinstance(fake, Tensor) else fake


def _turns(head: fx.Node) -> list[fx.Node]:
    """Return the ops between a table and the head, first to last."""
    found: list[fx.Node] = []
    node = table_of(head)
    while node.op != "get_attr":
        found.insert(0, node)
        node = node.all_input_nodes[0]
    return found


def _to_the_output(head: fx.Node) -> list[fx.Node]:
    """Return the ops between a head and the outputs.

    Raises:
        PlanError: one of them is not computed element by element, or reads other tensors.
    """
    found: list[fx.Node] = []
    waiting = list(head.users)
    while waiting:
        node = waiting.pop(0)
        if node.op == "output":
            continue
        tensors = [n for n in node.all_input_nodes if any(t.dim() for t in tensor_values(n))]
        if not _is_pointwise(node) or len(tensors) > 1:
            raise PlanError(
                'logits="narrow" needs a head whose result is returned',
                at=source_line(node),
                why=f"{op_name(node)} reads the logits",
                fix='logits="wide"',
            )
        found.append(node)
        waiting += list(node.users)
    return found


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and (node.target in COPIES or torch.Tag.pointwise in node.target.tags)


@dataclass(frozen=True)
class MaskVocabulary(GraphPass):
    """Fill the logits of ids that are gone: with -inf, what a graph with wide logits is compared with.

    Attributes:
        tables: of the graph.
        kept: the ids that stay.
        fill: the value of these logits.
    """

    tables: tuple[Table, ...]
    kept: Kept
    fill: float = -torch.inf
    name: ClassVar[str] = "mask the vocabulary"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return the graph with masked heads."""
        masked, new = clone(module)
        gone = self.kept.columns == len(self.kept.ids)
        for head in (new[head.node] for table in self.tables for head in table.heads):
            users = list(head.users)
            make = after(head)
            device = fetch(module, self.tables[0].name).device
            mask = make.tensor(masked, "vocabulary_gone", gone.to(device))
            redirect(users, head, make(aten.masked_fill.Scalar, head, mask, self.fill))
        masked.graph.lint()
        masked.recompile()
        return masked
