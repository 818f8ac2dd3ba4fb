"""Bytes of integer weights under the six conventions that papers count storage by, and of a real file.

For one tensor of N codes of b bits, n of which do not stand for 0 (density n / N):

    C0   nonzeros, no index           n b
    C1   relative index of r bits     entries (b + r); zeros between two nonzeros fill up what r bits cannot say
    C2   compressed sparse rows       n (b + 16) + (rows + 1) 32
    C3   bitmap and packed values     N + n b
    C4   entropy                      N H(codes), what ideal arithmetic coding of the codes takes
    C5   a real compressor            of all codes, b bits each, end to end

C0 cannot be decoded: it is what many compression ratios in papers are made of, and up to ten times below what storing
the same weights takes. Quote it together with C4 or C5. None counts what is stored beside the codes (steps, biases,
norms, layers left in float): that is `SizeModel.remainder_bits`.

Source: C1 is section 3 of Han, Mao and Dally, Deep Compression (ICLR 2016), without their Huffman coding.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphcomp.errors import PlanError

Numbers: TypeAlias = npt.NDArray[Any]
Convention: TypeAlias = Literal["C0", "C1", "C2", "C3", "C4", "C5"]
Decodable: TypeAlias = Literal["C1", "C2", "C3", "C5"]
Compressor: TypeAlias = Literal["zlib", "gzip", "lzma", "bz2"]

INDEX_BITS = 8
"""Of a relative index: what Deep Compression uses for convolutions (for linear layers it uses 5)."""
POINTER_BITS, STEP_BITS, BITS_FIELD = 32, 32, 4


@dataclass(frozen=True, eq=False)
class Codes:
    """An integer tensor, as it is stored.

    Attributes:
        values: integers of any shape, all in 0 … 2^bits - 1 or all in -2^(bits-1) … 2^(bits-1) - 1.
        bits: of each code, 1 to 16.
        zero_point: the code of 0: an int, or integers that broadcast with `values`.
        steps: float scales stored with the codes: 1 per tensor, or as many as there are channels or groups.

    Raises:
        PlanError: values that are no integers, have no data or do not fit the bits; a zero point that does not
            broadcast; bits out of range.
    """

    values: Tensor
    bits: int
    zero_point: Tensor | int = 0
    steps: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 16:
            raise PlanError(f"bits={self.bits!r} is not a whole number from 1 to 16", fix="Codes(values, bits=8)")
        if self.values.is_floating_point() or self.values.is_complex() or self.values.is_meta:
            raise PlanError(
                f"codes of {self.values.dtype} on {self.values.device} cannot be stored",
                why="a code is an integer with a value",
                fix="give the integers of a quantized tensor",
            )
        raw = self.values.detach().cpu().numpy()
        low, high = (int(raw.min()), int(raw.max())) if self.total else (0, 0)
        least, most = (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if low < 0 else (0, 2**self.bits - 1)
        if low < least or high > most:
            enough = max(high.bit_length(), (-low - 1).bit_length()) + (low < 0)
            raise PlanError(
                f"codes from {low} to {high} do not fit {self.bits} bits",
                why=f"{self.bits} bits hold {least} to {most} here",
                fix=f"bits={enough}" if enough <= 16 else "codes of at most 16 bits",
            )
        _ = self._zeros  # raises where the zero point does not broadcast

    @property
    def total(self) -> int:
        """N: codes in all."""
        return self.values.numel()

    @cached_property
    def kept(self) -> int:
        """n: codes that do not stand for 0."""
        return sum(int(np.count_nonzero(nonzero)) for _, nonzero in self.parts())

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns: dim 0 against all others; a vector is one row."""
        rows = self.values.shape[0] if self.values.dim() > 1 else 1
        return rows, self.total // rows if rows else 0

    @property
    def flat(self) -> Numbers:
        """(N,) in the dtype of the values, row-major."""
        return self._values.reshape(-1)

    @property
    def zeros(self) -> Numbers:
        """(N,) int32: the code of 0 at every place."""
        return self._zeros.reshape(-1)

    @property
    def nonzero(self) -> Numbers:
        """(N,) bool: which codes do not stand for 0."""
        return np.concatenate([np.empty(0, bool), *(nonzero for _, nonzero in self.parts())])

    def parts(self) -> Iterator[tuple[Numbers, Numbers]]:
        """Yield the codes, in order, and which of them do not stand for 0: about `_CHUNK` at a time, (n,) each."""
        if not self.values.dim():
            yield self.flat, self.flat != self.zeros
            return
        rows = max(1, _CHUNK * len(self._values) // max(1, self.total))
        for start in range(0, len(self._values), rows):
            own, zeros = self._values[start : start + rows], self._zeros[start : start + rows]
            yield own.reshape(-1), (own != zeros).reshape(-1)

    @cached_property
    def _values(self) -> Numbers:
        return self.values.detach().cpu().numpy()

    @cached_property
    def _zeros(self) -> Numbers:
        """A view that takes no memory of its own."""
        zero = _numpy(self.zero_point) if isinstance(self.zero_point, Tensor) else np.int32(self.zero_point)
        try:
            return np.broadcast_to(zero, tuple(self.values.shape))
        except ValueError as error:
            shapes = f"{tuple(np.shape(zero))} does not broadcast with codes of shape {tuple(self.values.shape)}"
            raise PlanError(f"a zero point of shape {shapes}", fix="one per tensor, or view it as (c, 1, …)") from error


def _numpy(tensor: Tensor) -> Numbers:
    return tensor.detach().cpu().numpy().astype(np.int32)


# ------------------------------------------------------------------------------------------------ conventions
def nonzero_bits(codes: Codes) -> int:
    """C0, n b: nonzeros times bits. No index, no codebook: nothing could be decoded from it."""
    return codes.kept * codes.bits


def relative_index_bits(codes: Codes, index_bits: int = INDEX_BITS) -> int:
    """C1, entries (b + r): each nonzero with the number of zeros before it, in r bits.

    Where 2^r zeros or more stand before a nonzero, every 2^r-th of them is an entry of its own. Zeros after the last
    nonzero are free. For scattered nonzeros of density p there are n (1 + q / (1 - q)) entries, q = (1 - p)^(2^r): as p
    goes to 0, the size goes to N (b + r) / 2^r and no further.

    Args:
        index_bits: r, 1 to 16.
    """
    _check_index(index_bits)
    entries, last, at = 0, -1, 0
    for _, nonzero in codes.parts():
        places = np.flatnonzero(nonzero) + at
        zeros = np.diff(places, prepend=last) - 1
        entries += len(zeros) + int((zeros >> index_bits).sum())
        last, at = int(places[-1]) if len(places) else last, at + len(nonzero)
    return entries * (codes.bits + index_bits)


def csr_bits(codes: Codes) -> int:
    """C2, n (b + 16) + (rows + 1) 32: each nonzero with its column, and where each row begins.

    Columns take 32 bits where there are more than 2^16 of them.
    """
    return codes.kept * (codes.bits + _column_bits(codes)) + (codes.matrix[0] + 1) * POINTER_BITS


def bitmap_bits(codes: Codes) -> int:
    """C3, N + n b: one bit per weight that says whether it is 0, and the nonzeros. Never below a bit per weight."""
    return codes.total + codes.kept * codes.bits


def entropy_bits(codes: Codes) -> float:
    """C4, N H: the entropy of the tensor's own histogram of codes, zero among them.

    What ideal arithmetic coding takes; the table of probabilities is not counted. Never above C3, nor above C0 plus
    the entropy of where the zeros are.
    """
    alphabet = 2**codes.bits
    counts = np.zeros(alphabet + 1, dtype=np.int64)
    for own, nonzero in codes.parts():
        # all zeros are one symbol, also where channels have zero points of their own
        symbols = np.where(nonzero, own.astype(np.int64) & (alphabet - 1), alphabet)
        counts += np.bincount(symbols, minlength=alphabet + 1)
    counts = counts[counts > 0]
    return float((counts * np.log2(codes.total / counts)).sum()) if codes.total else 0.0


def compressed_bits(codes: Codes, compressor: Compressor = "zlib") -> int:
    """C5: bits of the file that `compressor`, at its highest level, makes of all codes packed b bits each."""
    return 8 * len(_compress(codes, compressor))


CONVENTIONS: dict[Convention, Callable[[Codes], float]] = {
    "C0": nonzero_bits,
    "C1": relative_index_bits,
    "C2": csr_bits,
    "C3": bitmap_bits,
    "C4": entropy_bits,
    "C5": compressed_bits,
}


# ------------------------------------------------------------------------------------------------ of a network
@dataclass(frozen=True)
class SizeModel:
    """What the parameters of a quantized network take.

    Attributes:
        tensors: name -> its codes.
        float_params: scalars that stay float32: biases, norms, layers that are not quantized.
        field_bits: whatever else is stored, such as bits per kernel where each has its own.
    """

    tensors: Mapping[str, Codes]
    float_params: int = 0
    field_bits: int = 0

    def bits(self, convention: Convention) -> float:
        """Bits of all codes, without the remainder.

        Raises:
            PlanError: no such convention.
        """
        if convention not in CONVENTIONS:
            raise PlanError(f"convention={convention!r}", fix=f"one of {', '.join(CONVENTIONS)}")
        return sum(CONVENTIONS[convention](codes) for codes in self.tensors.values())

    def remainder_bits(self) -> int:
        """Bits of all that is no code: 32 per float parameter and per step, 4 for the bits of each tensor, zero points
        where there are any but 0, and `field_bits`."""
        headers = sum(_header_bits(codes) for codes in self.tensors.values())
        return 32 * self.float_params + headers + self.field_bits

    def sizes(self) -> dict[str, float]:
        """Bytes by convention, "C0" to "C5", and the "remainder" that comes on top of each.

        C5 compresses every tensor: about a second per ten million weights.
        """
        found = {str(convention): self.bits(convention) / 8 for convention in CONVENTIONS}
        return {**found, "remainder": self.remainder_bits() / 8}


def _header_bits(codes: Codes) -> int:
    zero = codes.zero_point if isinstance(codes.zero_point, Tensor) else torch.tensor(codes.zero_point)
    zero_points = zero.numel() if bool((zero != 0).any()) else 0
    return STEP_BITS * codes.steps + BITS_FIELD + codes.bits * zero_points


def file_bytes(path: str | Path) -> int:
    """Bytes of a file, or of all files in a folder and below it.

    Raises:
        PlanError: there is no such file or folder.
    """
    path = Path(path)
    if not path.exists():
        raise PlanError(f"{path} does not exist", fix="small.save(folder), then file_bytes(folder)")
    files = [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
    return sum(file.stat().st_size for file in files)


# ------------------------------------------------------------------------------------------------ encoding
@dataclass(frozen=True)
class Field:
    """`count` numbers of `width` bits each, packed end to end, the lowest bit first."""

    data: bytes
    count: int
    width: int


@dataclass(frozen=True)
class Encoded:
    """A tensor in the stored form of a convention, and what is needed to read it.

    Attributes:
        convention: which one.
        fields: what is counted, by name.
        shape, dtype, bits: of the tensor and its codes.
        signed: codes below 0 occur.
        zeros: (N,) the code of 0 at every place.
        compressor: of C5.
    """

    convention: Decodable
    fields: Mapping[str, Field]
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int
    signed: bool
    zeros: Numbers = field(repr=False)
    compressor: Compressor = "zlib"

    @property
    def size_bits(self) -> int:
        """Bits of all fields."""
        return sum(part.count * part.width for part in self.fields.values())


def encode(
    codes: Codes, convention: Decodable, *, index_bits: int = INDEX_BITS, compressor: Compressor = "zlib"
) -> Encoded:
    """Store a tensor, in as many bits as the convention counts.

    Args:
        convention: C0 and C4 are sizes without a stored form.
        index_bits: of C1.
        compressor: of C5.

    Raises:
        PlanError: a convention without a stored form, or an option out of range.
    """
    if convention not in get_args(Decodable):
        raise PlanError(f"convention={convention!r} has no stored form", fix=f"one of {', '.join(get_args(Decodable))}")
    if convention == "C1":
        fields = _encode_relative(codes, index_bits)
    elif convention == "C2":
        fields = _encode_csr(codes)
    elif convention == "C3":
        fields = {"bitmap": _field(codes.nonzero, 1), "values": _field(codes.flat[codes.nonzero], codes.bits)}
    else:
        data = _compress(codes, compressor)
        fields = {"file": Field(data, len(data), 8)}
    return Encoded(
        convention,
        fields,
        tuple(codes.values.shape),
        codes.values.dtype,
        codes.bits,
        bool((codes.flat < 0).any()),
        codes.zeros,
        compressor,
    )


def decode(encoded: Encoded) -> Tensor:
    """The tensor that was encoded, bit for bit, in its shape and dtype."""
    flat = encoded.zeros.astype(np.int64)
    if encoded.convention == "C5":
        packed = DECOMPRESS[encoded.compressor](encoded.fields["file"].data)
        flat = _signed(_unpack(packed, len(flat), encoded.bits), encoded)
    else:
        flat[_places(encoded)] = _signed(_read(encoded.fields["values"]), encoded)
    return torch.from_numpy(flat).to(encoded.dtype).reshape(encoded.shape)


def _places(encoded: Encoded) -> Numbers:
    """Where the stored values stand in the flat tensor."""
    numbers = {name: _read(part) for name, part in encoded.fields.items() if name != "values"}
    if encoded.convention == "C1":
        return np.cumsum(numbers["gaps"] + 1) - 1
    if encoded.convention == "C3":
        return np.flatnonzero(numbers["bitmap"])
    pointers = numbers["pointers"]
    rows = np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))
    columns = len(encoded.zeros) // max(len(pointers) - 1, 1)
    return rows * columns + numbers["columns"]


