"""How far two outputs are apart, and how far rounding may take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphcomp.torch_compat import pytree

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative error that rounding may cause, by the dtype of the output."""


def relative_error(expected: Any, actual: Any) -> float:
    """max|a - b| / max|a|, the worst over the floating tensors of two nested outputs.

    Infinite where the outputs differ in number, shape or in where they are not finite.
    """
    pairs = floating_tensors(expected), floating_tensors(actual)
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        return math.inf
    return max((_error(a, b) for a, b in zip(*pairs, strict=True)), default=0.0)


def floating_tensors(output: Any) -> list[Tensor]:
    """The floating tensors of a nested output, in a fixed order."""
    return [t.detach() for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def squared_error(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> tuple[float, float]:
    """Return Σ (a - b)² and Σ a² in float64, over the elements of a that are finite: masked logits are -inf in both.

    The error is infinite where b is not finite and a is.
    """
    error = norm = 0.0
    for a, b in zip(expected, actual, strict=True):
        finite = a.isfinite()
        x, y = a[finite].double(), b[finite].double()
        error += float((x - y).square().sum().nan_to_num(math.inf, math.inf))
        norm += float(x.square().sum())
    return error, norm


def why_silent(output: Tensor) -> str:
    """Return why a comparison of `output` proves nothing; "" where it proves something.

    Classes, flags, one number everywhere and numbers that are not finite look alike for many models.
    """
    if output.is_meta:
        return "has no values (meta device)"
    if output.numel() == 0:
        return "is empty"
    if not output.is_floating_point() and not output.is_complex():
        return "holds flags" if output.dtype == torch.bool else "holds integers"
    numbers = torch.view_as_real(output) if output.is_complex() else _computable(output)
    finite = numbers[numbers.isfinite()]
    if finite.numel() == 0:
        return "is nowhere finite"
    least, most = finite.min(), finite.max()
    if numbers.numel() > 1 and least == most:
        return "is zero everywhere" if least == 0 else "is one number everywhere"
    return "is zero" if least == most == 0 else ""


def is_whole(output: Tensor) -> bool:
    """Return whether a tensor of floats holds whole numbers alone, as classes and flags do that were cast to floats."""
    if not output.is_floating_point() or output.is_meta:
        return False
    numbers = _computable(output)
    return bool((numbers == numbers.round())[numbers.isfinite()].all())


def _computable(output: Tensor) -> Tensor:
    """Return floats of 8 bits, which few ops take, as float32; all else as it is."""
    return output.float() if output.is_floating_point() and output.itemsize == 1 else output


def _error(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(torch.float64).tiny))


def in_float64(found: Any) -> Any:
    """A floating tensor in float64; anything else as it is."""
    return found.double() if isinstance(found, Tensor) and found.is_floating_point() else found


def tolerance_of(output: Any) -> float:
    """The largest relative error that rounding may cause in `output`."""
    return max((TOLERANCE.get(t.dtype, 1e-1) for t in floating_tensors(output)), default=0.0)
