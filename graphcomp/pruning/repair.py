"""Least-squares repair of a cut: each layer that reads what the cut changed gets the weights that restore its output.

    T = T0 + (Σ x̃ x̃ᵀ + λ · mean diag · I)⁻¹ (Σ x̃ tᵀ − Σ x̃ x̃ᵀ T0)

x̃ is what the layer reads in the small model, t the output that the layer had in the model before, T0 the slice of the
old weights. Rows count by their influence on the model's outputs (`influence.py`). Layers are solved in order of
execution, in lock step over both graphs: a layer is solved the moment it is reached, and runs with its new weights.
Where its result is added to a stream, t makes up for what the stream has lost.

Sources: optimal brain surgeon's layer-wise form and its sequential use after structural cuts, as in GRAIL, CORP, Olica
and SlimLLM (2025), each for one architecture.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.axis import kept_indices
from graphcomp.coupling.groups import Kept
from graphcomp.errors import CalibrationError
from graphcomp.ir.graph import all_tensors, assign, bind, clone, example_size, fetch, names_by_tensor, tensor_values
from graphcomp.ir.preserve import writes
from graphcomp.ir.run_nodes import Lockstep, refused_batch
from graphcomp.ir.streamed import as_before, in_memory
from graphcomp.numerics.regression import choose_ridge, solve
from graphcomp.ops.design import Patches
from graphcomp.pruning.consumers import Consumer, Consumers, ends_of, is_evaluated_norm, operands
from graphcomp.pruning.influence import Influences, influences
from graphcomp.pruning.least_squares import FEWEST_ROWS, ROWS, Problem, Sums
from graphcomp.pruning.slice import by_factor, kept_of_tensors, scatter, select

aten = torch.ops.aten

LIVE = 3 << 30
"""Bytes of values that both runs may hold at a time."""
MOST_TAPS = 3000
"""Features of a convolution above which its channels are mapped, not its patches."""
SMALL_SLOPE = 1e-3
"""A batch norm's factor below this share of the mean one lets nothing through that a layer could make up for."""


@dataclass(frozen=True)
class LayerRepair:
    """What the repair of one layer did, on the calibration rows.

    Attributes:
        before: relative error of the layer's output with the sliced weights, ||y - t|| / ||t||, rows weighted by what
            they count for the model's outputs (see `influence`).
        after: that with the repaired weights; never larger.
        ridge: λ, chosen on held-out rows; infinite where the sliced weights stay.
        rows: rows that the layer was solved on.
    """

    before: float
    after: float
    ridge: float
    rows: int


@dataclass(frozen=True, eq=False)
class Repaired:
    """A repaired cut.

    Attributes:
        before: the plan of the model before the cut.
        kept: the units that stay.
        graph: the sliced graph with the repaired values.
        changed: names of the tensors with other values.
        layers: layer -> what was done.
        left: layer -> why it keeps the sliced weights.
        reestimated: batch norms behind such layers, whose statistics are those of the calibration data.
        batches: how many of the batches, the first ones, were used: as many as memory is for.
        alike: why all rows counted alike; "" where rows count what they do for the outputs.
    """

    before: Analysis
    kept: Kept
    graph: fx.GraphModule
    changed: tuple[str, ...] = ()
    layers: Mapping[str, LayerRepair] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    reestimated: tuple[str, ...] = ()
    batches: int = 0
    alike: str = ""

    @cached_property
    def plan(self) -> Analysis:
        """The plan of the model before the cut, with the repaired values in place: its slice is `graph`."""
        cuts = kept_of_tensors(self.before.coupling, self.kept)
        old = dict(all_tensors(self.before.captured.module))
        names = names_by_tensor(old.items())
        found: dict[str, Tensor] = {}
        for name in self.changed:
            whole = _like(scatter(old[name], cuts.get(name, {}), fetch(self.graph, name)), old[name])
            found |= dict.fromkeys(names[id(old[name])], whole)
        return self.before.bind(found)