def _encode_relative(codes: Codes, index_bits: int) -> dict[str, Field]:
    gaps = _gaps(codes, index_bits)
    places = np.cumsum(gaps + 1) - 1
    return {"gaps": _field(gaps, index_bits), "values": _field(codes.flat[places], codes.bits)}


def _gaps(codes: Codes, index_bits: int) -> Numbers:
    """(entries,) int64: zeros between each entry of C1 and the one before it, 0 … 2^r - 1."""
    zeros, longest = _zeros_before(codes, index_bits), 2**index_bits - 1
    fillers = zeros >> index_bits
    gaps = np.full(len(zeros) + int(fillers.sum()), longest, dtype=np.int64)
    gaps[np.cumsum(fillers + 1) - 1] = zeros & longest
    return gaps


def _zeros_before(codes: Codes, index_bits: int) -> Numbers:
    """(n,) int64: zeros between each nonzero and the one before it."""
    _check_index(index_bits)
    found: Numbers = np.diff(np.flatnonzero(codes.nonzero), prepend=-1) - 1
    return found


def _check_index(index_bits: int) -> None:
    if not 1 <= index_bits <= 16:
        raise PlanError(f"index_bits={index_bits!r} is outside 1 to 16", fix=f"index_bits={INDEX_BITS}")


