"""Time the layers of a network at several widths, and predict the network's time from them.

A few narrower networks are cut as `compress` would cut them, and lowered where bits are asked for. Each is taken apart
into pieces (`graphcomp.cost.pieces`), and one piece of each kind is timed alone. Some of the networks are timed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from graphcomp.cost import CostModel
from graphcomp.cost.latency_table import LatencyTable, LayerTimes, Predicted, Sample, Timed, key_of, this_machine
from graphcomp.cost.model import Lengths, UnknownLength, counts_of
from graphcomp.cost.pieces import Piece, computed_values, pieces_of, text_of, touched
from graphcomp.cost.work import Work, work_of
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import PlanError
from graphcomp.flows.family import Once
from graphcomp.flows.held import held_by_class
from graphcomp.flows.one_shot import cut_groups, cut_to_integers
from graphcomp.pruning.knapsack import widths_of
from graphcomp.pruning.slice import SliceGroups
from graphcomp.pruning.ties import Tie
from graphcomp.quantization import ops
from graphcomp.quantization.ptq import PostTraining
from graphcomp.system.threads import one_at_a_time
from graphcomp.targets.timing import Call, Timer, timer_of

DESIGNS = 10
"""Networks that are taken apart, the dense one among them: so many widths of each layer are timed."""
WHOLE = (0, 3, 6, 9)
"""Positions of those that are timed whole, too."""
NARROWEST = 0.25
"""Mean share of the units that the narrowest network has."""
JITTER = 0.3
"""Share by which a group is wider or narrower than the mean, at most."""

Shrink = Callable[[Kept], fx.GraphModule]
Step = Callable[[str], None]


@one_at_a_time
def time_plan(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    table: LatencyTable,
    *,
    quantization: PostTraining | None = None,
    round_to: int = 1,
    step: Step = lambda text: None,
    timer: Timer | None = None,
) -> tuple[LatencyTable, Predicted]:
    """Time the layers that the table does not hold, and return the completed table with the prediction that it gives.

    Args:
        plan: of the whole model.
        groups: that may be cut.
        table: what is known, and how to measure the rest.
        quantization: what is left is lowered to; None: floats.
        round_to: units that stay are multiples.
        step: is told what begins.
        timer: takes the time; by default that of the table's runtime on this machine.

    Raises:
        PlanError: no graph runs, lengths depend on data, or layers are missing in a table of another machine.
        ExportError: the `onnx` extra is not installed; an op has no ONNX form.
    """
    _check(plan, table, quantization)
    shrink = _shrink(plan, groups, quantization)
    layers = {op.node.name: op.layer for op in CostModel(plan).operations}
    step("taking the network apart")
    dense = shrink({})
    inputs = plan.captured.inputs.flat()
    parts = _parts(dense, inputs, layers)
    timed = _timed(plan, groups, parts)
    factors = [group.factor for group in groups]
    whole = key_of("whole", *(piece.key for piece in timed), *(str(group.size) for group in groups))
    original = whole if quantization is None else key_of("original", whole)
    first = {piece.key: piece.name for piece in reversed(timed)}
    missing = {name: key for key, name in first.items() if key not in table.layers}
    if missing or whole not in table.layers:
        machine = timer.machine if timer else this_machine(table.runtime)
        if table.layers and table.machine != machine:
            raise PlanError(
                f"the table of latencies lacks {len(missing) or 'the whole network, not'} of {len(first)} layers",
                why=f"the table was measured on another machine: {table.machine}; this one is {machine}",
                fix="graphcomp.time_layers(model, inputs, table=table) there; or another table for this machine",
            )
        timer = timer or timer_of(table.runtime, table.threads)
        networks = designs(groups, round_to)
        calls: list[Call] = []
        asked: list[tuple[str, tuple[int, ...]]] = []  # key and widths of each call
        work = {piece.name: piece.work for piece in timed}
        between = touched(parts.pieces, parts.values)
        for k, kept in enumerate(networks):
            step(f"cutting network {k + 1} of {len(networks)} to time its layers")
            counts = counts_of(kept)
            module = shrink(kept) if kept else dense
            parts = _parts(module, inputs, layers)
            chosen = [piece for piece in parts.pieces if piece.name in missing]
            calls += timer.pieces(module, parts.values, chosen, between)
            asked += [(missing[piece.name], work[piece.name].local(counts)) for piece in chosen]
            if k in WHOLE:
                left, running = _as_run(plan, groups, kept, module, table, quantization)
                counts = counts_of(left)
                calls.append(timer.whole(running, plan.captured.inputs))
                asked.append((whole, tuple(counts.get(group.factor, group.size) for group in groups)))
        if original != whole:
            calls.append(call_original(plan, table, timer))
            asked.append((original, ()))
        step(f"timing {len(calls)} layers and networks")
        samples: dict[str, list[Sample]] = {}
        for (key, widths), ms in zip(asked, timer.times(calls), strict=True):
            samples.setdefault(key, []).append(Sample(widths, ms))
        names = {key: layers.get(n, n) for n, key in missing.items()}
        names |= {original: "the network before", whole: "the whole network"}
        table = table.with_times(machine, {key: LayerTimes(names[key], tuple(own)) for key, own in samples.items()})
    return table, Predicted(timed, table, whole, factors, original)


@dataclass(frozen=True, eq=False)
class Networks:
    """Calls of whole networks of one plan, for a timer.

    Attributes:
        plan: of the whole model.
        groups: that may be cut.
        table: says in what the networks run.
        quantization: what is left is lowered to; None: floats.
        once: what others of a family have made: a file of the original is written once.
    """

    plan: Analysis
    groups: Sequence[ChannelGroup]
    table: LatencyTable
    quantization: PostTraining | None
    once: Once

    @property
    def here(self) -> bool:
        """Whether the table is of this machine."""
        return self.table.machine == this_machine(self.table.runtime)

    def timer(self) -> Timer:
        """Return the timer of the table's runtime."""
        return timer_of(self.table.runtime, self.table.threads)

    def original(self, timer: Timer) -> Call:
        """Return a call of the network before it is cut and quantized."""
        return self.once("original", partial(call_original, self.plan, self.table, timer))

    def uncut(self, timer: Timer) -> Call:
        """Return a call of the network that is quantized and not cut."""
        return self.once("uncut", partial(self.cut, {}, timer))

    @one_at_a_time
    def cut(self, kept: Kept, timer: Timer, held: nn.Module | None = None) -> Call:
        """Return a call of the network in which the `kept` units stay.

        Args:
            held: the model of the user's class, which PyTorch runs; a file is written of the graph.
        """
        if held is None or self.table.runtime != "eager":
            held = _shrink(self.plan, self.groups, self.quantization)(kept)
        return timer.whole(held, self.plan.captured.inputs)


