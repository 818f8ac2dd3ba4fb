"""One block, learned: Adam on places of weights between levels, on biases and on steps of activations.

Sources: Nagel et al. 2020 (AdaRound, arXiv 2004.10568), the loss of equation 25 and its schedule; Wei et al. 2022
(QDrop, arXiv 2203.05740), elements that are float at random; Esser et al. 2020 (LSQ, arXiv 1902.08153), gradients of
steps. Difference: the block is computed with weights that are more and more on their levels, by the straight-through
estimator, so that in a few hundred steps all else is learned for the levels, and not for places between them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.graph import bind, fetch
from graphcomp.ir.run_nodes import compute_node
from graphcomp.ops.answers import compute_of
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.segments import Segment
from graphcomp.quantization.setting import Setting
from graphcomp.quantization.soft_rounding import SoftRounding
from graphcomp.quantization.tensors import read_by_others
from graphcomp.torch_compat import pytree

PULL = 1000.0
"""Weight of the pull to levels: of the mean weight, relative to the error of the block at the start."""
SOFTEST, SHARPEST = 20.0, 2.0
"""Exponents of the pull, when it begins and at the end; AdaRound's numbers."""
WARM_UP = 0.2
"""Share of the steps without a pull; AdaRound's number."""
HARD = 0.6
"""Share of the steps after which weights are computed with on their levels: until then more and more so."""
FROZEN = 0.8
"""Share of the steps after which weights stay, and biases and steps alone are learned for them."""
RATE, BIAS_RATE, STEP_RATE = 0.01, 5e-3, 1e-2
"""Adam's learning rates: of V, of biases relative to their size, and of steps relative to theirs."""
DROPPED = 0.5
"""Chance of an element to be float while a block is learned; QDrop's number."""
FEWEST_STEPS = 20
"""With time for fewer steps nothing is learned."""
SMALL_BIAS = 1e-2
"""Size of a bias, at least, that its learning rate is relative to."""


@dataclass(frozen=True)
class Data:
    """What a block reads, and what it should give, piece by piece.

    Attributes:
        given: values from outside the block, as the quantized graph computes them.
        carried: the value that enters the block, as the float graph computes it; None: no element is replaced.
        wanted: what the float block gives.
        learns, judges: pieces to learn on, and to compare on.
    """

    given: Sequence[Mapping[fx.Node, Any]]
    carried: Sequence[Tensor] | None
    wanted: Sequence[Sequence[Tensor]]
    learns: Sequence[int]
    judges: Sequence[int]


