"""The ops of a lowered graph, and our definitions of torch's, should torch move them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from graphcomp.quantization.ops import (
    DECOMPOSED,
    PACKED_BITS,
    define_decomposed,
    dequantize_grouped,
    pack,
    unpack,
)
from graphcomp.quantization.stored import Affine, container, spread

from .cases import pattern

NAMESPACE = "graphcomp_test_decomposed"
INTEGERS = [torch.uint8, torch.int8, torch.uint16, torch.int16]


@pytest.fixture(scope="module")
def ours():
    define_decomposed(NAMESPACE)
    return getattr(torch.ops, NAMESPACE)


# ------------------------------------------------------------------------------------------------ few bits
@given(st.sampled_from(PACKED_BITS), st.lists(st.integers(0, 15), max_size=41), st.booleans())
def test_packing_round_trips(bits: int, numbers: list[int], signed: bool) -> None:
    codes = torch.tensor([n % 2**bits for n in numbers], dtype=torch.int8 if signed else torch.uint8)
    values = codes - (2 ** (bits - 1) if signed else 0)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (math.ceil(len(numbers) * bits / 8),)
    back = unpack(packed, list(values.shape), bits, signed)
    assert back.dtype == values.dtype and torch.equal(back, values)


def test_packing_by_hand() -> None:
    """The first code in the lowest bits of a byte, two's complement; missing last codes are 0."""
    codes = torch.tensor([[1, -1, 7], [-8, 0, 2], [3, -2, 5]], dtype=torch.int8)
    assert [hex(b) for b in pack(codes, 4).tolist()] == ["0xf1", "0x87", "0x20", "0xe3", "0x5"]
    assert torch.equal(unpack(pack(codes, 4), [3, 3], 4, True), codes)
    assert [f"{b:08b}" for b in pack(torch.tensor([1, -1, -2, 0, 1]), 2).tolist()] == ["00101101", "00000001"]
    assert [f"{b:08b}" for b in pack(torch.tensor([1, 7, 4, 3]), 3).tolist()] == ["00111001", "00000111"]


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5), (0, 4)])
def test_unpacking_any_shape(shape: tuple[int, ...], signed: bool, bits: int) -> None:
    codes = (torch.randint(0, 2**bits, shape) - 2 ** (bits - 1) * signed).to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, list(shape), bits, signed), codes)
    torch.library.opcheck(torch.ops.graphcomp.unpack.default, (packed, list(shape), bits, signed))


# ------------------------------------------------------------------------------------------------ groups
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantize_grouped(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As Affine has it, bit for bit; groups in any order, one of them empty."""
    values = torch.randint(0, 16, shape, dtype=torch.uint8)
    scales, groups = torch.rand(3, 4, dtype=dtype), torch.tensor([2, 0, 0, 3, 2])
    zeros = torch.randint(0, 16, (3, 4), dtype=torch.int32)
    result = dequantize_grouped(values, scales, zeros, groups)
    assert result.dtype == dtype
    assert torch.equal(pattern(result), pattern(Affine(values, scales, zeros, 0, 15, 0, groups).dequantize()))
    row, column = 2, 3
    group = groups[column]
    expected = (values[row, ..., column].to(dtype) - zeros[row, group]) * scales[row, group]
    assert torch.equal(result[row, ..., column], expected)
    torch.library.opcheck(torch.ops.graphcomp.dequantize_grouped.default, (values, scales, zeros, groups))


# ------------------------------------------------------------------------------------------------ codes
@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (0, 3, torch.uint8), (0, 255, torch.uint8), (-7, 7, torch.int8), (-127, 127, torch.int8),
        (0, 256, torch.uint16), (0, 65535, torch.uint16), (-128, 128, torch.int16), (-32767, 32767, torch.int16),
        (-32768, 32768, torch.int32),
    ],
)  # fmt: skip
def test_container(low: int, high: int, dtype: torch.dtype) -> None:
    assert container(low, high) == dtype


def test_spread() -> None:
    scale = torch.arange(3.0)
    assert spread(torch.tensor(2.0), 3, None).shape == ()
    assert spread(scale, 4, 1).shape == (1, 3, 1, 1)
    grouped = spread(torch.arange(6.0).view(3, 2), 3, 0, torch.tensor([1, 1, 0, 1]))
    assert grouped.shape == (3, 1, 4)
    assert grouped[2, 0].tolist() == [5, 5, 4, 5]


# ------------------------------------------------------------------------------------------------ torch's own
def test_schemas_are_those_of_torch(ours) -> None:
    for name in ("quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel"):
        schemas = [str(getattr(n, name).default._schema).split("::")[1] for n in (ours, DECOMPOSED)]
        assert schemas[0] == schemas[1]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("floats", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_is_that_of_torch(ours, dtype: torch.dtype, floats: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = torch.cat([torch.randn(100), torch.tensor([0.0, -0.0, 0.05, 1e4, -1e4])]).to(floats)
    for scale, zero in ((0.1, 3), (0.0137, 0), (1e-3, 100)):
        results = [
            n.quantize_per_tensor(x, scale, zero, max(info.min, -300), info.max, dtype) for n in (ours, DECOMPOSED)
        ]
        assert results[0].dtype == results[1].dtype == dtype
        assert torch.equal(*results)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("out", [None, torch.float32, torch.float16])
def test_dequantize_is_that_of_torch(ours, dtype: torch.dtype, out: torch.dtype | None) -> None:
    info = torch.iinfo(dtype)
    codes = torch.randint(max(info.min, -300), min(info.max, 300) + 1, (3, 4, 5)).to(dtype)
    arguments = (info.min, info.max, dtype)
    results = [n.dequantize_per_tensor(codes, 0.0137, 5, *arguments, out_dtype=out) for n in (ours, DECOMPOSED)]
    assert results[0].dtype == results[1].dtype
    assert torch.equal(pattern(results[0]), pattern(results[1]))
    zeros = torch.tensor([1, 0, -3, 7], dtype=torch.int32)
    for scales in (torch.rand(4), torch.rand(4, dtype=torch.float64)):
        for zero in (None, zeros):
            if dtype == torch.uint16 and zero is not None:
                continue  # torch's cannot: it has no sums of uint16 and int32
            results = [
                n.dequantize_per_channel(codes, scales, zero, 1, *arguments, out_dtype=out) for n in (ours, DECOMPOSED)
            ]
            assert results[0].dtype == results[1].dtype
            assert torch.equal(pattern(results[0]), pattern(results[1].contiguous()))


@pytest.mark.parametrize("namespace", [NAMESPACE, "quantized_decomposed"])
def test_decomposed_ops_take_fake_tensors(ours, namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    with FakeTensorMode():
        codes = ops.quantize_per_tensor(torch.empty(2, 3), 0.1, 0, -127, 127, torch.int8)
        assert codes.dtype == torch.int8 and codes.shape == (2, 3)
        assert ops.dequantize_per_tensor(codes, 0.1, 0, -127, 127, torch.int8).shape == (2, 3)
        assert ops.dequantize_per_channel(codes, torch.empty(3), None, 1, -127, 127, torch.int8).shape == (2, 3)