def call_original(plan: Analysis, table: LatencyTable, timer: Timer) -> Call:
    """Return a call of the network before it is cut and quantized: in PyTorch the model of the user's class."""
    return timer.whole(plan.model if table.runtime == "eager" else plan.captured.module, plan.captured.inputs)


def _as_run(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    kept: Kept,
    module: fx.GraphModule,
    table: LatencyTable,
    quantization: PostTraining | None,
) -> tuple[Kept, nn.Module]:
    """Return what users will run of a graph that was cut, and which units stay in it.

    In PyTorch the calls of modules take a good part of the time of small ops: the model of the user's class is timed,
    with equally many units where the class needs equal lengths, as `compress` chooses them.
    """
    if table.runtime != "eager" or quantization is not None:
        return kept, module
    if not kept:
        return kept, plan.model
    cut, found = held_by_class(cut_groups(plan, kept, groups, verify=False), partial(_equal, kept), widths=False)
    return (kept, module) if found.module is None else (cut.kept, found.module)


def _equal(kept: Kept, ties: Sequence[Tie]) -> Kept:
    """Return units that stay with the fewest of each tie."""
    least = {group: min(len(kept[other]) for other in tie) for tie in ties for group in tie}
    return {group: units[: least.get(group, len(units))] for group, units in kept.items()}


