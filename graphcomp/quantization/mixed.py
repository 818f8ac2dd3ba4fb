"""Mixed precision without training: bits of each layer, by the error that the layer's rounding makes in the outputs.

Each layer is rounded alone, at the fewest and at the most bits, and the error is that of the model's outputs. Between
the two the error is taken as exponential in the bits: one bit more halves the step. Layers then lose bits in the order
of error per cost saved, along the lower convex hull of each layer's choices, until the budget holds.

Source: the measure is the perturbation of Dong et al. 2019 (HAWQ, arXiv 1905.03696) seen in the outputs themselves; the
allocation is the greedy solution of the multiple-choice knapsack problem (Sinha and Zoltners 1979).
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from graphcomp.errors import BudgetError, PlanError
from graphcomp.ir.graph import bind, module_path
from graphcomp.ir.inputs import first_samples
from graphcomp.ir.passes import applied
from graphcomp.ir.program import Program
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.numerics.compare import floating_tensors, squared_error
from graphcomp.ops.answers import compute_of, lookup_of
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import LoweredLayer, layers_of
from graphcomp.quantization.ptq import (
    CalibrateActivations,
    CalibrateWeights,
    PlaceQuantizers,
    PostTraining,
    written_out,
)
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.spec import QuantConfig, with_bits

logger = logging.getLogger("graphcomp")

SAMPLES = 32
"""Samples that the error of a layer is measured on, and the rest of a batch."""
FLOAT_BITS = 32
"""Bits of what is not quantized."""


@dataclass(frozen=True)
class Unit:
    """Layers that get bits together: those of one module, and those that share a weight.

    Attributes:
        paths: of the modules, those of parents first.
        nodes: names of the ops.
    """

    paths: tuple[str, ...]
    nodes: tuple[str, ...]


BitErrors: TypeAlias = Mapping[int, float]
"""Bits -> relative squared error of the outputs."""
Costs: TypeAlias = tuple[float, ...]
"""What a choice of bits costs, of each limit."""


def at_bits(config: QuantConfig, bits: int, activations: bool) -> QuantConfig:
    """Return the configuration with all layers at `bits`, the first and the last included.

    Args:
        config: with the specs.
        bits: of weights.
        activations: whether activations have as many; else they keep theirs.
    """
    read = with_bits(config.activations, bits) if activations else config.activations
    table = with_bits(config.embeddings, bits)
    weights = with_bits(config.weights, bits)
    return replace(config, weights=weights, activations=read, embeddings=table, first_and_last_bits=bits)


def units_of(layers: Sequence[LoweredLayer], graph: fx.Graph) -> tuple[Unit, ...]:
    """Return the units of all layers with integer weights, in the order of the graph.

    Args:
        layers: of `graph`, with bits.
        graph: whose nodes the layers name.
    """
    paths = {node.name: module_path(node) for node in graph.nodes}
    owner: dict[tuple[str, str], int] = {}
    members: list[list[LoweredLayer]] = []
    for layer in layers:
        if layer.weight_bits == FLOAT_BITS or not paths[layer.node]:
            continue
        keys = ("path", paths[layer.node]), ("weight", layer.name)
        known = sorted({owner[key] for key in keys if key in owner})
        place = known[0] if known else len(members)
        if not known:
            members.append([])
        for other in known[1:]:  # a module and a weight that were apart so far
            members[place] += members[other]
            members[other] = []
            owner |= {key: place for key, own in owner.items() if own == other}
        members[place].append(layer)
        owner |= dict.fromkeys(keys, place)
    return tuple(
        Unit(tuple(sorted({paths[layer.node] for layer in found}, key=_depth)), tuple(layer.node for layer in found))
        for found in members
        if found
    )


def _depth(path: str) -> tuple[int, str]:
    return path.count("."), path


def options_of(options: PostTraining, chosen: Mapping[Unit, int], activations: bool) -> PostTraining:
    """Return the options with the bits that were chosen for each unit.

    Args:
        options: as they are.
        chosen: bits of each unit.
        activations: whether what a layer reads has as many bits as its weight.
    """
    config = options.config
    by_path = {path: bits for unit, bits in chosen.items() for path in unit.paths}
    overrides = dict(config.overrides)
    for path in sorted(by_path, key=_depth):  # the last entry that matches counts: children behind their parents
        read = with_bits(config.activations, by_path[path]) if activations else config.activations
        overrides[path] = with_bits(config.weights, by_path[path]), read
    return replace(options, config=replace(config, overrides=overrides))


# ------------------------------------------------------------------------------------------------ errors
@torch.no_grad()
def bit_errors(
    program: Program,
    options: PostTraining,
    limits: tuple[int, int],
    batches: Sequence[Sequence[Any]],
    activations: bool,
) -> dict[Unit, BitErrors]:
    """Return what rounding each unit alone does to the outputs, for each number of bits.

    Args:
        program: float, in eval mode.
        options: how tensors are quantized.
        limits: the fewest and the most bits.
        batches: flat inputs; the first of them are used, see `SAMPLES`.
        activations: whether activations have as many bits as weights.

    Raises:
        PlanError: the model returns no floats.
        CalibrationError: no batch, one that the model does not run on, or values that are not finite.
    """
    low, high = limits
    used = first_samples(batches, SAMPLES)
    found: dict[Unit, dict[int, float]] = {}
    for bits in dict.fromkeys((low, high)):
        config = at_bits(options.config, bits, activations)
        fake = applied(
            program,
            *written_out(config),
            PlaceQuantizers(config, options.ignore),
            CalibrateWeights(),
            CalibrateActivations(batches),
        ).module
        quantizers = dict(quantizer_nodes(fake))
        for quantizer in quantizers.values():
            quantizer.enabled = False
        wanted = [_floats(fake, batch) for batch in used]
        for unit in units_of(layers_of(fake), fake.graph):
            own = _quantizers(fake, unit, quantizers)
            found.setdefault(unit, {})[bits] = _error(fake, own, used, wanted)
            logger.debug("%s at %d bits: the outputs are off by %.3g", unit.paths, bits, found[unit][bits])
    return {unit: _between(errors, low, high) for unit, errors in found.items()}


def _quantizers(fake: fx.GraphModule, unit: Unit, known: Mapping[fx.Node, Quantizer]) -> list[Quantizer]:
    """Return the quantizers of what the ops of a unit read."""
    nodes = [node for node in fake.graph.nodes if node.name in set(unit.nodes)]
    read = [bind(node)[name] for node in nodes for name in _operands(node)]
    return list(dict.fromkeys(known[n] for n in read if n in known))


def _operands(node: fx.Node) -> list[str]:
    compute, lookup = compute_of(node), lookup_of(node)
    if compute is not None:
        return list(dict.fromkeys((*compute.data, compute.weight)))
    return [] if lookup is None else [lookup.weight]


def _error(
    fake: fx.GraphModule, own: Sequence[Quantizer], batches: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Tensor]]
) -> float:
    """Return Σ ||y - t||² / Σ ||t||² of the outputs with some quantizers on."""
    for quantizer in own:
        quantizer.enabled = True
    try:
        error = norm = 0.0
        for batch, outputs in zip(batches, wanted, strict=True):
            found, energy = squared_error(outputs, _floats(fake, batch))
            error, norm = error + found, norm + energy
    finally:
        for quantizer in own:
            quantizer.enabled = False
    return error / norm if norm else 0.0


def _floats(module: fx.GraphModule, batch: Sequence[Any]) -> list[Tensor]:
    found = floating_tensors(run_tapped(module, batch))
    if not found:
        raise PlanError(
            "no output is of floats, so nothing says what the bits of a layer are worth", fix="bits=8, for all layers"
        )
    return found


def _between(errors: Mapping[int, float], low: int, high: int) -> dict[int, float]:
    """Return the errors of all bits, those between the two measured ones on an exponential."""
    tiny = torch.finfo(torch.float32).tiny
    first = max(errors[low], tiny)
    last = min(max(errors[high], tiny), first)
    slope = math.log(last / first) / max(high - low, 1)
    return {bits: first * math.exp(slope * (bits - low)) for bits in range(low, high + 1)}


# ------------------------------------------------------------------------------------------------ the choice
def choose_bits(
    errors: Mapping[Unit, BitErrors],
    cost: Callable[[Mapping[Unit, int]], Costs],
    limits: Mapping[str, float],
) -> dict[Unit, int]:
    """Return bits for each unit, the least sum of errors that a greedy choice finds within all limits.

    Args:
        errors: of each unit, for each number of bits.
        cost: of a choice, one number for each limit, a sum over units.
        limits: by name, in the order of the costs.

    Raises:
        BudgetError: the fewest bits of all units cost more.
    """
    most = {unit: max(found) for unit, found in errors.items()}
    now = cost(most)
    steps = {unit: _hull(unit, errors[unit], most, cost, limits) for unit in errors}
    chosen, taken = dict(most), dict.fromkeys(errors, 0)
    waiting = [(found[0].slope, k, unit) for k, (unit, found) in enumerate(steps.items()) if found]
    heapq.heapify(waiting)
    while not _hold(now, limits):
        if not waiting:
            raise _out_of_reach(now, limits)
        _, k, unit = heapq.heappop(waiting)
        step = steps[unit][taken[unit]]
        taken[unit] += 1
        chosen[unit], now = step.bits, tuple(a - b for a, b in zip(now, step.saved, strict=True))
        if taken[unit] < len(steps[unit]):
            heapq.heappush(waiting, (steps[unit][taken[unit]].slope, k, unit))
    return _raised(errors, chosen, cost, limits)


@dataclass(frozen=True)
class _Step:
    """From one point of a hull to the next: bits then, what is saved, and the error per share of the limits saved."""

    bits: int
    saved: Costs
    slope: float


def _hull(
    unit: Unit,
    errors: BitErrors,
    most: Mapping[Unit, int],
    cost: Callable[[Mapping[Unit, int]], Costs],
    limits: Mapping[str, float],
) -> list[_Step]:
    """Return the steps down from the most bits along the lower convex hull of error against cost."""
    costs = {bits: cost({**most, unit: bits}) for bits in errors}
    shares = {
        bits: sum(c / limit for c, limit in zip(found, limits.values(), strict=True)) for bits, found in costs.items()
    }
    hull: list[int] = []
    for bits in sorted(errors, reverse=True):
        if hull and shares[bits] >= shares[hull[-1]]:  # saves nothing: five bits are stored as eight
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1], errors, shares) >= _slope(hull[-1], bits, errors, shares):
            hull.pop()
        hull.append(bits)
    steps = []
    for a, b in pairwise(hull):
        saved = tuple(x - y for x, y in zip(costs[a], costs[b], strict=True))
        steps.append(_Step(b, saved, _slope(a, b, errors, shares)))
    return steps


def _slope(a: int, b: int, errors: BitErrors, shares: Mapping[int, float]) -> float:
    return (errors[b] - errors[a]) / (shares[a] - shares[b])


def _raised(
    errors: Mapping[Unit, BitErrors],
    chosen: Mapping[Unit, int],
    cost: Callable[[Mapping[Unit, int]], Costs],
    limits: Mapping[str, float],
) -> dict[Unit, int]:
    """Return the choice with bits given back as long as all limits hold, where most error goes first."""
    found = dict(chosen)
    for unit in sorted(errors, key=lambda u: errors[u][max(errors[u])] - errors[u][chosen[u]]):
        for bits in sorted((b for b in errors[unit] if b > found[unit]), reverse=True):
            if _hold(cost({**found, unit: bits}), limits):
                found[unit] = bits
                break
    return found


def _hold(costs: Costs, limits: Mapping[str, float]) -> bool:
    return all(c <= limit for c, limit in zip(costs, limits.values(), strict=True))


def _out_of_reach(costs: Costs, limits: Mapping[str, float]) -> BudgetError:
    name, least, limit = next(
        (name, c, limit) for (name, limit), c in zip(limits.items(), costs, strict=True) if c > limit
    )
    return BudgetError(
        f"no choice of bits meets the budget of {limit:,.0f} {name}",
        why=f"with the fewest bits of all layers there are {math.ceil(least):,}",
        fix=f"Budget({name}={math.ceil(least)}), fewer bits, or sparsity=0.3, which removes units first",
    )