def _encode_csr(codes: Codes) -> dict[str, Field]:
    rows, columns = codes.matrix
    places = np.flatnonzero(codes.nonzero)
    per_row = codes.nonzero.reshape(rows, columns).sum(axis=1)
    return {
        "pointers": _field(np.concatenate([[0], np.cumsum(per_row)]), POINTER_BITS),
        "columns": _field(places % max(columns, 1), _column_bits(codes)),
        "values": _field(codes.flat[places], codes.bits),
    }


def _column_bits(codes: Codes) -> int:
    return 16 if codes.matrix[1] <= 2**16 else 32


COMPRESS: dict[Compressor, Callable[[bytes], bytes]] = {
    "zlib": lambda data: zlib.compress(data, 9),
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "lzma": lambda data: lzma.compress(data, preset=9),
    "bz2": lambda data: bz2.compress(data, 9),
}
DECOMPRESS: dict[Compressor, Callable[[bytes], bytes]] = {
    "zlib": zlib.decompress,
    "gzip": gzip.decompress,
    "lzma": lzma.decompress,
    "bz2": bz2.decompress,
}


def _compress(codes: Codes, compressor: Compressor) -> bytes:
    if compressor not in COMPRESS:
        raise PlanError(f"compressor={compressor!r}", fix=f"one of {', '.join(COMPRESS)}")
    return COMPRESS[compressor](_pack(codes.flat, codes.bits))


