"""Quantization-aware training by LSQ and LSQ+: parameter groups with learning rates that fit steps and zero points.

Source: LSQ (Esser et al. 2020, arXiv 1902.08153) trains steps by SGD with the learning rate of the weights, and scales
their gradients by 1 / sqrt(n * quant_max). Adaptive optimizers, such as Adam, divide that scale out again: an update
has the size of the learning rate. Here each quantizer then gets a learning rate of its own, in proportion to its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from graphcomp.quantization.quantizers.affine import AffineQuantizer
from graphcomp.quantization.quantizers.uniform import StepQuantizer

FASTEST = 0.01
"""Of a step with an adaptive optimizer, by default: one update moves the step by 1 % of its size at most."""

FASTER = 10.0
"""Relative learning rate of steps, by default, in learning rates of the weights."""


FARTHEST = 0.1
"""Largest relative change of a step in one update. An 8-bit step is small beside the weights, whose gradients the step
sums: without a limit one update can take the step below 0, after which the channel is 0."""


def lsq_groups(
    quantizers: Sequence[StepQuantizer], base: type[Optimizer], lr: float, lr_quant: float | None
) -> Iterator[dict[str, Any]]:
    """Yield parameter groups of all steps and zero points that can be trained, without weight decay.

    Args:
        base: class of the optimizer.
        lr: learning rate of the weights.
        lr_quant: with SGD, learning rate of steps and zero points (default: `lr`). With other optimizers, the size of
            an update in steps, and in ranges of codes (default: ten times `lr`, 1 % at most).
    """
    if issubclass(base, SGD):
        parameters = [p for q in quantizers for p in q.parameters() if p.requires_grad]
        if parameters:
            yield _group(*parameters, lr=lr if lr_quant is None else lr_quant)
        return
    relative = min(FASTER * float(lr), FASTEST) if lr_quant is None else lr_quant
    for quantizer in quantizers:
        for step in quantizer.steps():
            if step.requires_grad:
                yield _group(step, lr=relative * float(step.detach().mean()))
        if isinstance(quantizer, AffineQuantizer) and quantizer.zero_point.requires_grad:
            codes = quantizer.spec.quant_max - quantizer.spec.quant_min
            yield _group(quantizer.zero_point, lr=relative * codes)


def decaying(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Return groups of the parameters of a model: matrices, and without weight decay biases and norms."""
    matrices: dict[str, Any] = {"params": [p for p in parameters if p.dim() > 1]}
    vectors: dict[str, Any] = {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}
    return [group for group in (matrices, vectors) if group["params"]]


def steps_of(quantizers: Sequence[StepQuantizer]) -> list[nn.Parameter]:
    """Return the steps of all quantizers."""
    return [step for quantizer in quantizers for step in quantizer.steps()]


@torch.no_grad()
def hold_steps(quantizers: Sequence[StepQuantizer], before: Sequence[Tensor]) -> None:
    """Bring steps back that an update has moved too far from those `before`, and zero points into the codes."""
    for step, old in zip(steps_of(quantizers), before, strict=True):
        step.clamp_(old * (1 - FARTHEST), old * (1 + FARTHEST))
    for quantizer in quantizers:
        quantizer.project()


def with_steps(module: nn.Module) -> list[StepQuantizer]:
    """Return the quantizers at fixed bits in a module, in the order of the modules."""
    return [m for m in module.modules() if isinstance(m, StepQuantizer)]


def _group(*parameters: Tensor, lr: float) -> dict[str, Any]:
    return {"params": list(parameters), "lr": lr, "weight_decay": 0.0}