def value_bytes(node: fx.Node) -> int:
    """Return the bytes of what a node computes, at the example sizes."""
    return sum(math.prod(map(example_size, t.shape)) * t.element_size() for t in tensor_values(node))


def within_memory(
    module: fx.GraphModule, batches: Sequence[Sequence[Any]], most: int = LIVE
) -> Sequence[Sequence[Any]]:
    """Return the first batches whose values, of two runs side by side, take `most` bytes at a time; one at least.

    Args:
        module: the graph, each node with an example of the value; values grow as the first input does.
        batches: flat inputs.
    """
    last = {operand: node for node in module.graph.nodes for operand in node.all_input_nodes}
    ends: dict[fx.Node, list[fx.Node]] = {}
    for operand, node in last.items():
        ends.setdefault(node, []).append(operand)
    live = peak = 0
    for node in module.graph.nodes:
        live += 0 if node.op == "get_attr" else value_bytes(node)
        peak = max(peak, live)
        live -= sum(value_bytes(operand) for operand in ends.get(node, ()) if operand.op != "get_attr")
    example = sum(value_bytes(node) for node in module.graph.find_nodes(op="placeholder"))
    given = [sum(t.numel() * t.element_size() for t in batch if isinstance(t, Tensor)) for batch in batches]
    count, used = 0, 0.0
    for size in given:
        used += 2 * peak * size / max(example, 1)
        if count and used > most:
            break
        count += 1
    return batches[:count]


@torch.no_grad()
def repair_cut(
    plan: Analysis,
    kept: Kept,
    small: fx.GraphModule,
    batches: Sequence[Sequence[Any]],
    *,
    direct: bool = False,
    rows: int = ROWS,
    influence: Influences | None = None,
) -> Repaired:
    """Repair a cut on unlabelled calibration data.

    Args:
        plan: of the model before.
        kept: the units that stay.
        small: the sliced graph; not changed.
        batches: flat inputs, in the order of the placeholders.
        direct: solve only layers whose own weights lose inputs or outputs.
        rows: each layer is solved on at most so many rows, or ten for each feature where that is more.
        influence: what rows count, of the same batches; None: they are differentiated for.

    Raises:
        CalibrationError: no batch, one that the model does not run on, or values that are not finite.
    """
    if not by_factor(kept):
        return Repaired(plan, kept, small)
    if not batches:
        raise CalibrationError("there is no batch to repair on", fix="calibration=[batch, …]")
    used = within_memory(plan.captured.module, batches)
    repair = _Repair(plan, kept, small, used, direct, rows, influence=influence)
    while repair.walk():  # a weight that several layers share is solved once all are seen, and then they run again
        pass
    return repair.result(kept)


@torch.no_grad()
def repair_behind(
    plan: Analysis, small: fx.GraphModule, given: Collection[str], batches: Sequence[Sequence[Any]], rows: int = ROWS
) -> Repaired:
    """Repair the layers of a graph that read other values than in the model before: no unit is cut.

    Args:
        plan: of the model before.
        small: its graph without some nodes, and with other values of some tensors; not changed.
        given: names of these tensors, which stay as they are in `small`.
        batches: flat inputs, as many as memory is for.
        rows: each layer is solved on at most so many rows, or ten for each feature where that is more.

    Raises:
        CalibrationError: a batch that the model does not run on, or values that are not finite.
    """
    repair = _Repair(plan, {}, small, batches, rows=rows, given=given)
    while repair.walk():
        pass
    return repair.result({})


def layer_influences(plan: Analysis, batches: Sequence[Sequence[Any]]) -> Influences:
    """Return how much the results of all layers of a plan's graph count for its outputs."""
    captured = plan.captured
    consumers = Consumers(captured.module, plan.coupling.sources, captured.outside.reads)
    return influences(captured.module, consumers.at, batches)


