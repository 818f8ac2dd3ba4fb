"""A check of placement: with all quantizers off, a quantized graph computes what the float graph computes.

Law 3 compares integers with the fake-quant graph; this is the step before. A quantizer that stands between a value and
a write into that value would lose the write in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import VerificationError
from graphcomp.ir.program import P
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.numerics.compare import relative_error, tolerance_of
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.torch_compat import pytree


@dataclass(frozen=True)
class CheckPlaced:
    """Compare the program, all quantizers off, with the float program remembered as `stage`, on the first batch."""

    stage: str
    batches: Sequence[Sequence[Any]]
    name: ClassVar[str] = "check placed quantizers"

    def __call__(self, program: P, /) -> P:
        """Return the program.

        Raises:
            VerificationError: the two differ.
        """
        for inputs in self.batches[:1]:
            check_placed(program.stages[self.stage].module, program.module, inputs)
        return program


def check_placed(floats: fx.GraphModule, fake: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Compare `fake`, all quantizers off, with `floats`, which quantizers were placed in, on flat `inputs`.

    Raises:
        VerificationError: an output differs by more than rounding.
    """
    expected = _run(floats, inputs)
    with in_floats(fake):
        actual = _run(fake, inputs)
    error, allowed = relative_error(expected, actual), tolerance_of(expected)
    if not error <= allowed or not _equal_integers(expected, actual):
        raise VerificationError(
            "the graph with quantizers does not compute what the float graph computes, all quantizers off",
            why=f"largest relative error {error:.1e}, allowed {allowed:.0e}: a quantizer is in the wrong place",
            fix="please report the model",
        )


@contextmanager
def in_floats(module: nn.Module) -> Iterator[None]:
    """Let the quantizers of `module` pass on what they read, inside."""
    with switched_off(quantizer for quantizer in module.modules() if isinstance(quantizer, Quantizer)):
        yield


@contextmanager
def switched_off(quantizers: Iterable[Quantizer]) -> Iterator[None]:
    """Let quantizers pass on what they read, inside."""
    found = list(quantizers)
    before = [quantizer.enabled for quantizer in found]
    for quantizer in found:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in zip(found, before, strict=True):
            quantizer.enabled = enabled


def _run(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run a graph, and leave the random state as it was, so that the next run draws the same numbers."""
    devices = {p.device.index or 0 for p in graph.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        return run_tapped(graph, inputs)


def _equal_integers(expected: Any, actual: Any) -> bool:
    """Return whether the outputs that hold no floats are equal."""
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor) and not a.is_floating_point())
