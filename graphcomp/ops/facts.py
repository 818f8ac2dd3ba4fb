"""What is known of an op beside its coupling rule: how it behaves on integers, what it sums, what it lets through.

Each question has an answer for every op of graphcomp's own, if only "no". None is no answer: the op is safe (frozen,
float, not counted) and named in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from torch import fx

Sums: TypeAlias = Literal["products", "totals", "statistics", "nothing"]
"""What an op sums away.

products     products of operands: multiply-accumulates; zeros in one operand take a unit out
totals       the elements of one operand: zeros take a unit out
statistics   elements that are counted, too, or compared: zeros do not take a unit out, a masked form does
nothing      nothing that a mask could stand on: what mixes indices is frozen
"""

Scales: TypeAlias = Literal["elements", "channels", "regrouped", "averaged", "added", "no"]
"""How f(s x) = s f(x) holds for a scale s > 0 per channel: element by element; within each index of dim 1; where the
channels are one dim of the result still; where no channels are averaged; where all operands are scaled alike; not."""


# ------------------------------------------------------------------------------------------------ on integers
@dataclass(frozen=True)
class Compute:
    """Multiplies and sums: the operands are quantized, and the result of a convolution.

    Attributes:
        data: arguments that are activations.
        weight: the argument that may be a constant.
        out: the dim of `weight` that counts the output channels.
        bias: the argument that is added per output channel.
        convolution: whether `weight` has dims of space behind the channels. No integer kernel returns floats.
        transposed: whether the convolution is transposed: `weight` holds one group's outputs.
    """

    data: tuple[str, ...]
    weight: str
    out: int = 0
    bias: str = ""
    convolution: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Move:
    """Moves or picks elements of one operand: what goes in on one scale comes out on that scale.

    Attributes:
        operand: the argument.
        pools: whether the largest of several elements is picked.
        pads: whether a constant is put around the elements.
    """

    operand: str = "self"
    pools: bool = False
    pads: bool = False


@dataclass(frozen=True)
class Rescale:
    """Has an integer kernel that rescales: the result is quantized where the operands are."""


@dataclass(frozen=True)
class Clip:
    """Clips: a part of the quantizer behind it.

    Attributes:
        low, high: the bound, or the argument that holds the bound. None: no bound.
    """

    low: float | str | None = None
    high: float | str | None = None

    def bounds(self, arguments: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """Return the bounds of a call, given its arguments by name; none where a bound is computed."""
        low, high = (arguments[end] if isinstance(end, str) else end for end in (self.low, self.high))
        if isinstance(low, fx.Node) or isinstance(high, fx.Node):
            return None, None
        return (None if low is None else float(low)), (None if high is None else float(high))


@dataclass(frozen=True)
class Fill:
    """Puts a constant in the place of elements, and computes in float."""


@dataclass(frozen=True)
class Lookup:
    """Looks rows up by number: the rows are quantized, one step each or one in all.

    Attributes:
        weight: the argument that holds the rows.
    """

    weight: str = "weight"


@dataclass(frozen=True)
class Fused:
    """Attention in one op: float, unless it is written out (`QuantConfig(attention=True)`)."""


@dataclass(frozen=True)
class Float:
    """Computes in float.

    Attributes:
        why: the reason.
        rows: the argument whose rows are looked up by number; "" where there is none.
    """

    why: str
    rows: str = ""


@dataclass(frozen=True)
class Routed(Float):
    """Multiplies each row of the first operand with one of the matrices of the second, and computes in float.

    Rows are sorted by matrix; the third operand says where the rows of each matrix end.
    """


Integer: TypeAlias = Compute | Move | Rescale | Clip | Fill | Lookup | Fused | Float


def renamed(integer: Integer, names: Mapping[str, str]) -> Integer:
    """Return `integer` for an op whose arguments have other names. An optional argument that is missing becomes ""."""
    changes: dict[str, Any] = {}
    for part in fields(integer):
        found = getattr(integer, part.name)
        if isinstance(found, tuple):
            changes[part.name] = tuple(names[name] for name in found)
        elif isinstance(found, str) and found and part.name != "why":
            changes[part.name] = names.get(found, "") if part.name == "bias" else names[found]
    return replace(integer, **changes)


# ------------------------------------------------------------------------------------------------ all of it
@dataclass(frozen=True)
class Facts:
    """The answers about one op. None is no answer.

    Attributes:
        integer: how the op behaves on integers; "like aten::linear": as that op does.
        sums: what the op sums away.
        masked: the form of an op that takes statistics in which masked units never existed (see `ops.masked`); or why
            the op needs none.
        keeps_zeros: whether the result holds the elements of the one operand, zeros where zeros were, in the same
            units: a mask on the operand need not be repeated behind the op.
        scales: how the op lets a scale per channel through.
        norm: whether an affine `weight` and `bias` scale and shift what was normalized.
    """

    integer: Integer | str | None = None
    sums: Sums | None = None
    masked: Callable[..., Any] | str | None = None
    keeps_zeros: bool | None = None
    scales: Scales | None = None
    norm: bool = False

    def unanswered(self) -> list[str]:
        """Return the questions without an answer."""
        return [part.name for part in fields(self) if getattr(self, part.name) is None]


UNANSWERED = Facts()

ZEROS_ADD_NOTHING = "zeros add nothing"
SUMS_NOTHING = "sums nothing away"


def in_float(why: str, rows: str = "", **answers: Any) -> Facts:
    """Return the facts of an op that computes in float and sums nothing away, but for `answers`."""
    facts = Facts(Float(why, rows), "nothing", SUMS_NOTHING, keeps_zeros=False, scales="no")
    return replace(facts, **answers)


def product(integer: Integer) -> Facts:
    """Return the facts of an op that multiplies and sums."""
    return Facts(integer, "products", ZEROS_ADD_NOTHING, keeps_zeros=False, scales="no")


def moves(integer: Integer, **answers: Any) -> Facts:
    """Return the facts of an op that moves elements, but for `answers`."""
    return replace(Facts(integer, "nothing", SUMS_NOTHING, keeps_zeros=False, scales="no"), **answers)
