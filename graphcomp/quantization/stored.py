"""What a quantizer stores of a tensor, in one of two forms, each of which writes itself into a lowered graph.

    Affine     codes, scale, zero point: value = (code - zero_point) * scale
    Codebook   codes and a table of values: value = table[code]

Passes ask a stored tensor, and never which of the two it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graphcomp.cost.conventions import Codes
from graphcomp.errors import PlanError
from graphcomp.ir.graph import bind, value
from graphcomp.ir.rewrite import Maker, before, replace_node
from graphcomp.quantization import ops
from graphcomp.quantization.spec import MIN_BITS, QuantSpec
from graphcomp.torch_compat import schema_of

aten = torch.ops.aten

SMALLEST_STEP = torch.finfo(torch.float32).tiny
"""The floor of every step: the smallest normal float32, so that dividing by it loses no precision."""

LOOKUP_OF = "lookup_of"
"""Key in `meta` of a lookup in codes: the name of the lookup in floats whose place it takes."""

KERNEL_BITS = 7
"""Bits of a code that was shifted (see `biases`)."""


@dataclass(frozen=True)
class Writer:
    """Writes nodes and tensors into a lowered graph.

    Attributes:
        module: the graph.
        make: makes nodes where the tensor is quantized in the fake-quant graph.
        pack: whether codes of few bits are stored end to end.
    """

    module: fx.GraphModule
    make: Maker
    pack: bool = True

    def buffer(self, name: str, tensor: Tensor) -> fx.Node:
        """Return the node of a new buffer, laid out as when read from a file: sums of another order round otherwise."""
        return self.make.tensor(self.module, name, tensor.detach().clone(memory_format=torch.contiguous_format))

    def cast(self, node: fx.Node) -> fx.Node:
        """Return `node` in the dtype of the model: what integers stand for is float32."""
        return cast(self.make, node, value(self.make.like).dtype)


def cast(make: Maker, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return `node` in `dtype`."""
    return node if value(node).dtype == dtype else make(aten.to.dtype, node, dtype)


class Written(Protocol):
    """A stored tensor in a lowered graph.

    Attributes:
        stored: the tensor as its codes stand there, shifted or not.
    """

    @property
    def stored(self) -> Stored: ...

    def floats(self) -> fx.Node:
        """Return a new node of the floats, in the dtype of the model."""

    def look_up(self, user: fx.Node) -> None:
        """Write a lookup in the codes in the place of `user`, a lookup in the floats."""


class Stored(Protocol):
    """A tensor as a quantizer stores the tensor.

    Attributes:
        values: codes from quant_min to quant_max, in the smallest integer dtype that holds the codes.
        quant_min, quant_max: lowest and highest code.
        dim: which dim of `values` has parameters of its own per index; None: one set of parameters for all.
    """

    @property
    def values(self) -> Tensor: ...
    @property
    def quant_min(self) -> int: ...
    @property
    def quant_max(self) -> int: ...
    @property
    def dim(self) -> int | None: ...

    @property
    def step(self) -> Tensor | None:
        """() or (c,) that every value is a whole multiple of, the code of 0 being 0: of such weights an integer kernel
        adds the bias. None without."""

    def dequantize(self) -> Tensor:
        """Return the floats, in the dtype of the parameters."""

    def computable(self) -> Stored:
        """Return the same floats from codes in a dtype that torch computes with."""

    def times(self, factor: Tensor, dim: int) -> Stored:
        """Return the tensor times `factor`, (c,) along `dim`, exact but for the rounding of parameters.

        `self.dim` is None or `dim`.
        """

    def on_spec(self) -> Stored:
        """Return the same floats from the codes of a quantizer that `spec` describes."""

    @property
    def spec(self) -> QuantSpec:
        """How a quantizer gives these codes, as those of `on_spec`."""

    def counted(self) -> Codes:
        """Return the codes, as the conventions of storage count codes."""

    def write(self, to: Writer, stem: str, shift: int = 0) -> Written:
        """Write codes and parameters into a lowered graph.

        Args:
            stem: names of tensors begin with.
            like: the fake-quant node.
            shift: places to shift codes by, where `step` is not None.
        """


# ------------------------------------------------------------------------------------------------ codes
def spread(parameter: Tensor, rank: int, dim: int | None, groups: Tensor | None = None) -> Tensor:
    """A per-tensor (), per-channel (c,) or per-group (c, g) parameter, viewed to broadcast with a tensor of `rank`.

    Per group, `dim` is 0 and the groups divide the last dim.
    """
    if dim is None:
        return parameter
    if groups is not None:
        return parameter[:, groups].view(parameter.shape[0], *[1] * (rank - 2), groups.shape[0])
    return parameter.view([-1 if d == dim else 1 for d in range(rank)])


