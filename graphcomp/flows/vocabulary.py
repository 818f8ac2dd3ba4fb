"""A model on part of its vocabulary: rows cut, verified on kept ids, and put into a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.capture import Captured
from graphcomp.capture.resized import OPEN, open_lengths
from graphcomp.cost import Bops, CostModel
from graphcomp.coupling.analysis import Analysis, analyze_rewritten
from graphcomp.errors import PlanError
from graphcomp.flows.checked import EXAMPLE, Checked, check_class, check_graph
from graphcomp.flows.results import check_floats, choose_module, native_notes, parameters_and_buffers, shapes
from graphcomp.flows.results import with_latency as latency_of
from graphcomp.ir.graph import bind, fetch, op_name, source_line, tensor_values, value
from graphcomp.ir.module import tensor_leaves, tensor_names
from graphcomp.ir.passes import Pipeline
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.native.vocabulary import Trimmed, trimmed_model
from graphcomp.ops.answers import lookup_of
from graphcomp.pruning.trim import MaskVocabulary, TrimVocabulary
from graphcomp.pruning.vocabulary import (
    Kept,
    Logits,
    Table,
    as_ids,
    distinct,
    example_ids,
    find_tables,
    tables_of,
)
from graphcomp.report.report import Change, Report, group_dict, layers
from graphcomp.result import CompressedModel
from graphcomp.system.threads import one_at_a_time
from graphcomp.torch_compat import pytree

LARGE = 1e4
"""A logit that decides each choice, each sum and each mean of logits."""
LAW = "trimmed == original, at the kept ids"
NATIVE = "native == trimmed"
OTHER = "other kept ids"


@one_at_a_time
def trimmed(
    plan: Analysis,
    token_ids: Any,
    *,
    embedding: Sequence[str],
    heads: Sequence[str] | None,
    logits: Logits,
    unknown: int | None,
    verify: bool,
    measure_latency: bool,
) -> CompressedModel:
    """Return the model of a plan with rows for some ids alone; see `graphcomp.trim_vocabulary`.

    Args:
        embedding: names of modules; none: the one table, or of several the one that the model names itself.
        heads: names of modules; None: the head that the model names itself, if any.
    """
    captured = plan.captured
    if captured.producer == "record":
        raise PlanError(
            f"the vocabulary of {type(plan.model).__name__} cannot be trimmed: the model could only be recorded",
            why=f"torch.export refused: {captured.reason}",
            fix="give example inputs that torch.export can follow",
        )
    check_floats(captured)
    _check_whole(plan)
    given = as_ids(token_ids)
    tables = _tables(plan, int(given.max()), embedding, heads)
    kept, notes = _kept(captured, tables, given, unknown)
    notes += [*_remarks(tables, kept, logits), *_whole_heads(captured, tables)]
    small = Pipeline("trim the vocabulary", (TrimVocabulary(tables, kept, logits),))(captured)
    given_ids = _given(captured, tables, kept)
    if logits == "wide" and any(table.heads for table in tables):
        notes.append(_of_the_gone(captured, tables, kept, given_ids))
    checked = Checked()
    if verify:
        reference = MaskVocabulary(tuple(tables), kept).rewrite(captured.module)
        adjust = _narrow(kept)
        checked = check_graph(LAW, reference, small.module, given_ids, "the model with a trimmed vocabulary", adjust)
    names = {name: captured.aliases.get(name, (name,)) for name in tensor_names(captured.original)}
    found = trimmed_model(captured.original, names, tables, kept, logits)
    found = check_class(found, small.module, given_ids, captured)
    checked = checked.with_class(NATIVE, found)
    module, form = choose_module(found, small.module, plan)
    report = _report(plan, small, tables, kept, checked, (*notes, *native_notes(plan, found)))
    module.train(plan.model.training)
    if isinstance(module, fx.GraphModule):
        module.meta[OPEN] = open_lengths(captured)
    held = {name for name, _ in parameters_and_buffers(plan.model)}
    return CompressedModel(
        module,
        form=form,
        kept={name: {0: kept.ids} for name in _cut_names(captured, tables) if name in held},
        report=latency_of(report, plan, module) if measure_latency else report,
        reason="" if form == "native" else found.reason,
        edits=found.edits if form == "native" else (),
        original_shapes=shapes(plan.model),
        example_args=captured.inputs.args,
        example_kwargs=captured.inputs.kwargs,
    )


def _check_whole(plan: Analysis) -> None:
    """Refuse a model on part of its vocabulary.

    Raises:
        PlanError: an id map stands in front of a table.
    """
    parts = any(isinstance(module, Trimmed) for module in plan.model.modules())
    if parts or _has_id_map(plan.captured.module):
        raise PlanError(
            f"the vocabulary of {type(plan.model).__name__} is trimmed already",
            why="an id map stands in front of its table",
            fix="trim_vocabulary of the model with all rows, with the ids that are to stay in the end",
        )


def _tables(plan: Analysis, most: int, embedding: Sequence[str], heads: Sequence[str] | None) -> tuple[Table, ...]:
    """Return the tables and heads that are named, or that a model of transformers says are its own."""
    graph = plan.captured.module
    if not embedding and sum(table.rows > most for table in tables_of(graph)) > 1:
        embedding = _said_by(plan.model, "get_input_embeddings")
    if heads is not None:
        return find_tables(graph, most, embedding, heads)
    found = find_tables(graph, most, embedding)
    cut = [fetch(graph, name) for name in _cut_tensors(found)]
    weights = {
        n: getattr(plan.model.get_submodule(n), "weight", None) for n in _said_by(plan.model, "get_output_embeddings")
    }
    untied = {n: w for n, w in weights.items() if isinstance(w, Tensor) and all(w is not tensor for tensor in cut)}
    own = [name for name, weight in untied.items() if weight.shape[:1] == (found[0].rows,)]
    return find_tables(graph, most, embedding, own) if own else found


def _said_by(model: nn.Module, name: str) -> tuple[str, ...]:
    """Return the path of the module that a method of transformers' models returns; nothing without method or module."""
    method = getattr(model, name, None)
    try:
        said = method() if callable(method) else None
    except NotImplementedError:  # as transformers answers for models without such a module
        said = None
    return tuple(path for path, module in model.named_modules() if module is said)


