"""One op node while its coupling rule runs, and what the rule says of the op beyond the axes of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import fx

from graphcomp.coupling import notation
from graphcomp.coupling.axis import Axes, Axis, Reason, freeze, mark
from graphcomp.coupling.size import Size
from graphcomp.errors import RuleError

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
    strides: int = 1
    """of what the strides of the operand must be multiples, but for the last dim's"""
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

    def einsum(
        self,
        text: str,
        sizes: Mapping[str, Size] | None = None,
        counted: Sequence[Sequence[str]] | None = None,
        /,
        **operands: Axes | None,
    ) -> list[Axes]:
        """Apply a rule in notation to the arguments given by name; contractions and products are noted. The data that
        weights are multiplied with are the first activation."""
        parsed = notation.parse(text)
        if len(parsed.operands) != len(operands):
            raise RuleError(f"rule {text!r} has {len(parsed.operands)} operands and got {len(operands)}")
        names = list(operands)
        data = next((k for k, name in enumerate(names) if name in self.activations), 0)
        applied = notation.apply(parsed, list(operands.values()), self.shapes, self.why, sizes, counted, data)
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


class AxesValue(tuple[Axis, ...]):
    """The axes of one tensor argument; a class of its own, so that it is not taken for a tuple of numbers."""
