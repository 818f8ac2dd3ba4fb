"""The registry of ops: one entry says all that is known of an op, by the op object.

    op(aten.linear.default, "... i, o i, o -> ... o", product(Compute(("input",), "weight", 0, "bias")))
                                                                  operands are the op's tensors, in schema order
    @op(aten.cat.default, facts=moves(Rescale()))                 parameters are the op's own schema:
    def cat(tensors: list[Axes], dim: int = 0) -> Axes: ...       tensors as Axes, lengths as sizes, the rest as is

A function that also takes `call` is handed the Call: shapes of the results, and what to tell later passes. A function
returns the axes of the result; of several results, a list of the axes of each.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any, TypeAlias, TypeVar, cast, get_args, overload

import torch

from graphcomp.coupling import notation
from graphcomp.coupling.axis import Axes, Axis
from graphcomp.errors import RuleError, first_line
from graphcomp.ir.taught import TAUGHT, forgetting
from graphcomp.ops.call import Call
from graphcomp.ops.facts import UNANSWERED, ZEROS_ADD_NOTHING, Facts, Float, Integer, Scales, in_float, renamed
from graphcomp.ops.fit import check_fit, is_written, overloads_of, tensors_of
from graphcomp.torch_compat import OpOverload, schema_of

Result: TypeAlias = Axes | list[Axes] | None
RuleFunction: TypeAlias = Callable[..., Result]
OpKey: TypeAlias = OpOverload | str
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One registration.

    Attributes:
        rule: the coupling rule; None: there is none.
        facts: the other answers.
        text: the rule in notation; "" where the rule is a function.
        fix: of an op without a rule: what to do instead.
    """

    rule: RuleFunction | None
    facts: Facts
    text: str = ""
    fix: str = ""


NOTHING_KNOWN = Entry(None, UNANSWERED)

_ENTRIES: dict[OpKey, Entry] = {}
_BUILT_IN: set[OpKey] = set()
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
            decorator of a rule in Python (see `rule`), or with that function last. An op is an OpOverload
            (`torch.ops.aten.cat.default`) or, where it may not be there yet, "mylib::op", which stands for all its
            overloads.
        integer: how the op behaves on integers: one of `graphcomp.ops.facts.Integer`, or "like aten::linear", whose
            tensors stand in the same order. Without an answer the op stays float, and the report names the op.
        masked: of an op that takes statistics over dims that its rule contracts: a function of a 0/1 mask, which
            broadcasts with the first operand that the rule contracts, and the op's arguments by name, that returns what
            the op would return had the masked units never existed.
        macs: multiply-accumulates of an op whose rule in notation does not tell them: the letters whose lengths are
            multiplied, or several of these, which are added: ("h s t d", "h s t e"). (): the op has none. An op that no
            rule says a product of is not counted, and named, until `macs` says so.
        keeps_zeros: whether the op returns the elements of its one operand, zeros where zeros were.
        scales: how the op lets a scale per channel through, see `graphcomp.ops.facts.Scales`.
        facts: answers to start from.

    Returns:
        A decorator of a rule in Python, where no rule is given.

    Raises:
        RuleError: the notation is malformed, an answer is not one of its kind or does not fit the op, or the op has an
            entry already.

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
    if coupling is None and len(keys) > 1 and _is_rule(keys[-1]):
        function = keys.pop()
    if not keys:
        raise RuleError("op() needs at least one op", fix='op("mylib::op", "n c, c -> n c")')
    for key in keys:
        _check_key(key)
    if coupling is not None:
        _check_masked(coupling, answers)
        function, answers = _from_notation(coupling, macs), _summing(coupling, macs, answers)
    elif macs is not None:
        answers = _without_products(macs, answers)

    def decorate(rule: F) -> F:
        for key in keys:
            _register(key, Entry(rule, answers, coupling or ""))
        return rule

    if function is not None:
        decorate(function)
    return decorate


@overload
def rule(op: OpKey, text: str, /) -> None: ...  # type: ignore[overload-overlap]
@overload
def rule(*ops: OpKey) -> Callable[[F], F]: ...


