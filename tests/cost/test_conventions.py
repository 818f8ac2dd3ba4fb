"""The storage conventions: numbers by hand and from the literature, and what is stored comes back."""

from __future__ import annotations

import math
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphcomp.cost import Codes, SizeModel, conventions, file_bytes
from graphcomp.cost.conventions import (
    CONVENTIONS,
    bitmap_bits,
    compressed_bits,
    csr_bits,
    decode,
    encode,
    entropy_bits,
    nonzero_bits,
    relative_index_bits,
)
from graphcomp.errors import PlanError
from graphcomp.quantization.ops import PACKED_BITS, pack

STORED = ("C1", "C2", "C3", "C5")


def sparse(rows: int, columns: int, nonzeros: int, bits: int, seed: int = 0) -> Codes:
    """Exactly `nonzeros` codes other than 0, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.zeros(rows * columns, dtype=torch.int8)
    places = torch.randperm(len(flat), generator=generator)[:nonzeros]
    flat[places] = torch.randint(1, 2 ** (bits - 1), (nonzeros,), generator=generator, dtype=torch.int8)
    return Codes(flat.view(rows, columns), bits)


def ternary(zeros: int, others: int) -> Codes:
    """As many codes -1 as 1, shuffled."""
    flat = torch.tensor([0] * zeros + [-1] * (others // 2) + [1] * (others // 2), dtype=torch.int8)
    return Codes(flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))], 2)


def binary_entropy(p: float) -> float:
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q)


@st.composite
def any_codes(draw: st.DrawFn) -> Codes:
    """Signed or unsigned codes of any shape, bits and density, with a zero point of 0, of one or of each row."""
    bits, signed = draw(st.integers(1, 16)), draw(st.booleans())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    dtype = torch.int64 if draw(st.booleans()) else {True: torch.int16, False: torch.uint16}[signed]
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = generator.integers(low, high + 1, shape)
    zero_point: Tensor | int = 0
    zeros = np.zeros(shape, dtype=np.int64)
    if not signed and shape and draw(st.booleans()):
        per_row = generator.integers(low, high + 1, (shape[0], *[1] * (len(shape) - 1)))
        zero_point, zeros = torch.from_numpy(per_row), np.broadcast_to(per_row, shape)
    keep = generator.random(shape) < draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
    return Codes(torch.from_numpy(np.asarray(np.where(keep, values, zeros))).to(dtype), bits, zero_point)


# ------------------------------------------------------------------------------------------------ numbers
def test_a_tenth_of_a_thousand_weights_in_four_bits() -> None:
    codes = sparse(10, 100, 100, 4)
    assert nonzero_bits(codes) == 400
    assert bitmap_bits(codes) == 1400
    assert csr_bits(codes) == 2000 + 352


def test_entropy_of_ternary_weights() -> None:
    assert entropy_bits(ternary(880, 120)) == pytest.approx(649.4, abs=0.05)
    assert entropy_bits(ternary(880, 120)) == pytest.approx(1000 * (binary_entropy(0.12) + 0.12))


@pytest.mark.parametrize(
    ("density", "bits", "ratio"), [(0.12, 6, 44.4), (0.1, 5, 64), (0.08, 4, 100), (0.0054, 3, 1975)]
)
def test_compression_ratios_of_the_literature_count_no_index(density: float, bits: int, ratio: float) -> None:
    """What ANNC's "40x", "60x", "100x" and "2000x" settings come to."""
    codes = sparse(100, 1000, round(density * 1e5), bits)
    assert 32 * codes.total / nonzero_bits(codes) == pytest.approx(ratio, rel=2e-3)
    assert bitmap_bits(codes) > codes.total
    assert entropy_bits(codes) > nonzero_bits(codes)  # so nothing that can be decoded is as small