def container(quant_min: int, quant_max: int) -> torch.dtype:
    """The smallest integer dtype that holds the codes."""
    for dtype in (torch.uint8, torch.int8, torch.uint16, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= quant_min and quant_max <= info.max:
            return dtype
    return torch.int32


def stored_bits(quant_min: int, quant_max: int) -> int:
    """Bits of a code that is packed: two at least."""
    return max(max(quant_max, -1 - quant_min).bit_length() + (quant_min < 0), min(ops.PACKED_BITS))


def write_codes(to: Writer, stem: str, own: Stored, shifted: Stored, shift: int) -> fx.Node:
    """Return the node of the codes of `shifted`, packed as those of `own` and unpacked where the codes are narrow."""
    bits = stored_bits(own.quant_min, own.quant_max)
    if bits > max(ops.PACKED_BITS) or not to.pack:
        return to.buffer(f"{stem}_codes", shifted.values)
    packed = to.buffer(f"{stem}_codes", ops.pack(own.values, bits))
    arguments = (packed, list(own.values.shape), bits, own.quant_min < 0, *([shift] if shift else []))
    return to.make(torch.ops.graphcomp.unpack.default, *arguments)


# ------------------------------------------------------------------------------------------------ evenly spaced
@dataclass(frozen=True)
class Affine:
    """Evenly spaced values: value = (values - zero_point) * scale, bit for bit what the quantizer's forward returns.

    Attributes:
        values: codes from quant_min to quant_max, in the smallest of uint8, int8, uint16, int16 that holds them.
        scale: () float, or (c,) along `dim`, or (c, groups) where `groups` is set. Units of the tensor per code.
        zero_point: as `scale`, int32; the code of 0.
        quant_min, quant_max: the lowest and highest code.
        dim: which dim of `values` has one scale per index; None: one scale for all.
        groups: (i,) int64, for each index of the dim after `dim` (the last) the column of `scale`; None without groups.
        widths: (c,) int64, bits of each channel, where channels have bits of their own; None: all have the same.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    dim: int | None = None
    groups: Tensor | None = None
    widths: Tensor | None = None

    def __repr__(self) -> str:
        return f"Affine({_shown(self.values)} from {self.quant_min} to {self.quant_max}, scale {_shown(self.scale)})"

    def dequantize(self) -> Tensor:
        """The floats, in the dtype of `scale`."""
        scale, zero = (spread(t, self.values.dim(), self.dim, self.groups) for t in (self.scale, self.zero_point))
        return (self.values.to(self.scale.dtype) - zero) * scale

    @property
    def step(self) -> Tensor | None:
        """`scale`, of one or one per channel, without zero points."""
        return None if self.groups is not None or bool((self.zero_point != 0).any()) else self.scale

    def computable(self) -> Affine:
        """Return int16 codes in place of uint16, which torch cannot subtract a zero point from."""
        return self.moved(-(self.quant_max + 1) // 2) if self.values.dtype is torch.uint16 else self

    def moved(self, offset: int) -> Affine:
        """Return the same floats from codes that are `offset` higher."""
        low, high = self.quant_min + offset, self.quant_max + offset
        values = (self.values.to(torch.int32) + offset).to(container(low, high))
        return replace(self, values=values, zero_point=self.zero_point + offset, quant_min=low, quant_max=high)

    def shifted(self, shift: int) -> Affine:
        """Return the same floats from codes that are shifted by so many places."""
        if shift == 0:
            return self
        low, high = self.quant_min << shift, self.quant_max << shift
        assert max(high, -1 - low).bit_length() < KERNEL_BITS and not bool(self.zero_point.any())
        values = (self.values.to(torch.int32) << shift).to(torch.int8)
        return replace(self, values=values, scale=self.scale / 2**shift, quant_min=low, quant_max=high)

    def times(self, factor: Tensor, dim: int) -> Affine:
        """Let the scale take the magnitude of `factor`; the codes stay, but that a negative factor mirrors the codes.

        The factor 0 clears the codes; the channel keeps its scale, which is as good as any.
        """
        rank, zero, scale = self.values.dim(), self.zero_point, self.scale
        old_zero = spread(zero, rank, self.dim, self.groups)
        magnitude, along = torch.where(factor == 0, 1.0, factor.abs()), self.dim
        if along is not None or bool((magnitude != 1).any() or (factor < 0).any()):
            along = dim
            if self.groups is not None:
                magnitude, factor = magnitude[:, None], factor[:, None]
            scale = (scale.double() * magnitude).to(scale.dtype).clamp(min=SMALLEST_STEP)
            zero = torch.where(factor < 0, self.quant_min + self.quant_max - zero, zero)
            zero = zero.expand_as(scale).contiguous()
        sign = spread(factor.flatten().sign().to(torch.int32), rank, dim)
        values = (self.values.to(torch.int32) - old_zero) * sign + spread(zero, rank, along, self.groups)
        return replace(self, values=values.to(self.values.dtype), scale=scale, zero_point=zero, dim=along)

    def on_spec(self) -> Affine:
        """Return codes as narrow as before a shift, about 0 or from 0 up."""
        shift = (self.quant_max & -self.quant_max).bit_length() - 1
        low, high = self.quant_min >> shift, self.quant_max >> shift
        middle = (low + high) // 2
        offset = middle if (low + high) % 2 == 0 and bool((self.zero_point == middle).all()) else low
        return replace(
            self,
            values=(self.values.to(torch.int32) >> shift) - offset,
            scale=self.scale * 2**shift,
            zero_point=self.zero_point - offset,
            quant_min=low - offset,
            quant_max=high - offset,
        )

    @property
    def spec(self) -> QuantSpec:
        """Symmetric where there are codes below 0."""
        symmetric = self.quant_min < 0
        bits = max(self.quant_max.bit_length() + symmetric, MIN_BITS)
        if self.groups is not None:
            size = -(-self.groups.numel() // self.scale.shape[1])
            return QuantSpec(bits, symmetric=symmetric, granularity="group", group_size=size)
        if self.widths is not None:
            return QuantSpec(bits, granularity="channel", kind="mixed")
        return QuantSpec(bits, symmetric=symmetric, granularity="tensor" if self.dim is None else "channel")

    def counted(self) -> Codes:
        """Return the codes, with a step for each scale."""
        zero = spread(self.zero_point, self.values.dim(), self.dim, self.groups)
        return Codes(self.values, (self.quant_max - self.quant_min).bit_length(), zero, self.scale.numel())

    def counted_by_width(self) -> dict[int, Codes]:
        """Return the codes of the channels of each width, by width: in as many bits as the channels have.

        Codes of a channel lie within the width of the channel, and the zero point is 0.
        """
        assert self.widths is not None and self.dim is not None
        found = {}
        for width in sorted(set(self.widths.tolist())):
            channels = (self.widths == width).nonzero().flatten()
            values = self.values.index_select(self.dim, channels.to(self.values.device))
            found[width] = Codes(values, width, 0, len(channels))
        return found

    def write(self, to: Writer, stem: str, shift: int = 0) -> Written:
        """Write codes, scales and zero points."""
        stored = self.shifted(shift)
        codes = write_codes(to, stem, self, stored, shift)
        scale = to.buffer(f"{stem}_scale", stored.scale)
        zero = to.buffer(f"{stem}_zero_point", stored.zero_point.to(torch.int32))
        return _WrittenAffine(stored, to, stem, codes, scale, zero)


@dataclass(frozen=True)
class _WrittenAffine:
    stored: Affine
    to: Writer
    stem: str
    codes: fx.Node
    scale: fx.Node
    zero: fx.Node

    def floats(self) -> fx.Node:
        """Return a dequantize node."""
        return self.to.cast(self._dequantize())

    def _dequantize(self) -> fx.Node:
        stored, make = self.stored, self.to.make
        bounds = (stored.quant_min, stored.quant_max, stored.values.dtype)
        parameters = (self.codes, self.scale, self.zero)
        if stored.groups is not None:
            groups = self.to.buffer(f"{self.stem}_groups", stored.groups)
            return make(torch.ops.graphcomp.dequantize_grouped.default, *parameters, groups)
        if stored.dim is not None:
            return make(ops.dequantize_per_channel, *parameters, stored.dim, *bounds)
        numbers = (float(stored.scale), int(stored.zero_point))
        return make(ops.dequantize_per_tensor, self.codes, *numbers, *bounds)

    def look_up(self, user: fx.Node) -> None:
        """embedding(dequantized table, ids) -> (embedding(codes, ids) - zero point) * scale of the row."""
        stored, make = self.stored, before(user)
        assert stored.groups is None, "an embedding has one scale per row or one in all"
        arguments = bind(user)
        rest = tuple(arguments[a.name] for a in schema_of(user.target).arguments[1:])
        row = make(user.target, self.codes, *rest)
        row.meta[LOOKUP_OF] = user.name
        row = make(aten.to.dtype, row, stored.scale.dtype)
        if bool((stored.zero_point != 0).any()):
            row = make(aten.sub.Tensor, row, self._row(self.zero, rest, make))
        row = make(aten.mul.Tensor, row, self._row(self.scale, rest, make))
        replace_node(user, cast(make, row, value(user).dtype))

    def _row(self, parameter: fx.Node, rest: tuple[Any, ...], make: Maker) -> fx.Node:
        if self.stored.dim is None:
            return parameter
        return make(make.like.target, make(aten.view.default, parameter, [-1, 1]), *rest)


# ------------------------------------------------------------------------------------------------ a table of values
@dataclass(frozen=True)
class Codebook:
    """Any few values: value = table[values], bit for bit what the quantizer's forward returns.

    Attributes:
        values: uint8, codes from 0 to levels - 1, any shape.
        table: (levels,) float, or (c, levels) where `dim` is set.
        dim: which dim of `values` has one table per index; None: one table for all.
    """

    values: Tensor
    table: Tensor
    dim: int | None = None

    def __repr__(self) -> str:
        return f"Codebook({_shown(self.values)}, table {_shown(self.table)})"

    @property
    def quant_min(self) -> int:
        """The lowest code."""
        return 0

    @property
    def quant_max(self) -> int:
        """The highest code."""
        return int(self.table.shape[-1]) - 1

    @property
    def step(self) -> Tensor | None:
        """None: values are multiples of no common step."""
        return None

    def dequantize(self) -> Tensor:
        """The floats, in the dtype of `table`."""
        return ops.in_table(self.values, self.table, self.dim)

    def computable(self) -> Codebook:
        """Return the tensor itself."""
        return self

    def times(self, factor: Tensor, dim: int) -> Codebook:
        """Let the tables take `factor`. Where `factor` is 0, every value of the table is 0, and every code is 0."""
        tables = self.table.double() * factor[:, None]
        tables = torch.where(factor[:, None] == 0, 0.0, tables).to(self.table.dtype)
        cleared = spread(factor == 0, self.values.dim(), dim)
        return replace(self, values=self.values.masked_fill(cleared, 0), table=tables, dim=dim)

    def on_spec(self) -> Codebook:
        """Return the tensor itself."""
        return self

    @property
    def spec(self) -> QuantSpec:
        """Ternary with a scale on each side of 0: what gives tables of three values."""
        return QuantSpec(kind="ternary", symmetric=False, granularity="tensor" if self.dim is None else "channel")

    def counted(self) -> Codes:
        """Return the codes, with a step for each value of a table but 0."""
        zero = (self.table == 0).to(torch.int32)
        code = torch.where(zero.any(-1), zero.argmax(-1), self.quant_max + 1).to(torch.int32)
        bits, steps = self.quant_max.bit_length(), int((zero == 0).sum())
        return Codes(self.values, bits, spread(code, self.values.dim(), self.dim), steps)

    def write(self, to: Writer, stem: str, shift: int = 0) -> Written:
        """Write codes and tables."""
        assert shift == 0, "codes of a table are no numbers"
        codes = write_codes(to, stem, self, self, 0)
        return _WrittenCodebook(self, to, codes, to.buffer(f"{stem}_table", self.table))


@dataclass(frozen=True)
class _WrittenCodebook:
    stored: Codebook
    to: Writer
    codes: fx.Node
    table: fx.Node

    def floats(self) -> fx.Node:
        """Return a node that looks the codes up."""
        arguments = (self.codes, self.table, *(() if self.stored.dim is None else (self.stored.dim,)))
        return self.to.cast(self.to.make(ops.LOOK_UP, *arguments))

    def look_up(self, user: fx.Node) -> None:
        """Refuse.

        Raises:
            PlanError: always.
        """
        raise PlanError(
            "an embedding cannot be stored as codes of a table of values",
            at=str(user.target),
            why="rows are looked up as integers with a scale",
            fix='QuantConfig(embeddings=QuantSpec(kind="ternary")), whose levels are multiples of one scale',
        )


def _shown(tensor: Tensor) -> str:
    """Return dtype and shape, in place of the values."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
