"""Calibration batches in pieces of few samples: one step of learning each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.ir.inputs import first_samples, sample_count
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.numerics.compare import floating_tensors

SAMPLES = 1024
"""Samples that are learned and judged on at most."""
PIECE = 16
"""Samples of one step at most, where a batch can be divided."""


def pieces_of(floats: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return the first batches, up to SAMPLES, in pieces of up to PIECE samples; a small single batch in two.

    Whole batches where the graph does not compute the same of pieces: not each sample by itself, or for one length.
    """
    chosen = first_samples(batches, SAMPLES)
    least = 2 if len(chosen) == 1 else 1
    if not divides(floats, chosen[0]):
        return list(chosen)
    return [piece for batch in chosen for piece in _pieces(batch, least)]


def in_parts(batch: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """Return a batch that can be divided in parts of up to `most` samples."""
    return _pieces(batch, 1, most)


def _pieces(batch: Sequence[Any], least: int, most: int = PIECE) -> list[Sequence[Any]]:
    count = sample_count(batch)
    parts = max(-(-count // most), min(least, count))
    split = [t.chunk(parts) if isinstance(t, Tensor) and t.dim() and len(t) == count else (t,) * parts for t in batch]
    return list(zip(*split, strict=False))  # `chunk` may give fewer


@torch.no_grad()
def divides(floats: fx.GraphModule, batch: Sequence[Any]) -> bool:
    """Return whether a batch has parts, and the outputs of its parts are the parts of its outputs."""
    parts = _pieces(batch, 2)
    if len(parts) < 2:
        return False
    whole = floating_tensors(run_tapped(floats, batch))
    try:
        found = [floating_tensors(run_tapped(floats, part)) for part in parts]
    except Exception:  # whatever the ops raise on inputs of another shape
        return False
    if not whole or any(len(outputs) != len(whole) for outputs in found):
        return False
    return all(_joined(tensor, [outputs[k] for outputs in found]) for k, tensor in enumerate(whole))


def _joined(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    if not whole.dim() or any(part.shape[1:] != whole.shape[1:] for part in parts):
        return False
    together = torch.cat(list(parts))
    return together.shape == whole.shape and torch.allclose(together, whole, rtol=1e-3, atol=1e-4, equal_nan=True)
