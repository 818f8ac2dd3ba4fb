"""Parameters, multiply-accumulates and bytes, as polynomials in the number of units kept.

Convolutions, products of matrices, attention and recurrent layers have multiply-accumulates; no other op is counted.
All is read off the axes: no tensor is cut, and the meta device will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import sympy
import torch
from torch import Tensor, fx

from graphcomp.capture.capture import Captured
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.axis import UNIT, Axes, Axis, Factor, Product, all_leaves, leaves, length, normal
from graphcomp.coupling.groups import Kept, summed_axes
from graphcomp.coupling.notation import einsum_letters
from graphcomp.coupling.propagate import Coupling, is_real
from graphcomp.ir.graph import argument_at, attributes, bind, is_op, module_path, source_line, tensor_values
from graphcomp.ops import registry
from graphcomp.torch_compat import tree_flatten_spec

aten = torch.ops.aten

Counts: TypeAlias = Mapping[Factor, int]
"""How many units of a group's factor stay; factors left out stay whole."""

Kind: TypeAlias = Literal["convolution", "linear", "attention", "recurrent"]
KINDS: tuple[Kind, ...] = ("convolution", "linear", "attention", "recurrent")
"""`attention` is any product of two activations, fused attention included; `linear` one with a parameter."""


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
        multiplies: whether its coupling rule says that it multiplies and sums.
    """

    op: str
    source: str
    why: str = "no formula counts its multiply-accumulates"
    multiplies: bool = False

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
        uncounted: ops that may have multiply-accumulates and have no formula, or lengths that depend on data; they
            count 0.
    """

    def __init__(self, analysis: Analysis) -> None:
        coupling = analysis.coupling
        self._size = Lengths(analysis.captured, {group.factor: group.factor for group in analysis.groups}).size
        axes_of = {
            id(tensor): own.attributes[str(node.target)]
            for own in (*coupling.beside, coupling)
            for node, tensor in attributes(own.module)
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
        for node in coupling.module.graph.nodes:
            formula = _formula(node)
            if node.target in LOOKUPS or formula not in (None, _attention):
                weights.update(layers.read(node))
            if formula is None:
                unknown = _without_formula(node, coupling)
                weights.update(layers.read(node) if unknown else ())
                uncounted += unknown
                continue
            if node not in coupling.axes:
                continue
            try:
                kind, count = formula(_Operands(node, coupling, self._size))
            except _UnknownLength:
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
        result = Polynomial.constant(1)
        for axis in axes:
            result *= self._length(normal(axis))
        return result

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
            raise _UnknownLength
        return int(value)


class _UnknownLength(Exception):
    """A length depends on the data."""


class _Layers:
    """What the layers of a model are called."""

    def __init__(self, analysis: Analysis) -> None:
        self._coupling = analysis.coupling
        self._tensors = {str(node.target): tensor for node, tensor in attributes(analysis.coupling.module)}
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
    """Σ coefficient · Π factors, the factors standing for how many of their units stay."""

    terms: Mapping[tuple[Factor, ...], int] = field(default_factory=dict)

    @staticmethod
    def constant(value: int) -> Polynomial:
        """The polynomial that is `value` whatever stays."""
        return Polynomial({(): value} if value else {})

    def __add__(self, other: Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for monomial, coefficient in other.terms.items():
            terms[monomial] = terms.get(monomial, 0) + coefficient
        return Polynomial(terms)

    def __mul__(self, other: Polynomial) -> Polynomial:
        terms: dict[tuple[Factor, ...], int] = {}
        for left, a in self.terms.items():
            for right, b in other.terms.items():
                monomial = tuple(sorted((*left, *right), key=lambda factor: factor.serial))
                terms[monomial] = terms.get(monomial, 0) + a * b
        return Polynomial(terms)

    def __call__(self, counts: Counts) -> int:
        """The value when `counts` units stay."""
        total = 0
        for monomial, value in self.terms.items():
            for factor in monomial:
                value *= counts.get(factor, factor.size)
            total += value
        return total


# ------------------------------------------------------------------------------------------------ multiply-accumulates
@dataclass(frozen=True)
class _Operands:
    """The operands of one op, as its formula sees them."""

    node: fx.Node
    coupling: Coupling
    size: Callable[[Iterable[Axis]], Polynomial]

    @property
    def result(self) -> Axes:
        return self.coupling.axes[self.node][0]

    def of(self, key: str) -> Axes:
        """Axes of the argument `key` ("params.2": item 2 of a list)."""
        return self.coupling.axes[argument_at(bind(self.node), key)][0]

    def kind(self, *keys: str) -> Kind:
        """Attention where every operand depends on the model's inputs."""
        operands = [argument_at(bind(self.node), key) for key in keys]
        return "linear" if any(operand in self.coupling.sources for operand in operands) else "attention"


Count: TypeAlias = tuple[Kind, Polynomial]


def _linear(op: _Operands) -> Count:
    return op.kind("input", "weight"), op.size(op.of("input")[:-1]) * op.size(op.of("weight"))


def _matmul(op: _Operands, left: str, right: str) -> Count:
    """Each result is a sum over the last dim of `left`."""
    return op.kind(left, right), op.size(op.result) * op.size(op.of(left)[-1:])


def _bilinear(op: _Operands) -> Count:
    return "linear", op.size(op.of("input1")[:-1]) * op.size(op.of("weight"))


def _einsum(op: _Operands) -> Count:
    """Operands are multiplied from left to right; a product that sums nothing away is pointwise and counts 0."""
    arguments = bind(op.node)
    keys = [f"tensors.{k}" for k in range(len(arguments["tensors"]))]
    names, result = einsum_letters(arguments["equation"], [len(op.of(key)) for key in keys])
    axis_of: dict[str, Axis] = dict.fromkeys("".join(names), UNIT)
    for name, key in zip(names, keys, strict=True):
        # dims of length 1 stretch, so theirs is not the length that counts
        axis_of |= {letter: a for letter, a in zip(name, op.of(key), strict=True) if length(a) != 1}
    total, done = Polynomial(), set(names[0])
    for k in range(1, len(names)):
        both = done | set(names[k])
        done = both & set(result + "".join(names[k + 1 :]))
        if done != both:
            total += op.size(axis_of[letter] for letter in both)
    return op.kind(*keys), total


def _attention(op: _Operands) -> Count:
    """(h s d)(h t d) and (h s t)(h t e): a causal mask saves nothing."""
    scores = op.size(op.result[:-1]) * op.size(op.of("key")[-2:-1])
    return "attention", scores * (op.size(op.of("query")[-1:]) + op.size(op.of("value")[-1:]))


def _conv(op: _Operands, source: str = "input") -> Count:
    """Every filter at every place of the result; of a transposed one, at every place of the input."""
    weight = op.of("weight")
    arguments = bind(op.node)
    transposed = arguments.get("transposed") or "transpose" in op.node.target._schema.name  # type: ignore[union-attr]
    places = op.of(source) if transposed else op.result
    spatial = len(weight) - 2
    sample = op.size(places[-spatial:]) * op.size(weight)
    return "convolution", op.size(places[: -spatial - 1]) * sample


def _conv_tbc(op: _Operands) -> Count:
    return "convolution", op.size(op.result[:-1]) * op.size(op.of("weight"))


def _recurrent(op: _Operands, source: str) -> Count:
    """Every matrix meets every step of every sequence once."""
    steps = op.size(op.of(source)[:-1])
    matrices = [op.of(f"params.{k}") for k in range(len(bind(op.node)["params"]))]
    return "recurrent", steps * sum((op.size(m) for m in matrices if len(m) == 2), start=Polynomial())


def _mkldnn_layer(op: _Operands) -> Count:
    """One layer in one direction: both of its matrices meet every step of every sequence once."""
    return "recurrent", op.size(op.of("input")[:-1]) * (op.size(op.of("weight0")) + op.size(op.of("weight1")))


def _cell(op: _Operands) -> Count:
    return "recurrent", op.size(op.of("input")[:-1]) * (op.size(op.of("w_ih")) + op.size(op.of("w_hh")))


def _grouped_mm(op: _Operands) -> Count:
    """Every row of the first operand meets one matrix of the second."""
    tokens, weight = list(bind(op.node))[:2]
    return op.kind(tokens, weight), op.size(op.of(tokens)) * op.size(op.of(weight)[-1:])


FORMULAS: dict[Any, Callable[[_Operands], Count]] = {
    aten.linear.default: _linear,
    aten.matmul.default: partial(_matmul, left="self", right="other"),
    aten.mm.default: partial(_matmul, left="self", right="mat2"),
    aten.bmm.default: partial(_matmul, left="self", right="mat2"),
    aten.mv.default: partial(_matmul, left="self", right="vec"),
    aten.dot.default: partial(_matmul, left="self", right="tensor"),
    aten.addmm.default: partial(_matmul, left="mat1", right="mat2"),
    aten.baddbmm.default: partial(_matmul, left="batch1", right="batch2"),
    aten.bilinear.default: _bilinear,
    aten.einsum.default: _einsum,
    aten._grouped_mm.default: _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
    aten.scaled_dot_product_attention.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention.default: _attention,
    aten._scaled_dot_product_efficient_attention.default: _attention,
    aten._scaled_dot_product_cudnn_attention.default: _attention,
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.padding: _conv,
    aten.convolution.default: _conv,
    aten._convolution.default: _conv,
    aten._convolution.deprecated: _conv,
    aten.mkldnn_convolution.default: partial(_conv, source="self"),
    aten.conv_transpose1d.default: _conv,
    aten.conv_transpose2d.input: _conv,
    aten.conv_transpose3d.input: _conv,
    aten.conv_tbc.default: _conv_tbc,
    "torchvision::deform_conv2d": _conv,
    aten.lstm.input: partial(_recurrent, source="input"),
    aten.lstm.data: partial(_recurrent, source="data"),
    aten.gru.input: partial(_recurrent, source="input"),
    aten.gru.data: partial(_recurrent, source="data"),
    aten.rnn_tanh.input: partial(_recurrent, source="input"),
    aten.rnn_tanh.data: partial(_recurrent, source="data"),
    aten.rnn_relu.input: partial(_recurrent, source="input"),
    aten.rnn_relu.data: partial(_recurrent, source="data"),
    aten.mkldnn_rnn_layer.default: _mkldnn_layer,
    aten.lstm_cell.default: _cell,
    aten.gru_cell.default: _cell,
    aten.rnn_tanh_cell.default: _cell,
    aten.rnn_relu_cell.default: _cell,
}
"""Op, or "library::name" of one that may not be there -> its multiply-accumulates."""

LOOKUPS = frozenset({aten.embedding.default, aten.embedding_bag.padding_idx, aten._embedding_bag.default})


def _formula(node: fx.Node) -> Callable[[_Operands], Count] | None:
    if not is_op(node):
        return None
    return FORMULAS.get(node.target) or FORMULAS.get(node.target._schema.name)  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ what is not counted
def _without_formula(node: fx.Node, coupling: Coupling) -> list[Uncounted]:
    """Name the op where its rule sums over what several operands share, or where nothing of graphcomp's knows the op
    and the op reads several matrices."""
    call = coupling.calls.get(node)
    operands = [n for n in node.all_input_nodes if coupling.axes.get(n)]
    axes = [coupling.axes[n][0] for n in operands]
    alike = len({tuple(all_leaves(own)) for own in axes}) < 2
    if call is not None and not alike and summed_axes(coupling, node, call):
        return [Uncounted(str(node.target), source_line(node), multiplies=True)]
    strange = str(node.target) in coupling.unknown if call is None else registry.is_taught(node.target)
    matrices = [n for n, own in zip(operands, axes, strict=True) if len(own) > 1 and is_real(tensor_values(n)[0])]
    return [Uncounted(str(node.target), source_line(node))] if strange and len(matrices) > 1 else []


# ------------------------------------------------------------------------------------------------ example inputs
def flat_inputs(captured: Captured, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The leaves of the arguments in the order of the graph's placeholders, keywords in any order."""
    spec = captured.module.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    flat: list[Any] = tree_flatten_spec((tuple(args), dict(kwargs)), spec)
    return flat


def _symbol_values(captured: Captured) -> dict[sympy.Symbol, int]:
    """What each symbolic length (batch, sequence) is for the example inputs."""
    placeholders = captured.module.graph.find_nodes(op="placeholder")
    found: dict[sympy.Symbol, int] = {}
    for node, given in zip(placeholders, flat_inputs(captured, captured.args, captured.kwargs), strict=True):
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
