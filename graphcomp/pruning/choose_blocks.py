"""Which residual blocks a model can do without.

Blocks are chosen one by one: the block whose absence, repaired, moves the model's outputs least on other samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.coupling.analysis import Analysis
from graphcomp.errors import CalibrationError, PlanError
from graphcomp.ir.inputs import first_samples
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.numerics.compare import squared_error
from graphcomp.pruning.blocks import Block
from graphcomp.pruning.depth import Depth

logger = logging.getLogger("graphcomp")

SAMPLES = 128
"""Samples that blocks are chosen on at most: as many to repair on, and as many to judge on."""
CHOICE_ROWS = 8_000
"""Rows that a layer is solved on while blocks are chosen."""


@torch.no_grad()
def choose_blocks(
    plan: Analysis,
    blocks: Sequence[Block],
    batches: Sequence[Sequence[Any]],
    *,
    enough: Callable[[Collection[Block]], bool],
    saved: Callable[[Collection[Block]], float] = lambda _: 1.0,
    repair: bool = True,
    together: Sequence[Sequence[Block]] | None = None,
) -> dict[Block, float]:
    """Choose blocks to leave out one by one: each time the block that adds least to the error for what it saves.

    Args:
        plan: of the whole model, exported.
        blocks: of the plan's graph.
        batches: flat inputs. Every second one judges; a single one does both.
        enough: whether the blocks chosen are as many as asked.
        saved: what blocks save, of what is to be saved.
        together: blocks to choose from, those in one entry go together; None: each block alone.
        repair: judge blocks by what is left of the error after the repair.

    Returns:
        Block -> relative squared error of the outputs once the block is gone, too, in the order of choice.

    Raises:
        CalibrationError: no batch, or one that the model does not run on.
        PlanError: the model returns no floats.
    """
    if not batches:
        raise CalibrationError("there is no batch to choose blocks on", fix="calibration=[batch, …]")
    fit, held = (first_samples(found, SAMPLES) for found in (batches[::2], batches[1::2] or batches))
    wanted = _floats(plan.captured.module, held)
    if not wanted:
        raise PlanError(
            "no output is of floats, so nothing says how much a block matters", fix="drop_blocks(plan, blocks)"
        )
    depth = Depth(plan, blocks, fit if repair else [], CHOICE_ROWS)
    chosen: dict[Block, float] = {}
    error = 0.0
    units = [(block,) for block in blocks] if together is None else [tuple(unit) for unit in together]
    while not enough(chosen):
        errors = {
            unit: _error(depth.without({*chosen, *unit}).graph, held, wanted)
            for unit in units
            if not any(_goes_with(block, chosen) for block in unit) and saved(unit) > 0
        }
        if not errors:
            break
        best = min(errors, key=lambda unit: (errors[unit] - error) / saved(unit))
        if errors[best] < error:  # what is better gone costs nothing, whatever it saves
            best = min(errors, key=errors.__getitem__)
        error = errors[best]
        chosen |= dict.fromkeys(best, error)
        names = ", ".join(block.name for block in best)
        logger.debug("without %s the outputs are off by %.2e (relative, squared)", names, error)
    return chosen


def _goes_with(block: Block, gone: Collection[Block]) -> bool:
    """Return whether a block is gone already, alone or as a part of another one."""
    return block in gone or any(block.total in other.ops for other in gone)


def _error(module: fx.GraphModule, held: Sequence[Sequence[Any]], wanted: Sequence[Tensor]) -> float:
    """Return Σ ||y − t||² / Σ ||t||² of the outputs."""
    error, norm = squared_error(wanted, _floats(module, held))
    return error / max(norm, torch.finfo(torch.float64).tiny)


def _floats(module: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> list[Tensor]:
    outputs = [tensor_leaves(run_tapped(module, batch)) for batch in batches]
    return [t.double() for found in outputs for t in found if t.is_floating_point()]
