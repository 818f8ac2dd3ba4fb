"""The registry of ops: one entry says all that is known of an op, by the op object.

    op(aten.linear.default, "... i, o i, o -> ... o", product(Compute(("input",), "weight", 0, "bias")))
                                                                  operands are the op's tensors, in schema order
    @op(aten.cat.default, facts=moves(Rescale()))                 parameters are the op's own schema:
    def cat(tensors: list[Axes], dim: int = 0) -> Axes: ...       tensors as Axes, lengths as sizes, the rest as is

A function that also takes `call` is handed the Call: shapes of the results, and what to tell later passes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias, TypeVar, get_args, overload

import torch

from graphcomp.coupling import notation
from graphcomp.coupling.axis import Axes
from graphcomp.errors import RuleError
from graphcomp.ops.call import Call
from graphcomp.ops.facts import UNANSWERED, ZEROS_ADD_NOTHING, Compute, Facts, Float, Integer, Scales, in_float, renamed
from graphcomp.torch_compat import OpOverload, schema_of

Result: TypeAlias = Axes | list[Axes] | None
RuleFunction: TypeAlias = Callable[..., Result]
OpKey: TypeAlias = OpOverload | str
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One registration: a coupling rule (None: there is none), and the facts."""

    rule: RuleFunction | None
    facts: Facts


NOTHING_KNOWN = Entry(None, UNANSWERED)

CONVOLUTION_ARGUMENTS = frozenset({"input", "weight", "bias", "stride", "padding", "dilation", "groups"})
"""Arguments of torch's convolutions that passes over quantized graphs read by name."""

_ENTRIES: dict[OpKey, Entry] = {}
_FAMILIES: list[tuple[Callable[[OpOverload], bool], Entry]] = []
_ELEMENTWISE: list[RuleFunction] = []


def op(
    *ops: OpKey | RuleFunction,
    coupling: str | None = None,
    facts: Facts | None = None,
    integer: Integer | str | None = None,
    masked: Callable[..., Any] | str | None = None,
    macs: str | Sequence[str] | None = None,
    keeps_zeros: bool | None = None,
    scales: Scales | None = None,
) -> Callable[[F], F]:
    """Say all that is known of an op, in one place.

    Args:
        ops: the op and its coupling rule in notation (see `graphcomp.coupling.notation`); or one or more ops, for a
            decorator of a rule in Python, or with that function last. An op is an OpOverload
            (`torch.ops.aten.cat.default`) or, where it may not be there yet, "mylib::op", which stands for all its
            overloads.
        integer: how the op behaves on integers: one of `graphcomp.ops.facts.Integer`, or "like aten::linear", whose
            tensors stand in the same order. Without an answer the op stays float, and the report names the op.
        masked: of an op that takes statistics over dims that its rule contracts: a function of a 0/1 mask, which
            broadcasts with the summed operand, and the op's arguments, that returns what the op would return had the
            masked units never existed.
        macs: multiply-accumulates of an op whose rule in notation does not tell them: the letters whose lengths are
            multiplied, or several of these, which are added: ("h s t d", "h s t e"). (): the op has none.
        keeps_zeros: whether the op returns the elements of its one operand, zeros where zeros were.
        scales: how the op lets a scale per channel through, see `graphcomp.ops.facts.Scales`.
        facts: answers to start from.

    Returns:
        A decorator of a rule in Python, where no rule is given.

    Raises:
        RuleError: the notation is malformed, an answer is not one of its kind, or the op has an entry already.

    Example:
        >>> graphcomp.op("mylib::linear", "... i, o i, o -> ... o", integer="like aten::linear")
        >>> graphcomp.op("mylib::attend", "h s d, h t d, h t e -> h s e", macs=("h s t d", "h s t e"))
    """
    if facts is not None and not isinstance(facts, Facts):
        raise RuleError(f"facts must be graphcomp.ops.facts.Facts, got {facts!r}", fix='integer="like aten::linear"')
    if coupling is not None and not isinstance(coupling, str):
        raise RuleError(f"coupling must be a rule in notation, got {coupling!r}", fix='coupling="n c, c -> n c"')
    given = {"integer": integer, "masked": masked, "keeps_zeros": keeps_zeros, "scales": scales}
    answered: dict[str, Any] = {name: found for name, found in given.items() if found is not None}
    answers = replace(facts or UNANSWERED, **answered)
    if masked is not None and answers.sums is None:
        answers = replace(answers, sums="statistics")
    _check_answers(answers)
    keys: list[Any] = list(ops)
    if keys and isinstance(keys[-1], str) and "->" in keys[-1]:
        coupling = str(keys.pop())
    function: RuleFunction | None = None
    if coupling is not None:
        function, answers = _from_notation(coupling, macs), _summing(coupling, macs, answers)
    elif macs is not None:
        raise RuleError("macs need a rule in notation, got a function", fix="call.multiply(axes, 'x', 'w') in the rule")
    elif keys and not isinstance(keys[-1], (str, OpOverload)) and callable(keys[-1]):
        function = keys.pop()
    if not keys:
        raise RuleError("op() needs at least one op", fix='op("mylib::op", "n c, c -> n c")')
    if function is not None:
        for key in keys:
            _register(key, Entry(function, answers))

    def decorate(rule: F) -> F:
        for key in keys:
            _register(key, Entry(rule, answers))
        return rule

    return decorate


