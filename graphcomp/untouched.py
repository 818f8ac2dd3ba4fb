"""Run a model without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from graphcomp.graph import assign
from graphcomp.graph_module import tensor_names
from graphcomp.inputs import copies
from graphcomp.module_copy import module_copy, own_memory
from graphcomp.threads import LOCK


@contextmanager
def eval_copy(model: nn.Module, *, real: bool) -> Iterator[nn.Module]:
    """Yield a copy of `model` in eval mode to run; put the random state back afterwards.

    The model itself is never touched, so that other threads may use it meanwhile. The flags of the copy are set
    directly, as a model's own `eval()` may do more than that. Parameters are shared.

    Args:
        model: any module.
        real: whether the copy runs on real data (rather than on fake tensors): then it has buffers, and other tensors
            that are no parameters, of its own, as the forward may write into them.
    """
    copied = module_copy(model, own_memory(list(tensor_names(model).values())) if real else None)
    for module in copied.modules():
        module.training = False
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with LOCK, torch.random.fork_rng(devices=cuda):
        yield copied


@contextmanager
def same_buffers(graph: fx.GraphModule) -> Iterator[None]:
    """Give `graph` copies of its buffers inside, if some op writes into a tensor that it is given."""
    before = dict(graph.named_buffers(remove_duplicate=False)) if writes(graph) else {}
    copies = {id(buffer): buffer.detach().clone() for buffer in before.values()}
    for name, buffer in before.items():
        assign(graph, name, copies[id(buffer)])
    try:
        yield
    finally:
        for name, buffer in before.items():
            assign(graph, name, buffer)


def own_inputs(graph: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Return flat inputs for one run of `graph`: copies where some op writes into a tensor, else `inputs`."""
    return copies(list(inputs)) if writes(graph) else list(inputs)


def writes(graph: fx.GraphModule) -> bool:
    """Whether some op writes into a tensor that it is given."""
    nodes = (node for part in graph.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes)
    return any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in nodes)