def test_relative_indices_by_hand() -> None:
    # gaps of two bits say 0 to 3 zeros; 5 zeros are a filler (after 3 zeros, itself the fourth) and a gap of 1
    codes = Codes(torch.tensor([0, 0, 7, 0, 0, 0, 0, 0, 5, 0, 0, 0, 3, 0, 0, 0, 0, 0]), 3)
    encoded = encode(codes, "C1", index_bits=2)
    assert relative_index_bits(codes, 2) == 4 * (3 + 2) == encoded.size_bits
    assert encoded.fields["gaps"].data == bytes([2 | 3 << 2 | 1 << 4 | 3 << 6])
    four = Codes(torch.tensor([0, 0, 0, 0, 1]), 3)  # the fourth zero is the filler
    assert relative_index_bits(four, 2) == 2 * 5
    assert relative_index_bits(Codes(torch.zeros(100, dtype=torch.int8), 3), 2) == 0


@pytest.mark.parametrize(("density", "index_bits"), [(0.3, 2), (0.1, 4), (0.02, 5), (0.01, 8)])
def test_relative_indices_of_scattered_weights(density: float, index_bits: int) -> None:
    codes, q = sparse(1000, 1000, round(density * 1e6), 3), (1 - density) ** (2**index_bits)
    expected = density * (1 + q / (1 - q)) * (3 + index_bits)
    assert relative_index_bits(codes, index_bits) / codes.total == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("index_bits", "floor"), [(4, 0.4375), (8, 0.043)])
def test_relative_indices_have_a_floor(index_bits: int, floor: float) -> None:
    one = torch.zeros(2**18, dtype=torch.int8)
    one[-1] = 1
    assert relative_index_bits(Codes(one, 3), index_bits) / len(one) == pytest.approx(floor, abs=5e-4)


@pytest.mark.parametrize(("zeros", "measured"), [(0.5, 1.531), (0.8, 1.083), (0.9, 0.710), (0.98, 0.223)])
def test_zlib_on_packed_ternary_codes(zeros: float, measured: float) -> None:
    """Measured on 4 million symbols; the rest is the smaller number of them, and the version of zlib."""
    n = 400_000
    codes = ternary(round(zeros * n), n - round(zeros * n))
    assert compressed_bits(codes) / n == pytest.approx(measured, rel=0.03)


def test_wide_rows_have_wide_columns() -> None:
    assert csr_bits(sparse(1, 2**16, 5, 4)) == 5 * (4 + 16) + 64
    wide = sparse(1, 2**16 + 1, 5, 4)
    assert csr_bits(wide) == 5 * (4 + 32) + 64
    assert torch.equal(decode(encode(wide, "C2")), wide.values)


def test_a_vector_is_one_row() -> None:
    assert csr_bits(Codes(torch.tensor([0, 1, 0, 2]), 4)) == 2 * 20 + 2 * 32
    assert csr_bits(Codes(torch.tensor([[0, 1], [0, 2]]), 4)) == 2 * 20 + 3 * 32


# ------------------------------------------------------------------------------------------------ properties
@settings(max_examples=150, deadline=None)
@given(any_codes(), st.integers(1, 9))
def test_what_is_stored_comes_back(codes: Codes, index_bits: int) -> None:
    for convention in STORED:
        encoded = encode(codes, convention, index_bits=index_bits)
        found = decode(encoded)
        assert found.dtype == codes.values.dtype
        assert found.shape == codes.values.shape
        assert torch.equal(found.long(), codes.values.long()), convention
        counted = relative_index_bits(codes, index_bits) if convention == "C1" else CONVENTIONS[convention](codes)
        assert encoded.size_bits == counted
        for part in encoded.fields.values():
            assert len(part.data) == -(-part.count * part.width // 8)


@settings(max_examples=150, deadline=None)
@given(any_codes())
def test_entropy_is_the_lowest_that_can_be_decoded(codes: Codes) -> None:
    entropy, n = entropy_bits(codes), max(codes.total, 1)
    assert 0 <= entropy <= bitmap_bits(codes) + 1e-6
    assert entropy <= nonzero_bits(codes) + n * binary_entropy(codes.kept / n) + 1e-6
    assert nonzero_bits(codes) <= min(csr_bits(codes), relative_index_bits(codes), bitmap_bits(codes))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.floats(0, 1), st.integers(2000, 20_000), st.integers(0, 99))
