"""Parameters, multiply-accumulates and bytes, as polynomials in the number of units kept.

The multiply-accumulates of an op follow from its coupling rule: the elements of the result times the lengths of the
dims that are summed away where operands are multiplied (`Call.products`). All is read off the axes: no tensor is cut,
and the meta device will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx

from graphcomp.capture.capture import Captured
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.axis import Axis, Factor, Product, leaves, length, normal
from graphcomp.coupling.groups import Kept
from graphcomp.coupling.propagate import Coupling
from graphcomp.ir.graph import argument_at, attributes, bind, module_path, source_line, tensor_values
from graphcomp.ops import registry
from graphcomp.ops.call import KINDS, Call, Kind
from graphcomp.ops.facts import Float, Lookup
from graphcomp.ops.teach import macs_fix

aten = torch.ops.aten

Counts: TypeAlias = Mapping[Factor, int]
"""How many units of a group's factor stay; factors left out stay whole."""

WHOLE: Counts = MappingProxyType({})
"""Every group whole: the network before a cut."""


def params(analysis: Analysis, kept: Kept | None = None) -> int:
    """Scalars in the distinct parameters of the model when only the `kept` units stay."""
    return CostModel(analysis).params(counts_of(kept or {}))


def macs(analysis: Analysis, kept: Kept | None = None) -> int:
    """Multiply-accumulates of one forward on the example inputs when only the `kept` units stay."""
    return CostModel(analysis).macs(counts_of(kept or {}))


def param_bytes(analysis: Analysis, kept: Kept | None = None) -> int:
    """Bytes of the distinct parameters and persistent buffers when only the `kept` units stay."""
    return CostModel(analysis).bytes(counts_of(kept or {}))


def counts_of(kept: Kept) -> dict[Factor, int]:
    """The number of units that stay, by factor."""
    return {group.factor: len(units) for group, units in kept.items()}


@dataclass(frozen=True)
class Operation:
    """One op that has multiply-accumulates.

    Attributes:
        node: in the analysed graph.
        layer: the largest parameter that the op multiplies with, without ".weight", by the name that
            `named_parameters` gives it: "encoder.0.linear1". Of attention and recurrent layers "module/node".
        kind: what multiplies what.
        macs: multiply-accumulates of one forward on the example inputs.
    """

    node: fx.Node
    layer: str
    kind: Kind
    macs: Polynomial


@dataclass(frozen=True)
class Uncounted:
    """An op whose multiply-accumulates are left out of every count.

    Attributes:
        op: the op.
        source: the user's source line.
        why: the reason.
        fix: the line that says what the op multiplies, to complete; "" where there is none.
    """

    op: str
    source: str
    why: str = "nothing says what it multiplies"
    fix: str = ""

    def __str__(self) -> str:
        at = f" at {self.source}" if self.source else ""
        return f"{self.op}{at} ({self.why})"


