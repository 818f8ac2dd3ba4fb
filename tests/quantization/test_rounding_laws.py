"""The laws of rounding without training, on random networks: integers are the fake-quant graph, budgets hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphcomp as gc
from graphcomp.numerics.compare import relative_error
from graphcomp.testing import random_model

SETTINGS = settings(max_examples=6, deadline=None, derandomize=True)


def drawn(seed: int, depth: int) -> tuple[torch.nn.Module, Tensor, list[Tensor], Tensor]:
    """A random network, its example, calibration batches of three sizes, and inputs of another size."""
    model, (x,) = random_model(seed, depth)
    generator = torch.Generator().manual_seed(seed)
    *batches, other = (torch.randn(n, *x.shape[1:], generator=generator) for n in (5, 2, 9, 4))
    return model.eval(), x, batches, other


@pytest.mark.slow
@pytest.mark.ci
@SETTINGS
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(2, 6),
    bits=st.integers(2, 8),
    activations=st.sampled_from([None, "dynamic", 3, 4, 8]),
    rounding=st.sampled_from(["nearest", "second_order"]),
    sparsity=st.sampled_from([0.0, 0.3]),
)
def test_integers_are_what_was_calibrated(
    seed: int, depth: int, bits: int, activations: Any, rounding: Any, sparsity: float
) -> None:
    model, x, batches, other = drawn(seed, depth)
    dynamic = {"activations": "dynamic"} if activations == "dynamic" else {"activation_bits": activations}
    small = gc.compress(
        model, x, bits=bits, rounding=rounding, sparsity=sparsity, calibration=batches, progress=False, **dynamic
    )
    assert isinstance(small.report, gc.Report)
    assert "integers == fake-quant, in steps" in small.report.verified or small.report.unchecked
    assert all(bool(torch.isfinite(t).all()) for t in _tensors(small(other)))
    wide = gc.compress(model, x, bits=8, sparsity=0, calibration=batches, activation_bits=None, progress=False)
    assert relative_error(_tensors(model(other)), _tensors(wide(other))) < 0.1


@pytest.mark.slow
@pytest.mark.ci
@SETTINGS
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(2, 6),
    share=st.floats(0.0, 1.0),
    cost=st.sampled_from(["bytes", "bops"]),
)
def test_a_budget_of_bits_holds(seed: int, depth: int, share: float, cost: str) -> None:
    model, x, batches, _ = drawn(seed, depth)
    options: dict[str, Any] = {"sparsity": 0, "calibration": batches, "progress": False}
    few, many = (getattr(gc.compress(model, x, bits=bits, **options).report, cost).ratio for bits in (3, 8))
    limit = few * 1.2 + share * (many - few)
    report = gc.compress(model, x, bits=(2, 8), budget=gc.Budget(**{cost: limit}), **options).report
    assert getattr(report, cost).ratio <= limit * (1 + 1e-9)
    assert all(2 <= layer.weight_bits <= 8 or layer.weight_bits == 32 for layer in report.layers)


def _tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
