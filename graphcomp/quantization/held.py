"""What a weight of integers holds: codes, scales, and what products were laid out for. Shared by all its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphcomp.quantization import ops
from graphcomp.quantization.dynamic import MIDDLE, integer_sums
from graphcomp.quantization.operand import Operand
from graphcomp.quantization.products import Product, product_of
from graphcomp.quantization.stored import Affine, stored_bits

KEPT_FLOAT = 2**18
"""Elements up to which floats are kept beside the codes once a product has read the weight: 1 MiB of float32. A product
in floats of so few elements takes less time than the steps around a product of integers."""


@dataclass(eq=False)
class Held:
    """Codes and scales of one weight.

    Attributes:
        given: codes as stored, four bits and fewer end to end, (bytes,) uint8; None once a product holds the codes in a
            layout of its own.
        shape: of the weight.
        scale: (), (c,) along `axis`, or (c, g) per group of the last dim.
        zero_point: int32 as `scale`; the code of 0.
        groups: (i,) int64, the group of each index of the last dim; None without groups.
        axis: dim with one scale per index; None: one scale.
        limits: lowest and highest code.
        stays: whether the codes stay beside products: rows are looked up (a tied table), or processes share them.
        floats: kept beside the codes of a small weight.
        sums: (o,) int32, of the codes of each output, once asked for.
        products: (weight is (o, i), dtype of the rows) -> kernel; None where no kernel takes the weight.
    """

    given: Tensor | None
    shape: torch.Size
    scale: Tensor
    zero_point: Tensor
    groups: Tensor | None
    axis: int | None
    limits: tuple[int, int]
    stays: bool = False
    floats: Tensor | None = None
    sums: Tensor | None = None
    products: dict[tuple[bool, torch.dtype], Product | None] = field(default_factory=dict)

    @staticmethod
    def of(stored: Affine) -> Held:
        """Return codes and scales, packed."""
        limits = stored.quant_min, stored.quant_max
        bits = stored_bits(*limits)
        given = ops.pack(stored.values, bits) if bits in ops.PACKED_BITS else stored.values
        return Held(given, stored.values.shape, stored.scale, stored.zero_point, stored.groups, stored.dim, limits)

    def check(self) -> None:
        """Check that codes and parameters fit one another, where they come from a file.

        Raises:
            ValueError: they do not.
        """
        given, (low, high), axis, scale = self.given, self.limits, self.axis, self.scale
        bits, count = stored_bits(low, high), self.shape.numel()
        assert given is not None
        fits = given.shape == (-(-count * bits // 8),) if bits in ops.PACKED_BITS else given.shape == self.shape
        if not fits or given.is_floating_point() or low > high:
            raise ValueError(f"codes {tuple(given.shape)} for {tuple(self.shape)}, of {bits} bits")
        if axis is not None and not 0 <= axis < len(self.shape):
            raise ValueError(f"axis {axis} of {tuple(self.shape)}")
        wanted: tuple[int, ...] = () if axis is None else (self.shape[axis],)
        if self.groups is not None:
            known = axis == 0 and self.groups.shape == self.shape[-1:] and scale.dim() == 2
            if not known or not _within(self.groups, scale.shape[1]):
                raise ValueError("groups do not fit the weight")
            wanted = (self.shape[0], scale.shape[1])
        if scale.shape != wanted or self.zero_point.shape != wanted or not scale.is_floating_point():
            found = tuple(scale.shape), tuple(self.zero_point.shape)
            raise ValueError(f"scales {found[0]} and zero points {found[1]}, not {wanted}")

    @property
    def bits(self) -> int:
        """Bits of a code, as the codes are stored."""
        return stored_bits(*self.limits)

    @property
    def packed(self) -> Tensor:
        """Return the codes as they are stored."""
        if self.given is not None:
            return self.given
        return ops.pack(self.codes, self.bits) if self.bits in ops.PACKED_BITS else self.codes

    @property
    def codes(self) -> Tensor:
        """Return the codes as integers of the weight's shape."""
        if self.given is None:
            (turned, _), product = next((key, p) for key, p in self.products.items() if p is not None)
            return product.codes() if turned else product.codes().t().contiguous()
        return self._unpacked(self.given, self.shape)

    def _unpacked(self, given: Tensor, shape: torch.Size) -> Tensor:
        if self.bits not in ops.PACKED_BITS:
            return given
        return ops.unpacked(given, shape, self.bits, self.limits[0] < 0)

    @property
    def stored(self) -> Affine:
        """Return codes and scales."""
        return Affine(self.codes, self.scale, self.zero_point, *self.limits, self.axis, self.groups)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the floats."""
        return self.stored.dequantize().to(dtype)

    def keep_codes(self) -> None:
        """Let the codes stay beside products: a product would make all of them anew each time they are asked for."""
        self.stays, self.given = True, self.packed

    def tensors(self) -> list[Tensor]:
        """Return all that is held in memory."""
        own = [self.given, self.scale, self.zero_point, self.groups, self.floats, self.sums]
        laid_out = [tensor for product in self.products.values() if product is not None for tensor in product.tensors()]
        return [tensor for tensor in (*own, *laid_out) if tensor is not None]

    # ------------------------------------------------------------------------------------------ rows of it
    def taken(self, pick: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor | None:
        """Return the floats of some indices of the first dim; None where those of all have to be made.

        Args:
            pick: from a tensor of the weight's first dim to one of the indices picked, their dims first.
        """
        own = self.shape[1:]
        if not self.shape or self.shape[0] == 0:
            return None
        given, packs = self.packed, self.bits in ops.PACKED_BITS
        if packs and own.numel() * self.bits % 8:
            return None
        chosen = pick(given.reshape(self.shape[0], -1))
        first = chosen.shape[:-1]
        codes = self._unpacked(chosen.reshape(-1), torch.Size((first.numel(), *own))) if packs else chosen
        scale, zero = self.scale, self.zero_point
        if self.axis == 0:
            tail = scale.shape[1:]
            scale, zero = (pick(t.reshape(self.shape[0], -1)).reshape(-1, *tail) for t in (scale, zero))
        codes = codes.reshape(first.numel(), *own)
        found = Affine(codes, scale, zero, *self.limits, self.axis, self.groups).dequantize().to(dtype)
        return found.view(*first, *own)

    # ------------------------------------------------------------------------------------------ products
    def times(self, rows: Tensor, turned: bool, operand: Operand | None) -> Tensor:
        """Return rows (…, i) times the weight, (…, o), in the dtype of the rows.

        Args:
            turned: the weight is (o, i); else (i, o).
            operand: how the rows are quantized; None: they stay floats.
        """
        flat = rows.reshape(-1, rows.shape[-1])
        if operand is not None:
            found = self._in_steps(flat.to(torch.promote_types(flat.dtype, torch.float32)), turned, operand)
            return found.to(rows.dtype).view(*rows.shape[:-1], found.shape[-1])
        if self.shape.numel() <= KEPT_FLOAT:
            if self.floats is None or self.floats.dtype is not rows.dtype:
                self.floats = self.dequantize(rows.dtype)
            return rows @ (self.floats.t() if turned else self.floats)
        product = self._product(turned, rows.dtype)
        if product is None:
            floats = self.dequantize(rows.dtype)
            return rows @ (floats.t() if turned else floats)
        found = product(flat)
        return found.view(*rows.shape[:-1], found.shape[-1])

    def _in_steps(self, rows: Tensor, turned: bool, operand: Operand) -> Tensor:
        """Return the product of codes: sums in 32 bits, times both scales."""
        signed, scale, zero = operand.signed(rows)
        codes, steps = self.codes, self.scale.to(rows.dtype)
        along = self.axis in (None, 0 if turned else 1) and self.groups is None
        if not along or codes.dtype is not torch.int8 or codes.device.type != "cpu" or self.shifted():
            whole = (signed.to(rows.dtype) - (zero - MIDDLE)) * scale
            floats = self.dequantize(rows.dtype)
            exact: Tensor = whole @ (floats.t() if turned else floats)
            return exact
        sums = integer_sums(signed, codes.t() if turned else codes)
        if zero != MIDDLE:
            if self.sums is None:
                self.sums = codes.sum(1 if turned else 0, dtype=torch.int32)
            sums.add_(self.sums, alpha=MIDDLE - int(zero))
        found = sums.to(rows.dtype)
        if isinstance(scale, Tensor) and scale.dim():
            return found.mul_(scale).mul_(steps)
        return found.mul_(steps * scale)

    def shifted(self) -> bool:
        """Return whether the code of 0 is another than 0."""
        return self.limits[0] >= 0 or bool(self.zero_point.any())

    def _product(self, turned: bool, dtype: torch.dtype) -> Product | None:
        key = (turned, dtype)
        if key not in self.products:
            self.products[key] = self._make(*key)
            if self.products[key] is not None and not self.stays:
                self.given = None  # the product holds the codes, in a layout of its own
        return self.products[key]

    def _make(self, turned: bool, dtype: torch.dtype) -> Product | None:
        if len(self.shape) != 2 or self.shifted() or self.axis not in (None, 0 if turned else 1):
            return None
        size = None
        if self.groups is not None:
            size = int((self.groups == 0).sum())
            if not torch.equal(self.groups, torch.arange(self.groups.numel(), device=self.groups.device) // size):
                return None
        codes = self.codes if turned else self.codes.t().contiguous()
        return product_of(codes, self.scale, self.bits, size, dtype)


def _within(groups: Tensor, count: int) -> bool:
    return groups.numel() == 0 or (int(groups.min()) >= 0 and int(groups.max()) < count)
