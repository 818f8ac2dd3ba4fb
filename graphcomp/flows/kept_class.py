"""Weights of integers in the user's own class: put there, and compared with the integer graph."""

from __future__ import annotations

import sys

import torch
from torch import nn

from graphcomp.capture.capture import Captured
from graphcomp.errors import PlanError
from graphcomp.flows.checked import check_class, given_to
from graphcomp.flows.results import Cut
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.preserve import eval_copy
from graphcomp.ir.program import Program
from graphcomp.native.integers import CannotHold, put_integers
from graphcomp.native.model import NativeResult
from graphcomp.numerics.compare import relative_error
from graphcomp.quantization.lower import FAKE
from graphcomp.quantization.operand import exact_products
from graphcomp.system.threads import one_at_a_time

SHOWS = 1e-4
"""Relative difference of outputs from which a note says that kernels round."""


def asks_for_class(model: nn.Module, keep_class: bool | None) -> bool:
    """Return whether weights of integers go into the model's own class: as asked, or where much of the model's use
    stands in its class (`generate`, caches and `save_pretrained` of transformers)."""
    if keep_class is not None:
        return keep_class
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


@one_at_a_time
def integers_in_class(cut: Cut, held: NativeResult, integers: Program) -> tuple[NativeResult, tuple[str, ...]]:
    """Put weights of integers into a model of the user's class.

    Args:
        held: the class with the floats of the cut; the model is changed.
        integers: lowered; its fake-quant stage says what is quantized.

    Returns:
        The model, or why there is none; and notes.
    """
    if held.module is None:
        return held, ()
    try:
        put_integers(held.module, integers.stages[FAKE].module)
    except CannotHold as why:
        return NativeResult(None, str(why)), ()
    captured = cut.plan.captured
    with exact_products():
        found = check_class(held, integers.module, given_to(captured), captured)
    if found.module is None:
        return found, ()
    off = _rounding_of_kernels(found.module, captured)
    note = (
        f"the class computes on integers: outputs differ by {off:.1e} (relative) from the same in floats, as products "
        "of four bits are rounded to bfloat16, and values on the border of two codes may get the other one"
    )
    return found, (note,) if off > SHOWS else ()


def _rounding_of_kernels(module: nn.Module, captured: Captured) -> float:
    """Return how far outputs computed by kernels are from those computed with floats made of the codes."""
    args, kwargs = captured.inputs.copies()
    with eval_copy(module, real=True) as copied, torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        got = tensor_leaves(copied(*args, **kwargs))
        args, kwargs = captured.inputs.copies()
        with exact_products():
            torch.manual_seed(0)
            wanted = tensor_leaves(copied(*args, **kwargs))
    return relative_error(wanted, got)


def refuse_graph(keep_class: bool | None, found: NativeResult) -> None:
    """Raise PlanError where the class was asked for, and cannot hold the integers."""
    if keep_class and found.module is None:
        raise PlanError(
            "keep_class=True, and the model's class cannot hold the quantized model",
            why=found.reason,
            fix='activation_bits=None, for weights alone, or activations="dynamic"; QuantConfig(attention=False) where '
            "products of two activations are quantized; or without keep_class, for a graph",
        )