def designs(groups: Sequence[ChannelGroup], round_to: int = 1, count: int = DESIGNS) -> list[dict[ChannelGroup, Any]]:
    """Return which units stay in each of the networks that are timed: the dense one first, then narrower and narrower.

    The widths of the groups are drawn apart from each other, so that a layer is seen at many pairs of widths, and are
    those that `choose_widths` chooses from.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[dict[ChannelGroup, Any]] = [{}]
    for k in range(1, count):
        mean = 1 - (1 - NARROWEST) * k / (count - 1)
        kept = {}
        for group in groups:
            share = mean + JITTER * (2 * float(torch.rand((), generator=generator)) - 1)
            near = min(widths_of(group, round_to), key=lambda n: abs(n - share * group.size))
            kept[group] = torch.arange(near)
        found.append(kept)
    return found


@dataclass(frozen=True, eq=False)
class _Parts:
    """A graph in pieces, and what its nodes computed in one run."""

    module: fx.GraphModule
    values: Mapping[fx.Node, Any]
    pieces: tuple[Piece, ...]


def _parts(module: fx.GraphModule, inputs: Sequence[Any], anchors: Mapping[str, str]) -> _Parts:
    values = computed_values(module, inputs)
    return _Parts(module, values, pieces_of(module, values, anchors, ops.DEQUANTIZE))


def _timed(plan: Analysis, groups: Sequence[ChannelGroup], dense: _Parts) -> list[Timed]:
    """Return the pieces of the dense network with their keys.

    What a piece computes by its widths is known of the analysed graph; lowering keeps the names of what multiplies.
    """
    lengths = Lengths(plan.captured, {group.factor: group.factor for group in groups})
    module = plan.captured.module
    anchors = {piece.name for piece in dense.pieces}
    values = computed_values(module, plan.captured.inputs.flat())
    of_floats = {piece.name: piece for piece in pieces_of(module, values, anchors)}
    found = []
    for piece in dense.pieces:
        of_float = of_floats.get(piece.name)  # none where the piece moves codes alone
        try:
            own = Work() if of_float is None else work_of(of_float, plan.coupling, lengths)
        except UnknownLength:
            raise PlanError(
                f"{piece.name} cannot be timed by its widths", why="a length depends on data", fix="Budget(macs=0.5)"
            ) from None
        found.append(Timed(piece.name, key_of(text_of(piece, dense.values), own.text), own))
    return found


def _check(plan: Analysis, table: LatencyTable, quantization: PostTraining | None) -> None:
    name = type(plan.model).__name__
    if plan.captured.producer == "record":
        raise PlanError(
            f"{name} cannot be timed by its widths: it could only be recorded",
            why=f"torch.export refused: {plan.captured.reason}",
            fix="Budget(macs=0.5)",
        )
    if any(p.is_meta for p in plan.model.parameters()):
        raise PlanError(f"{name} cannot be timed: it has no values (meta device)", fix="give it weights first")
    if any(p.device.type != "cpu" for p in plan.model.parameters()):
        raise PlanError(f"{name} is not on the CPU", why="latencies are timed on the CPU", fix="model.cpu()")
    if table.runtime == "eager" and quantization is not None and not quantization.config.dynamic:
        raise PlanError(
            'runtime="eager" with bits',
            why="PyTorch runs the quantized graph in floats: its time says nothing of integers",
            fix='graphcomp.LatencyTable(runtime="onnxruntime"), or activations="dynamic"',
        )


def _shrink(plan: Analysis, groups: Sequence[ChannelGroup], quantization: PostTraining | None) -> Shrink:
    """Return a function from units that stay to the graph as it will be run."""
    if quantization is None:
        return lambda kept: SliceGroups(plan.coupling, kept).rewrite(plan.captured.module)
    options = replace(quantization, rounding="nearest")  # the values of weights take no time
    batch = [plan.captured.inputs.flat()]
    return lambda kept: cut_to_integers(plan, kept, groups, options, batch, verify=False)[1].module
