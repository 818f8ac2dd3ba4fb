"""Depth: which residual blocks a model can do without, and the repair of what is left.

Blocks i..j of a stream are left out: what read the stream behind block j reads the stream in front of block i. The last
layer before block i takes over what a linear map can: with h + W x the stream in front and s the stream behind,

    W' = W + argmin ||s − (h + W x) − D x||²,  shrunk towards D = 0 by a ridge that is chosen on held-out rows

Where a layer norm stands between the sum and the stream, s is the sum behind block j in units of the standard deviation
of the sum in front, and the norm gets the scale and the shift that best map what is normalized to the stream behind.
Then the layers behind are solved in order of execution, each towards what it gave in the model before, as after a cut
of units (`repair.py`): a sum behind blocks makes up for what the map has left over.
Source: ReplaceMe (Shopkhoev et al., 2025): one linear map in place of blocks, folded into the projection before. Here
the map reads the layer's inputs, not its outputs, so that the map has more to work with.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.coupling.analysis import Analysis
from graphcomp.errors import CalibrationError
from graphcomp.ir.graph import all_tensors, assign, bind, fetch, names_by_tensor
from graphcomp.ir.preserve import own_inputs, same_buffers
from graphcomp.ir.run_nodes import Run, output_errors, refused_batch
from graphcomp.ir.streamed import as_before, in_memory
from graphcomp.numerics.regression import choose_ridge, solve
from graphcomp.ops.design import design_of
from graphcomp.pruning.blocks import ADDITIONS, Block, DropBlocks, is_identity, order_of
from graphcomp.pruning.consumers import Consumer, Consumers, is_evaluated_norm, operands
from graphcomp.pruning.least_squares import FEWEST_ROWS, ROWS, Problem
from graphcomp.pruning.repair import LIVE, LayerRepair, repair_behind, value_bytes

aten = torch.ops.aten

Values = dict[str, list[Tensor]]
"""Name of a node -> what the node computed, per batch."""


@dataclass(frozen=True, eq=False)
class Dropped:
    """A graph without some blocks, repaired.

    Attributes:
        graph: shares the tensors that stay as they were with the graph before.
        changed: names of the tensors with other values.
        layers: layer in front of blocks -> what the map for them did to it.
        left: block, or first of several in a row -> why no layer takes its part over; layer behind -> why it stays.
        behind: layer behind blocks -> what the repair did to it.
        reestimated: batch norms behind layers that stay, with the statistics of the calibration data.
        alike: why all rows counted alike behind the blocks; "" where rows count what they do for the outputs.
    """

    graph: fx.GraphModule
    changed: tuple[str, ...] = ()
    layers: Mapping[str, LayerRepair] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    behind: Mapping[str, LayerRepair] = field(default_factory=dict)
    reestimated: tuple[str, ...] = ()
    alike: str = ""


def in_a_row(chosen: Sequence[Block]) -> list[list[Block]]:
    """Return blocks in order of execution, those together of which each begins where the last one ends."""
    found: list[list[Block]] = []
    for block in chosen:
        if found and found[-1][-1].end is block.start:
            found[-1].append(block)
        else:
            found.append([block])
    return found


class Depth:
    """A model's blocks, what the model computes with all of them, and what it computes without some.

    Args:
        plan: of the whole model, exported.
        blocks: of the plan's graph.
        batches: flat inputs to repair on, in the order of the placeholders; those at the end are left out where memory
            is short.
        rows: that each layer is solved on at most, or ten for each feature where that is more.
        gone: blocks that may be left out; None: any.
    """

    def __init__(
        self,
        plan: Analysis,
        blocks: Sequence[Block],
        batches: Sequence[Sequence[Any]],
        rows: int = ROWS,
        gone: Sequence[Block] | None = None,
    ) -> None:
        self.plan, self.blocks, self.rows = plan, blocks, rows
        self.module = plan.captured.module
        self.consumers = Consumers(self.module, plan.coupling.sources, plan.captured.outside.reads)
        ends = blocks if gone is None else [row[-1] for row in in_a_row(gone)]
        wanted = {node for block in ends for node in (block.total, block.end)}
        self.batches = _within(self.module, wanted, batches)
        self.exact = _values(self.module, self.batches, wanted) if batches else {}

    @torch.no_grad()
    def walked(self, chosen: Collection[Block]) -> Dropped:
        """Return the graph without the chosen blocks, and the layers behind them repaired, too.

        After the maps in front of the blocks, each later layer is solved towards what it gave in the model before; in
        that order what is left of an error is made up for once more. The maps alone stay where that does not bring the
        outputs of the batches nearer.
        """
        folded = self.without(chosen)
        if not self.batches or not chosen:
            return folded
        found = repair_behind(self.plan, folded.graph, folded.changed, self.batches, self.rows)
        errors, _ = output_errors(self.module, (folded.graph, found.graph), self.batches)
        if not errors[1] < errors[0]:
            return folded
        behind = {name: layer for name, layer in found.layers.items() if not math.isinf(layer.ridge)}
        changed = dict.fromkeys((*folded.changed, *found.changed))
        left = {**folded.left, **found.left}
        return Dropped(found.graph, tuple(changed), folded.layers, left, behind, found.reestimated, found.alike)

    @torch.no_grad()
    def without(self, chosen: Collection[Block]) -> Dropped:
        """Return the graph without the chosen blocks; with batches, layers in front of them hold a map for them."""
        ordered = order_of(self.blocks, chosen)
        small = DropBlocks(ordered).rewrite(self.module)
        if not self.batches:
            return Dropped(small)
        names = {node.name for node in small.graph.nodes}
        layers: dict[str, LayerRepair] = {}
        left: dict[str, str] = {}
        changed: dict[str, None] = {}
        for row in in_a_row(ordered):
            place = self._place(row)
            if not isinstance(place, str) and place.total.name not in names:
                within = any(row[0].total in other.ops for other in ordered)
                place = WITHIN if within else "the layer in front, which would take its map, is gone, too"
            if isinstance(place, str):
                left[row[0].name] = place
                continue
            fold = _Fold(self, small, place, row)
            found = fold.solve()
            changed |= dict.fromkeys(fold.changed)
            if isinstance(found, str):
                left[row[0].name] = found
            else:
                layers[place.consumer.name] = found
        small.recompile()
        return Dropped(small, tuple(changed), layers, left)

    def _place(self, row: Sequence[Block]) -> _Place | str:
        """Return the layer that makes up for blocks in a row, or why there is none."""
        first, last = row[0], row[-1]
        if not first.alone:
            return "its input is read elsewhere, too"
        if len(last.ends) != len(first.ends):
            return "other ops stand behind it than in front of it"
        total = first.start
        ends: list[fx.Node] = []
        while len(ends) < len(first.ends) or is_identity(total):
            if not is_identity(total):
                ends.insert(0, total)
            total = next(n for n in total.all_input_nodes if n.op != "get_attr")
            if len(total.users) != 1:
                return "its input is read elsewhere, too"
        if any(end.target in NORMS for end in ends) and len(ends) > 1:
            return "several ops with a norm among them stand in front of it"
        made = [total]
        if total.target in ADDITIONS:
            made = sorted(total.all_input_nodes, key=lambda n: n in self.blocks_between(total), reverse=True)
        for node in made:
            found = self._layer(node, total)
            if found is not None:
                return _Place(found[0], found[1], total, tuple(ends))
        return "no layer in front of it can hold a map"

    def blocks_between(self, total: fx.Node) -> set[fx.Node]:
        """Return the branch of the block whose addition `total` is."""
        return {block.branch for block in self.blocks if block.total is total}

    def _layer(self, node: fx.Node, total: fx.Node) -> tuple[Consumer, Tensor | None] | None:
        """Return the layer whose result `node` is, but for batch norms, and the factor per channel on the way."""
        slope: Tensor | None = None
        reader = total if node is not total else None
        while node not in self.consumers.at:
            alone = reader is None or (len(node.users) == 1 and reader in node.users)
            if is_evaluated_norm(node) and alone:
                arguments = bind(node)
                factor = torch.rsqrt(
                    fetch(self.module, str(arguments["running_var"].target)).double() + arguments["eps"]
                )
                if arguments["weight"] is not None:
                    factor = factor * fetch(self.module, str(arguments["weight"].target)).double()
                slope = factor if slope is None else slope * factor
            elif not is_identity(node) or not alone:
                return None
            reader, node = node, node.all_input_nodes[0]
        consumer = self.consumers.at[node]
        if len(self.consumers.together[consumer]) > 1 or (reader is not None and len(node.users) != 1):
            return None
        return consumer, slope


WITHIN = "it lies within another block that is gone"
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
"""Norms over the last dims, whose input may be scaled row by row."""


@dataclass(frozen=True, eq=False)
class _Place:
    """The layer that makes up for blocks.

    Attributes:
        consumer: in the graph before.
        slope: factor per channel between the layer and `total`; None: 1.
        total: the value that the layer's result ends in, in front of `ends`.
        ends: the ops between `total` and the start of the blocks.
    """

    consumer: Consumer
    slope: Tensor | None
    total: fx.Node
    ends: tuple[fx.Node, ...]


class _Fold:
    """One repair of one graph without blocks; the graph gets new tensors."""

    def __init__(self, depth: Depth, small: fx.GraphModule, place: _Place, row: Sequence[Block]) -> None:
        self.depth, self.small, self.place, self.row = depth, small, place, row
        self.nodes = {node.name: node for node in small.graph.nodes}
        self.changed: list[str] = []

    def solve(self) -> LayerRepair | str:
        """Give the layer, and a norm behind it, what makes up for the blocks; return what was done, or why nothing."""
        consumer, exact, last = self.place.consumer, self.depth.exact, self.row[-1]
        data = operands(consumer.node)[consumer.data]
        values = self._run(data, self.place.total)
        inputs, now = values[data.name], values[self.place.total.name]
        weight = fetch(self.small, consumer.tensor).detach().flatten()[consumer.index]
        if not weight.is_floating_point() or not inputs[0].is_floating_point():
            return f"{consumer.name} computes in {weight.dtype}"
        design = design_of(
            consumer.node, consumer.data, consumer.weight,
            {consumer.data: inputs[0].shape, consumer.weight: weight.shape},
        )  # fmt: skip
        if design is None:
            return f"{consumer.name} is no product with a matrix"
        bias = bool(consumer.bias)
        problem = Problem(design, design.matrices(weight).shape[1] + bias, bias)
        wanted = [self._wanted(s, z) for s, z in zip(exact[last.total.name], now, strict=True)]
        rest = [(t - z.double()) / self._slope(z) for t, z in zip(wanted, now, strict=True)]
        sums = problem.sums(inputs, rest, wanted, self.depth.rows)
        total = sums.all
        if not total.finite:
            raise CalibrationError("the data, or what the model computes of them, are not finite", at=consumer.name)
        ridge = choose_ridge(sums.fit, sums.held, bias) if total.rows >= FEWEST_ROWS else math.inf
        change = solve(total, ridge, bias)
        if change is None:
            ridge, change = math.inf, total.no_change
        after = total.tt if math.isinf(ridge) else min(total.error(change), total.tt)
        if not math.isinf(ridge):
            self._add(consumer.tensor, design.weight(change[:, :-1] if bias else change), consumer.index)
            if bias:
                self._add(consumer.bias, change[:, -1] * consumer.sign)
        self._scale_norm()
        norm = max(sums.norm, torch.finfo(torch.float64).tiny)
        return LayerRepair(math.sqrt(total.tt / norm), math.sqrt(after / norm), ridge, total.rows)

    def _run(self, *nodes: fx.Node) -> Values:
        """Return what nodes of the graph before compute in the graph without blocks, up to the last of them."""
        return _values(self.small, self.depth.batches, {self.nodes[node.name] for node in nodes}, stop=True)

    def _slope(self, z: Tensor) -> Tensor:
        slope = self.place.slope
        if slope is None:
            return z.new_ones((), dtype=torch.float64)
        safe = torch.where(slope.abs() > SMALL_SLOPE * slope.abs().mean(), slope, math.inf)
        return safe.view(1, -1, *[1] * (z.dim() - 2))

    def _wanted(self, total: Tensor, now: Tensor) -> Tensor:
        """Return what the sum in front of the blocks is to be, given the sum behind them.

        In front of a norm over the last dims, scale (and mean) of a row are free: those of the row now.
        """
        norm = self._norm()
        total, now = total.double(), now.double()
        if norm is None:
            return total
        dims = tuple(range(-len(bind(norm)["normalized_shape"]), 0))
        if norm.target is aten.rms_norm.default:
            return total * (_rms(now, dims) / _rms(total, dims))
        mean, other = now.mean(dims, keepdim=True), total - total.mean(dims, keepdim=True)
        return mean + other * (_rms(now - mean, dims) / _rms(other, dims))

    def _norm(self) -> fx.Node | None:
        return next((end for end in self.place.ends if end.target in NORMS), None)

    def _scale_norm(self) -> None:
        """Give a layer norm in front of the blocks the scale and the shift that fit the stream behind best."""
        norm = self._norm()
        if norm is None or norm.target is not aten.layer_norm.default or len(bind(norm)["normalized_shape"]) != 1:
            return
        names = [str(bind(norm)[name].target) for name in ("weight", "bias") if bind(norm)[name] is not None]
        readers = self.depth.consumers.readers
        if len(names) != 2 or any(len(readers[n]) > 1 or len(readers[n][0].users) > 1 for n in names):
            return
        now = self._run(self.place.total)[self.place.total.name]
        eps = bind(norm)["eps"]
        x = torch.cat([torch.nn.functional.layer_norm(z.double(), z.shape[-1:], eps=eps).flatten(0, -2) for z in now])
        t = torch.cat([v.double().flatten(0, -2) for v in self.depth.exact[self.row[-1].end.name]])
        if len(x) < FEWEST_ROWS:
            return
        x_mean, t_mean = x.mean(0), t.mean(0)
        scale = ((x - x_mean) * (t - t_mean)).mean(0) / (x - x_mean).square().mean(0).clamp(min=1e-12)
        for name, found in zip(names, (scale, t_mean - scale * x_mean), strict=True):
            self._put(name, found.to(fetch(self.small, name).dtype))

    def _add(self, name: str, change: Tensor, index: Tensor | None = None) -> None:
        old = in_memory(fetch(self.small, name).detach())
        new = old.double().flatten()
        if index is None:
            new = new + change.flatten()
        else:
            new = new.clone()
            new[index.flatten().to(new.device)] += change.flatten()
        self._put(name, new.view(old.shape).to(old.dtype))

    def _put(self, name: str, tensor: Tensor) -> None:
        old = fetch(self.small, name)
        tensor = as_before(tensor, old)
        new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        for own in names_by_tensor(all_tensors(self.small))[id(old)]:
            assign(self.small, own, new)
        self.changed.append(name)


SMALL_SLOPE = 1e-3
"""A batch norm's factor below this share of the mean one lets nothing through that a layer could make up for."""


