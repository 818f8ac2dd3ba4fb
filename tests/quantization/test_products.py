"""Products with weights of integers: as near to the exact ones as the scheme of each says."""

import pytest
import torch

from graphcomp.quantization import products
from graphcomp.quantization.products import (
    HALVES,
    INT4_GROUPS,
    LARGEST,
    DigitProduct,
    Int4Product,
    half_of_block,
    product_of,
)


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 7), (64, 100), (300, 129), (3, 2000)])
@pytest.mark.parametrize("rows", [1, 4, 33])
def test_products_of_digits_are_as_good_as_products_of_floats(outputs, inputs, rows):
    torch.manual_seed(outputs + rows)
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scale, x = torch.rand(outputs) + 0.1, torch.randn(rows, inputs) * torch.logspace(-20, 20, rows)[:, None]
    product = DigitProduct(codes, scale)
    wanted = x.double() @ (codes.double() * scale.double()[:, None]).t()
    error = (product(x).double() - wanted).abs()
    # each element of a row is rounded to half of 1 / LARGEST of the row's largest, and float32 holds sums to 2^-24
    bound = x.double().abs().amax(-1, keepdim=True) * (codes.double().abs() @ torch.ones(inputs).double()) * scale
    assert bool((error <= bound * (0.5 / LARGEST + 4 * 2**-24)).all())
    assert torch.equal(product.codes(), codes)


@pytest.mark.parametrize("size", [1, 16, 100, 200])
def test_groups_of_inputs_have_scales_of_their_own(size):
    codes, x = torch.randint(-127, 128, (30, 150), dtype=torch.int8), torch.randn(3, 150)
    scale = torch.rand(30, -(-150 // size)) + 0.1
    product = DigitProduct(codes, scale, size)
    wanted = x.double() @ (codes.double() * scale.double().repeat_interleave(size, 1)[:, :150]).t()
    assert relative(product(x), wanted) < 1e-5 and torch.equal(product.codes(), codes)


def test_a_row_of_zeros_gives_zeros_and_a_row_that_is_not_finite_spoils_itself_alone():
    product = DigitProduct(torch.randint(-127, 128, (6, 9), dtype=torch.int8), torch.ones(6))
    x = torch.randn(4, 9)
    x[0], x[1, 3], x[2, 4] = 0, torch.nan, torch.inf
    got = product(x)
    assert torch.equal(got[0], torch.zeros(6))
    assert not got[1].isfinite().any() and not got[2].isfinite().any()
    assert got[3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_comes_out(dtype):
    codes, scale = torch.randint(-127, 128, (8, 40), dtype=torch.int8), torch.rand(8) / 100
    x = torch.randn(3, 40).to(dtype)
    got = DigitProduct(codes, scale)(x)
    wanted = x.double() @ (codes.double() * scale.double()[:, None]).t()
    assert got.dtype is dtype and relative(got, wanted) < torch.finfo(dtype).eps


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (5, 7), (64, 100), (33, 513)])
@pytest.mark.parametrize("size", INT4_GROUPS)
def test_products_of_four_bits_are_rounded_to_bfloat16_alone(outputs, inputs, size):
    torch.manual_seed(inputs)
    codes, x = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8), torch.randn(3, inputs)
    scale = (torch.rand(outputs, -(-inputs // size)) + 0.5).bfloat16().float()
    product = Int4Product(codes, scale, size)
    floats = codes.double() * scale.double().repeat_interleave(size, 1)[:, :inputs]
    assert relative(product(x), x.double() @ floats.t()) < 2**-8
    assert relative(product(x.bfloat16()), x.bfloat16().double() @ floats.t()) < 2**-8
    assert torch.equal(product.codes(), codes)


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (70, 100), (300, 513), (5, 9000)])
@pytest.mark.parametrize("grouped", [False, True])
def test_many_rows_are_multiplied_more_exactly_than_bfloat16_holds(outputs, inputs, grouped):
    torch.manual_seed(inputs)
    codes, x = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8), torch.randn(80, inputs)
    x[2], x[3, 0], x[4, 0] = 0, torch.nan, 1e30
    x[5] = 1.0  # every digit at its largest
    scale = (torch.rand(outputs, -(-inputs // 32) if grouped else 1) + 0.5).bfloat16().float()
    product = Int4Product(codes, scale, 32)
    floats = codes.double() * (scale.double().repeat_interleave(32, 1)[:, :inputs] if grouped else scale.double())
    wanted, got = x.double() @ floats.t(), product(x)
    assert half_of_block() in (0, *HALVES)
    assert torch.equal(got[2], torch.zeros(outputs)) and got[3].isnan().all()
    bound = 2e-4 if half_of_block() else 2**-8  # a kernel of another layout takes the rows itself
    assert relative(got[5:], wanted[5:]) < bound and relative(got[4:5], wanted[4:5]) < 2**-7
    assert relative(product(x.bfloat16())[5:], x.bfloat16().double()[5:] @ floats.t()) < 2**-8
    assert torch.equal(product.codes(), codes)


def test_a_kernel_of_another_layout_takes_many_rows_itself(monkeypatch):
    monkeypatch.setattr(products, "half_of_block", lambda: 0)
    codes, x = torch.randint(-8, 8, (40, 64), dtype=torch.int8), torch.randn(80, 64)
    product = Int4Product(codes, torch.ones(40, 1), 32)
    assert relative(product(x), x.double() @ codes.double().t()) < 2**-8 and torch.equal(product.codes(), codes)


def test_one_scale_for_all_inputs_is_not_rounded():
    codes = torch.full((16, 64), 1, dtype=torch.int8)
    scale = torch.full((16, 1), 1 + 2**-12)
    got = Int4Product(codes, scale, 64)(torch.ones(1, 64))
    assert torch.equal(got, torch.full((1, 16), 64 * (1 + 2**-12)))


def test_a_weight_that_no_kernel_takes_has_no_product():
    codes, scale = torch.ones(4, 8, dtype=torch.int8), torch.ones(4)
    taken = product_of(codes, scale, 8, None, torch.float32)
    assert isinstance(taken, DigitProduct)
    assert isinstance(product_of(codes, scale, 4, None, torch.float32), Int4Product)
    assert product_of(codes, scale, 8, None, torch.float64) is None  # digits hold 21 bits
    assert product_of(codes.to(torch.int16), scale, 8, None, torch.float32) is None
    assert isinstance(product_of(codes, scale[:, None], 8, 8, torch.float32), DigitProduct)
    # torch's kernel of four bits knows no groups of eight inputs
    assert isinstance(product_of(codes, scale[:, None], 4, 8, torch.float32), DigitProduct)
    assert product_of(codes[None], scale, 8, None, torch.float32) is None
    assert product_of(codes.to("meta"), scale, 8, None, torch.float32) is None