# ------------------------------------------------------------------------------------------------ bits end to end
_CHUNK = 2**17  # numbers at a time; a multiple of 8, so that every chunk ends at a byte


def _field(numbers: Numbers, width: int) -> Field:
    return Field(_pack(numbers, width), len(numbers), width)


def _read(part: Field) -> Numbers:
    return _unpack(part.data, part.count, part.width)


def _pack(numbers: Numbers, width: int) -> bytes:
    """The lowest `width` bits of each number, the lowest first."""
    shifts = np.arange(width, dtype=np.int64)
    parts = []
    for start in range(0, len(numbers), _CHUNK):
        places = (numbers[start : start + _CHUNK, None].astype(np.int64) >> shifts) & 1
        parts.append(np.packbits(places.astype(np.uint8), bitorder="little").tobytes())
    return b"".join(parts)


def _unpack(data: bytes, count: int, width: int) -> Numbers:
    """(count,) int64, at least 0."""
    weights = 1 << np.arange(width, dtype=np.int64)
    packed = np.frombuffer(data, dtype=np.uint8)
    parts = []
    for start in range(0, count, _CHUNK):
        n = min(_CHUNK, count - start)
        part = np.unpackbits(packed[start * width // 8 :][: -(-n * width // 8)], count=n * width, bitorder="little")
        parts.append(part.reshape(n, width) @ weights)
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _signed(numbers: Numbers, encoded: Encoded) -> Numbers:
    """Two's complement of `bits` bits where there are codes below 0."""
    if not encoded.signed:
        return numbers
    half = 1 << (encoded.bits - 1)
    return (numbers ^ half) - half
