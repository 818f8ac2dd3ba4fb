"""The law as a function.

Law 2: for every choice of kept units, the sliced model and the masked model compute the same function.

    result = check_law(model, example_inputs)      # raises VerificationError where the law does not hold
    assert result.groups and result.moved > 0.01   # something was cut, and cutting it changed the output
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.capture import capture
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.axis import kept_indices
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.errors import VerificationError
from graphcomp.ir.graph import neighbourhood, source_line
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.preserve import eval_copy, same_buffers
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.ir.taught import suspected
from graphcomp.numerics.compare import relative_error, tolerance_of, why_silent
from graphcomp.pruning.mask import InsertMasks, computed_with, hold_masks, set_masks
from graphcomp.pruning.slice import SliceGroups, by_factor, select
from graphcomp.pruning.verify import check_slicing
from graphcomp.torch_compat import pytree

KeptUnits: TypeAlias = dict[ChannelGroup, Tensor]


@dataclass(frozen=True, eq=False)
class LawResult:
    """What `check_law` saw.

    Attributes:
        analysis: groups, frozen axes and unknown ops of the model.
        groups: the groups that were cut.
        max_relative_error: sliced against masked, the worst of all rounds.
        identity_error: the masked model with every unit kept, against the model.
        moved: relative change of the output by the cut, the least of all rounds. 0 says that the check was vacuous.
        unchecked: the law, or a part of it, that could not be checked -> why. Where outputs prove nothing (classes,
            flags, NaN), the floats that they are computed from are compared.
    """

    analysis: Analysis
    groups: tuple[ChannelGroup, ...]
    max_relative_error: float
    identity_error: float
    moved: float
    unchecked: Mapping[str, str] = field(default_factory=dict)


def check_law(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    rounds: int = 1,
    keep: tuple[float, float] = (0.3, 0.9),
    groups: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> LawResult:
    """Check on the example inputs that slicing is masking made physical, that masks of ones change nothing, and that
    units whose parameters are held at zero, as in training, count as masked.

    Args:
        model: any module that `capture` takes; it is left as it was.
        example_inputs, example_kwargs: as for `capture`.
        seed: of the random choice of units.
        rounds: number of random choices.
        keep: each group keeps a share of its units that is drawn from this range, and at least one unit.
        groups: names of the groups to cut; None: all.
        tolerance: largest relative error; None: by the dtype of the output, see `compare.TOLERANCE`.

    Raises:
        VerificationError: the law does not hold; the message shows the first node whose values differ.
    """
    captured = capture(model, example_inputs, example_kwargs)
    analysis = analyze_captured(captured)
    wanted = analysis.groups if groups is None else tuple(analysis.group(name) for name in groups)
    masked = InsertMasks(analysis.coupling, wanted)(captured.module)
    held = InsertMasks(analysis.coupling, wanted, held=True)(captured.module)

    def run(module: nn.Module) -> Any:
        args, kwargs = captured.inputs.copies()
        return module(*args, **kwargs), args, kwargs

    def run_graph(graph: fx.GraphModule) -> Any:
        with same_buffers(graph):
            return run(graph)

    with torch.no_grad(), eval_copy(captured.original, real=True) as copied:
        dense = run(copied)
        allowed = tolerance_of(dense) if tolerance is None else tolerance
        identity = relative_error(dense, run_graph(masked))
        if not identity <= allowed:
            raise VerificationError(
                f"with every unit kept the masked model is off by {identity:.1e} (relative), allowed {allowed:.0e}"
            )
        generator = torch.Generator().manual_seed(seed)
        errors, moves, unchecked = [0.0], [math.inf], dict[str, str]()
        for _ in range(rounds):
            kept = random_kept(wanted, generator, keep)
            set_masks(masked, wanted, kept)
            small = SliceGroups(analysis.coupling, kept)(captured.module)
            expected, actual = run_graph(masked), run_graph(small)
            errors.append(relative_error(expected, actual))
            moves.append(relative_error(dense, expected))
            if not errors[-1] <= allowed:
                raise _violated(errors[-1], allowed, analysis, masked, small, kept)
            if any(map(why_silent, tensor_leaves(expected[0]))):
                found = check_slicing(analysis.coupling, captured, kept, small)
                errors += [] if math.isnan(found.error) else [found.error]
                unchecked |= found.unchecked
            zeroed = copy.deepcopy(held)
            hold_masks(zeroed, wanted, kept, computed_with(analysis.coupling))
            off = relative_error(expected, run_graph(zeroed))
            if not off <= allowed:
                raise VerificationError(
                    f"with masked units held at zero the model is off by {off:.1e} (relative), allowed {allowed:.0e}"
                )
    return LawResult(analysis, wanted, max(errors), identity, min(moves), unchecked)


def random_kept(
    groups: Sequence[ChannelGroup], generator: torch.Generator, keep: tuple[float, float] = (0.3, 0.9)
) -> KeptUnits:
    """For each group a random share of its units, unequal from group to group, at least one: (k,) int64, ascending."""
    low, high = keep
    kept: KeptUnits = {}
    for group in groups:
        share = low + (high - low) * torch.rand((), generator=generator).item()
        count = max(1, int(group.size * share))
        kept[group] = torch.randperm(group.size, generator=generator)[:count].sort().values
    return kept


def _violated(
    error: float, allowed: float, analysis: Analysis, masked: fx.GraphModule, small: fx.GraphModule, kept: KeptUnits
) -> VerificationError:
    node = _first_difference(analysis, masked, small, kept, allowed)
    return VerificationError(
        f"sliced and masked model differ by {error:.1e} (relative), allowed {allowed:.0e}",
        at="" if node is None else source_line(node),
        why="no single value differs" if node is None else f"the values differ from here on\n{neighbourhood(node)}",
        fix=suspected(analysis.coupling.graph, ""),
    )


def _first_difference(
    analysis: Analysis, masked: fx.GraphModule, small: fx.GraphModule, kept: KeptUnits, allowed: float
) -> fx.Node | None:
    """The first node of the captured graph whose sliced value is not its masked value at the kept indices."""
    captured, coupling, units = analysis.captured, analysis.coupling, by_factor(kept)
    inputs = pytree.tree_leaves((captured.inputs.args, captured.inputs.kwargs))
    expected, actual = _values(masked, inputs), _values(small, inputs)
    nodes: list[fx.Node] = list(captured.module.graph.nodes)
    for node in nodes:
        if node.op != "call_function" or node.name not in expected or node.name not in actual:
            continue
        for full, cut, axes in zip(
            _tensors(expected[node.name]), _tensors(actual[node.name]), coupling.axes.get(node, []), strict=False
        ):
            found = {dim: kept_indices(axis, units) for dim, axis in enumerate(axes)}
            wanted = select(full, {dim: index for dim, index in found.items() if index is not None})
            if not relative_error(wanted, cut) <= allowed:
                return node
    return None


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _values(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, Any]:
    """Node name -> value, of one run."""
    values: dict[str, Any] = {}

    def keep(node: fx.Node, found: Any) -> None:
        values[node.name] = found

    run_tapped(module, inputs, see=keep)
    return values