@overload
def rule(op: OpKey, text: str, /) -> None: ...  # type: ignore[overload-overlap]
@overload
def rule(*ops: OpKey) -> Callable[[F], F]: ...


def rule(*args: Any) -> Any:
    """Say how an op couples the dims of its operands and results: the short form of `op`.

    Args:
        args: one op and its rule in notation (see `graphcomp.coupling.notation`), or one or more ops: a decorator.
            An op is an OpOverload (`torch.ops.aten.cat.default`) or, where it may not be there yet, "mylib::op",
            which stands for all its overloads.

    Raises:
        RuleError: the notation is malformed, or the op has a rule already.

    Example:
        >>> graphcomp.rule("mylib::swish_scale", "n c h w, c -> n c h w")
    """
    if not args:
        raise RuleError("rule() needs at least one op", fix='rule("mylib::op", "n c, c -> n c")')
    decorator = op(*args)
    return None if len(args) == 2 and isinstance(args[1], str) and "->" in args[1] else decorator


def refuse(*ops: OpKey, why: str) -> None:
    """Say why ops have no coupling rule: they are unknown ops, with this reason."""
    for key in ops:
        _register(key, Entry(None, in_float(why)))


def _register(key: OpKey, entry: Entry) -> None:
    if not isinstance(key, OpOverload) and not (isinstance(key, str) and "::" in key):
        raise RuleError(f"{key!r} is not an op", fix="pass torch.ops.lib.op.overload, or 'lib::op'")
    if key in _ENTRIES:
        raise RuleError(f"{key} has a coupling rule already", fix="graphcomp.ops.registry.forget(op) first")
    _ENTRIES[key] = entry
    _known.cache_clear()


def _check_answers(facts: Facts) -> None:
    """Refuse answers that are not of their kind.

    Raises:
        RuleError: an answer is not one of its kind.
    """
    kinds = get_args(Integer)
    if isinstance(facts.integer, str):
        if not re.fullmatch(r"like \w+::\w+(\.\w+)?", facts.integer):
            raise RuleError(
                f"integer must be an integer form or 'like lib::op', got {facts.integer!r}",
                fix='integer="like aten::linear"',
            )
    elif facts.integer is not None and not isinstance(facts.integer, kinds):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise RuleError(f"integer must be one of {names}, got {facts.integer!r}", fix='integer="like aten::linear"')
    if facts.scales is not None and facts.scales not in get_args(Scales):
        raise RuleError(f"scales must be one of {', '.join(get_args(Scales))}, got {facts.scales!r}")
    if facts.keeps_zeros is not None and not isinstance(facts.keeps_zeros, bool):
        raise RuleError(f"keeps_zeros must be True or False, got {facts.keeps_zeros!r}")
    if facts.masked is not None and not (callable(facts.masked) or isinstance(facts.masked, str)):
        raise RuleError(f"masked must be a function of a mask and the op's arguments, got {facts.masked!r}")


def _summing(coupling: str, macs: Any, facts: Facts) -> Facts:
    """Answer what is summed away from a rule in notation. A rule that multiplies nothing tells nothing of stars."""
    if facts.sums is None and (macs is not None or notation.products(notation.parse(coupling))):
        facts = replace(facts, sums="products")
    return replace(facts, masked=ZEROS_ADD_NOTHING) if facts.masked is None and facts.sums == "products" else facts


def forget(op: OpKey) -> None:
    """Remove the entry of `op`, so that another can be given."""
    _ENTRIES.pop(op, None)
    _known.cache_clear()


def family(holds: Callable[[OpOverload], bool], function: RuleFunction, facts: Facts) -> None:
    """One entry for every op that has none of its own and of which `holds` is true."""
    _FAMILIES.append((holds, Entry(function, facts)))
    _known.cache_clear()


