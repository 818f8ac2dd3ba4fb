"""Pruning of single weights: which parameters take part, and the mask of the largest of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from graphcomp.coupling.propagate import Coupling
from graphcomp.ir.graph import argument_at, bind, module_path
from graphcomp.ops.answers import parameter_behind
from graphcomp.pruning.analytic import analytic_masks
from graphcomp.quantization.spec import matches
from graphcomp.training.prepared import Prepared


def multiplied(ready: Prepared) -> dict[str, nn.Parameter]:
    """Return the parameters that the model multiplies with and that are trained, by name, in the order of the graph.

    These are the operands that the rules of the ops multiply: of layers, of einsum, of recurrent layers. Parameters of
    modules that are to stay float are left out. A parameter of two names is there once.
    """
    session, coupling = ready.session, ready.session.plan.coupling
    found: dict[str, nn.Parameter] = {}
    for node in coupling.graph.nodes:
        if any(matches(pattern, module_path(node)) for pattern in session.ignore):
            continue
        for name in _weights(node, coupling):
            found[name] = ready.get_parameter(name)
    shared = {id(parameter): name for name, parameter in reversed(found.items())}
    return {n: p for n, p in found.items() if p.requires_grad and shared[id(p)] == n}


def _weights(node: fx.Node, coupling: Coupling) -> Iterator[str]:
    """Yield the parameters whose elements the op multiplies and sums, as the op's rule says."""
    call = coupling.calls.get(node)
    if call is None or not call.products:
        return
    arguments = bind(node)
    for key in dict.fromkeys(key for product in call.products for key in product.operands):
        operand = argument_at(arguments, key)
        if isinstance(operand, fx.Node) and (name := parameter_behind(operand, coupling.parameters)):
            yield name


@torch.no_grad()
def drop_gradients(ready: Prepared, masks: Mapping[str, Tensor]) -> None:
    """Set the gradients of pruned weights to zero, which momentum would gather."""
    for name, mask in masks.items():
        gradient = ready.get_parameter(name).grad
        if gradient is not None:
            gradient.masked_fill_(~mask, 0)


def pruned_counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return columns of metrics: how many weights are pruned, of how many."""
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    return {"weights_pruned": pruned, "weights": sum(mask.numel() for mask in masks.values())}


Allocation: TypeAlias = Literal["global", "opq"]
"""How many weights of each layer go: all ranked by magnitude together, or as OPQ plans from the weights."""


def masks_of(weights: Mapping[str, Tensor], sparsity: float, allocation: Allocation = "global") -> dict[str, Tensor]:
    """Return bool masks of single weights, False for the fraction that goes, met to the nearest weight.

    Args:
        sparsity: fraction of all elements that is pruned.
        allocation: "global", see `largest`; "opq", see `graphcomp.pruning.analytic`.
    """
    return largest(weights, sparsity) if allocation == "global" else analytic_masks(weights, sparsity)


def others(allocation: Allocation) -> dict[str, str]:
    """Return what tells runs of this allocation from others; nothing of the default, as folders of before have none."""
    return {} if allocation == "global" else {"allocation": allocation}


@torch.no_grad()
def largest(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Return bool masks that leave the largest magnitudes of all tensors together.

    Args:
        sparsity: fraction of all elements that is pruned, met to the nearest element.
    """
    flat = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[flat.argsort(stable=True)[: round(sparsity * len(flat))]] = False
    parts = torch.split(mask, [weight.numel() for weight in weights.values()])
    return {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}
