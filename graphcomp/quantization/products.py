"""Products of floats with integer weights on a CPU, without floats of the weight: one function per form of the weight.

Weight codes of eight bits stay integers. The other operand is written as three digits of seven bits, so that a product
in floats is three products of integers, whose sums are exact: the scheme of Ozaki et al. 2012 (Numerical Algorithms 59,
error-free splitting for matrix products), here with one scale for each row. The rounding of a row to 21 bits is the
only error: 2^-21 of the row's largest value for each element. Seven bits, and codes from 0 to 127, keep the sum of two
products in 16 bits, which CPUs without VNNI need.

Weight codes of four bits are multiplied by torch's kernel in bfloat16: operand and result are rounded to 2^-9 of each
element, sums are float32. Of many rows (a prompt) the kernel would take longer than floats: a row is then written as
two digits of eight bits (2^-16 of its largest value), and codes are unpacked to bytes a few outputs at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from graphcomp.torch_compat import (
    int4_products,
    int8_products,
    int_mm,
    pack_int4,
    pack_int8,
)

DIGIT = 7
"""Bits of a digit, from -64 to 63."""
BASE = 2**DIGIT
LARGEST = (BASE // 2 - 1) * (BASE**2 + BASE + 1)
"""The largest whole number that three digits hold."""

INT4_GROUPS = (256, 128, 64, 32)
"""Input indices with one scale that torch's kernel of four bits takes."""
INT4_ROWS = 16
"""Outputs of a four-bit weight must be a multiple of this number for torch's kernel."""
INT4_ZERO = 8
"""The code of 0 in torch's kernel of four bits."""

