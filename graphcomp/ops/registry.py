"""The registry of coupling rules: one per op, by the op object.

    rule(aten.linear.default, "... i, o i, o -> ... o")           operands are the op's tensors, in schema order

    @rule(aten.cat.default)                                       parameters are the op's own schema:
    def cat(tensors: list[Axes], dim: int = 0) -> Axes: ...       tensors as Axes, lengths as sizes, the rest as is

A function that also takes `call` is handed the Call: shapes of the results, and what to tell later passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar, overload

from torch import fx

from graphcomp.coupling import notation
from graphcomp.coupling.axis import Axes, Axis, Reason, freeze, mark
from graphcomp.coupling.size import Size
from graphcomp.errors import RuleError
from graphcomp.torch_compat import OpOverload, schema_of

Result: TypeAlias = Axes | list[Axes] | None
RuleFunction: TypeAlias = Callable[..., Result]
OpKey: TypeAlias = OpOverload | str
F = TypeVar("F", bound=Callable[..., Any])


Kind: TypeAlias = Literal["convolution", "linear", "attention", "recurrent"]
KINDS: tuple[Kind, ...] = ("convolution", "linear", "attention", "recurrent")
"""`attention` is any product of two activations, fused attention included; `linear` one with a parameter."""


@dataclass(frozen=True)
class Product:
    """Operands that an op multiplies and sums: one multiply-accumulate per index of `axes`.

    Attributes:
        axes: the dims of the result and the dims that are summed away.
        operands: names of the arguments that are multiplied.
        kind: what the op is; None: linear or attention, as the operands depend on the model's inputs or not.
    """

    axes: Axes
    operands: tuple[str, ...]
    kind: Kind | None = None


@dataclass
class Call:
    """One op node while its rule runs, and what the rule says of it beyond the axes of the results."""

    node: fx.Node
    shapes: list[tuple[Size, ...]]  # of the results
    why: Reason  # "<op> addresses it by position", the default reason to freeze
    origins: Mapping[str, frozenset[fx.Node]]
    """tensor arguments that depend on the model's inputs -> the values each was made of by pointwise ops;
    "tensors.1" is item 1 of the list "tensors" """
    contracted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """argument -> dims that are summed over: masked units must be zero there."""
    products: list[Product] = field(default_factory=list)
    """what is multiplied and summed: the multiply-accumulates of the op"""
    lengths: dict[str, Any] = field(default_factory=dict)
    """argument -> the Axis whose length it is (None: leave), or a list of these."""
    pins: dict[str, Any] = field(default_factory=dict)
    """argument -> the value that an implied constant had before any cut."""
    multiples: list[tuple[Axis, int]] = field(default_factory=list)
    """axes whose lengths must be multiples of a number"""
    residual: bool = False  # the op adds a branch to the stream it left

    @property
    def activations(self) -> frozenset[str]:
        """Names of the tensor arguments that depend on the model's inputs."""
        return frozenset(self.origins)

    @property
    def shape(self) -> tuple[Size, ...]:
        """Shape of the only result."""
        return self.shapes[0]

    def because(self, text: str) -> Reason:
        """A reason naming this op and the user's line."""
        return Reason(text, self.why.op, self.why.source)

    def freeze(self, axes: Axis | Sequence[Axis], text: str = "") -> None:
        """Freeze one axis or several."""
        for axis in axes if isinstance(axes, (tuple, list)) else (axes,):
            freeze(axis, self.because(text) if text else self.why)

    def contract(self, argument: str, *dims: int) -> None:
        """Masked units of these dims of `argument` must be multiplied by zero before the op."""
        self.contracted[argument] = tuple(dict.fromkeys((*self.contracted.get(argument, ()), *dims)))

    def multiply(self, axes: Sequence[Axis], *operands: str, kind: Kind | None = None) -> None:
        """Say that the arguments `operands` are multiplied, once per index of `axes`, and summed."""
        self.products.append(Product(tuple(axes), operands, kind))

    def align(self, axis: Axis, multiple: int) -> None:
        """Say that the op takes no length of `axis` but multiples of a number."""
        self.multiples.append((axis, multiple))

    def einsum(self, text: str, /, sizes: Mapping[str, Size] | None = None, **operands: Axes | None) -> list[Axes]:
        """Apply a rule in notation to the arguments given by name; contractions and products are noted."""
        parsed = notation.parse(text)
        if len(parsed.operands) != len(operands):
            raise RuleError(f"rule {text!r} has {len(parsed.operands)} operands and got {len(operands)}")
        applied = notation.apply(parsed, list(operands.values()), self.shapes, self.why, sizes)
        names = list(operands)
        for contraction in applied.contractions:
            self.contract(names[contraction.operand], contraction.dim)
        for product in applied.products:
            self.multiply(
                product.axes, *(names[k] for k in product.operands), kind="convolution" if product.kernel else None
            )
        return applied.results

    def mark(self, axes: Axis | Sequence[Axis], *names: str) -> None:
        """Note facts that decide a group's role: head, head_dim, expert, conv, residual, normalized, layer_norm."""
        for axis in axes if isinstance(axes, (tuple, list)) else (axes,):
            mark(axis, *names)


