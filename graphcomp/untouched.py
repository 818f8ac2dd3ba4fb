"""Run a model without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from graphcomp.inputs import copies


@contextmanager
def untouched(model: nn.Module, *, real: bool) -> Iterator[None]:
    """Eval mode inside; outside, the model and the random state are as they were.

    Restored for every submodule: its own train/eval flag; its attributes, which a forward may cache things on, and one
    level into those that are dicts (parameters, buffers, submodules, hooks); and, for a run on real data, the
    values of its buffers. The flags are set directly, as a model's own `eval()` may do more than that.

    Args:
        model: any module.
        real: whether the model runs on real data inside (rather than on fake tensors), so that buffers may change.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    tables = [(value, dict(value)) for saved in attributes for value in saved.values() if isinstance(value, dict)]
    buffers = [(b, b._version, b.clone()) for b in model.buffers()] if real and not _inference(model) else []
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=cuda):
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, saved in zip(modules, attributes, strict=True):
                _restore(vars(module), saved)
            for table, saved in tables:
                _restore(table, saved)
            with torch.no_grad():
                for buffer, version, value in buffers:
                    if buffer._version != version:
                        buffer.copy_(value)


@contextmanager
def same_buffers(graph: fx.GraphModule) -> Iterator[None]:
    """What a run of `graph` writes into tensors of the model is undone; nothing is copied where no op writes."""
    saved = [(b, b.clone()) for b in graph.buffers()] if writes(graph) else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def own_inputs(graph: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Return flat inputs for one run of `graph`: copies where some op writes into a tensor, else `inputs`."""
    return copies(list(inputs)) if writes(graph) else list(inputs)


def writes(graph: fx.GraphModule) -> bool:
    """Whether some op writes into a tensor that it is given."""
    nodes = (node for part in graph.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes)
    return any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in nodes)


def _inference(model: nn.Module) -> bool:
    """Inference tensors count no versions; a model made of them is taken as is."""
    return any(buffer.is_inference() for buffer in model.buffers())


def _restore(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Give `now` the entries of `before`, in order, touching it only where they differ."""
    if list(now) == list(before) and all(now[key] is before[key] for key in before):
        return
    now.clear()
    now.update(before)