def _like(tensor: Tensor, old: Tensor) -> Tensor:
    """Return `tensor` as a parameter where `old` is one."""
    return nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor


class _Repair:
    """One repair of one cut, on graphs of its own."""

    def __init__(
        self,
        plan: Analysis,
        kept: Kept,
        small: fx.GraphModule,
        batches: Sequence[Sequence[Any]],
        direct: bool = False,
        rows: int = ROWS,
        given: Collection[str] = (),
        influence: Influences | None = None,
    ) -> None:
        self.plan, self.batches, self.small, self.direct, self.rows = plan, batches, small, direct, rows
        self.given = frozenset(given)
        self.cuts = kept_of_tensors(plan.coupling, kept)
        self.in_place = writes(small)
        self.units = by_factor(kept)
        self.whole = plan.captured.module
        self.work, _ = clone(small)  # shares the tensors of `small`; those of a solution take the place of its own
        self.twins = {node.name: node for node in self.whole.graph.nodes}
        sources = plan.coupling.sources
        constant = {n: sources[t] for n in self.work.graph.nodes if (t := self.twins.get(n.name)) in sources}
        self.consumers = Consumers(self.work, constant, plan.captured.outside.reads)
        self.influence = layer_influences(plan, batches) if influence is None else influence
        self.place = {node: k for k, node in enumerate(self.work.graph.nodes)}
        self.names = names_by_tensor(all_tensors(small))
        self.changed: dict[str, None] = {}
        self.layers: dict[str, LayerRepair] = {}
        self.left: dict[str, str] = {}
        self.reestimated: dict[str, None] = {}
        self.solved: set[Consumer] = set()
        self.sums: dict[Consumer, Sums] = {}

    def result(self, kept: Kept) -> Repaired:
        """Return what was done."""
        self.work.recompile()
        return Repaired(
            self.plan, kept, self.work, tuple(self.changed), self.layers, self.left, tuple(self.reestimated),
            len(self.batches), self.influence.why,
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------- walking
    def walk(self) -> bool:
        """Solve layers in order of execution; True where a shared weight was solved: the graph runs again with it."""
        self.sums.clear()
        self.same: set[fx.Node] = set()
        self.exact, self.rough = Lockstep(self.whole, self.batches), Lockstep(self.work, self.batches)
        unsolved: set[fx.Node] = set()
        before = iter(self.whole.graph.nodes)
        for node in self.work.graph.nodes:
            twin = self.twins.get(node.name)
            if twin is None:  # a length that slicing computes
                self.rough.step(node)
                self.rough.drop(node)
                continue
            for old in before:  # those in front of the twin are of a block that is left out
                self._step(self.exact, old)
                if old is twin:
                    break
                self.exact.drop(old)
            consumer = self.consumers.at.get(node)
            if self._untouched(node, twin):
                self.same.add(node)
            elif consumer is not None and consumer not in self.solved and not self._passed_over(consumer):
                why = self._reach(consumer, twin)
                if why == AGAIN:
                    return True
                if why:
                    self.left[consumer.name] = why
                    unsolved.add(node)
            elif node in self.consumers.left and self._reads_other(node, twin):
                self.left[self.consumers.name(node)] = self.consumers.left[node]
                unsolved.add(node)
            elif is_evaluated_norm(node) and node.all_input_nodes[0] in unsolved:
                self._reestimate(node)
            if node in self.same and node.op != "placeholder":  # each run has inputs of its own
                self.rough.take(node, self.exact, twin)
            elif node.target in CHOICES and self._alike(node, twin):
                self._choose(node, twin)
            else:
                self._step(self.rough, node)
            self.exact.drop(twin)
            self.rough.drop(node)
        return False

    def _alike(self, node: fx.Node, twin: fx.Node) -> bool:
        """Return whether an op reads as many elements as before the cut."""
        pairs = zip(self.rough.of(node.all_input_nodes[0]), self.exact.of(twin.all_input_nodes[0]), strict=True)
        return all(x.shape == y.shape for x, y in pairs)

    def _choose(self, node: fx.Node, twin: fx.Node) -> None:
        """Give an op that chooses positions the choice of the model before: rows of both runs stay side by side."""
        arguments = bind(node)
        dim, keeps = arguments["dim"], arguments.get("keepdim", True)
        for run, source in zip(self.rough.runs, self.exact.runs, strict=True):
            chosen = source.values[twin]
            if isinstance(chosen, Tensor):
                run.values[node] = chosen
                continue
            index = chosen[1] if keeps else chosen[1].unsqueeze(dim)
            picked = run.values[node.all_input_nodes[0]].gather(dim, index)
            run.values[node] = (picked if keeps else picked.squeeze(dim), chosen[1])

    def _untouched(self, node: fx.Node, twin: fx.Node) -> bool:
        """Return whether an op computes what it computed before the cut: the value is taken over then."""
        if self.in_place:
            return False
        if node.op == "get_attr":
            name = str(node.target)
            return name not in self.changed and name not in self.cuts and name not in self.given
        if node.op != "call_function" or any(n not in self.same for n in node.all_input_nodes):
            return node.op == "placeholder"
        found, old = (fx.map_arg((n.args, n.kwargs), lambda operand: operand.name) for n in (node, twin))
        return bool(found == old)

    def _passed_over(self, consumer: Consumer) -> bool:
        """Return whether the layer keeps its weights: they are given, or only layers that lose inputs are solved."""
        return consumer.tensor in self.given or (self.direct and consumer.tensor not in self.cuts)

    def _step(self, values: Lockstep, node: fx.Node) -> None:
        for k, run in enumerate(values.runs):
            try:
                run.step(node)
            except Exception as error:  # whatever the ops raise on inputs of another shape
                raise refused_batch(k, error) from error

    def _reads_other(self, node: fx.Node, twin: fx.Node) -> bool:
        """Return whether the cut changed what an op reads."""
        pairs = zip(node.all_input_nodes, twin.all_input_nodes, strict=False)
        return any(n not in self.consumers.sources and self._differ(n, t) for n, t in pairs)

    def _differ(self, node: fx.Node, twin: fx.Node) -> bool:
        if node in self.same and self.twins.get(node.name) is twin:
            return False
        found = zip(self.rough.of(node), self.exact.of(twin), strict=True)
        return any(not isinstance(x, Tensor) or x.shape != y.shape or not torch.equal(x, y) for x, y in found)

    # -------------------------------------------------------------------------------------------- solving
    def _reach(self, consumer: Consumer, twin: fx.Node) -> str:
        """Solve a layer, or the weight that several share once the last is reached; AGAIN then. Return why not."""
        together = self.consumers.together[consumer]
        if consumer.name in self.left:  # another layer with the same weight
            return self.left[consumer.name]
        other = self._differ(operands(consumer.node)[consumer.data], operands(twin)[consumer.data])
        if len(together) == 1 and not other:
            return ""
        self._start_over(consumer)
        problem = Problem.of(consumer, self.rough)
        if isinstance(problem, str):
            return problem
        if problem.ends and any(not torch.equal(a, b) for a, b in zip(problem.ends, self._ends(twin), strict=True)):
            return "the cut sends rows to other matrices"
        inputs = self.rough.of(operands(consumer.node)[consumer.data])
        if self._maps_channels(consumer, problem):
            self._map_channels(consumer, twin, problem)
            return ""
        wanted = self._wanted(consumer.node, twin)
        self._step(self.rough, consumer.node)
        rest = [t.double() - y.double() for t, y in zip(wanted, self.rough.of(consumer.node), strict=True)]
        sums = problem.sums(inputs, rest, wanted, self.rows, counts=self._rows_count(consumer, problem, inputs))
        _check_finite(sums, consumer)
        if len(together) == 1:
            self._solve(consumer, problem, sums)
            return ""
        first = together[0]
        self.sums[first] = self.sums[first] + sums if first in self.sums else sums
        if consumer is not together[-1]:
            return ""
        changed = self._solve(consumer, problem, self.sums[first])
        if changed:  # layers from the first of these on have read values of the weight as it was
            self.solved = {c for c in self.solved if self.place[c.node] < self.place[first.node] or self._shared(c)}
        self.solved |= {*together}
        return AGAIN if changed else ""

    def _shared(self, consumer: Consumer) -> bool:
        """Return whether several layers share the weight, which is solved once: two such weights that take turns would
        undo each other for ever."""
        return len(self.consumers.together[consumer]) > 1

    def _rows_count(self, consumer: Consumer, problem: Problem, inputs: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Return what each row of a layer counts for the model's outputs, per batch; None: all alike."""
        rows = self.influence.rows.get(self.twins[consumer.node.name])
        return rows if rows and [len(own) for own in rows] == [problem.design.count(x) for x in inputs] else None

    def _ends(self, twin: fx.Node) -> list[Tensor]:
        """Return where the rows of each matrix end in the model before, by batch."""
        ends = ends_of(twin)
        return [] if ends is None else self.exact.of(ends)

    def _solve(self, consumer: Consumer, problem: Problem, sums: Sums) -> bool:
        """Give a layer the solution; False where it keeps the sliced weights."""
        total = sums.all
        fewest = FEWEST_ROWS * len(self.consumers.together[consumer])  # of one sample each use of a weight has rows
        ridge = choose_ridge(sums.fit, sums.held, problem.intercept) if total.rows >= fewest else math.inf
        change = solve(total, ridge, problem.intercept)
        if change is None:
            ridge, change = math.inf, total.no_change
        errors = (total.tt, total.tt if math.isinf(ridge) else min(total.error(change), total.tt))
        before, after = (math.sqrt(error / sums.norm) if sums.norm else 0.0 for error in errors)
        self.layers[consumer.name] = LayerRepair(before, after, ridge, total.rows)
        if math.isinf(ridge):
            return False
        self._give(consumer, problem, change)
        return True

    def _give(self, consumer: Consumer, problem: Problem, change: Tensor) -> None:
        """Add a change to the weight of a layer, and to the tensor that takes its intercept."""
        added = problem.design.weight(change[:, :-1] if problem.intercept else change)
        self._add(consumer.tensor, added, consumer.index)
        if problem.intercept:
            self._add(consumer.bias, change[:, -1] * consumer.sign)
        self._refresh(consumer)

    def _add(self, name: str, change: Tensor, index: Tensor | None = None) -> None:
        old = in_memory(fetch(self.work, name)).detach()
        new = old.flatten().to(torch.float64, copy=True)  # in float64, too, the tensor of the slice stays
        if index is None:
            new += change.flatten()
        else:
            new[index.flatten().to(new.device)] += change.flatten()
        self._put(name, new.view(old.shape).to(old.dtype))

    def _put(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in place of one, under each of its names."""
        old = fetch(self.small, name)
        new = _like(as_before(tensor.detach(), old), old)
        for own in self.names[id(old)]:
            assign(self.work, own, new)
        self.changed[name] = None

    def _refresh(self, consumer: Consumer) -> None:
        """Bring values that were read off the layer's tensors up to date."""
        biases = self.consumers.readers[consumer.bias] if consumer.bias else []
        for node in (consumer.attribute, *consumer.moves, *biases):
            self.rough.step(node)

    def _maps_channels(self, consumer: Consumer, problem: Problem) -> bool:
        """Return whether a convolution has too many taps to be solved, and neither groups nor a shared weight."""
        design = problem.design
        if not isinstance(design, Patches) or max(design.kernel) == 1 or problem.features <= MOST_TAPS:
            return False
        return design.groups == 1 and not consumer.moves and len(self.consumers.together[consumer]) == 1

    def _map_channels(self, consumer: Consumer, twin: fx.Node, problem: Problem) -> None:
        """Solve a convolution with too many taps by a map from the channels that it reads to those that it read before.

            M = argmin Σ ||x − M x̃||², shrunk towards the plain selection;  W' = W M for each tap

        The sliced weights stay where the map does not make the output better.
        """
        design = problem.design
        assert isinstance(design, Patches)
        data = operands(twin)[consumer.data]
        inputs, before_cut = self.rough.of(operands(consumer.node)[consumer.data]), self.exact.of(data)
        wanted = self._wanted(consumer.node, twin)
        points = Problem.points(inputs[0])
        sums = points.sums(inputs, self._missing(data, inputs), before_cut, self.rows)
        _check_finite(sums, consumer)
        before = self._error(consumer.node, wanted)
        ridge = choose_ridge(sums.fit, sums.held, intercept=True)
        change = solve(sums.all, ridge, intercept=True)
        after = before
        if change is not None and not math.isinf(ridge):
            whole = in_memory(fetch(self.whole, consumer.tensor)).detach().double()
            out = 1 if design.transposed else 0
            cut = self.cuts.get(consumer.tensor, {})
            outputs = {dim: index for dim, index in cut.items() if dim == out}
            filters = select(whole, outputs).movedim(1 - out, 0)  # (c, o, *k)
            self._add(consumer.tensor, torch.tensordot(change[0, :-1], filters, 1).movedim(0, 1 - out))
            if consumer.bias:
                self._add(consumer.bias, torch.tensordot(change[0, -1], filters, 1).flatten(1).sum(1) * consumer.sign)
            self._refresh(consumer)
            after = self._error(consumer.node, wanted)
        if after >= before:
            self._start_over(consumer)
        self.layers[consumer.name] = LayerRepair(before, min(before, after), ridge, sums.all.rows)

    def _missing(self, data: fx.Node, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return each channel as it was before the cut, less what stands in its place now."""
        (axes,) = self.plan.coupling.axes[data]
        kept = kept_indices(axes[1], self.units)
        rest = [x.double() for x in self.exact.of(data)]  # copies, unless they were in float64
        result = []
        for old, x in zip(rest, inputs, strict=True):
            now = torch.zeros_like(old)
            now[:, slice(None) if kept is None else kept.to(now.device)] = x.double()
            result.append(old - now)
        return result

    def _error(self, node: fx.Node, wanted: Sequence[Tensor]) -> float:
        """Return the relative error of a layer's output as it is now."""
        self._step(self.rough, node)
        pairs = list(zip(wanted, self.rough.of(node), strict=True))
        error, norm = (
            sum(float(v.double().square().sum()) for v in values)
            for values in ([t - y for t, y in pairs], [t for t, _ in pairs])
        )
        return math.sqrt(error / norm) if norm else 0.0

    def _start_over(self, consumer: Consumer) -> None:
        """Put the sliced tensors of a layer back."""
        sliced, now = (in_memory(fetch(module, consumer.tensor)).detach() for module in (self.small, self.work))
        index, now = consumer.index.flatten().to(now.device), now.flatten().clone()
        now[index] = sliced.flatten()[index]  # what else the tensor holds may be solved
        self._put(consumer.tensor, now.view(sliced.shape))
        if consumer.bias:
            self._put(consumer.bias, fetch(self.small, consumer.bias))
        self._refresh(consumer)

    def _reestimate(self, norm: fx.Node) -> None:
        """Give a batch norm behind a layer that is not repaired the statistics of what the norm reads now."""
        arguments = bind(norm)
        names = [str(arguments[name].target) for name in ("running_mean", "running_var")]
        if any(len(self.consumers.readers[name]) > 1 for name in names):
            return
        values = [x.double().movedim(1, 0).flatten(1) for x in self.rough.of(arguments["input"])]
        found = torch.cat(values, 1)
        for name, statistic in zip(names, (found.mean(1), found.var(1)), strict=True):
            self._put(name, statistic.to(fetch(self.small, name).dtype))
            for node in self.consumers.readers[name]:
                self.rough.step(node)
        self.reestimated[names[0].removesuffix(".running_mean")] = None

    # -------------------------------------------------------------------------------------------- targets
    def _wanted(self, node: fx.Node, twin: fx.Node) -> list[Tensor]:
        """Return what the layer is to give, at the indices that stay.

        Where the result is added to a stream, behind batch norms or alone, that is the old sum less the stream as it
        is now.
        """
        wanted = [self._kept(twin, y) for y in self.exact.of(twin)]
        found = _added_to(node, self.work)
        if found is None:
            return wanted
        total, other, slope = found
        old = self._other(total, other)
        if old is None or not self.rough.has(other) or not self.exact.has(old):
            return wanted  # computed later: then that layer makes up for this one
        result = []
        for t, now, before in zip(wanted, self.rough.of(other), self.exact.of(old), strict=True):
            lost = self._kept(old, before).double() - now.double()
            if lost.shape != t.shape:
                return wanted
            if slope is not None:
                safe = torch.where(slope.abs() > SMALL_SLOPE * slope.abs().mean(), slope, math.inf)
                lost = lost / safe.view(1, -1, *[1] * (lost.dim() - 2))
            result.append((t.double() + lost).to(t.dtype))
        return result

    def _other(self, total: fx.Node, other: fx.Node) -> fx.Node | None:
        """Return what stood in the place of an operand of a sum in the model before; None where nothing did."""
        twin = self.twins.get(total.name)
        if twin is None or len(twin.all_input_nodes) != len(total.all_input_nodes):
            return None
        found: fx.Node = twin.all_input_nodes[total.all_input_nodes.index(other)]
        return found

    def _kept(self, twin: fx.Node, y: Tensor) -> Tensor:
        """Return the part of a value of the model before that the small model computes."""
        (axes,) = self.plan.coupling.axes[twin]
        found = {dim: kept_indices(axis, self.units) for dim, axis in enumerate(axes)}
        dims = {dim: index for dim, index in found.items() if index is not None}
        return select(y, dims) if dims else y


CHOICES = frozenset({
    aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable,
    aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default,
})  # fmt: skip
"""Ops that return the positions of elements, chosen by size. Small errors turn a choice, and rows change places."""


def _check_finite(sums: Sums, consumer: Consumer) -> None:
    """Raise CalibrationError where a row that a layer is solved on is not finite."""
    if not sums.all.finite:
        raise CalibrationError("the data, or what the model computes of them, are not finite", at=consumer.name)


AGAIN = "again"
"""What reaching a layer gives where the graph must run again."""


def _added_to(node: fx.Node, module: fx.GraphModule) -> tuple[fx.Node, fx.Node, Tensor | None] | None:
    """Return the sum that a layer's result goes into, its other operand, and the factor per channel on the way.

    None where the result goes elsewhere, too, or through other ops than batch norms.
    """
    slope: Tensor | None = None
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in (aten.add.Tensor, aten.add_.Tensor):
            others = [n for n in user.all_input_nodes if n is not node]
            return (user, others[0], slope) if len(others) == 1 and bind(user)["alpha"] == 1 else None
        if is_evaluated_norm(user):
            arguments = bind(user)
            var = fetch(module, str(arguments["running_var"].target)).double()
            factor = torch.rsqrt(var + arguments["eps"])
            if arguments["weight"] is not None:
                factor = factor * fetch(module, str(arguments["weight"].target)).double()
            slope = factor if slope is None else slope * factor
        elif user.target is not aten.dropout.default:
            return None
        node = user
    return None
