"""One walk over the graph: every dim of every value gets an Axis."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn

from graphcomp.coupling.axis import Axes, Concat, Reason, all_leaves, freeze, fresh, leaves, length, normal
from graphcomp.coupling.size import size_of
from graphcomp.errors import RuleError
from graphcomp.ir.graph import argument_at, attributes, bind, is_op, source_line, tensor_values, value
from graphcomp.ir.program import Program
from graphcomp.ops import registry
from graphcomp.ops.call import AxesValue, Call
from graphcomp.ops.teach import rule_fix
from graphcomp.torch_compat import OpOverload, storage_key

logger = logging.getLogger("graphcomp.coupling")

RULE_FAILED = "its rule failed"
"""How the reason begins where a rule raised anything but a RuleError: it has a mistake."""

MAX_ORIGINS = 8
"""A value made of more values than these is one of its own: a chain of gates would else drag along all before it."""


@dataclass(frozen=True)
class UnknownOp:
    """An op without a rule, or whose rule does not decide: every axis that the op touches is frozen.

    Attributes:
        op: the op.
        source: the user's source line.
        count: how many calls.
        why: the reason.
        fix: the line that lifts the op, to be checked against what the op computes; "" where there is none.
    """

    op: str
    source: str
    count: int
    why: str = "no coupling rule"
    fix: str = ""

    def __str__(self) -> str:
        at = f" at {self.source}" if self.source else ""
        return f"{self.op} ({self.count}x){at}: {self.why}"


@runtime_checkable
class Coupled(Protocol):
    """A module that stands in a graph as one node and says itself how its operand's axes couple: a quantizer.

    It must be elementwise: what it returns has the shape and the axes of what it reads.
    """

    def couple_axes(self, x: Axes, own: Mapping[str, Axes], why: Reason) -> Axes:
        """Axes of the result, from those of the operand; `own`: of the module's parameters and buffers, by name."""


@dataclass
class Coupling:
    """What the walk found. Axes of a node are one tuple per tensor it computes. It holds no tensor of the model."""

    graph: fx.Graph
    axes: dict[fx.Node, list[Axes]] = field(default_factory=dict)
    attributes: dict[str, Axes] = field(default_factory=dict)  # get_attr target -> axes of the tensor
    first_names: dict[str, str] = field(default_factory=dict)
    """get_attr target -> the first one of the graph that reads the same tensor."""
    parameters: set[str] = field(default_factory=set)  # the get_attr targets that are parameters
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    sources: dict[fx.Node, frozenset[str]] = field(default_factory=dict)
    """For values that depend on parameters and constants only: the get_attr targets they are made of."""
    unknown: dict[str, UnknownOp] = field(default_factory=dict)
    origins: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    """For results of pointwise ops: the values that they were made of, element by element; at most MAX_ORIGINS."""
    many: dict[frozenset[fx.Node], fx.Node] = field(default_factory=dict)
    """More origins than that -> the first value made of them, which stands for them."""
    beside: list[Coupling] = field(default_factory=list)
    """Couplings of other graphs of the same model, with axes in common: see `couple_beside`."""

    def origins_of(self, nodes: Sequence[fx.Node]) -> frozenset[fx.Node]:
        """The values that `nodes` were made of by pointwise ops."""
        return frozenset().union(*(self.origins.get(n, (n,)) for n in nodes))