def _rms(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.square().mean(dims, keepdim=True).sqrt().clamp(min=1e-12)


@torch.no_grad()
def _values(
    module: fx.GraphModule, batches: Sequence[Sequence[Any]], nodes: Collection[fx.Node], *, stop: bool = False
) -> Values:
    """Return what some nodes compute, per batch; with `stop` nothing behind the last of them is computed.

    Raises:
        CalibrationError: the graph does not run on a batch.
    """
    found: Values = {node.name: [] for node in nodes}
    for k, batch in enumerate(batches):
        with same_buffers(module):
            run = Run(module, own_inputs(module, batch))
            waiting = set(nodes)
            for node in module.graph.nodes:
                if node.op == "output" or (stop and not waiting):
                    break
                try:
                    run.step(node)
                except Exception as error:  # whatever the ops raise on inputs of another shape
                    raise refused_batch(k, error) from error
                if node in waiting:
                    found[node.name].append(run.values[node].detach().clone())
                    waiting.discard(node)
                run.drop(node)
    return found


def _within(
    module: fx.GraphModule, nodes: Collection[fx.Node], batches: Sequence[Sequence[Any]], most: int = LIVE
) -> Sequence[Sequence[Any]]:
    """Return the first batches, one at least, of which the values of all nodes take `most` bytes together."""
    held = sum(value_bytes(node) for node in nodes)
    example = max(sum(value_bytes(node) for node in module.graph.find_nodes(op="placeholder")), 1)
    used, count = 0.0, 0
    for batch in batches:
        used += held * sum(t.numel() * t.element_size() for t in batch if isinstance(t, Tensor)) / example
        if count and used > most:
            break
        count += 1
    return batches[:count]
