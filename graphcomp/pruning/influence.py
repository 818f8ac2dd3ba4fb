"""How much each row that a layer computes counts for the model's outputs, without labels.

    w_r = (E ||g_r||²)^½,   g_r = ∂ vᵀ y / ∂ z_r,   v of independent signs

z_r is a row of the layer's result, y are the model's outputs. To first order an error e of the row moves the outputs by
E (g_rᵀ e)². A row of padding, which a mask hides from the outputs, has no weight. Squared errors of rows are weighted
by w_r, not by w_r²: with the square few rows have most of the weight, and the regression fits their noise (measured on
rows that were held out).

Source: Gauss-Newton weights, as GuidedQuant (Kim et al., 2025) takes them off a loss for rounding; here one weight a
row, of random projections of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.errors import first_line
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.ops.design import Design, design_of
from graphcomp.pruning.consumers import Consumer, is_routed, operands

PROJECTIONS = 2
"""Random projections of the outputs that are differentiated, for each batch."""
SEED = 0
"""Seed of their signs."""


@dataclass(frozen=True, eq=False)
class Influences:
    """How much the results of layers count for the floating outputs of a graph.

    Attributes:
        rows: op of the graph -> w, per batch (r,) float32, in the order of the layer's `Design`; the mean over rows
            that count is 1. Layers whose results no output depends on, and those that send each row to a matrix of its
            own, are missing: their rows count alike.
        why: why all rows of all layers count alike; "" where some do not.
    """

    rows: Mapping[fx.Node, Sequence[Tensor]] = field(default_factory=dict)
    why: str = ""

    def alike(self, consumers: Iterable[Consumer]) -> str:
        """Return why rows of one of these layers count alike, at least; "" where they count what they do."""
        for consumer in consumers:
            if consumer.node not in self.rows:
                routed = "each row is sent to a matrix of its own"
                return self.why or (routed if is_routed(consumer.node) else "no output depends on what a layer returns")
        return ""

    def present(self) -> Influences:
        """Return the same rows with a weight of 1 each."""
        return Influences({node: [(own > 0).float() for own in rows] for node, rows in self.rows.items()}, self.why)


def influences(
    module: fx.GraphModule, consumers: Mapping[fx.Node, Consumer], batches: Sequence[Sequence[Any]]
) -> Influences:
    """Differentiate projections of the outputs by what layers compute.

    Args:
        module: the graph; its tensors get no gradients.
        consumers: op of `module` -> the layer; the arguments' names are those of the op.
        batches: flat inputs.
    """
    found: dict[fx.Node, list[Tensor]] = {}
    chances = [_Chances(SEED + k) for k in range(PROJECTIONS)]
    for batch in batches:
        try:
            gradients = _rows_of_gradients(module, consumers, batch, chances)
        except Exception as error:  # an op without a derivative, or a batch that the run which follows refuses
            return Influences(why=f"the outputs have no gradient: {first_line(error)}")
        if not gradients:
            return Influences(why="no output has a gradient")
        for node, rows in gradients.items():
            found.setdefault(node, []).append(rows.float().square().mean((0, 1, 3)).sqrt())
    return Influences({node: _scaled(rows) for node, rows in found.items() if _says_something(rows, len(batches))})


NAMED = 8
"""Groups that a note names."""


def rows_alike(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what a report says of groups whose readers' rows count alike, by the reason."""
    return [
        f"rows of calibration data count alike, as {why}: {', '.join(names[:NAMED])}"
        + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        for why, names in groups.items()
    ]


class _Chances:
    """Random signs of one projection: the same for one batch as for its parts, one after the other."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[int, torch.Generator] = {}

    def signs(self, k: int, y: Tensor) -> Tensor:
        """Return +1 or -1 for each element of output `k` that is finite, and 0 for the others."""
        generator = self.generators.setdefault(k, torch.Generator().manual_seed(self.seed + PROJECTIONS * k))
        found = 2.0 * torch.randint(2, y.shape, generator=generator).to(y.device, y.dtype) - 1
        return torch.where(y.isfinite(), found, torch.zeros_like(found))


def _says_something(rows: Sequence[Tensor], batches: int) -> bool:
    """Return whether there are weights of each batch, finite, and some not zero."""
    return len(rows) == batches and all(bool(r.isfinite().all()) for r in rows) and any(bool(r.any()) for r in rows)


def _scaled(rows: Sequence[Tensor]) -> list[Tensor]:
    """Return weights with a mean of 1 over the rows that count."""
    every = torch.cat(list(rows))
    mean = every[every > 0].mean()
    return [own / mean for own in rows]


def _rows_of_gradients(
    module: fx.GraphModule, consumers: Mapping[fx.Node, Consumer], batch: Sequence[Any], chances: Sequence[_Chances]
) -> dict[fx.Node, Tensor]:
    """Return the gradients of projections of the outputs by the results of layers, (projections, g, r, o)."""
    shapes: dict[fx.Node, torch.Size] = {}
    read: dict[fx.Node, Tensor] = {}

    def see(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            shapes[node] = value.shape

    def instead(node: fx.Node, value: Any) -> Any:
        if node not in consumers or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        read[node] = value if value.requires_grad else value.detach().requires_grad_()
        return read[node].clone()  # an op may write into the value

    output = run_tapped(module, batch, see=see, instead=instead, gradients=True)
    outputs = [y for y in tensor_leaves(output) if y.is_floating_point() and y.requires_grad]
    if not outputs:
        return {}
    found: dict[fx.Node, list[Tensor]] = {}
    for chance in chances:
        signs = [chance.signs(k, y) for k, y in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, list(read.values()), signs, retain_graph=True, allow_unused=True)
        for node, gradient in zip(read, gradients, strict=True):
            design = None if gradient is None else _design(node, consumers[node], shapes)
            if design is not None and gradient is not None:
                x = torch.empty(shapes[operands(node)[consumers[node].data]], device="meta")
                every = torch.arange(design.count(x), device=gradient.device)
                found.setdefault(node, []).append(design.results(gradient, every))
    return {node: torch.stack(rows) for node, rows in found.items()}


def _design(node: fx.Node, consumer: Consumer, shapes: Mapping[fx.Node, torch.Size]) -> Design | None:
    """Return the products that a layer is; None for one that sends each row to a matrix of its own."""
    if is_routed(node):
        return None
    return design_of(
        node, consumer.data, consumer.weight, {name: shapes[operand] for name, operand in operands(node).items()}
    )