@pytest.mark.slow
@pytest.mark.ci
def test_no_compressor_beats_the_entropy_of_random_codes(bits: int, density: float, n: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 2**bits, n) * (generator.random(n) < density)
    codes = Codes(torch.from_numpy(values), bits)
    slack = 2**bits * math.log2(n)  # the histogram, which the entropy takes as known
    for compressor in ("zlib", "gzip", "lzma", "bz2"):
        assert compressed_bits(codes, compressor) >= entropy_bits(codes) - slack


@pytest.mark.parametrize("compressor", ["zlib", "gzip", "lzma", "bz2"])
def test_every_compressor_gives_back_what_it_got(compressor: str) -> None:
    codes = ternary(900, 100)
    encoded = encode(codes, "C5", compressor=compressor)
    assert torch.equal(decode(encoded), codes.values)
    assert encoded.size_bits == compressed_bits(codes, compressor) < 2000


def test_more_codes_than_are_packed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = sparse(3, 37, 70, 3)
    whole = {convention: encode(codes, convention) for convention in STORED}
    monkeypatch.setattr("graphcomp.cost.conventions._CHUNK", 16)
    for convention in STORED:
        encoded = encode(codes, convention)
        assert encoded.fields == whole[convention].fields
        assert torch.equal(decode(encoded), codes.values)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_codes_are_packed_as_in_a_lowered_graph(bits: int) -> None:
    values = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)
    every = Codes(values, bits, zero_point=100)  # no code stands for 0, so all are stored
    assert encode(every, "C3").fields["values"].data == pack(values, bits).numpy().tobytes()


def test_the_code_of_zero_may_differ_by_channel() -> None:
    values = torch.tensor([[3, 3, 5], [7, 3, 7]], dtype=torch.uint8)
    codes = Codes(values, 3, zero_point=torch.tensor([[3], [7]]))
    assert (codes.kept, nonzero_bits(codes)) == (2, 6)
    assert entropy_bits(codes) == pytest.approx(4 * math.log2(6 / 4) + 2 * math.log2(6))
    for convention in STORED:
        assert torch.equal(decode(encode(codes, convention, index_bits=1)), values)


# ------------------------------------------------------------------------------------------------ of a network
def test_sizes_of_a_network() -> None:
    first, second = sparse(10, 100, 100, 4), ternary(880, 120)
    sizes = SizeModel({"a": first, "b": second}, float_params=7, field_bits=12).sizes()
    assert list(sizes) == ["C0", "C1", "C2", "C3", "C4", "C5", "remainder"]
    assert sizes["C0"] == (400 + 240) / 8
    assert sizes["C3"] == (1400 + 1240) / 8
    assert sizes["C4"] == pytest.approx((entropy_bits(first) + entropy_bits(second)) / 8)
    assert sizes["C5"] == (compressed_bits(first) + compressed_bits(second)) / 8
    assert sizes["remainder"] == (7 * 32 + 2 * (32 + 4) + 12) / 8


def test_steps_and_zero_points_are_stored_too() -> None:
    values = torch.ones(5, 3, dtype=torch.uint8)
    per_channel = Codes(values, 8, zero_point=torch.full((5, 1), 128), steps=5)
    assert SizeModel({"a": per_channel}).remainder_bits() == 5 * 32 + 4 + 5 * 8
    symmetric = Codes(values, 8, zero_point=torch.zeros(5, 1, dtype=torch.int32), steps=5)
    assert SizeModel({"a": symmetric}).remainder_bits() == 5 * 32 + 4


