"""Ranges of activations chosen by what they do to the results of the ops that read the activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.ir.graph import example_size, tensor_values
from graphcomp.ir.memory import is_writing
from graphcomp.ir.preserve import own_inputs, same_buffers
from graphcomp.ir.run_nodes import Run
from graphcomp.ops.answers import move_of
from graphcomp.quantization.calibrate import Range
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.quantizers.base import Quantizer

ENOUGH = 32
"""Samples, of the first batches, that ranges are chosen on."""


@torch.no_grad()
def choose_ranges(
    fake: fx.GraphModule, choices: Mapping[Quantizer, Sequence[Range]], batches: Sequence[Sequence[Any]]
) -> None:
    """Set the range of each quantizer to the one, of its choices, with the least error.

    The error is that of the results of all ops that read the quantized value, each relative to its own size, when
    nothing else is quantized. Ops that move elements are passed over. The first of equals is taken.

    Args:
        fake: with quantizers; nothing but the ranges of these changes.
        choices: quantizer -> ranges, one at least.
        batches: flat inputs in the form of the placeholders, on which the graph runs; the first ones are used.
    """
    everything = dict(quantizer_nodes(fake))
    found = {node: quantizer for node, quantizer in everything.items() if quantizer in choices}
    errors = {quantizer: [0.0] * len(ranges) for quantizer, ranges in choices.items()}
    for quantizer in everything.values():
        quantizer.enabled = False
    try:
        with same_buffers(fake):
            for batch in _first(fake, batches):
                _compare(fake, batch, found, choices, errors)
    finally:
        for quantizer in everything.values():
            quantizer.enabled = True
    for quantizer, own in errors.items():
        quantizer.set_range(*choices[quantizer][own.index(min(own))])


def _compare(
    fake: fx.GraphModule,
    batch: Sequence[Any],
    found: Mapping[fx.Node, Quantizer],
    choices: Mapping[Quantizer, Sequence[Range]],
    errors: Mapping[Quantizer, list[float]],
) -> None:
    """Add to `errors` what each range does to the results of one batch."""
    run = Run(fake, own_inputs(fake, batch))
    for node in fake.graph.nodes:
        run.step(node)
        exact = run.values[node]
        passed_over = node in found or node.op == "output" or move_of(node) or is_writing(node)  # these are run once
        reads = [] if passed_over else node.all_input_nodes
        for operand in reads:
            quantizer = found.get(operand)
            if quantizer is None or not isinstance(exact, Tensor) or not exact.is_floating_point():
                continue
            whole = run.values[operand]
            quantizer.enabled = True
            for k, ends in enumerate(choices[quantizer]):
                quantizer.set_range(*ends)
                run.values[operand] = quantizer(whole)
                run.step(node)
                errors[quantizer][k] += _relative(exact, run.values[node])
            quantizer.enabled = False
            run.values |= {operand: whole, node: exact}
        run.drop(node)


def _relative(exact: Tensor, rough: Tensor) -> float:
    norm = float(exact.double().square().sum())
    error = float((exact.double() - rough.double()).square().sum())
    return error / norm if norm else error


def _first(fake: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return the first batches, of ENOUGH samples together; one at least."""
    inputs = [tensor for node in fake.graph.find_nodes(op="placeholder") for tensor in tensor_values(node)]
    example = max(1, sum(math.prod(map(example_size, t.shape[1:])) for t in inputs))
    sizes = [sum(t.numel() for t in batch if isinstance(t, Tensor)) // example for batch in batches]
    before = [0, *accumulate(sizes)]
    return [batch for batch, _ in zip(batches, takewhile(lambda count: count < ENOUGH, before), strict=False)]