class CostModel:
    """The costs of one analysed model as polynomials in the number of units kept, made once, evaluated often.

    Attributes:
        operations: what multiply-accumulates are counted of, in the order of the graph.
        layers: the name without ".weight" of every parameter, and the layer of every operation.
        weights: the name without ".weight" of every parameter that an op multiplies with or looks up; others are added,
            scaled with or fed in: norms, class tokens, tables of positions, biases of attention.
        uncounted: ops of which nothing says what they multiply, or whose lengths depend on data; they count 0.
    """

    def __init__(self, analysis: Analysis) -> None:
        coupling = analysis.coupling
        self._size = Lengths(analysis.captured, {group.factor: group.factor for group in analysis.groups}).size
        axes_of = {
            id(tensor): own.attributes[str(node.target)]
            for own, module in analysis.coupled
            for node, tensor in attributes(module)
        }
        parameters = {id(p): p for p in analysis.model.parameters()}
        stored = {id(t): t for t in analysis.model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
        names = {id(p): name.removesuffix(".weight") for name, p in reversed(list(analysis.model.named_parameters()))}
        self._params, self._bits = Polynomial(), Polynomial()
        self._by_layer: dict[str, tuple[Polynomial, int]] = {}  # elements of its parameter, bits of each
        for key, tensor in (parameters | stored).items():
            numel = self._size(axes_of[key]) if key in axes_of else Polynomial.constant(tensor.numel())
            self._params += numel if key in parameters else Polynomial()
            self._bits += numel * Polynomial.constant(8 * tensor.element_size())
            if key in names:
                self._by_layer[names[key]] = numel, 8 * tensor.element_size()
        self._macs = {kind: Polynomial() for kind in KINDS}
        layers = _Layers(analysis)
        operations, uncounted = [], []
        weights: set[str] = set()
        for node in coupling.graph.nodes:
            call = coupling.calls.get(node)
            if call is None or not call.products:
                missing = _uncounted(node, coupling)
                weights.update(layers.read(node) if missing or _looks_up(node, coupling) else ())
                uncounted += missing
                continue
            kind = _kind(call, coupling)
            if call.products[0].kind != "attention":
                weights.update(layers.read(node))
            try:
                count = sum((self._size(product.axes) for product in call.products), start=Polynomial())
            except UnknownLength:
                uncounted.append(Uncounted(str(node.target), source_line(node), "its lengths depend on data"))
                continue
            operations.append(Operation(node, layers.of(node, kind), kind, count))
            self._macs[kind] += count
        self.operations = tuple(operations)
        self.layers = frozenset(layers.parameters) | {operation.layer for operation in operations}
        self.weights = frozenset(weights)
        self.uncounted = tuple(uncounted)

    def params(self, counts: Counts = WHOLE) -> int:
        """Scalars in the distinct parameters."""
        return self._params(counts)

    def macs(self, counts: Counts = WHOLE) -> int:
        """Multiply-accumulates of one forward on the example inputs."""
        return sum(self.macs_by_kind(counts).values())

    def macs_by_kind(self, counts: Counts = WHOLE) -> dict[Kind, int]:
        """`macs`, apart for each kind of op."""
        return {kind: polynomial(counts) for kind, polynomial in self._macs.items()}

    def macs_by_op(self, counts: Counts = WHOLE) -> dict[fx.Node, int]:
        """`macs`, apart for each op of the analysed graph, in its order."""
        return {operation.node: operation.macs(counts) for operation in self.operations}

    def macs_by_layer(self, counts: Counts = WHOLE) -> dict[str, int]:
        """`macs`, apart for each layer (see `Operation.layer`); one that is called twice counts twice."""
        found: dict[str, int] = {}
        for operation in self.operations:
            found[operation.layer] = found.get(operation.layer, 0) + operation.macs(counts)
        return found

    def bytes(self, counts: Counts = WHOLE, weight_bits: Mapping[str, float] | None = None) -> int:
        """Bytes of the distinct parameters and persistent buffers.

        Args:
            weight_bits: layer -> bits that an element of its weight is stored with; the others as they are. Steps and
                zero points are not counted.
        """
        total = self._bits(counts)
        for layer, bits in (weight_bits or {}).items():
            if layer in self._by_layer:
                elements, before = self._by_layer[layer]
                total += elements(counts) * (round(bits) - before)
        return -(-total // 8)


class Lengths:
    """How long axes are when not all units stay.

    Args:
        captured: with the example inputs whose batch and sequence stand for the symbols.
        variables: factor -> the one whose units are counted; all other factors have the length they have.
    """

    def __init__(self, captured: Captured, variables: Mapping[Factor, Factor]) -> None:
        self._symbols = _symbol_values(captured)
        self._variables = variables

    def size(self, axes: Iterable[Axis]) -> Polynomial:
        """Number of elements of a value with these axes."""
        return math.prod(self.lengths(axes), start=Polynomial.constant(1))

    def lengths(self, axes: Iterable[Axis]) -> list[Polynomial]:
        """Number of indices of each axis."""
        return [self._length(normal(axis)) for axis in axes]

    def _length(self, axis: Axis) -> Polynomial:
        if isinstance(axis, Factor):
            variable = self._variables.get(axis)
            return Polynomial({(variable,): 1}) if variable else Polynomial.constant(self._number(axis.size))
        if not any(leaf in self._variables for leaf in leaves(axis)):
            return Polynomial.constant(self._number(length(axis)))
        parts = [self._length(part) for part in axis.parts]
        if isinstance(axis, Product):
            return math.prod(parts, start=Polynomial.constant(1))
        return sum(parts, start=Polynomial())

    def _number(self, size: Any) -> int:
        """A length with the example inputs' batch and sequence in place of the symbols."""
        if isinstance(size, int):
            return size
        value = size.subs(self._symbols)
        if value.free_symbols:
            raise UnknownLength
        return int(value)


class UnknownLength(Exception):
    """A length depends on the data. The package alone raises and catches the exception."""


class _Layers:
    """What the layers of a model are called."""

    def __init__(self, analysis: Analysis) -> None:
        self._coupling = analysis.coupling
        self._tensors = {str(node.target): tensor for node, tensor in attributes(analysis.captured.module)}
        names = {id(p): name.removesuffix(".weight") for name, p in analysis.model.named_parameters()}
        self.parameters = tuple(names.values())
        self._names = {t: names.get(id(tensor), t.removesuffix(".weight")) for t, tensor in self._tensors.items()}

    def of(self, node: fx.Node, kind: Kind) -> str:
        """The layer that `node` is, or is part of."""
        weights = [] if kind in ("attention", "recurrent") else self._targets(node)
        if weights:
            return self._names[max(weights, key=lambda target: self._tensors[target].numel())]
        return f"{module_path(node)}/{node.name}".removeprefix("/")

    def read(self, node: fx.Node) -> set[str]:
        """Names of the tensors of the model that the op's operands are computed from."""
        return {self._names[target] for target in self._targets(node)}

    def _targets(self, node: fx.Node) -> list[str]:
        sources = (self._coupling.sources.get(operand, frozenset()) for operand in node.all_input_nodes)
        return sorted(target for targets in sources for target in targets)


@dataclass(frozen=True)
class Polynomial:
    """Σ coefficient · Π factors, the factors standing for how many of their units stay.

    Coefficients are whole numbers, but for bit operations of channels with bits of their own, whose mean is a fraction.
    """

    terms: Mapping[tuple[Factor, ...], Any] = field(default_factory=dict)

    @staticmethod
    def constant(value: int | Fraction) -> Polynomial:
        """The polynomial that is `value` whatever stays."""
        return Polynomial({(): value} if value else {})

    def __add__(self, other: Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for monomial, coefficient in other.terms.items():
            terms[monomial] = terms.get(monomial, 0) + coefficient
        return Polynomial(terms)

    def __mul__(self, other: Polynomial) -> Polynomial:
        terms: dict[tuple[Factor, ...], Any] = {}
        for left, a in self.terms.items():
            for right, b in other.terms.items():
                monomial = tuple(sorted((*left, *right), key=lambda factor: factor.serial))
                terms[monomial] = terms.get(monomial, 0) + a * b
        return Polynomial(terms)

    def __call__(self, counts: Counts) -> int:
        """The value when `counts` units stay, rounded up."""
        total: int | Fraction = 0
        for monomial, value in self.terms.items():
            for factor in monomial:
                value *= counts.get(factor, factor.size)
            total += value
        return math.ceil(total)


# ------------------------------------------------------------------------------------------------ multiply-accumulates
def _kind(call: Call, coupling: Coupling) -> Kind:
    """What an op is: attention where every operand of its products depends on the model's inputs."""
    arguments = bind(call.node)
    operands = [argument_at(arguments, name) for product in call.products for name in product.operands]
    between_activations = not any(operand in coupling.sources for operand in operands)
    return call.products[0].kind or ("attention" if between_activations else "linear")


# ------------------------------------------------------------------------------------------------ what is not counted
def _looks_up(node: fx.Node, coupling: Coupling) -> bool:
    """Whether the op looks rows of a table up, or picks parts of any tensor by numbers that depend on the inputs."""
    integer = registry.facts_of(node.target).integer
    by_input = isinstance(integer, Float) and integer.rows != "" and node not in coupling.sources
    return isinstance(integer, Lookup) or by_input


def _uncounted(node: fx.Node, coupling: Coupling) -> list[Uncounted]:
    """Name the op where nothing says what the op multiplies, or where the rule that would say so failed."""
    call, sums = coupling.calls.get(node), registry.facts_of(node.target).sums
    if call is None and (str(node.target) not in coupling.unknown or sums not in (None, "products")):
        return []
    if call is not None and sums is not None:
        return []
    return [Uncounted(str(node.target), source_line(node), fix=macs_fix(node))]


# ------------------------------------------------------------------------------------------------ example inputs
def _symbol_values(captured: Captured) -> dict[sympy.Symbol, int]:
    """What each symbolic length (batch, sequence) is for the example inputs."""
    placeholders = captured.module.graph.find_nodes(op="placeholder")
    found: dict[sympy.Symbol, int] = {}
    for node, given in zip(placeholders, captured.inputs.flat(), strict=True):
        for tensor in tensor_values(node):
            for symbolic, actual in zip(tensor.shape, given.shape, strict=True):
                found |= _solve(symbolic, actual)
    return found


def _solve(symbolic: int | torch.SymInt, actual: int) -> dict[sympy.Symbol, int]:
    expression = symbolic.node.expr if isinstance(symbolic, torch.SymInt) else sympy.Integer(symbolic)
    if len(expression.free_symbols) != 1:
        return {}
    (symbol,) = expression.free_symbols
    if symbol is expression:
        return {symbol: actual}
    solutions = sympy.solve(expression - actual, symbol)
    return {symbol: int(solutions[0])} if solutions else {}