def test_a_network_without_codes() -> None:
    sizes = SizeModel({}, float_params=10).sizes()
    assert sizes.pop("remainder") == 40
    assert set(sizes.values()) == {0}


def test_file_bytes(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(1000))
    (tmp_path / "model" / "b.bin").write_bytes(bytes(37))
    assert file_bytes(tmp_path / "a.bin") == 1000
    assert file_bytes(str(tmp_path)) == 1037
    with pytest.raises(PlanError, match="does not exist"):
        file_bytes(tmp_path / "c.bin")


# ------------------------------------------------------------------------------------------------ bad arguments
@pytest.mark.parametrize(
    ("values", "bits", "fix"),
    [([8], 3, "bits=4"), ([-5, 0], 3, "bits=4"), ([-4, 4], 3, "bits=4"), ([2**40], 8, "codes of at most 16 bits")],
)
def test_codes_that_do_not_fit(values: list[int], bits: int, fix: str) -> None:
    with pytest.raises(PlanError, match=rf"(?s)do not fit {bits} bits.*fix: +{fix}$"):
        Codes(torch.tensor(values), bits)


@pytest.mark.parametrize(("values", "bits"), [([-1, 0], 1), ([0, 1], 1), ([-4, 3], 3), ([7], 3), ([65535], 16)])
def test_codes_that_just_fit(values: list[int], bits: int) -> None:
    assert Codes(torch.tensor(values), bits).total == len(values)


@pytest.mark.parametrize(
    "values", [torch.zeros(3), torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.int8, device="meta")]
)
def test_codes_that_are_no_integers(values: Tensor) -> None:
    with pytest.raises(PlanError, match="cannot be stored"):
        Codes(values, 8)


def test_bad_options() -> None:
    codes = ternary(8, 2)
    for bits in (0, 17, True):
        with pytest.raises(PlanError, match="from 1 to 16"):
            Codes(torch.zeros(3, dtype=torch.int8), bits)
    for index_bits in (0, 17):
        with pytest.raises(PlanError, match="outside 1 to 16"):
            relative_index_bits(codes, index_bits)
    for convention in ("C0", "C4", "zip"):
        with pytest.raises(PlanError, match="C1, C2, C3, C5"):
            encode(codes, convention)
    with pytest.raises(PlanError, match="zlib, gzip"):
        compressed_bits(codes, "rar")
    with pytest.raises(PlanError, match="C0, C1"):
        SizeModel({"a": codes}).bits("C6")
    with pytest.raises(PlanError, match=r"\(2, 1\) does not broadcast with codes of shape \(3,"):
        Codes(torch.zeros(3, 4, dtype=torch.int8), 8, zero_point=torch.ones(2, 1, dtype=torch.int8))


@pytest.mark.parametrize("shape", [(), (37,), (9, 21), (1, 50), (4, 3, 5), (0, 3)])
@pytest.mark.parametrize("zeros", ["none", "tensor", "channel"])
def test_codes_are_counted_the_same_in_parts(shape, zeros, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 8, shape, generator=generator, dtype=torch.uint8) * (torch.rand(shape) < 0.4)
    zero = 0 if zeros == "none" else 3
    if zeros == "channel" and len(shape) > 1:
        zero = torch.randint(0, 8, (shape[0], *[1] * (len(shape) - 1)), generator=generator)
    counted = [dict(SizeModel({"a": Codes(values, 3, zero)}).sizes())]
    monkeypatch.setattr(conventions, "_CHUNK", 8)
    codes = Codes(values, 3, zero)
    counted.append(SizeModel({"a": codes}).sizes())
    assert counted[0] == pytest.approx(counted[1], rel=1e-12)
    assert len(list(codes.parts())) > 1 or codes.total <= 8 or shape[0] == 1
    assert torch.equal(decode(encode(codes, "C1")), values)
