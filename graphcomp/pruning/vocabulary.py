"""Vocabulary: rows of embedding tables that no id of a task reads are cut, and an id map stands in front.

    embedding(table, ids)  ->  embedding(table[kept], rows[ids])

`rows` holds the row of each id; the tokenizer stays. An id without a row has the number behind the last row, which a
lookup refuses, or the row of an id that stands for unknown ones. A head, which multiplies with the table's rows, gives
one logit per kept id; wide, these stand in their old columns and the others are -inf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import PlanError
from graphcomp.ir.graph import (
    all_tensors,
    argument_at,
    attributes,
    bind,
    fetch,
    op_name,
    source_line,
    tensor_values,
)
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.ops.facts import Move
from graphcomp.ops.registry import facts_of
from graphcomp.torch_compat import OpOverload

aten = torch.ops.aten

Logits: TypeAlias = Literal["wide", "narrow"]
"""Whether a cut head gives logits in the old columns, the others -inf, or one column per kept id."""

LISTED = 5
"""Names that a message lists."""

TURNS = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.detach.default)
"""Ops that may stand between a table and the product that a head is."""
PRODUCTS: dict[Any, str] = {aten.linear.default: "weight", aten.mm.default: "mat2", aten.matmul.default: "other"}
"""Products that a head may be -> the argument that holds the table."""
JOINS = (aten.cat, aten.stack)
CHOOSES: dict[Any, tuple[str, ...]] = {
    aten.where: ("self", "other"), aten.masked_fill: ("self", "value"), aten.to: ("self",), aten._to_copy: ("self",),
    aten.index: ("self",), aten.index_select: ("self",), aten.gather: ("self",), aten.detach: ("self",),
    aten.slice_scatter: ("self", "src"), aten.select_scatter: ("self", "src"), aten.index_put: ("self", "values"),
    aten.copy: ("self", "src"),
}  # fmt: skip
"""Ops that return elements of some operands, or of one in another dtype -> these operands."""
FILLED = (
    aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_ones, aten.new_full,
    aten.new_empty,
)  # fmt: skip
"""Ops that read a tensor for its shape alone."""


@dataclass(frozen=True, eq=False)
class Head:
    """A product with the rows of a table, or with the rows of another weight that count the same ids.

    Attributes:
        node: the product.
        weight: name of the weight, one row per id.
        bias: name of the bias; "" without one.
    """

    node: fx.Node
    weight: str
    bias: str = ""


@dataclass(frozen=True, eq=False)
class Table:
    """An embedding table that is read by ids of the inputs, and perhaps by ids that the model computes of these.

    Attributes:
        name: of the tensor in the graph.
        rows: how many there are.
        lookups: the ops that read the table by ids.
        inputs: the placeholders that the ids come from.
        heads: the ops that multiply with the table.
    """

    name: str
    rows: int
    lookups: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    heads: tuple[Head, ...] = ()

    @property
    def module(self) -> str:
        """Name of the module that holds the table."""
        return self.name.rpartition(".")[0] or self.name

    def padding(self) -> set[int]:
        """Return the ids whose rows are not trained."""
        found = {bind(node)["padding_idx"] for node in self.lookups}
        return {index % self.rows for index in found if isinstance(index, int) and index != -1}


@dataclass(frozen=True, eq=False)
class Kept:
    """The ids that keep their rows.

    Attributes:
        ids: (k,) int64, ascending.
        size: how many ids there are.
        unknown: the id whose row all other ids read; None: a lookup refuses these.
    """

    ids: Tensor
    size: int
    unknown: int | None = None

    @property
    def columns(self) -> Tensor:
        """Return the place of each id among the kept ones, (size,) int32; k for ids that are gone."""
        found = torch.full((self.size,), len(self.ids), dtype=torch.int32)
        found[self.ids] = torch.arange(len(self.ids), dtype=torch.int32)
        return found

    @property
    def rows(self) -> Tensor:
        """Return the row that each id reads, (size,) int32; k, behind the last row, for ids that are refused."""
        found = self.columns
        if self.unknown is not None:
            found[found == len(self.ids)] = found[self.unknown].clone()
        return found


# ------------------------------------------------------------------------------------------------ finding
def find_tables(
    graph: fx.GraphModule, most: int, tables: Sequence[str] = (), heads: Sequence[str] = ()
) -> tuple[Table, ...]:
    """Return the tables that the ids of the inputs read, with the heads to cut.

    Args:
        graph: captured.
        most: the highest id.
        tables: modules that hold the tables; none: the one table that ids of the inputs read and that has enough rows.
        heads: modules whose weights have one row per id and are tables of their own (untied heads).

    Raises:
        PlanError: no such table, several without a name, or a table that other ops read.
    """
    found = list(tables_of(graph))
    if tables:
        named = [table for table in found if _holds(graph, table.name, tables)]
        lost = [name for name in tables if not any(_holds(graph, table.name, [name]) for table in named)]
        if lost:
            raise PlanError(
                f"embedding names {lost[0]!r}, which holds no table that ids of the inputs read",
                why=_there_are(found),
                fix=f"embedding={found[0].module!r}" if found else "give a model that looks rows up by ids",
            )
    else:
        named = [table for table in found if table.rows > most]
        if len(named) != 1:
            raise _not_one(found, named, most)
    for table in named:
        if table.rows <= most:
            raise PlanError(
                f"token_ids must be below {table.rows}, the rows of '{table.module}', got {most}",
                fix=f"ids from 0 to {table.rows - 1}",
            )
    others = tuple(_untied(graph, name, named[0].rows) for name in heads)
    return tuple(_with_heads(graph, table, others if k == 0 else ()) for k, table in enumerate(named))


def _not_one(found: Sequence[Table], named: Sequence[Table], most: int) -> PlanError:
    if not found:
        return PlanError(
            "the model has no embedding table that ids of its inputs read",
            why="rows are looked up by integers that come from an input as they are, without arithmetic",
            fix="give a model whose inputs hold token ids",
        )
    if not named:
        most_rows = max(table.rows for table in found)
        return PlanError(
            f"token_ids must be below {most_rows}, the rows of the largest table, got {most}",
            why=_there_are(found),
            fix=f"ids from 0 to {most_rows - 1}",
        )
    return PlanError(
        f"{len(named)} embedding tables are read by ids of the inputs",
        why=_there_are(named),
        fix=f"embedding={named[0].module!r}",
    )


def _there_are(tables: Sequence[Table]) -> str:
    named = ", ".join(f"'{table.module}' with {table.rows} rows" for table in tables[:LISTED])
    return f"the tables are {named}" if named else "there is none"


def tables_of(graph: fx.GraphModule) -> Iterator[Table]:
    """Yield the tables that ids of the inputs read, without heads."""
    lookups: dict[str, list[fx.Node]] = {}
    inputs: dict[str, dict[fx.Node, None]] = {}
    for node in graph.graph.find_nodes(op="call_function", target=aten.embedding.default):
        weight, origins = bind(node)["weight"], ids_from(bind(node)["indices"])
        if weight.op == "get_attr":
            lookups.setdefault(str(weight.target), []).append(node)
            inputs.setdefault(str(weight.target), {}).update(dict.fromkeys(origins))
    for name, nodes in lookups.items():
        if inputs[name]:
            yield Table(name, fetch(graph, name).shape[0], tuple(nodes), tuple(inputs[name]))


def ids_from(node: Any) -> set[fx.Node]:
    """Return the inputs whose elements `node` holds, as they are; empty where it computes others of them."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, fx.Node) or one in seen:
            continue
        seen.add(one)
        if one.op == "placeholder":
            found.add(one)
        elif one.op != "get_attr":
            operands = _elements(one)
            if operands is None:
                return set()
            waiting += operands
    return found