def propagate(
    module: fx.GraphModule,
    output_names: Sequence[str] = (),
    order: Sequence[fx.Node] | None = None,
    held: Mapping[str, str] | None = None,
    known: Program | None = None,
) -> Coupling:
    """Walk `module` once and couple all its axes.

    Args:
        module: a captured graph; every node carries meta["val"].
        output_names: one per output tensor, for the reasons.
        order: another topological order of the nodes (the result must not depend on it).
        held: tensors that must stay as they are -> why.
        known: another graph of the same model, with its axes: tensors that both graphs read have the same axes.
    """
    coupling = Coupling(module.graph)
    _place_attributes(coupling, module, known)
    for name, why in (held or {}).items():
        for axis in coupling.attributes.get(name, ()):
            freeze(axis, Reason(f"'{name}': {why}"))
    for node in order or module.graph.nodes:
        if node.op == "placeholder":
            coupling.axes[node] = [_inputs(node, t) for t in tensor_values(node)]
        elif node.op == "get_attr":
            if str(node.target) in coupling.attributes:
                coupling.axes[node] = [coupling.attributes[str(node.target)]]
                coupling.sources[node] = frozenset([str(node.target)])
        elif node.op == "output":
            _freeze_outputs(coupling, node, output_names)
        elif node.target is operator.getitem:
            _getitem(coupling, node)
        elif is_op(node):
            _op(coupling, node)
        elif _is_coupled(module, node):
            _module(coupling, node, module.get_submodule(str(node.target)))
        elif tensor_values(node) or any(coupling.axes.get(n) for n in node.all_input_nodes):
            _unknown(coupling, node, str(node.target), "not an op of a library")
    return coupling


def couple_beside(
    program: Program,
    module: fx.GraphModule,
    output_names: Sequence[str],
    what: str,
    held: Mapping[str, str] | None = None,
) -> None:
    """Couple another graph of the same model, in place: what the other graph asks of common tensors holds for both.

    What the other graph freezes is frozen in both, and so is what it reads in parts that the first graph does not know:
    the lengths of such parts stand in code that no sliced graph can follow.

    Args:
        program: the first graph, with its axes.
        what: completes the reasons: "in training mode".
    """
    coupling = program.coupling
    assert coupling is not None
    before = {leaf: leaf.frozen for axes in coupling.attributes.values() for leaf in all_leaves(axes)}
    coupling.beside.append(propagate(module, output_names, held=held, known=program))
    for leaf, frozen in before.items():
        if isinstance(normal(leaf), Concat):
            freeze(leaf, Reason(f"read in parts {what}"))
        elif frozen is None:
            for inner in leaves(leaf):
                if inner.frozen is not None:
                    inner.frozen = Reason(f"{inner.frozen.text}, {what}", inner.frozen.op, inner.frozen.source)


def _place_attributes(coupling: Coupling, module: fx.GraphModule, known: Program | None) -> None:
    """Fresh axes for every tensor the graph reads. The same tensor under two names has the same axes."""
    shared = [] if known is None else list(attributes(known.module))
    of_known = known.coupling.attributes if known is not None and known.coupling is not None else {}
    by_tensor: dict[int, Axes] = {id(t): of_known[str(n.target)] for n, t in shared}
    by_storage: dict[int, tuple[int, Axes]] = {
        storage_key(tensor.untyped_storage()): (id(tensor), by_tensor[id(tensor)]) for _, tensor in shared
    }
    first_names: dict[int, str] = {}
    for node, tensor in attributes(module):
        coupling.first_names[str(node.target)] = first_names.setdefault(id(tensor), str(node.target))
        if isinstance(tensor, nn.Parameter):
            coupling.parameters.add(str(node.target))
        axes = by_tensor.get(id(tensor))
        if axes is None:
            axes = tuple(fresh(n) for n in tensor.shape)
            by_tensor[id(tensor)] = axes
            storage = storage_key(tensor.untyped_storage())
            if storage in by_storage and by_storage[storage][0] != id(tensor):
                for axis in (*axes, *by_storage[storage][1]):
                    freeze(axis, Reason(f"'{node.target}' shares memory with another tensor of the model"))
            by_storage[storage] = id(tensor), axes
        coupling.attributes[str(node.target)] = axes


def _inputs(node: fx.Node, tensor: Tensor) -> Axes:
    return tuple(fresh(size_of(n), Reason(f"model input '{node.target}', dim {k}")) for k, n in enumerate(tensor.shape))