def _has_id_map(module: fx.GraphModule) -> bool:
    """Return whether the ids of a lookup are read from a list of the model that is longer than the table."""
    for node in module.graph.nodes:
        if lookup_of(node) is None:
            continue
        arguments = bind(node)
        ids, table = arguments.get("indices"), arguments.get("weight")
        if isinstance(ids, fx.Node) and ids.target is torch.ops.aten.index.Tensor and isinstance(table, fx.Node):
            source = ids.args[0]
            listed = isinstance(source, fx.Node) and source.op == "get_attr" and value(source).dim() == 1
            if isinstance(source, fx.Node) and listed and value(source).shape[0] > value(table).shape[0]:
                return True
    return False


# ------------------------------------------------------------------------------------------------ which ids
def _kept(captured: Captured, tables: Sequence[Table], given: Tensor, unknown: int | None) -> tuple[Kept, list[str]]:
    """Return the ids that stay: those given, and those that the model needs besides.

    Raises:
        PlanError: the example inputs hold other ids; `unknown` is no id; no id would go.
    """
    size = tables[0].rows
    if any(table.rows != size for table in tables):
        raise PlanError(
            "the tables must have equally many rows, got " + ", ".join(f"{t.rows} in '{t.module}'" for t in tables),
            fix=f"embedding={tables[0].module!r}, and the other tables in a second call",
        )
    if unknown is not None and not 0 <= unknown < size:
        raise PlanError(
            f"unknown must be an id from 0 to {size - 1}, got {unknown}", fix="unknown=tokenizer.unk_token_id"
        )
    ids = set(given.tolist())
    special = {i for i in special_ids(captured.original) if i < size} | set().union(*(t.padding() for t in tables))
    special |= set() if unknown is None else {unknown}
    notes = [f"padding and special ids that are kept besides: {len(special - ids)}"] if special - ids else []
    ids |= special
    seen = set(example_ids(captured.module, captured.inputs.flat(), tables).tolist()) - ids
    leaves = zip(captured.module.graph.find_nodes(op="placeholder"), captured.inputs.flat(), strict=True)
    places = {node for table in tables for node in table.inputs}
    shown = {i for node, leaf in leaves if node in places for i in distinct(leaf).tolist()}
    if seen & shown:
        raise PlanError(
            f"the example inputs hold the id {min(seen & shown)}, which token_ids does not",
            why="the result is verified on the example inputs",
            fix="example inputs of ids that are kept",
        )
    if seen:
        notes.append(f"ids that the model puts in itself, kept besides: {len(seen)}")
    ids |= seen
    if len(ids) == size:
        raise PlanError(f"token_ids holds all {size} ids: there is nothing to trim", fix="the ids of the task's texts")
    return Kept(torch.tensor(sorted(ids)), size, unknown), notes