def elementwise(function: F) -> F:
    """Note of a rule that is no family's that it is elementwise, too."""
    _ELEMENTWISE.append(function)
    return function


def is_elementwise(function: RuleFunction) -> bool:
    """Whether each element of the result depends on the operands' elements at its place: a family's rule, mostly."""
    return any(function is member for member in (*_ELEMENTWISE, *(entry.rule for _, entry in _FAMILIES)))


def known(op: object) -> Entry:
    """Return what is known of an op: by the object, else by its name without overload, else by family.

    Raises:
        RuleError: an op is to be on integers as another op of which nothing is known.
    """
    return _known(op) if isinstance(op, OpOverload) else NOTHING_KNOWN


@cache
def _known(op: OpOverload) -> Entry:
    entry = _entry(op)
    if isinstance(entry.facts.integer, str):
        entry = replace(entry, facts=replace(entry.facts, integer=_integer_like(op, entry.facts.integer)))
    _check_convolution(op, entry.facts.integer)
    return entry


def _check_convolution(op: OpOverload, integer: object) -> None:
    """Refuse a convolution whose arguments have other names than those of torch's convolutions: passes read them.

    Raises:
        RuleError: an argument is missing.
    """
    if not isinstance(integer, Compute) or not integer.convolution:
        return
    missing = CONVOLUTION_ARGUMENTS - {argument.name for argument in schema_of(op).arguments}
    if missing:
        raise RuleError(
            f"{op} is a convolution on integers and has no argument {', '.join(sorted(missing))}",
            fix="name the op's arguments as those of aten::conv2d, or leave integer= out",
        )


def _entry(op: OpOverload) -> Entry:
    own = _ENTRIES.get(op) or _ENTRIES.get(schema_of(op).name)
    return own or next((entry for holds, entry in _FAMILIES if holds(op)), NOTHING_KNOWN)


def _integer_like(op: OpOverload, text: str) -> Integer | None:
    """Return the integer form of another op, with the names of this one's tensors.

    Raises:
        RuleError: there is no such op, the op has no integer form, or its tensors are more.
    """
    name = text.removeprefix("like ")
    library, _, rest = name.partition("::")
    packet, _, overload_name = rest.partition(".")
    other = getattr(getattr(getattr(torch.ops, library), packet, None), overload_name or "default", None)
    integer = known(other).facts.integer
    if other is None or integer is None or isinstance(integer, str):
        raise RuleError(f"nothing is known of {name!r} on integers", fix='integer="like aten::linear"')
    names = dict(zip(_tensors_of(other), _tensors_of(op), strict=False))
    try:
        return renamed(integer, names)
    except KeyError as error:
        raise RuleError(
            f"{op} has fewer tensors than {name}: it has none that stands for {error}", fix="an integer form by name"
        ) from error


def registered() -> list[OpKey]:
    """Return every op that has an entry of its own."""
    return list(_ENTRIES)


def facts_of(op: object) -> Facts:
    """Return the facts of what a node calls; no answers where nothing is known."""
    return known(op).facts


def find(op: OpOverload) -> RuleFunction | None:
    """Return the coupling rule of `op`."""
    return _entry(op).rule


def why_unknown(op: OpOverload) -> str:
    """Return why `op` has no coupling rule."""
    integer = _entry(op).facts.integer
    return integer.why if isinstance(integer, Float) else "no coupling rule"


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


def _from_notation(text: str, macs: str | Sequence[str] | None = None) -> RuleFunction:
    parsed = notation.parse(text)
    texts = [macs] if isinstance(macs, str) else macs
    if texts is not None and not (isinstance(texts, (list, tuple)) and all(isinstance(part, str) for part in texts)):
        raise RuleError(f"macs must be letters of the rule, or several of these, got {macs!r}", fix='macs="n o i"')
    counted = None if texts is None else notation.products_of(parsed, texts)

    def from_notation(call: Call, **arguments: Any) -> Result:
        assert isinstance(call.node.target, OpOverload)
        names = _tensors_of(call.node.target)[: len(parsed.operands)]
        return call.einsum(text, None, counted, **{name: arguments.get(name) for name in names})

    return from_notation


def _tensors_of(op: OpOverload) -> list[str]:
    return [argument.name for argument in schema_of(op).arguments if str(argument.type) in _TENSOR_TYPES]


_TENSOR_TYPES = ("Tensor", "Optional[Tensor]")