def rule(*args: Any) -> Any:
    """Say how an op couples the dims of its operands and results: the short form of `op`.

    A rule is a line in notation, or a function in Python. The parameters of the function are arguments of the op, by
    their names in the schema, those that matter. A tensor arrives as a tuple with one axis per dim; a list of tensors
    as a list of such tuples, None as None, a length as a number, anything else as the call has it. The function returns
    one axis per dim of the result, or a list with the axes of each of several results: the very axes of an operand
    where the result has the operand's units at the same places. Two dims whose units live and die together are coupled
    (`graphcomp.coupling.axis.couple`). With a parameter `call`, the function says the rest:

        call.freeze(axes)             no unit of these may go: the op reads by position
        call.contract("w", dim)       the op sums over this dim of the argument `w`: masks stand there
        call.multiply(axes, "x", "w") one multiply-accumulate per index of `axes`
        call.lengths["n"] = axis      the argument `n` is the length of this axis

    Args:
        args: one op and its rule in notation (see `graphcomp.coupling.notation`), or one or more ops: a decorator.
            An op is an OpOverload (`torch.ops.aten.cat.default`) or, where it may not be there yet, "mylib::op",
            which stands for all its overloads.

    Raises:
        RuleError: the notation is malformed, or the op has a rule already.

    Example:
        >>> graphcomp.rule("mylib::swish_scale", "n c h w, c -> n c h w")

        >>> @graphcomp.rule("mylib::linear")
        ... def linear(x, w, *, call):
        ...     couple(x[-1], w[1], call.why)
        ...     call.contract("w", 1)
        ...     call.multiply((*x, w[0]), "x", "w")
        ...     return (*x[:-1], w[0])
    """
    if not args:
        raise RuleError("rule() needs at least one op", fix='rule("mylib::op", "n c, c -> n c")')
    decorator = op(*args)
    return None if len(args) == 2 and isinstance(args[1], str) and "->" in args[1] else decorator


def refuse(*ops: OpKey, why: str, facts: Facts | None = None, fix: str = "") -> None:
    """Say why ops have no coupling rule: they are unknown ops, with this reason.

    Args:
        ops: the ops.
        why: the reason.
        facts: the other answers; None: computed in float, sums nothing away.
        fix: what to do instead.
    """
    for key in ops:
        _register(key, Entry(None, facts or in_float(why), fix=fix))


def seal() -> None:
    """Note that every entry so far is graphcomp's own: those to come are users'."""
    _BUILT_IN.update(_ENTRIES)


def _register(key: OpKey, entry: Entry) -> None:
    _check_key(key)
    if _BUILT_IN:
        for overload_ in [key] if isinstance(key, OpOverload) else overloads_of(key):
            _checked(overload_, entry)
        if callable(entry.facts.masked):
            entry = replace(entry, facts=replace(entry.facts, masked=_guarded(entry.facts.masked, str(key))))
        TAUGHT.add(key)
    _ENTRIES[key] = entry
    _known.cache_clear()


def _is_rule(found: Any) -> bool:
    return callable(found) and not isinstance(found, (str, OpOverload))


def _check_key(key: Any) -> None:
    """Refuse what names no op, and an op that has an entry.

    Raises:
        RuleError: `key` is no op, or the op has an entry already.
    """
    if not isinstance(key, (OpOverload, str)) or (isinstance(key, str) and not re.fullmatch(r"\w+::\w+", key)):
        overload_ = re.fullmatch(r"(\w+)::(\w+)\.(\w+)", key) if isinstance(key, str) else None
        fix = "pass torch.ops.lib.op.overload, or 'lib::op'; a rule in notation has one '->'"
        if overload_:
            name, spelt = "::".join(overload_.groups()[:2]), ".".join(overload_.groups())
            fix = f"{name!r}, which stands for all overloads, or torch.ops.{spelt}"
        raise RuleError(f"{key!r} is not an op", fix=fix)
    others = [key, schema_of(key).name] if isinstance(key, OpOverload) else [key, *overloads_of(key)]
    there = next((other for other in others if other in _ENTRIES), None)
    if there is None:
        return
    if there in _BUILT_IN:
        raise RuleError(
            f"{key} has a coupling rule already",
            why=f"graphcomp knows {there}",
            fix="teach an op of your own; a rule of graphcomp's that is wrong is a bug, please report it",
        )
    raise RuleError(
        f"{key} has a coupling rule already",
        why="one registration says all that is known of an op",
        fix=f"{forgetting(there)}, then all answers at once: graphcomp.op({there!r}, rule, integer=…, macs=…)",
    )


