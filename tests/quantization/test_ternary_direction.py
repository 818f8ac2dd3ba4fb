"""Ternary directions of filters: section 6 of the methods, items 1 to 5."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from graphcomp.quantization.ternary_direction import (
    best_masks,
    cosines,
    directions,
    kept_means,
    largest_masks,
    unit_rows,
)

W = torch.tensor([[0.9, -0.7, 0.1, -0.05, 0.4]], dtype=torch.float64)


def laplace(count: int) -> Tensor:
    u = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def test_6_1_the_best_direction_of_five_weights():
    mask = best_masks(W)
    assert (W.sign() * mask).tolist() == [[1, -1, 0, 0, 1]]
    alpha = kept_means(W, mask)
    assert float(alpha) == pytest.approx(2 / 3) and float(cosines(W, mask)) == pytest.approx(0.9515721, abs=1e-7)
    assert float((W - alpha * W.sign() * mask).square().sum()) == pytest.approx(0.1391667, abs=1e-7)
    by_k = [float(cosines(W, largest_masks(W, k))) for k in range(1, 6)]
    assert by_k == pytest.approx([0.741677, 0.932346, 0.951572, 0.865290, 0.792366], abs=1e-6)


def test_6_1_no_other_ternary_vector_is_nearer():
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    every = torch.tensor([t for t in itertools.product((-1.0, 0.0, 1.0), repeat=5) if any(t)], dtype=torch.float64)
    exhaustive = (unit_rows(rows) @ unit_rows(every).T).amax(1)
    torch.testing.assert_close(cosines(rows, best_masks(rows)), exhaustive)


@pytest.mark.parametrize(
    ("density", "threshold", "alpha", "zeros", "cosine"),
    [("gaussian", 0.6120, 1.2239, 0.4598, 0.89976), ("laplace", 1.0006, 2.0012, 0.6323, 0.8574)],
)
def test_6_2_densities(density, threshold, alpha, zeros, cosine):
    count = 1_000_000
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = (drawn if density == "gaussian" else laplace(count))[None]
    mask = best_masks(rows)
    assert float(rows.abs()[mask].min()) == pytest.approx(threshold, rel=0.02)
    assert float(kept_means(rows, mask)) == pytest.approx(alpha, rel=0.01)
    assert 1 - float(mask.double().mean()) == pytest.approx(zeros, abs=0.01)
    assert float(cosines(rows, mask)) == pytest.approx(cosine, abs=1e-3)
    if density == "gaussian":
        error = (rows - kept_means(rows, mask)[:, None] * rows.sign() * mask).square().mean()
        assert float(error) == pytest.approx(0.19034, rel=0.01)


def test_6_3_rows_have_norm_1_and_are_nearly_orthogonal():
    rows = torch.randn(64, 576, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = directions(rows, largest_masks(rows, round(0.12 * rows.numel())))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(64, dtype=torch.float64), rtol=1e-15, atol=0)
    products = (found @ found.T)[~torch.eye(64, dtype=torch.bool)]
    assert float(products.square().mean().sqrt()) == pytest.approx(0.0405, rel=0.1)
    assert float(products.abs().max()) < 0.2


def test_6_4_gradients_are_at_right_angles_to_the_rows():
    rows = torch.randn(16, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    (
        unit_rows(rows) * torch.randn(16, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ).sum().backward()
    assert float((rows.detach() * rows.grad).sum(1).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("kept", "expected"), [(1.0, (0.798, 0.921, 0.996)), (0.12, (0.982, 0.993, 0.9997))], ids=["whole", "pruned"]
)
def test_6_5_the_pull_alone_raises_the_cosine(kept, expected):
    rows = torch.randn(64, 576, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = largest_masks(rows, round(kept * rows.numel()))
    v, found = unit_rows(rows * mask), []
    for step in range(201):
        found.append(float(cosines(v, mask).mean()))
        if step in (0, 50, 200):
            assert found[-1] == pytest.approx(expected[(0, 50, 200).index(step)], abs=3e-3)
        v = unit_rows(v - 0.01 * (v - directions(v, mask)))
    assert all(later > sooner for sooner, later in itertools.pairwise(found))


PRUNED = {
    0.3: (0.892, 0.805), 0.5: (0.933, 0.861), 0.7: (0.962, 0.910), 0.8: (0.974, 0.933), 0.9: (0.984, 0.957),
    0.95: (0.990, 0.970),
}  # fmt: skip
"""Share pruned -> cosine of what is left with its signs, of Gaussian and of Laplace weights."""


@pytest.mark.parametrize(("share", "expected"), PRUNED.items(), ids=str)
def test_6_pruned_vectors_are_near_their_signs(share, expected):
    drawn = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rows, cosine in zip((drawn[None], laplace(200_000)[None]), expected, strict=True):
        mask = largest_masks(rows, round((1 - share) * rows.numel()))
        assert float(cosines(rows * mask, mask)) == pytest.approx(cosine, abs=2e-3)


def test_each_row_keeps_its_largest_and_the_count_is_met():
    rows = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [100], [1], [1], [1], [1]]
    )
    rows[2, 5] = 1e3  # all other shares of this row are tiny
    rows[4] = 0
    for count in (0, 6, 7, 90, 180):
        mask = largest_masks(rows, count)
        assert int(mask.sum()) == max(count, 6)
        assert bool(mask.gather(1, rows.abs().argmax(1, keepdim=True)).all())
    by_row = largest_masks(rows, 60).sum(1)
    assert int(by_row[2]) == 1 and int(by_row[1]) > 5  # rows count by their shares, not by their norms


def test_a_row_of_zeros():
    rows = torch.zeros(2, 4)
    mask = best_masks(rows)
    assert mask.sum(1).tolist() == [1, 1]
    assert not bool(directions(rows, mask).any()) and cosines(rows, mask).tolist() == [1.0, 1.0]
    assert not bool(unit_rows(rows).any()) and kept_means(rows, mask).tolist() == [0.0, 0.0]