@dataclass(eq=False)
class BlockTrial:
    """What one block learns.

    Attributes:
        setting: holds the fake-quant graph.
        segment: the block.
        results: what is compared, nested nodes.
        drops: let elements of activations be float at random.
        softs: quantizer node of a weight -> its rounding.
        biases: attribute -> the bias as it is learned, of those that one op of the block alone reads.
        steps: of quantizers of activations that stand in the block alone.
    """

    setting: Setting
    segment: Segment
    results: Any
    data: Data
    drops: bool = True
    softs: dict[fx.Node, SoftRounding] = field(init=False)
    biases: dict[fx.Node, Tensor] = field(init=False)
    steps: list[nn.Parameter] = field(init=False)

    rates: ClassVar[tuple[float, float, float]] = RATE, BIAS_RATE, STEP_RATE
    """Adam's learning rates, as `RATE`, `BIAS_RATE` and `STEP_RATE`."""
    decays: ClassVar[bool] = False
    """Whether the learning rate of rounding goes to 0, too, along a cosine."""

    def __post_init__(self) -> None:
        self.softs, self.biases, self.steps = self._softs(), self._biases(), self._steps()
        self._kept = [step.detach().clone() for step in self.steps]

    def restore(self) -> None:
        """Give steps the values that they had."""
        with torch.no_grad():
            for step, old in zip(self.steps, self._kept, strict=True):
                step.copy_(old)

    def learned(self) -> dict[fx.Node, Tensor]:
        """Return weights on levels, and biases, as they were learned."""
        hard = {node: soft.hard() for node, soft in self.softs.items()}
        return hard | {node: bias.detach() for node, bias in self.biases.items()}

    @torch.no_grad()
    def error(self, which: Sequence[int], instead: Mapping[fx.Node, Tensor]) -> float:
        """Return Σ ||y - t||² / Σ ||t||² of some pieces, with other weights and biases."""
        error = norm = 0.0
        for k in which:
            one, energy = squared(self._run({**self.data.given[k], **instead}), self.data.wanted[k])
            error, norm = error + float(one), norm + float(energy)
        return error / norm if norm else 0.0

    # -------------------------------------------------------------------------------------------- descent
    def descend(self, steps: int, seconds: float | None, generator: torch.Generator) -> str:
        """Take the steps of Adam, fewer where the time is short; return why there was no use in any, or "".

        Raises:
            RuntimeError, NotImplementedError: an op has no gradient.
        """
        data = self.data
        start = self.error(data.learns, {})
        if start == 0 or not math.isfinite(start):
            return "the output is as in floats already" if start == 0 else "the output is not finite"
        of_rounding, of_bias, of_step = self.rates
        groups: list[dict[str, Any]] = [{"params": [soft.free for soft in self.softs.values()], "lr": of_rounding}]
        groups += [{"params": [b], "lr": of_bias * max(_size(b), SMALL_BIAS)} for b in self.biases.values()]
        groups += [{"params": [p], "lr": of_step * _size(p)} for p in self.steps]
        optimizer, rates = torch.optim.Adam(groups), [group["lr"] for group in groups]
        learnt = [p.requires_grad for p in self.steps]
        own = {self.setting.quantizers[node] for node in self.segment.nodes if node in self.setting.quantizers}
        begun, order = time.monotonic(), list[int]()
        try:
            for parameter in self.steps:
                parameter.requires_grad_(True)
            for step in range(steps):
                done = step / steps
                if seconds is not None:
                    spent = (time.monotonic() - begun) / max(seconds, 1e-9)
                    if step <= 2 and spent * FEWEST_STEPS > max(step, 1):
                        return f"there is no time for {FEWEST_STEPS} steps"
                    done = max(done, spent)
                    if done >= 1:
                        break
                first = 0 if self.decays else 1
                for group, rate in zip(groups[first:], rates[first:], strict=True):
                    group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
                order = order or torch.randperm(len(data.learns), generator=generator).tolist()
                optimizer.zero_grad()
                with torch.enable_grad():
                    self._loss(data.learns[order.pop()], done, start, generator).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                for quantizer in own:
                    quantizer.project()
        finally:
            for parameter, state in zip(self.steps, learnt, strict=True):
                parameter.requires_grad_(state)
        return ""

    def _loss(self, k: int, done: float, start: float, generator: torch.Generator) -> Tensor:
        """Return the error of one piece, relative to the start, with the pull to levels."""
        values = dict(self.data.given[k])
        if self.data.carried is not None and self.segment.entry is not None and self.drops:
            entry = self.segment.entry
            values[entry] = _mixed(self.data.carried[k], values[entry], generator)
        values |= {node: soft.between(max(0.0, 1 - done / HARD)) for node, soft in self.softs.items()}
        if done >= FROZEN:
            values |= {node: soft.hard() for node, soft in self.softs.items()}
        values |= self.biases
        error, norm = squared(self._run(values, generator if self.drops else None), self.data.wanted[k])
        loss = error / norm.clamp(min=torch.finfo(norm.dtype).tiny) / start
        if not WARM_UP <= done < FROZEN:
            return loss
        sharp = SOFTEST + (SHARPEST - SOFTEST) * (done - WARM_UP) / (1 - WARM_UP)
        count = sum(soft.free.numel() for soft in self.softs.values())
        return loss + PULL / count * torch.stack([soft.undecided(sharp) for soft in self.softs.values()]).sum()

    def _run(self, values: dict[fx.Node, Any], drops: torch.Generator | None = None) -> list[Tensor]:
        """Compute the block; nodes that `values` holds are taken as they are."""
        for node in self.segment.nodes:
            if node in values:
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            found = compute_node(self.setting.fake, node, args, kwargs)
            if node.op == "get_attr" and isinstance(found, Tensor):
                found = found.detach()
            elif drops is not None and node in self.setting.quantizers and node not in self.setting.constant:
                found = _mixed(values[node.all_input_nodes[0]], found, drops)
            values[node] = found
        found = fx.map_arg(self.results, values.__getitem__)
        return [t for t in pytree.tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()]

    # -------------------------------------------------------------------------------------------- what is learned
    def _softs(self) -> dict[fx.Node, SoftRounding]:
        found = {}
        for node in self.segment.weights:
            held = self.setting.held(node)
            if isinstance(held, str):
                continue
            floats = self.setting.floats.get(node, held.weight)
            soft = SoftRounding.of(self.setting.quantizers[node], held.weight, floats)
            if soft is not None:
                found[node] = soft
        return found

    def _biases(self) -> dict[fx.Node, Tensor]:
        found: dict[fx.Node, Tensor] = {}
        for node in self.segment.nodes:
            operands = compute_of(node) if node.op == "call_function" else None
            bias = bind(node).get(operands.bias) if operands is not None and operands.bias else None
            if not isinstance(bias, fx.Node) or bias.op != "get_attr":
                continue
            if not read_by_others(self.setting.readers, bias, node):
                found[bias] = fetch(self.setting.fake, str(bias.target)).detach().clone().requires_grad_(True)
        return found

    def _steps(self) -> list[nn.Parameter]:
        own, places = set(self.segment.nodes), dict[Quantizer, list[fx.Node]]()
        for node, quantizer in self.setting.quantizers.items():
            places.setdefault(quantizer, []).append(node)
        return [
            step
            for quantizer, nodes in places.items()
            if own.issuperset(nodes) and not any(node in self.setting.constant for node in nodes)
            for step in quantizer.steps()
        ]


def _mixed(exact: Tensor, rough: Tensor, generator: torch.Generator) -> Tensor:
    """Return elements of `exact` at random, and of `rough` elsewhere."""
    chosen = torch.rand(rough.shape, generator=generator) < DROPPED
    return torch.where(chosen.to(rough.device), exact, rough)


def squared(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return Σ (y - t)² and Σ t² over the elements of t that are finite."""
    parts = []
    for y, t in zip(found, wanted, strict=True):
        wide, finite = torch.promote_types(t.dtype, torch.float32), t.isfinite()
        y, t = (torch.where(finite, x, 0).to(wide) for x in (y, t))
        parts.append((torch.sum((y - t).square(), dtype=torch.float64), torch.sum(t.square(), dtype=torch.float64)))
    error, norm = (torch.stack(each).sum() for each in zip(*parts, strict=True))
    return error, norm


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().abs().mean())