def _freeze_outputs(coupling: Coupling, node: fx.Node, names: Sequence[str]) -> None:
    results = [n for n in _flat(node.args) if n in coupling.axes]
    for position, result in enumerate(results):
        name = names[position] if position < len(names) else str(position)
        for axes in coupling.axes.get(result, []):
            for k, axis in enumerate(axes):
                freeze(axis, Reason(f"reaches output '{name}', dim {k}", source=source_line(result)))


def _flat(args: Any) -> list[Any]:
    found: list[Any] = []
    fx.map_arg(args, found.append)
    return found


def _getitem(coupling: Coupling, node: fx.Node) -> None:
    source, index = node.args
    assert isinstance(source, fx.Node)
    if source not in coupling.axes:
        return
    found = value(source)
    part, tensors_before = found[index], sum(isinstance(v, Tensor) for v in found[:index])
    if isinstance(part, (list, tuple)):  # a list among several results, which axes are not kept of
        why = Reason("stands in a list among the results of an op", str(source.target), source_line(node))
        coupling.axes[node] = [tuple(fresh(size_of(n), why) for n in t.shape) for t in tensor_values(node)]
    else:
        coupling.axes[node] = [coupling.axes[source][tensors_before]] if isinstance(part, Tensor) else []
    if source in coupling.sources:
        coupling.sources[node] = coupling.sources[source]
    if source in coupling.origins:  # an elementwise op with two results, such as a quantizer with its mask
        coupling.origins[node] = coupling.origins[source]


def _is_coupled(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Coupled)


def _module(coupling: Coupling, node: fx.Node, called: Any) -> None:
    """A call of an elementwise module, whose tensors are attributes of the graph as any other."""
    (operand,) = node.all_input_nodes
    own = {}
    for name, tensor in (*called.named_parameters(), *called.named_buffers()):
        axes = coupling.attributes.get(f"{node.target}.{name}") or tuple(fresh(n) for n in tensor.shape)
        own[name] = coupling.attributes[f"{node.target}.{name}"] = axes
    why = Reason("quantized on one scale together with others", str(node.target), source_line(node))
    coupling.axes[node] = [called.couple_axes(coupling.axes[operand][0], own, why)]
    coupling.origins[node] = coupling.origins.get(operand, frozenset([operand]))
    if operand in coupling.sources:
        coupling.sources[node] = coupling.sources[operand]


def _op(coupling: Coupling, node: fx.Node) -> None:
    operands = [n for n in node.all_input_nodes if coupling.axes.get(n)]
    if not tensor_values(node) and not operands:
        return
    if all(n in coupling.sources for n in operands):
        coupling.sources[node] = frozenset().union(*(coupling.sources[n] for n in operands))
    assert isinstance(node.target, OpOverload)
    function = registry.find(node.target)
    if function is None:
        return _unknown(coupling, node, str(node.target), registry.why_unknown(node.target))
    if any(0 in map(size_of, t.shape) for n in operands for t in tensor_values(n)) and not _is_cat(node):
        return _unreached(coupling, node)
    arguments = bind(node)
    call = _call(coupling, node, arguments)
    try:
        results = registry.run(function, call, {k: _argument(coupling, v) for k, v in arguments.items()})
        _check(node, results, call)
        _freeze_unmaskable_sums(coupling, call, arguments)
    except Exception as error:  # whatever a rule raises, ours or a user's
        logger.debug("rule of %s", node.target, exc_info=True)
        return _unknown(coupling, node, str(node.target), _undecided(error))
    coupling.axes[node] = results
    coupling.calls[node] = call
    if registry.is_elementwise(function) and not call.residual:
        made_of = coupling.origins_of([n for n in operands if n not in coupling.sources])
        few = len(made_of) <= MAX_ORIGINS
        coupling.origins[node] = made_of if few else frozenset([coupling.many.setdefault(made_of, node)])


def _undecided(error: Exception) -> str:
    """Why a rule cannot decide, in one line."""
    if isinstance(error, RuleError):
        return error.what
    text, _, _ = str(error).partition("\n")
    return f"{RULE_FAILED}, {type(error).__name__}: {text}"


