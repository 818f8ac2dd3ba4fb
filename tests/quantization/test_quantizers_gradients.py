"""The straight-through primitives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphcomp.quantization.quantizers.gradients import bounded, fake_quantize, round_through, scale_gradient

from .cases import gradients, pattern

every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])


@every_dtype
def test_round_through(dtype: torch.dtype) -> None:
    """Exactly torch.round, halves to even; the gradient is handed on."""
    x = torch.tensor([-2.5, -0.4, 0.0, 0.5, 1.5, 100.3], dtype=dtype, requires_grad=True)
    result = round_through(x)
    assert torch.equal(result, x.round())
    upstream = torch.arange(6, dtype=dtype)
    assert torch.equal(gradients(result, upstream, x)[0], upstream)


@every_dtype
def test_scale_gradient(dtype: torch.dtype) -> None:
    x = torch.tensor([0.1, -3.0], dtype=dtype, requires_grad=True)
    result = scale_gradient(x, 0.25)
    assert torch.equal(result, x)
    (grad,) = gradients(result, torch.tensor([1.0, 8.0], dtype=dtype), x)
    assert grad.dtype == dtype and grad.tolist() == [0.25, 2.0]


@pytest.mark.parametrize("as_tensors", [False, True])
@every_dtype
def test_bounded_lets_through_what_leads_back(dtype: torch.dtype, as_tensors: bool) -> None:
    low, high = (torch.tensor(b, dtype=dtype) for b in (-1.0, 2.0)) if as_tensors else (-1.0, 2.0)
    x = torch.tensor([-3.0, -3.0, -1.0, 0.5, 2.0, 5.0, 5.0], dtype=dtype, requires_grad=True)
    result = bounded(x, low, high)
    assert result.tolist() == [-1, -1, -1, 0.5, 2, 2, 2]
    # A descent step subtracts the gradient: below the bound only negative ones help, above it only positive ones.
    (grad,) = gradients(result, torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0], dtype=dtype), x)
    assert grad.tolist() == [0, -1, 1, 1, -1, 1, 0]


def test_fake_quantize_by_hand() -> None:
    """4 codes, -1 … 2 after the zero point, of width 0.5."""
    x = torch.tensor([-9.0, -0.5, -0.2, 0.25, 0.3, 0.76, 1.0, 1.1, 9.0], requires_grad=True)
    scale, zero = torch.tensor(0.5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    result = fake_quantize(x, scale, zero, 0, 3)
    assert result.tolist() == [-0.5, -0.5, 0, 0, 0.5, 1, 1, 1, 1]
    assert pattern(result.detach())[2] == 0, "-0 is no integer"
    to_x, to_scale, to_zero = gradients(result, torch.ones(9), x, scale, zero)
    assert to_x.tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    # v = x / scale: -18, -1, -0.4, 0.5, 0.6, 1.52, 2, 2.2, 18
    torch.testing.assert_close(to_scale, torch.tensor(-1 + 0 + 0.4 - 0.5 + 0.4 + 0.48 + 0 + 2 + 2))
    torch.testing.assert_close(to_zero, torch.tensor(-0.5 * 3))


def test_fake_quantize_next_to_the_floor() -> None:
    """Where x / scale overflows, autograd of the composed expression gives 0 * inf; this does not."""
    x = torch.tensor([-1e30, 0.0, 1e30], requires_grad=True)
    scale = torch.tensor(torch.finfo(torch.float32).tiny, requires_grad=True)
    to_x, to_scale = gradients(fake_quantize(x, scale, None, -7, 7), torch.tensor([1.0, 1.0, 3.0]), x, scale)
    assert to_x.tolist() == [0, 1, 0]
    assert to_scale == -7 + 21


def test_second_derivatives_do_not_break() -> None:
    """Hessian-vector products see the straight-through gradient as piecewise linear."""
    x = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return fake_quantize(x, torch.tensor(0.25, dtype=torch.float64), None, -7, 7).pow(2).sum()

    _, product = torch.autograd.functional.hvp(loss, x, torch.ones_like(x))
    assert product.tolist() == [2, 0]