def special_ids(model: nn.Module) -> set[int]:
    """Return the special ids that the configs of a transformers model name: for padding, for the start, for the end."""
    found: set[int] = set()
    for config in (getattr(model, name, None) for name in ("config", "generation_config")):
        as_dict = getattr(config, "to_dict", None)
        fields = as_dict() if callable(as_dict) else {}
        for name, given in fields.items() if isinstance(fields, Mapping) else ():
            if name.endswith("_token_id"):
                numbers = given if isinstance(given, (list, tuple)) else [given]
                found |= {n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n >= 0}
    return found


def _remarks(tables: Sequence[Table], kept: Kept, logits: Logits) -> list[str]:
    names = ", ".join(f"'{table.module}'" for table in tables)
    notes = [f"{len(kept.ids)} of {kept.size} rows of {names} are kept; the model takes the old ids"]
    notes.append(
        "a lookup of any other id is refused (an index out of range)"
        if kept.unknown is None
        else f"any other id is read as id {kept.unknown}"
    )
    if any(table.heads for table in tables) and logits == "narrow":
        notes.append("logits are narrow: column k is of the id kept[weight][0][k] of the result")
    return notes


def _whole_heads(captured: Captured, tables: Sequence[Table]) -> list[str]:
    """Name heads of their own that still give logits of all ids."""
    cut = set(_cut_tensors(tables))
    names = []
    for node in captured.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        weight = node.args[1]
        name = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""
        if name and name not in cut and fetch(captured.module, name).shape[0] == tables[0].rows:
            names.append(name.removesuffix(".weight"))
    return [
        f"'{name}' has as many outputs as there are ids and keeps all: to feed its choice back, pass heads={name!r}"
        for name in dict.fromkeys(names)
    ]


# ------------------------------------------------------------------------------------------------ readers of logits
def _of_the_gone(captured: Captured, tables: Sequence[Table], kept: Kept, given: Mapping[str, Sequence[Any]]) -> str:
    """Return a note that says what the outputs hold for ids that are gone.

    The logits of these ids are filled with -inf, and with a large number: in what is computed of the logits the two may
    differ in the columns of these ids alone.

    Raises:
        PlanError: an op reads the logits of all ids together, as a softmax or a loss does, on its way to an output.
    """
    if any(t.is_meta for t in tensor_names(captured.module).values()):
        return "logits of ids that are gone are -inf; what reads them was not checked: the model has no values"
    of_heads = _behind([head.node for table in tables for head in table.heads])
    behind = [node for node in captured.module.graph.nodes if node in of_heads]
    leaves = pytree.tree_leaves(captured.module.graph.output_node().args)
    returned = [node for node in leaves if isinstance(node, fx.Node) and tensor_values(node)]
    found: list[Tensor] = []
    for flat in given.values():
        masked = (MaskVocabulary(tuple(tables), kept, fill).rewrite(captured.module) for fill in (-torch.inf, LARGE))
        a, b = (_values(module, flat, {node.name for node in behind}) for module in masked)
        columns = {n: [_gone_columns(*pair, kept) for pair in zip(a[n.name], b[n.name], strict=True)] for n in behind}
        spoilt = [node for node, own in columns.items() if any(one is None for one in own)]
        read = next((node for node in spoilt if _behind([node]) & set(returned)), None)
        if read is not None:
            names = zip(returned, captured.output_names, strict=True)
            others = [name for node, name in names if node not in spoilt]
            raise PlanError(
                f"the vocabulary cannot be trimmed: {op_name(read)} reads the logits of all ids together",
                at=source_line(read),
                why="the logits of ids that are gone are -inf, and its result would be another",
                fix=f"outputs={others!r}, which are as before" if others else "keep the vocabulary",
            )
        for node in returned:
            found += [one.flatten() for one in columns.get(node, []) if one is not None]
    values = torch.cat(found) if found else torch.full((1,), -torch.inf)
    if bool((values == -torch.inf).all()):
        return "logits of ids that are gone are -inf"
    return (
        f"outputs of ids that are gone are {float(values.min()):g} to {float(values.max()):g}: what the ops behind the "
        "head make of -inf"
    )