def _call(coupling: Coupling, node: fx.Node, arguments: dict[str, Any]) -> Call:
    why = Reason("addressed by position", str(node.target), source_line(node))
    origins = {}
    lists = {key: argument for key, argument in arguments.items() if isinstance(argument, (list, tuple))}
    items = {f"{key}.{k}": item for key, argument in lists.items() for k, item in enumerate(argument)}
    for name, argument in (arguments | items).items():
        nodes = [n for n in _flat(argument) if n in coupling.axes and n not in coupling.sources]
        if nodes:
            origins[name] = coupling.origins_of(nodes)
    shapes = [tuple(size_of(n) for n in t.shape) for t in tensor_values(node)]
    return Call(node, shapes, why, origins)


def _argument(coupling: Coupling, argument: Any) -> Any:
    """What a rule sees of an argument: axes for tensors, sizes for lengths, everything else as it is."""
    if isinstance(argument, fx.Node):
        found = value(argument)
        if argument in coupling.axes and isinstance(found, (Tensor, list, tuple)):
            axes = coupling.axes[argument]
            return AxesValue(axes[0]) if isinstance(found, Tensor) else [AxesValue(a) for a in axes]
        return size_of(found) if isinstance(found, (int, torch.SymInt)) else found
    if isinstance(argument, (list, tuple)):
        return [_argument(coupling, item) for item in argument]
    return argument


def _check(node: fx.Node, results: list[Axes], call: Call) -> None:
    """The seam: a rule's axes have the shapes that the op has."""
    lengths = [tuple(length(axis) for axis in axes) for axes in results]
    if lengths != call.shapes:
        raise RuleError(f"the rule gives shapes {lengths} and the op {call.shapes}", at=call.why.source)


def _freeze_unmaskable_sums(coupling: Coupling, call: Call, arguments: dict[str, Any]) -> None:
    """A mask is a vector of fixed length of numbers: it cannot stand on a dynamic length, nor on whole numbers."""
    for key, dims in call.contracted.items():
        operand = argument_at(arguments, key)
        axes, counts_things = coupling.axes[operand][0], not is_real(value(operand))
        for dim in dims:
            if not isinstance(length(axes[dim]), int):
                freeze(axes[dim], call.because("summed over together with a dynamic length"))
            elif counts_things:
                freeze(axes[dim], call.because("a sum of whole numbers or truth values"))


def is_real(tensor: Tensor) -> bool:
    """Whether the elements are floating or complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def _is_cat(node: fx.Node) -> bool:
    """Joining nothing to something is how lists are often begun, and couples as ever."""
    return node.target is torch.ops.aten.cat.default


def _unreached(coupling: Coupling, node: fx.Node) -> None:
    """An op on an empty tensor: it shows nothing of what it would do, and no run on these inputs can verify it."""
    _freeze_around(coupling, node, Reason("the example inputs send nothing here", str(node.target), source_line(node)))


def _unknown(coupling: Coupling, node: fx.Node, op: str, why: str) -> None:
    reason = Reason(f"{why} for {op}" if why.startswith("no ") else f"{op}: {why}", op, source_line(node))
    _freeze_around(coupling, node, reason)
    known = coupling.unknown.get(op)
    source, why, fix = (known.source, known.why, known.fix) if known else (reason.source, why, rule_fix(node))
    coupling.unknown[op] = UnknownOp(op, source, 1 + (known.count if known else 0), why, fix)


def _freeze_around(coupling: Coupling, node: fx.Node, reason: Reason) -> None:
    """Freeze what the op reads and what it returns."""
    for operand in node.all_input_nodes:
        for axes in coupling.axes.get(operand, []):
            for axis in axes:
                freeze(axis, reason)
    coupling.axes[node] = [tuple(fresh(size_of(n), reason) for n in t.shape) for t in tensor_values(node)]
