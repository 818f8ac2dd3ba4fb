"""Quantizers, losses and factorisations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .rule_walk import Walk, check_law, free, frozen, same


def test_per_channel_quantizer() -> None:
    w = Walk(
        lambda x, s, z: torch.fake_quantize_per_channel_affine(x, s, z, 1, 0, 255),
        x=torch.randn(3, 4, 5), s=torch.rand(4), z=torch.zeros(4, dtype=torch.int32),
    )  # fmt: skip
    assert same(w["x"][1], w["s"][0], w["z"][0], w.result[1])
    assert free(*w["x"])
    assert check_law(w) == 3


def test_per_tensor_quantizer() -> None:
    w = Walk(lambda x, s, z: torch._fake_quantize_learnable_per_tensor_affine(x, s, z, 0, 255, 1.0),
             x=torch.randn(3, 4), s=torch.rand(1), z=torch.zeros(1))  # fmt: skip
    assert free(*w["x"])
    assert check_law(w) == 2


def test_losses_freeze() -> None:
    w = Walk(lambda x, y: F.cross_entropy(x, y), x=torch.randn(3, 4), y=torch.tensor([0, 1, 2]))
    assert frozen(*w["x"], *w["y"])
    w = Walk(lambda x, y: F.mse_loss(x, y), x=torch.randn(3, 4), y=torch.randn(3, 4))
    assert frozen(*w["x"], *w["y"])


def test_matrices() -> None:
    w = Walk(lambda x: torch.linalg.inv(x), x=torch.randn(2, 4, 4) + 4 * torch.eye(4))
    assert same(w["x"][0], w.result[0])
    assert free(w["x"][0])
    assert frozen(*w["x"][1:], *w.result[1:])
    assert check_law(w) == 1
    w = Walk(lambda a, b: torch.linalg.solve(a, b), a=torch.eye(4), b=torch.randn(4, 3))
    assert frozen(*w["a"], *w["b"])