def _behind(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nodes, and what is computed of them."""
    found = set(nodes)
    waiting = list(nodes)
    while waiting:
        new = [user for user in waiting.pop().users if user not in found and user.op != "output"]
        found.update(new)
        waiting += new
    return found


def _values(module: fx.GraphModule, flat: Sequence[Any], names: set[str]) -> dict[str, list[Tensor]]:
    """Return the tensors that some nodes give in a run, by the names of the nodes."""
    found: dict[str, list[Tensor]] = {}

    def see(node: fx.Node, result: Any) -> None:
        if node.name in names:
            found[node.name] = tensor_leaves(result)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        run_tapped(module, list(flat), see=see)
    return found


def _gone_columns(a: Tensor, b: Tensor, kept: Kept) -> Tensor | None:
    """Return the columns of `a` where two values differ; empty where the values are equal, None where others differ."""
    other = (
        torch.ones_like(a, dtype=torch.bool) if a.shape != b.shape else ~torch.isclose(a, b, 0.0, 0.0, equal_nan=True)
    )
    if not bool(other.any()):
        return a.new_empty(0)
    gone = torch.nonzero(kept.columns == len(kept.ids)).flatten().to(a.device)
    for dim, size in enumerate(a.shape):
        if size == kept.size and not bool(other.index_select(dim, kept.ids.to(a.device)).any()):
            return a.index_select(dim, gone)
    return None


# ------------------------------------------------------------------------------------------------ verification
def _given(captured: Captured, tables: Sequence[Table], kept: Kept) -> dict[str, list[Any]]:
    """Return the flat inputs to compare on: the example inputs, and the same with other ids in place of ids."""
    flat = captured.inputs.flat()
    places = {node for table in tables for node in table.inputs}
    generator = torch.Generator().manual_seed(0)
    other = []
    for node, leaf in zip(captured.module.graph.find_nodes(op="placeholder"), flat, strict=True):
        if node in places and isinstance(leaf, Tensor):
            drawn = kept.ids[torch.randint(len(kept.ids), leaf.shape, generator=generator)]
            leaf = drawn.to(leaf.dtype).to(leaf.device)
        other.append(leaf)
    return {EXAMPLE: flat, OTHER: other}


def _narrow(kept: Kept) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from an output of the whole vocabulary, and of the narrow one, to what the latter must be."""

    def adjust(wanted: Tensor, got: Tensor) -> Tensor:
        if wanted.shape == got.shape or wanted.shape[-1:] != (kept.size,):
            return wanted
        return wanted.index_select(-1, kept.ids.to(wanted.device))

    return adjust


# ------------------------------------------------------------------------------------------------ report
def _cut_names(captured: Captured, tables: Sequence[Table]) -> list[str]:
    """Return the names, in the model, of the tensors that lose rows."""
    return list(dict.fromkeys(own for name in _cut_tensors(tables) for own in captured.aliases.get(name, (name,))))


def _cut_tensors(tables: Sequence[Table]) -> list[str]:
    """Return the names, in the graph, of the tensors that lose rows."""
    heads = [name for table in tables for head in table.heads for name in (head.weight, head.bias) if name]
    return [*(table.name for table in tables), *heads]


def _report(
    plan: Analysis,
    small: Captured,
    tables: Sequence[Table],
    kept: Kept,
    checked: Checked,
    notes: Sequence[str],
) -> Report:
    captured = plan.captured
    costs = CostModel(plan)
    after = CostModel(analyze_rewritten(plan, replace(small, original=small.module)))
    cut = {id(t): t for t in (fetch(captured.module, name) for name in _cut_tensors(tables))}
    gone = kept.size - len(kept.ids)
    parameters = sum(gone * (t.numel() // kept.size) for t in cut.values() if isinstance(t, nn.Parameter))
    stored = sum(gone * (t.numel() // kept.size) * t.element_size() for t in cut.values())
    before = tensor_names(captured.module)
    maps = [t for name, t in tensor_names(small.module).items() if name not in before]
    kept_of = {name: {0: kept.ids} for name in _cut_names(captured, tables)}
    bytes_after = costs.bytes() - stored + sum(t.numel() * t.element_size() for t in maps)
    return Report(
        params=Change(costs.params(), costs.params() - parameters),
        macs=Change(costs.macs(), after.macs()),
        bops=Change(Bops(costs).layers(), Bops(after).layers()),
        bops_attention=Change(Bops(costs).attention(), Bops(after).attention()),
        bytes=Change(costs.bytes(), bytes_after),
        units_removed=gone * len(tables),
        units_total=kept.size * len(tables),
        layers=layers(plan, kept_of, costs, after.macs_by_layer()),
        groups=tuple(group_dict(group, {}) for group in plan.groups),
        frozen=plan.frozen,
        unknown_ops=tuple(u.op for u in plan.unknown_ops),
        verified=checked.verified,
        unchecked=checked.unchecked,
        notes=(*captured.notes, *notes, *captured.path.notes()),
        model=type(plan.model).__name__,
    )
