"""Whether a graph has the gradients of the model that it was captured from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.backward import between, calls_in, drop
from graphcomp.capture.capture import Captured
from graphcomp.capture.record import named_tensors
from graphcomp.errors import first_line
from graphcomp.ir.preserve import eval_copy, same_buffers
from graphcomp.ops.answers import compute_of
from graphcomp.torch_compat import pytree

log = logging.getLogger("graphcomp.prepare")

ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest relative difference of two gradients that rounding may cause; COARSE for other dtypes."""
COARSE = 5e-2

SHOWN = 3


def settle_gradients(captured: Captured, *, quantized: bool) -> str:
    """Keep the backward of Functions in a graph that is to be trained, where that can be done, and compare gradients.

    A Function that is random loses its backward, since the backward is taken of another run of the Function; so does
    one that multiplies with weights, where these are to be quantized.

    Returns:
        What differs, which is logged, too; "" where nothing does.
    """
    graph = captured.module.graph
    unfit = [call for call in calls_in(graph) if any(_is_unfit(node, quantized) for node in between(call))]
    if unfit:
        drop(graph, unfit)
        captured.module.recompile()
    other = other_gradients(captured)
    if other:
        log.warning("%s: %s", type(captured.original).__name__, other)
    return other


def _is_unfit(node: fx.Node, quantized: bool) -> bool:
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return random or (quantized and compute_of(node) is not None)


def other_gradients(captured: Captured) -> str:
    """Return which parameters have another gradient in the graph than in the model, and why; "" where none has.

    Both run once in eval mode on the example inputs; the loss is a random sum of the outputs.
    """
    parameters = {n: p for n, p in captured.module.named_parameters() if p.requires_grad and not p.is_meta}
    if not parameters or torch.is_inference_mode_enabled() or captured.producer == "record":
        return ""
    try:
        wanted, got = _of_model(captured, parameters), _of_graph(captured, parameters)
    except Exception as error:  # of the user's code: a forward that has no gradient, say
        log.debug("the gradients of %s are not compared: %s", type(captured.original).__name__, first_line(error))
        return ""
    apart = [name for name in parameters if _differ(wanted[name], got[name])]
    if not apart:
        return ""
    more = f" and {len(apart) - SHOWN} more" if len(apart) > SHOWN else ""
    written = ", ".join(map(str, captured.functions))
    reason = f"the backward of {written} is lost" if written else "a hook or other code of eager mode changes it"
    return f"the gradient of {', '.join(apart[:SHOWN])}{more} is not that of the model: {reason}"


def _of_model(captured: Captured, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    args, kwargs = captured.inputs.copies()
    with eval_copy(captured.original, real=True) as copied, torch.enable_grad():
        return _gradients(dict(named_tensors(copied(*args, **kwargs), "")), captured, parameters)


def _of_graph(captured: Captured, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    args, kwargs = captured.inputs.copies()
    with same_buffers(captured.module), torch.enable_grad():
        outputs = pytree.tree_leaves(captured.module(*args, **kwargs))
    tensors = [t for t in outputs if isinstance(t, Tensor)]
    return _gradients(dict(zip(captured.output_names, tensors, strict=True)), captured, parameters)


def _gradients(
    outputs: Mapping[str, Tensor], captured: Captured, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    terms = []
    for name in captured.output_names:
        output = outputs[name]
        weight = torch.randn(output.shape, generator=generator).to(output.device)
        if output.requires_grad:
            terms.append((output * weight.to(output.dtype)).sum())
    if not terms:
        return dict.fromkeys(parameters)
    loss: Any = sum(terms)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def _differ(wanted: Tensor | None, got: Tensor | None) -> bool:
    if wanted is None or got is None:
        given = wanted if got is None else got
        return given is not None and bool(given.any())
    allowed = ROUNDING.get(wanted.dtype, COARSE)
    size = torch.maximum(wanted.double().norm(), got.double().norm())
    return not bool((wanted.double() - got.double()).norm() <= allowed * size)
