"""Errors of outputs, where some elements are not finite."""

from __future__ import annotations

import math

import torch

from graphcomp.numerics.compare import squared_error


def test_masked_elements_do_not_count() -> None:
    a, b = torch.tensor([3.0, -math.inf, 4.0]), torch.tensor([3.0, -math.inf, 2.0])
    assert squared_error([a, a[:1]], [b, b[:1] + 1]) == (5.0, 34.0)


def test_elements_that_are_no_longer_finite_are_infinitely_off() -> None:
    a = torch.tensor([1.0, 2.0])
    for wrong in (math.nan, math.inf):
        assert squared_error([a], [torch.tensor([1.0, wrong])]) == (math.inf, 5.0)