_RULES: dict[OpKey, RuleFunction] = {}
_BUILT_IN: set[OpKey] = set()
_FAMILIES: list[tuple[Callable[[OpOverload], bool], RuleFunction]] = []
_ELEMENTWISE: list[RuleFunction] = []


@overload
def rule(op: OpKey, text: str, /) -> None: ...  # type: ignore[overload-overlap]
@overload
def rule(*ops: OpKey) -> Callable[[F], F]: ...


def rule(*args: Any) -> Any:
    """Say how an op couples the dims of its operands and results.

    Args:
        args: one op and its rule in notation (see `graphcomp.coupling.notation`), or one or more ops: a decorator.
            An op is an OpOverload (`torch.ops.aten.cat.default`) or, where it may not be there yet, "mylib::op",
            which stands for all its overloads.

    Raises:
        RuleError: the notation is malformed, or the op has a rule already.

    Example:
        >>> graphcomp.rule("mylib::swish_scale", "n c h w, c -> n c h w")
    """
    if len(args) == 2 and isinstance(args[1], str) and "->" in args[1]:
        op, text = args
        _register(op, _from_notation(text))
        return None
    if not args:
        raise RuleError("rule() needs at least one op", fix='rule("mylib::op", "n c, c -> n c")')

    def decorate(function: F) -> F:
        for op in args:
            _register(op, function)
        return function

    return decorate


def _register(op: OpKey, function: RuleFunction) -> None:
    if not isinstance(op, OpOverload) and not (isinstance(op, str) and "::" in op):
        raise RuleError(f"{op!r} is not an op", fix="pass torch.ops.lib.op.overload, or 'lib::op'")
    if op in _RULES:
        raise RuleError(f"{op} has a coupling rule already", fix="graphcomp.ops.registry.forget(op) first")
    _RULES[op] = function


def forget(op: OpKey) -> None:
    """Remove the rule of `op`, so that another can be given."""
    _RULES.pop(op, None)
    _BUILT_IN.discard(op)


def close_built_in() -> None:
    """Take all rules that are registered by now for graphcomp's own; rules registered later are the user's."""
    _BUILT_IN.update(_RULES)


def is_taught(op: object) -> bool:
    """Whether the rule of the op is one that the user registered."""
    if not isinstance(op, OpOverload):
        return False
    key: OpKey = op if op in _RULES else schema_of(op).name
    return key in _RULES and key not in _BUILT_IN


def family(holds: Callable[[OpOverload], bool], function: RuleFunction) -> None:
    """One rule for every op that has none of its own and of which `holds` is true."""
    _FAMILIES.append((holds, function))


def elementwise(function: F) -> F:
    """Note of a rule that is no family's that it is elementwise, too."""
    _ELEMENTWISE.append(function)
    return function


def is_elementwise(function: RuleFunction) -> bool:
    """Whether each element of the result depends on the operands' elements at its place: a family's rule, mostly."""
    return any(function is member for member in (*_ELEMENTWISE, *(member for _, member in _FAMILIES)))


def find(op: OpOverload) -> RuleFunction | None:
    """The rule of `op`: by the object, else by its name without overload, else by family."""
    own = _RULES.get(op) or _RULES.get(schema_of(op).name)
    return own or next((function for holds, function in _FAMILIES if holds(op)), None)


def run(function: RuleFunction, call: Call, arguments: Mapping[str, Any]) -> list[Axes]:
    """Axes of each result of the op."""
    names, takes_all = _parameters(function)
    accepted = dict(arguments) if takes_all else {name: arguments[name] for name in names if name in arguments}
    result = function(**accepted, call=call) if "call" in names else function(**accepted)
    if result is None:
        return []
    return result if isinstance(result, list) else [result]


@cache
def _parameters(function: RuleFunction) -> tuple[tuple[str, ...], bool]:
    """The arguments that a rule names (the op's others do not matter to it), and whether it takes any."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters), any(p.kind is p.VAR_KEYWORD for p in parameters)


def _from_notation(text: str) -> RuleFunction:
    parsed = notation.parse(text)

    def from_notation(call: Call, **arguments: Any) -> Result:
        assert isinstance(call.node.target, OpOverload)
        names = [a.name for a in schema_of(call.node.target).arguments if str(a.type) in _TENSOR_TYPES]
        return call.einsum(text, **{name: arguments.get(name) for name in names[: len(parsed.operands)]})

    return from_notation


_TENSOR_TYPES = ("Tensor", "Optional[Tensor]")


class AxesValue(tuple[Axis, ...]):
    """The axes of one tensor argument; a class of its own, so that it is not taken for a tuple of numbers."""