def text_of(op: OpOverload) -> str:
    """Return the rule of `op` in notation; "" where there is none, or where it is a function."""
    return _entry(op).text


def _check_masked(coupling: str, facts: Facts) -> None:
    """Refuse a masked form that no mask reaches.

    Raises:
        RuleError: the rule contracts nothing.
    """
    if callable(facts.masked) and not notation.parse(coupling).contracted:
        raise RuleError(
            "masked= is never called: the rule contracts nothing",
            why=f"masks stand on letters that stand on the left only, and {coupling!r} has none",
            fix="a rule in Python that says which dim the statistics are over: call.contract('x', dim)",
        )


def _without_products(macs: Any, facts: Facts) -> Facts:
    """Answer for a rule in Python that the op has no multiply-accumulates.

    Raises:
        RuleError: `macs` holds letters, which are those of a rule in notation.
    """
    if isinstance(macs, str) or not isinstance(macs, Sequence) or len(macs):
        raise RuleError(
            f"macs must be () for a rule in Python, got {macs!r}", fix="call.multiply(axes, 'x', 'w') in the rule"
        )
    return replace(facts, sums=facts.sums or "products", masked=facts.masked or ZEROS_ADD_NOTHING)


def _guarded(form: Callable[..., Any], op: str) -> Callable[..., Any]:
    """Return a user's masked form, whose failures name the op."""

    @wraps(form)
    def guarded(mask: Any, **arguments: Any) -> Any:
        try:
            return form(mask, **arguments)
        except Exception as error:
            raise RuleError(
                f"the masked form of {op} failed",
                why=f"{type(error).__name__}: {first_line(error)}",
                fix="masked= takes a mask, and the op's arguments by name, and returns what the op returns",
            ) from error

    return guarded


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
    _BUILT_IN.discard(op)
    TAUGHT.discard(op)
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
    return _checked(op, _entry(op))


def _checked(op: OpOverload, entry: Entry) -> Entry:
    """Return `entry` with the integer form by the names of the op's arguments.

    Raises:
        RuleError: an answer does not fit the schema of `op`.
    """
    integer = entry.facts.integer
    if isinstance(integer, str):
        entry = replace(entry, facts=replace(entry.facts, integer=_integer_like(op, integer)))
    check_fit(op, entry.facts, entry.text)
    return entry


def _entry(op: OpOverload) -> Entry:
    key = _key(op)
    if key is not None:
        return _ENTRIES[key]
    return next((entry for holds, entry in _FAMILIES if holds(op)), NOTHING_KNOWN)


def _key(op: OpOverload) -> OpKey | None:
    """Return what `op` has an entry under; None where the op has none of its own."""
    return next((key for key in (op, schema_of(op).name) if key in _ENTRIES), None)


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
    names = dict(zip(tensors_of(other), tensors_of(op), strict=False))
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
    if isinstance(result, tuple) or (result and all(isinstance(axis, get_args(Axis)) for axis in result)):
        return [cast(Axes, tuple(result))]
    return [tuple(axes) for axes in result]


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
        names = tensors_of(call.node.target)[: len(parsed.operands)]
        if not call.shapes:
            _check_written(call, parsed, names)
        return call.einsum(text, None, counted, **{name: arguments.get(name) for name in names})

    return from_notation


def _check_written(call: Call, rule: notation.Notation, names: Sequence[str]) -> None:
    """Refuse a rule of an op without results that does not say how what the op writes into comes out.

    Raises:
        RuleError: the right side is not that of the operands that are written into.
    """
    written = [argument.name for argument in schema_of(call.node.target).arguments if is_written(argument)]
    patterns = dict(zip(names, rule.operands, strict=False))
    wanted = [patterns[name] for name in written if name in patterns]
    if wanted and list(rule.results) != wanted:
        left = rule.text.partition("->")[0].strip()
        right = ", ".join(left.split(",")[names.index(name)].strip() for name in written if name in patterns)
        raise RuleError(
            f"the op writes into {', '.join(written)}, and the rule {rule.text!r} does not end in the axes of that",
            at=call.why.source,
            fix=f'"{left} -> {right}"',
        )