HALVES = (32, 16)
"""Outputs of half a block in the layouts of torch's kernel for AVX512 and for AVX2."""
BLOCKS = 16
"""Blocks that are unpacked at a time: what stays in a core's cache."""
BYTE = 2**8
LARGEST_PAIR = (BYTE // 2 - 1) * (BYTE + 1)
"""The largest whole number that two digits of eight bits hold."""
LONGEST = 8192
"""Most inputs whose products of two digits and a code from -8 to 7 32 bits hold, whatever the digits are."""
PROMPT = (28, 64)
"""Rows from which unpacking takes less time than torch's kernel: with one scale for each output, and with groups."""


class Product(Protocol):
    """A weight (o, i), laid out for a kernel; called with rows (n, i), returns (n, o) in the dtype of the rows."""

    def __call__(self, rows: Tensor) -> Tensor: ...

    def codes(self) -> Tensor:
        """Return the codes (o, i) int8, as they were given."""

    def tensors(self) -> list[Tensor]:
        """Return what the product holds in memory."""


class DigitProduct:
    """Rows, as float32, times codes of eight bits: exact sums of digits, see the module.

    Args:
        codes: (o, i) int8, from -127 to 127.
        scale: (o,) float32, or (o, g) of groups of `size` neighbouring inputs.
        size: inputs that share a scale; None: all.
    """

    def __init__(self, codes: Tensor, scale: Tensor, size: int | None = None) -> None:
        self.size = size or codes.shape[1]
        self.packed = [pack_int8(part.contiguous(), None) for part in codes.split(self.size, 1)]  # type: ignore[no-untyped-call]
        self.scales = [part.contiguous() for part in scale.view(codes.shape[0], -1).t()]
        self.zero = torch.zeros_like(self.scales[0], dtype=torch.int32)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return (n, o) in the dtype of the rows."""
        dtype, rows = rows.dtype, rows.float()
        largest = rows.abs().amax(-1, keepdim=True)
        step = torch.where(largest == 0, 1.0, largest).div_(LARGEST)
        whole = (rows / step).round_()
        upper = (whole * (1 / BASE)).round_()
        top = (upper * (1 / BASE)).round_()
        digits = torch.cat([top, torch.sub(upper, top, alpha=BASE), torch.sub(whole, upper, alpha=BASE)])
        # torch makes int8 of floats in a quarter of the time that uint8 takes; codes from 0 to 127 are the same in both
        codes = digits.add_(BASE // 2).to(torch.int8).view(torch.uint8)
        parts = [codes] if len(self.packed) == 1 else codes.split(self.size, 1)  # type: ignore[no-untyped-call]
        products = zip(parts, self.packed, self.scales, strict=True)
        first, *others = (self._sums(part, packed, scale) for part, packed, scale in products)
        for other in others:
            first += other
        high, middle, low = first.chunk(3)
        sums: Tensor = torch.add(low, torch.add(middle, high, alpha=BASE), alpha=BASE)
        return sums.mul_(step).to(dtype)

    def _sums(self, codes: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        operands = (codes.contiguous(), 1.0, BASE // 2, packed, scale, self.zero, None)
        found: Tensor = int8_products(*operands, 1.0, 0, torch.float32, "none", [], "")
        return found

    def codes(self) -> Tensor:
        """Return the codes that the packed weight holds."""
        return torch.cat([packed.to_dense().t() for packed in self.packed], 1).contiguous()

    def tensors(self) -> list[Tensor]:
        """Return codes and scales."""
        return [*self.packed, *self.scales, self.zero]


class Int4Product:
    """Rows times codes of four bits with a scale for each group of inputs.

    Few rows go through torch's kernel in bfloat16. Many rows (`PROMPT`) are multiplied by codes that are unpacked a few
    blocks of outputs at a time: with one scale for each output as two digits of eight bits times bytes, with groups in
    floats.

    Args:
        codes: (o, i) int8, from -8 to 7.
        scale: (o, g), of groups of `size` neighbouring inputs, rounded to bfloat16; (o, 1), of all inputs: not rounded.
        size: one of INT4_GROUPS.
    """

    def __init__(self, codes: Tensor, scale: Tensor, size: int) -> None:
        self.shape, self.size = codes.shape, size
        self.half = half_of_block()
        groups = -(-codes.shape[1] // size)
        self.fill = (groups * size - codes.shape[1], -codes.shape[0] % (2 * self.half or INT4_ROWS))
        self.factor = scale.flatten() if scale.shape[1] == 1 else None
        scale = scale if self.factor is None else torch.ones_like(scale).expand(-1, groups)
        wide = F.pad(codes, (0, self.fill[0], 0, self.fill[1])).to(torch.int32) + INT4_ZERO
        self.packed = pack_int4(wide.contiguous(), 1)
        steps = F.pad(scale, (0, 0, 0, self.fill[1])).to(torch.bfloat16).t()
        self.scales = torch.stack([steps, torch.zeros_like(steps)], -1).contiguous()

    def __call__(self, rows: Tensor) -> Tensor:
        """Return (n, o) in the dtype of the rows."""
        wide = F.pad(rows, (0, self.fill[0])) if self.fill[0] else rows
        if self.half and len(rows) >= PROMPT[self.factor is None]:
            bytes_hold = self.factor is not None and self.shape[1] <= LONGEST
            many = self._in_bytes if bytes_hold else self._in_groups
            found = many(wide.float())[:, : self.shape[0]]
            found = found if self.factor is None or bytes_hold else found.mul_(self.factor.float())
            return found.to(rows.dtype)
        sums = self._sums(wide.to(torch.bfloat16)).to(rows.dtype)
        return sums if self.factor is None else sums * self.factor.to(rows.dtype)

    def _sums(self, rows: Tensor) -> Tensor:
        found: Tensor = int4_products(rows.contiguous(), self.packed, self.size, self.scales)
        return found[:, : self.shape[0]] if self.fill[1] else found

    # ------------------------------------------------------------------------------------------ many rows
    def _in_bytes(self, rows: Tensor) -> Tensor:
        """Return rows (n, i) float32 times the weight, of one scale for each output: exact sums of two digits."""
        assert self.factor is not None
        largest = rows.abs().amax(-1, keepdim=True)
        step = torch.where(largest == 0, 1.0, largest).div_(LARGEST_PAIR)
        whole = (rows / step).round_()
        upper = torch.add(whole, BYTE // 2).mul_(1 / BYTE).floor_()
        digits = torch.cat([upper, whole.sub_(upper, alpha=BYTE)]).to(torch.int8)
        zero = int_mm(digits, digits.new_full((rows.shape[1], 1), INT4_ZERO))
        factor = F.pad(self.factor.float(), (0, self.fill[1])).view(-1, 2, self.half)
        found = rows.new_empty(len(rows), *factor.shape)
        for blocks, halves in self._unpacked(BLOCKS):
            for k, codes in enumerate(halves):
                sums = _joined(int_mm(digits, codes), zero).view(len(rows), -1, self.half)
                torch.mul(sums, factor[blocks, k], out=found[:, blocks, k])
        return found.view(len(rows), -1).mul_(step)

    def _in_groups(self, rows: Tensor) -> Tensor:
        """Return rows (n, i) float32 times the weight, made floats a few outputs at a time."""
        steps = self.scales[..., 0].float().view(-1, 1, self.packed.shape[0] // (2 * self.half), 2, self.half)
        sums = rows.view(len(rows), -1, self.size).sum(-1).mul_(INT4_ZERO)
        found = rows.new_empty(len(rows), *steps.shape[2:])
        for blocks, halves in self._unpacked(BLOCKS):
            for k, codes in enumerate(halves):
                own = steps[:, :, blocks, k].reshape(len(steps), 1, -1)
                floats = codes.float().view(-1, self.size, own.shape[-1]).mul_(own)
                products = torch.mm(sums, own[:, 0]).neg_()
                products.addmm_(rows, floats.view(rows.shape[1], -1))
                found[:, blocks, k] = products.view(len(rows), -1, self.half)
        return found.view(len(rows), -1)

    def _unpacked(self, count: int) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        """Yield codes from 0 to 15, int8 (i, outputs), of the first and of the second half of some blocks."""
        blocks = self.packed.view(-1, self.scales.shape[0] * self.size, self.half)
        for start in range(0, len(blocks), count):
            part = blocks[start : start + count]
            laid = part.new_empty(part.shape[1], part.shape[0], self.half)
            laid.permute(1, 0, 2).copy_(part)
            laid = laid.view(part.shape[1], -1)
            second = laid >> 4
            yield slice(start, start + len(part)), (laid.bitwise_and_(15).view(torch.int8), second.view(torch.int8))

    def codes(self) -> Tensor:
        """Return the codes that the packed weight holds."""
        if self.half:
            inputs = self.scales.shape[0] * self.size
            parts = [torch.stack([h.view(inputs, -1, self.half) for h in own], 2) for _, own in self._unpacked(BLOCKS)]
            codes = torch.cat(parts, 1).view(inputs, -1).sub_(INT4_ZERO).t()
        else:  # products with the unit vectors, which bfloat16 holds exactly
            ones = torch.ones_like(self.scales)
            ones[..., 1] = 0
            unit = torch.eye(self.scales.shape[0] * self.size, dtype=torch.bfloat16)
            codes = int4_products(unit, self.packed, self.size, ones).t().to(torch.int8)
        return codes[: self.shape[0], : self.shape[1]].contiguous()

    def tensors(self) -> list[Tensor]:
        """Return codes and scales."""
        return [self.packed, self.scales, *([] if self.factor is None else [self.factor])]


def _joined(sums: Tensor, zero: Tensor) -> Tensor:
    """Return sums of two digits (n, o) int32, the upper one in the first n of 2n rows, without those of `zero`."""
    (upper, lower), (first, second) = sums.chunk(2), zero.chunk(2)
    return lower.add_(upper, alpha=BYTE).sub_(second + first * BYTE)


@cache
def half_of_block() -> int:
    """Return half of the outputs that torch's kernel keeps in one block, 0 where its layout is another.

    The layout belongs to the kernel, and differs from CPU to CPU: found out on random codes. A block of 64 or 32
    outputs has a byte for each input and each output of its first half, whose upper four bits are the output that is
    half a block behind.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2 * max(HALVES), 2 * max(INT4_GROUPS)), generator=generator, dtype=torch.int32)
    packed = pack_int4(codes, 1)
    for half in HALVES:
        if packed.dtype is torch.uint8 and packed.numel() == codes.numel() // 2:
            blocks = packed.view(-1, codes.shape[1], half)
            woven = torch.stack([blocks & 15, blocks >> 4], 2).reshape(len(blocks), codes.shape[1], -1)
            if torch.equal(woven.permute(0, 2, 1).reshape(codes.shape).to(torch.int32), codes):
                return half
    return 0


def product_of(codes: Tensor, scale: Tensor, bits: int, size: int | None, dtype: torch.dtype) -> Product | None:
    """Return the fastest product of a weight (o, i) with rows of `dtype`; None where no kernel takes the weight.

    Args:
        codes: (o, i) int8, symmetric about 0.
        scale: () or (o,), or (o, g) where `size` is set.
        bits: of a code.
        size: inputs that share a scale, neighbours; None: all of a row.
    """
    if codes.device.type != "cpu" or codes.dim() != 2 or codes.dtype is not torch.int8 or 0 in codes.shape:
        return None
    if bits <= 4 and dtype in (torch.float32, torch.bfloat16):
        size = size or next((g for g in INT4_GROUPS if codes.shape[1] >= g), INT4_GROUPS[-1])
        if size in INT4_GROUPS:
            wide = scale if scale.dim() == 2 else scale.reshape(-1, 1).expand(codes.shape[0], 1)
            return Int4Product(codes, wide, size)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    wide = scale.float() if size is not None else scale.float().expand(codes.shape[0])
    return DigitProduct(codes, wide.contiguous(), size)