def _elements(node: fx.Node) -> list[Any] | None:
    """Return the operands whose elements an op returns; none of a constant, None where it computes others."""
    if not isinstance(node.target, OpOverload):  # an item of several results
        return [node.args[0]] if tensor_values(node) and node.all_input_nodes else None
    packet, arguments, integer = node.target.overloadpacket, bind(node), facts_of(node.target).integer
    if packet in JOINS:
        return list(arguments["tensors"])
    if packet in CHOOSES:
        return [arguments.get(name) for name in CHOOSES[packet]]
    if isinstance(integer, Move):
        return [argument_at(arguments, integer.operand)]
    reads = [n for n in node.all_input_nodes if tensor_values(n)]
    return [] if not reads or packet in FILLED else None


def _holds(graph: fx.GraphModule, name: str, modules: Sequence[str]) -> bool:
    """Return whether one of `modules` holds the tensor, under any of its names."""
    tensor = fetch(graph, name)
    names = {own for own, held in all_tensors(graph) if held is tensor}
    return any(own.rpartition(".")[0] in modules or own in modules for own in names)


def _with_heads(graph: fx.GraphModule, table: Table, others: Sequence[Head]) -> Table:
    """Return the table with its heads.

    Raises:
        PlanError: another op reads the table.
    """
    heads = list(others)
    tensor = fetch(graph, table.name)
    for attribute, held in attributes(graph):
        if held is not tensor:
            continue
        for node in attribute.users:
            if node in table.lookups:
                continue
            heads += _products(node, attribute, table.name)
    return Table(table.name, table.rows, table.lookups, table.inputs, tuple(heads))


