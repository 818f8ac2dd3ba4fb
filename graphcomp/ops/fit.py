"""Whether what is said of an op fits the op: names of arguments, operands of the rule, the form of a masked form."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from graphcomp.coupling import notation
from graphcomp.coupling.notation import Pattern, parse
from graphcomp.errors import RuleError
from graphcomp.ops.facts import Clip, Compute, Facts, Float, Lookup, Move
from graphcomp.torch_compat import OpOverload, OpOverloadPacket, schema_of

CONVOLUTION_ARGUMENTS = frozenset({"input", "weight", "bias", "stride", "padding", "dilation", "groups"})
"""Arguments of torch's convolutions that passes over quantized graphs read by name."""

_TENSOR_TYPES = ("Tensor", "Optional[Tensor]")


def tensors_of(op: OpOverload) -> list[str]:
    """Return the names of the op's tensors, lists of tensors left out."""
    return [argument.name for argument in schema_of(op).arguments if str(argument.type) in _TENSOR_TYPES]


def is_written(argument: Any) -> bool:
    """Return whether an op writes into this argument of its schema."""
    return argument.alias_info is not None and argument.alias_info.is_write


def overloads_of(name: str) -> list[OpOverload]:
    """Return the overloads of "lib::op" that are there already, without those that write to out=."""
    library, _, rest = name.partition("::")
    packet = getattr(getattr(torch.ops, library), rest, None)
    if not isinstance(packet, OpOverloadPacket):
        return []
    found = (getattr(packet, overload) for overload in packet.overloads())  # type: ignore[no-untyped-call]
    return [overload for overload in found if not any(argument.is_out for argument in schema_of(overload).arguments)]


def check_fit(op: OpOverload, facts: Facts, text: str) -> None:
    """Refuse answers that do not fit the op.

    Args:
        op: the op.
        facts: the answers; the integer form by the names of the op's arguments.
        text: the rule in notation, "" without one.

    Raises:
        RuleError: a name is no argument of the op, the output channels of a weight stand elsewhere, or a masked form
            cannot be called as it will be.
    """
    integer = facts.integer
    if isinstance(integer, Compute) and integer.convolution:
        _check_convolution(op)
    _check_names(op, integer)
    if isinstance(integer, Compute) and text:
        _check_channels(op, integer, parse(text))
    if callable(facts.masked):
        _check_masked(op, facts.masked)


def _check_convolution(op: OpOverload) -> None:
    """Refuse a convolution whose arguments have other names than those of torch's convolutions: passes read them."""
    missing = CONVOLUTION_ARGUMENTS - {argument.name for argument in schema_of(op).arguments}
    if missing:
        raise RuleError(
            f"{op} is a convolution on integers and has no argument {', '.join(sorted(missing))}",
            fix="name the op's arguments as those of aten::conv2d, or leave integer= out",
        )


def _check_names(op: OpOverload, integer: object) -> None:
    every = [argument.name for argument in schema_of(op).arguments]
    for field, name, of_tensor in _named(integer):
        among = tensors_of(op) if of_tensor else every
        if name not in among:
            what, article = ("tensor", "a") if of_tensor else ("argument", "an")
            raise RuleError(
                f"{field} of {type(integer).__name__} must be {article} {what} of {op}, got {name!r}",
                why=f"the {what}s of {op} are {', '.join(among) or 'none'}",
                fix=f"one of {', '.join(map(repr, among))}" if among else "leave integer= out",
            )
    if isinstance(integer, Lookup) and integer.weight != every[0]:
        raise RuleError(
            f"{op} does not look rows up as aten::embedding does",
            why=f"the table must be the first argument, got {integer.weight!r} of {', '.join(every)}",
            fix="leave integer= out",
        )


def _named(integer: object) -> Iterator[tuple[str, Any, bool]]:
    """Yield the field, the name and whether a tensor must stand there, of each argument that an integer form names."""
    if isinstance(integer, Compute):
        data = integer.data if isinstance(integer.data, (tuple, list)) else (integer.data,)
        named = [*(("data", name) for name in data), ("weight", integer.weight), ("bias", integer.bias)]
        yield from ((field, name, True) for field, name in named if name != "")
    elif isinstance(integer, Move):
        yield "operand", integer.operand, True
    elif isinstance(integer, Lookup):
        yield "weight", integer.weight, True
    elif isinstance(integer, Clip):
        ends = (("low", integer.low), ("high", integer.high))
        yield from ((field, end, False) for field, end in ends if isinstance(end, str))
    elif isinstance(integer, Float) and integer.rows:
        yield "rows", integer.rows, True


def _check_channels(op: OpOverload, integer: Compute, rule: notation.Notation) -> None:
    """Refuse a weight whose dim `out` is not the dim of the result that counts the output channels."""
    patterns = dict(zip(tensors_of(op), rule.operands, strict=False))
    pattern, result = patterns.get(integer.weight), rule.results[0].dims
    if pattern is None or not result:
        return
    channels = result[1 if integer.convolution and len(result) > 1 else -1]
    at = _item(pattern, integer.out)
    if at == channels or (integer.convolution and at is not None and set(at) <= rule.kept):
        return
    raise RuleError(
        f"dim {integer.out} of {integer.weight!r} must count the output channels of {op}, got {_spelt(at)}",
        why=f"the output channels of the rule {rule.text!r} are {_spelt(channels)}",
        fix=_right_form(patterns, channels, rule),
    )


def _item(pattern: Pattern, dim: int) -> str | tuple[str, ...] | None:
    """Return the item of a pattern that stands for `dim`; None where no item does."""
    dims = pattern.dims if dim >= 0 else pattern.dims[::-1]
    at = dim if dim >= 0 else -1 - dim
    open_at = next((k for k, item in enumerate(dims) if notation.is_open(item)), len(dims))
    return dims[min(at, open_at)] if min(at, open_at) < len(dims) else None


def _spelt(item: str | tuple[str, ...] | None) -> str:
    if item is None:
        return "no dim"
    return repr(item) if isinstance(item, str) else f"'({' '.join(item)})'"


def _right_form(patterns: dict[str, Pattern], channels: object, rule: notation.Notation) -> str:
    """Return the integer form that the rule tells: the weight has the output channels and what is summed away."""
    for name, pattern in patterns.items():
        summed = pattern.letters() & rule.contracted
        data = [other for other, own in patterns.items() if other != name and summed & own.letters()]
        if channels in pattern.dims and data and "..." not in pattern.dims:
            return f"integer=Compute(({data[0]!r},), {name!r}, out={pattern.dims.index(channels)})"
    return "leave integer= out"


def _check_masked(op: OpOverload, form: Any) -> None:
    """Refuse a masked form that does not take a mask and the op's arguments by name."""
    names = [argument.name for argument in schema_of(op).arguments]
    try:
        inspect.signature(form).bind(None, **dict.fromkeys(names))
    except TypeError as error:
        raise RuleError(
            f"masked must take a mask and the arguments of {op} by name",
            why=str(error),
            fix=f"def masked(mask, {', '.join(names)}): …",
        ) from error
