"""A result that was trained on: the same cut with other values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from graphcomp.capture.capture import example_arguments
from graphcomp.errors import PlanError
from graphcomp.native.integers import quantized_tensors
from graphcomp.quantization.raising import integer_graph
from graphcomp.report.report import Report
from graphcomp.result import CompressedModel


def trainable(small: CompressedModel) -> nn.Module:
    """Return the module of a result in floats.

    Raises:
        PlanError: weights are integers.
    """
    if quantized_tensors(small.module) or integer_graph(small.module) is not None:
        raise PlanError(
            "the weights of the model are integers, which no gradient moves",
            fix="train before quantizing: small = finetune(small, …), then compress(small.module, x, "
            'sparsity=0.0, bits=8); or method="qat"',
        )
    return small.module


def inputs_of(
    small: CompressedModel, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example inputs that were given, or those that the model was compressed with.

    Raises:
        PlanError: there are none, as after `load`.
    """
    if example_inputs is not None or example_kwargs is not None:
        return example_arguments(() if example_inputs is None else example_inputs, example_kwargs)
    if not small.example_args and not small.example_kwargs:
        raise PlanError("no example inputs", why="a loaded model has none", fix="finetune(…, example_inputs=x)")
    return small.example_args, small.example_kwargs


def with_values(small: CompressedModel, tuned: CompressedModel) -> CompressedModel:
    """Return `tuned` with what `small` says of the cut: the costs before, the units, the indices that were kept.

    Args:
        tuned: `small` with other values, itself cut nowhere.
    """
    assert isinstance(tuned.report, Report)
    report: Any = small.report
    if isinstance(report, Report):
        notes = dict.fromkeys((*report.notes, *tuned.report.notes))
        own = tuned.report
        report = replace(
            report,
            notes=tuple(notes),
            verified={**report.verified, **own.verified},
            unchecked={**report.unchecked, **own.unchecked},
            latency_ms=own.latency_ms or report.latency_ms,
        )
    found = CompressedModel(
        tuned.module,
        form=small.form,
        kept=small.kept,
        report=report,
        reason=small.reason,
        edits=small.edits,
        original_shapes=small.original_shapes,
        example_args=tuned.example_args,
        example_kwargs=tuned.example_kwargs,
    )
    found.path, found.called = tuned.path, small.called
    return found