def _products(node: fx.Node, operand: fx.Node, name: str, turned: bool = False) -> list[Head]:
    """Return the heads that `node` is, or leads to, which reads the table as `operand`.

    Args:
        turned: whether the rows of the table are the columns of `operand`.

    Raises:
        PlanError: something else reads the table.
    """
    by_rows = turned != (node.target is aten.linear.default)
    if node.target in PRODUCTS and table_of(node) is operand and by_rows:
        bias = bind(node).get("bias")
        if bias is None or bias.op == "get_attr":
            return [Head(node, name, "" if bias is None else str(bias.target))]
    if node.target in TURNS and all(t.dim() == 2 for t in tensor_values(node)):
        turned = turned != _turns(node)
        return [head for user in node.users for head in _products(user, node, name, turned)]
    raise PlanError(
        f"the rows of '{name}' cannot be cut: {op_name(node)} reads them, too",
        at=source_line(node),
        why="a table is looked up by ids, or multiplied with by a head",
        fix="keep the vocabulary, or write the model's head as torch.nn.functional.linear(x, table)",
    )


def _turns(node: fx.Node) -> bool:
    """Return whether one of TURNS makes columns of the rows of a matrix."""
    arguments = bind(node)
    if node.target is aten.transpose.int:
        return bool((arguments["dim0"] - arguments["dim1"]) % 2)
    if node.target is aten.permute.default:
        return bool(arguments["dims"][0] % 2)
    return node.target is not aten.detach.default


def table_of(head: fx.Node) -> fx.Node:
    """Return the operand of a head that the rows come from."""
    found = bind(head)[PRODUCTS[head.target]]
    assert isinstance(found, fx.Node), "a head multiplies with a tensor"
    return found


def _untied(graph: fx.GraphModule, module: str, rows: int) -> Head:
    """Return the head that a module is.

    Raises:
        PlanError: the module multiplies with no weight of so many rows.
    """
    for name in (f"{module}.weight", module):
        for attribute in graph.graph.find_nodes(op="get_attr"):
            if str(attribute.target) != name and not _holds(graph, str(attribute.target), [module]):
                continue
            if tuple(fetch(graph, str(attribute.target)).shape[:1]) != (rows,) or len(attribute.users) != 1:
                continue
            (node,) = attribute.users
            if fetch(graph, str(attribute.target)).dim() == 2:
                found = _products(node, attribute, str(attribute.target))
                if len(found) == 1:
                    return found[0]
    raise PlanError(
        f"heads names {module!r}, which does not multiply with a weight of {rows} rows",
        why="a head has one row per id of the vocabulary",
        fix="heads=() cuts the embedding, and a head that is tied to the embedding",
    )


# ------------------------------------------------------------------------------------------------ ids
def as_ids(token_ids: Any) -> Tensor:
    """Return the distinct ids, (k,) int64, ascending.

    Args:
        token_ids: an id, a tensor or an array of ids, or an iterable of these.

    Raises:
        PlanError: something else, numbers that are not whole or negative, no id.
    """
    found: set[int] = set()
    _collect(token_ids, found)
    if not found:
        raise PlanError("token_ids holds no id", fix='token_ids=[batch["input_ids"] for batch in batches]')
    if min(found) < 0:
        raise PlanError(f"token_ids must be of at least 0, got {min(found)}", fix="leave labels such as -100 out")
    return torch.tensor(sorted(found))


def _collect(given: Any, found: set[int]) -> None:
    fix = 'token_ids=[batch["input_ids"] for batch in batches]'
    if isinstance(given, int) and not isinstance(given, bool):
        found.add(given)
        return
    if hasattr(given, "__array__") and not isinstance(given, Tensor):
        given = torch.as_tensor(given.__array__().copy())
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool or given.is_meta:
            raise PlanError(f"token_ids must be whole numbers, got {given.dtype}", fix=fix)
        found.update(given.flatten().tolist())
        return
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping, nn.Module)):
        kind = type(given).__name__
        raise PlanError(f"token_ids must be ids, or tensors or lists of ids, got a {kind}", fix=fix)
    for one in given:
        _collect(one, found)


def distinct(tensor: Tensor) -> Tensor:
    """Return the values of a tensor, each once, (k,) int64 on the CPU."""
    return torch.tensor(sorted(set(tensor.detach().flatten().tolist())), dtype=torch.int64)


def example_ids(graph: fx.GraphModule, inputs: Sequence[Any], tables: Sequence[Table]) -> Tensor:
    """Return the ids that reach the lookups in one run, (k,) int64.

    Args:
        graph: captured.
        inputs: flat, in the order of the placeholders.
    """
    indices = {bind(node)["indices"] for table in tables for node in table.lookups}
    found: list[Tensor] = []

    def see(node: fx.Node, result: Any) -> None:
        if node in indices:
            found.append(distinct(result))

    run_tapped(graph, inputs, see=see)
    return distinct(torch.cat(found))
