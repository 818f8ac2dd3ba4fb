"""Pruning of single weights: which parameters take part, and the mask of the largest of all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graphcomp.ir.graph import bind, module_path
from graphcomp.ops.answers import compute_of, parameter_behind
from graphcomp.quantization.spec import matches
from graphcomp.training.prepared import Prepared


def multiplied(ready: Prepared) -> dict[str, nn.Parameter]:
    """Return the parameters that the model multiplies with and that are trained, by name, in the order of the graph.

    Parameters of modules that are to stay float are left out.
    """
    session, plan = ready.session, ready.session.plan
    found: dict[str, nn.Parameter] = {}
    for node in plan.coupling.graph.nodes:
        compute = compute_of(node)
        if compute is None:
            continue
        name = parameter_behind(bind(node)[compute.weight], plan.coupling.parameters)
        if name and not any(matches(pattern, module_path(node)) for pattern in session.ignore):
            found[name] = ready.get_parameter(name)
    return {name: parameter for name, parameter in found.items() if parameter.requires_grad}


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
