"""QST's equations on plain numbers: the surrogate, the three routes of gradients, the dead zone, gates of units."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphcomp.methods.qst.gates import gated, sparse, step, surrogate
from graphcomp.quantization.quantizers.gradients import fake_quantize

WEIGHTS = [0.9, -0.35, 0.12, -0.04, 0.6]
GRADIENT = torch.tensor([1, -1, 0.5, 2, -1], dtype=torch.float64)
MASK = torch.tensor([1, 1, 0, 0, 1], dtype=torch.float64)


def double(*values: float, scalar: bool = False) -> Tensor:
    found = torch.tensor(values, dtype=torch.float64)
    return (found[0] if scalar else found).clone().requires_grad_()


def test_the_surrogate():
    u = torch.tensor([-1.5, 1.5, -1, 1, -0.7, 0.7, -0.4, 0.4, -0.2, 0.2, 0], dtype=torch.float64)
    expected = [0, 0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 1.2, 1.2, 2]
    torch.testing.assert_close(surrogate(u), torch.tensor(expected, dtype=torch.float64))
    fine = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    assert float(torch.trapezoid(surrogate(fine), fine)) == pytest.approx(1.44, abs=1e-4)


@pytest.mark.parametrize(
    ("route", "of_threshold", "path"),
    [
        ("latent", -0.528, (0.36, -0.42, 0.1128, 0.1248, -0.24)),
        ("literal", -0.4, (0.3, -0.3, 0, 0, -0.2)),
        ("dense", -0.528, (0, 0, 0.5, 2, 0)),
    ],
)
def test_gradients_of_five_weights(route, of_threshold, path):
    """`path` is what the weights get beside the gradient on the mask."""
    weight, threshold, width = double(*WEIGHTS), double(0.15, scalar=True), double(0.25, scalar=True)
    found = sparse(weight, fake_quantize(weight.detach(), width, None, -3, 3), threshold, None, route)
    assert found.tolist() == [0.75, -0.25, 0, 0, 0.5]
    found.backward(GRADIENT)
    assert float(width.grad) == pytest.approx(3.0)
    assert float(threshold.grad) == pytest.approx(of_threshold)
    torch.testing.assert_close(weight.grad - GRADIENT * MASK, torch.tensor(path, dtype=torch.float64))


def test_clipped_weights_get_no_gradient_of_the_value():
    weight, threshold = double(*WEIGHTS), double(0.15, scalar=True)
    inside = weight.detach().abs() <= 0.75
    sparse(weight, weight.detach(), threshold, inside, "dense").backward(GRADIENT)
    assert weight.grad.tolist() == [0, -1, 0.5, 2, -1]


@pytest.mark.parametrize("dense", [True, False])
def test_thresholds_of_channels_sum_over_their_weights(dense):
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    threshold = torch.full((4, 1, 1), 0.3, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(4, 3, 2, dtype=torch.float64)
    sparse(weight, weight.detach(), threshold, None, "dense" if dense else "latent").backward(gradient)
    pull = gradient * weight.detach() * surrogate(weight.detach().abs() - 0.3)
    torch.testing.assert_close(threshold.grad, -pull.sum((1, 2), keepdim=True))


def test_a_threshold_inside_of_the_dead_zone_changes_nothing():
    torch.manual_seed(0)
    weight = torch.randn(1000)
    levels = fake_quantize(weight, torch.tensor(0.4), None, -3, 3)
    for threshold in (0.0, 0.1, 0.199):
        assert torch.equal(sparse(weight, levels, torch.tensor(threshold), None, "dense"), levels)
    assert not torch.equal(sparse(weight, levels, torch.tensor(0.3), None, "dense"), levels)
    assert not bool(sparse(weight, levels, weight.abs().max(), None, "dense").any())


def test_without_levels_it_is_dynamic_sparse_training():
    """Masks times weights, with the surrogate in place of the step's derivative, by autograd."""

    class Binary(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            ctx.save_for_backward(u)
            return (u > 0).to(u.dtype)

        @staticmethod
        def backward(ctx, grad):
            (u,) = ctx.saved_tensors
            near = 2 - 4 * u.abs()
            return grad * torch.where(u.abs() <= 0.4, near, torch.where(u.abs() <= 1, 0.4, 0.0))

    torch.manual_seed(0)
    weight, gradient = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    found = []
    for own in (
        lambda w, t: w * Binary.apply(w.abs() - t),
        lambda w, t: sparse(w, w.detach(), t, None, "latent"),
        lambda w, t: sparse(w, w.detach(), t, None, "literal"),
    ):
        w, t = weight.clone().requires_grad_(), torch.full((6, 1), 0.4, dtype=torch.float64, requires_grad=True)
        own(w, t).backward(gradient)
        found.append((w.grad, t.grad))
    for own in found[1:]:
        torch.testing.assert_close(own, found[0])


@pytest.mark.parametrize("dense", [True, False])
def test_a_gate_has_the_gradient_of_a_product(dense):
    torch.manual_seed(0)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.2, -0.1, 0.7, -3.0], dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(4, 3, dtype=torch.float64)
    found = gated(weight, step(u).view(4, 1), dense)
    open_ = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64).view(4, 1)
    assert torch.equal(found, (weight * open_).detach())
    found.backward(gradient)
    torch.testing.assert_close(weight.grad, gradient if dense else gradient * open_)
    torch.testing.assert_close(u.grad, (gradient * weight.detach()).sum(1) * surrogate(u.detach()))
