"""Reconstruction of blocks: weights move to neighbouring levels where a block's output gets nearer to the float one.

A block lies between two places that all values pass through: a residual block, an attention layer with the sum behind.
The whole block is seen, its nonlinear ops too, where rounding layer by layer sees a product alone. Each weight may go
one level up or down; which one goes is learned by gradients of the block's error with a term that pulls moves to whole
levels. Biases and steps of activations inside the block are learned along. A block is kept as it was unless its error
falls on batches that the learning has not seen.

Sources: Nagel et al. 2020 (AdaRound, arXiv 2004.10568) for the relaxation and the pull, Li et al. 2021 (BRECQ, arXiv
2102.05426) for blocks, Wei et al. 2022 (QDrop, arXiv 2203.05740) for inputs that are mixed with float ones. Unlike
AdaRound, moves start from the rounding there is, and go both ways.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.arguments import check_flag, check_whole, is_number, wrong
from graphcomp.ir.graph import attribute_readers, bind, fetch
from graphcomp.ir.preserve import writes
from graphcomp.ir.program import P
from graphcomp.ir.rewrite import before
from graphcomp.ir.run_nodes import Lockstep, compute_node
from graphcomp.ops.answers import compute_of
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import constants_with_quantizers
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.stored import Affine, spread
from graphcomp.quantization.tensors import put, read_by_others
from graphcomp.system.progress import progress

logger = logging.getLogger("graphcomp")

STRETCH = 1.2
"""Moves are STRETCH · tanh of what is learned, cut to one level: whole levels are reached, not only approached."""
PULL = 1.0
"""Weight of the pull to whole levels, of the mean distance of moves, relative to the error of the block."""
SHARPEST, SOFTEST = 2.0, 20.0
"""Exponents of the pull, from the last step back to the first."""
WARM_UP, SETTLED = 0.2, 0.95
"""Shares of the steps after which moves begin to be pulled and settled, and all are settled."""
SETTLING = 5
"""Steps between two times that moves are settled."""
RATE, BIAS_RATE, STEP_RATE = 0.02, 1e-3, 1e-3
"""Adam's learning rates: of moves, of biases relative to their size, and of steps relative to theirs."""
MIXED = 0.5
"""Share of the elements of a block's input that are float ones while the block is learned."""


@dataclass(frozen=True)
class Reconstruction:
    """How long blocks are learned.

    Attributes:
        steps: of Adam for each block, one batch each.
        seconds: for all blocks; those that are not reached in time stay as they were, and a note says so. None: no
            limit, and the same result in each run.
        seed: of the mixing.
        progress: show a progress line on the terminal.

    Raises:
        PlanError: a value out of range.
    """

    steps: int = 200
    seconds: float | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, fix="steps=200")
        check_whole("seed", self.seed, 0, fix="seed=0")
        check_flag("progress", self.progress)
        if self.seconds is not None and not (is_number(self.seconds) and self.seconds > 0):
            raise wrong("seconds", "a positive number, or None", self.seconds, "seconds=60")


@dataclass(frozen=True)
class Block:
    """Nodes between two places that all values pass through.

    Attributes:
        entry: the value that comes in; None at the beginning.
        nodes: in the order of the graph; the last one's value goes out.
    """

    entry: fx.Node | None
    nodes: tuple[fx.Node, ...]

    @property
    def exit(self) -> fx.Node:
        """The node whose value goes out."""
        return self.nodes[-1]


def blocks_of(fake: fx.GraphModule) -> tuple[Block, ...]:
    """Return the blocks with quantized weights, in the order of the graph.

    Values that hang on no quantized weight (masks, positions) are free: they may pass beside a block.
    """
    weights = _weight_nodes(fake)
    heavy: set[fx.Node] = set()
    last: dict[fx.Node, int] = {}
    nodes = [node for node in fake.graph.nodes if node.op != "output"]
    for k, node in enumerate(fake.graph.nodes):
        if any(n in heavy or n in weights for n in node.all_input_nodes):
            heavy.add(node)
        for operand in node.all_input_nodes:
            last[operand] = k
    found: list[Block] = []
    waiting: list[fx.Node] = []
    reads = False
    entry: fx.Node | None = None
    live: set[fx.Node] = set()
    for k, node in enumerate(nodes):
        waiting.append(node)
        if node in heavy and last.get(node, -1) > k:
            live.add(node)
        live = {other for other in live if last[other] > k}
        reads = reads or any(n in weights for n in node.all_input_nodes)
        if live == {node} and reads:
            found.append(Block(entry, tuple(waiting)))
            entry, waiting, reads = node, [], False
    return tuple(found)


def _weight_nodes(fake: fx.GraphModule) -> dict[fx.Node, Quantizer]:
    constant = constants_with_quantizers(fake)
    return {node: q for node, q in quantizer_nodes(fake) if node in constant}


@dataclass(frozen=True)
class ReconstructBlocks:
    """Learn the rounding of each block, see the module; a pass behind `SetLayers`.

    Attributes:
        batches: flat inputs; every fourth one judges, and the last of two or three; a single one does both.
        floats: stage of the float graph.
        options: how long.
    """

    batches: Sequence[Sequence[Any]]
    floats: str
    options: Reconstruction = Reconstruction()
    name: ClassVar[str] = "reconstruct blocks"

    def __call__(self, program: P, /) -> P:
        """Return the program with a note of what was reconstructed."""
        fake = program.module
        if writes(fake):
            found = ["no block was reconstructed, as an op writes into a tensor that it is given"]
        else:
            found = _Learning(program.stages[self.floats].module, fake, self.options).walk(self.batches)
        return replace(program, notes=(*program.notes, *found))


class _Learning:
    """One walk over a float graph and its fake-quant graph."""

    def __init__(self, folded: fx.GraphModule, fake: fx.GraphModule, options: Reconstruction) -> None:
        self.folded, self.fake, self.options = folded, fake, options
        self.quantizers = dict(quantizer_nodes(fake))
        self.weights = _weight_nodes(fake)
        self.twins = self._pair()
        self.readers = attribute_readers(fake)
        self.generator = torch.Generator().manual_seed(options.seed)

    def _pair(self) -> dict[fx.Node, fx.Node]:
        """Return the float node of each node; a quantizer's is that of what it reads."""
        float_nodes = iter(self.folded.graph.nodes)
        found: dict[fx.Node, fx.Node] = {}
        for node in self.fake.graph.nodes:
            found[node] = found[node.all_input_nodes[0]] if node in self.quantizers else next(float_nodes)
        return found

    def walk(self, batches: Sequence[Sequence[Any]]) -> list[str]:
        """Learn block after block; return what to say."""
        begun = time.monotonic()
        blocks = {block.exit: block for block in blocks_of(self.fake)}
        exact, rough = Lockstep(self.folded, batches), Lockstep(self.fake, batches)
        judges = [k for k in range(len(batches)) if k % 4 == 3] or [len(batches) - 1]
        learns = [k for k in range(len(batches)) if k not in judges] or judges
        better: list[tuple[float, float]] = []
        late = 0
        with progress(max(len(blocks), 1), self.options.progress) as bar:
            for block in blocks.values():
                for node in self._float_nodes(block):
                    exact.step(node)
                inputs = [node for node in block.nodes if node.op == "placeholder"]
                for node in inputs:
                    rough.step(node)
                bar.step(f"reconstructing {block.exit.name}")
                if self.options.seconds is not None and time.monotonic() - begun > self.options.seconds:
                    late += 1
                else:
                    better += self._learn(block, exact, rough, learns, judges)
                for node in block.nodes:
                    if node not in inputs:
                        rough.step(node)
                for node in block.nodes:
                    rough.drop(node)
                    if node not in self.quantizers:
                        exact.drop(self.twins[node])
        self.fake.recompile()
        said = []
        if better:
            old, new = (math.sqrt(sum(pair[k] for pair in better) / len(better)) for k in (0, 1))
            said.append(
                f"{len(better)} of {len(blocks)} blocks were reconstructed: relative error of their outputs on batches "
                f"held out {old:.3g} -> {new:.3g} (root mean square)"
            )
        else:
            said.append("no block was reconstructed: no move of weights helps on batches that are held out")
        if late:
            said.append(f"{late} blocks were not reconstructed within {self.options.seconds:g} s")
        return said

    def _float_nodes(self, block: Block) -> Iterator[fx.Node]:
        """Yield the float nodes of a block, each once."""
        yield from dict.fromkeys(self.twins[node] for node in block.nodes if node not in self.quantizers)

    # -------------------------------------------------------------------------------------------- one block
    def _learn(
        self, block: Block, exact: Lockstep, rough: Lockstep, learns: Sequence[int], judges: Sequence[int]
    ) -> list[tuple[float, float]]:
        """Learn one block; return its squared relative error before and after, nothing where it stays as it was."""
        outside = self._outside(block)
        inputs = [node for node in block.nodes if node.op == "placeholder"]
        given = [{node: run.values[node] for node in (*outside, *inputs)} for run in rough.runs]
        wanted = exact.of(self.twins[block.exit])
        if not all(isinstance(t, Tensor) and t.is_floating_point() for t in wanted):
            return []
        moves = self._moves(block)
        if not moves:
            return []
        floats = None if block.entry is None else exact.of(self.twins[block.entry])
        biases = self._biases(block)
        steps = self._steps(block)
        kept = {p: p.detach().clone() for p in steps}
        error = self._error(block, given, wanted, judges, {})
        self._descend(block, given, floats, wanted, learns, moves, biases, steps)
        hard = {node: move.hard() for node, move in moves.items()} | {n: p.detach() for n, p in biases.items()}
        after = self._error(block, given, wanted, judges, hard)
        logger.debug("block %s: %.3g -> %.3g", block.exit.name, error, after)
        if not after < error:
            for parameter, old in kept.items():
                parameter.data.copy_(old)
            return []
        self._keep(moves, biases, rough)
        return [(error, after)]

    def _outside(self, block: Block) -> list[fx.Node]:
        """Return the values that a block reads and does not compute."""
        own = set(block.nodes)
        return list(dict.fromkeys(n for node in block.nodes for n in node.all_input_nodes if n not in own))

    def _descend(
        self,
        block: Block,
        given: Sequence[Mapping[fx.Node, Any]],
        floats: Sequence[Tensor] | None,
        wanted: Sequence[Tensor],
        learns: Sequence[int],
        moves: Mapping[fx.Node, _Move],
        biases: Mapping[fx.Node, Tensor],
        steps: Sequence[nn.Parameter],
    ) -> None:
        """Take the steps of Adam."""
        groups: list[dict[str, Any]] = [{"params": [move.free for move in moves.values()], "lr": RATE}]
        groups += [
            {"params": [b], "lr": BIAS_RATE * max(float(b.detach().abs().mean()), 1e-3)} for b in biases.values()
        ]
        groups += [{"params": [p], "lr": STEP_RATE * _size(p)} for p in steps]
        optimizer = torch.optim.Adam(groups)
        count = sum(move.free.numel() for move in moves.values())
        states = {p: p.requires_grad for p in steps}
        for parameter in steps:
            parameter.requires_grad_(True)
        try:
            for step in range(self.options.steps):
                k = learns[step % len(learns)]
                values = dict(given[k])
                if block.entry is not None and floats is not None and block.entry in values:
                    values[block.entry] = self._mixed(values[block.entry], floats[k])
                with torch.enable_grad():
                    values |= {node: move.soft() for node, move in moves.items()}
                    values |= biases
                    y = self._run(block, values)
                    error = (y - wanted[k]).square().sum() / wanted[k].square().sum().clamp(min=1e-12)
                    pull = self._pull(step)
                    if pull is not None:
                        error = error + PULL / count * sum(move.away(pull) for move in moves.values()) * error.detach()
                    optimizer.zero_grad()
                    error.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if step % SETTLING == SETTLING - 1:
                    share = (step / self.options.steps - WARM_UP) / (SETTLED - WARM_UP)
                    for move in moves.values():
                        move.settle(min(max(share, 0.0), 1.0))
                for quantizer in self.quantizers.values():
                    quantizer.project()
        finally:
            for parameter, state in states.items():
                parameter.requires_grad_(state)

    def _pull(self, step: int) -> float | None:
        """Return the exponent of the pull at a step; None as long as there is none."""
        share = step / max(self.options.steps - 1, 1)
        if share < WARM_UP:
            return None
        left = (1 - share) / (1 - WARM_UP)
        return SHARPEST + (SOFTEST - SHARPEST) * left

    def _mixed(self, rough: Tensor, exact: Tensor) -> Tensor:
        """Return a block's input with some elements as the float model has them."""
        chosen = torch.rand(rough.shape, generator=self.generator) < MIXED
        return torch.where(chosen.to(rough.device), exact, rough)

    def _run(self, block: Block, values: dict[fx.Node, Any]) -> Tensor:
        """Compute a block; nodes that `values` holds are taken as they are."""
        for node in block.nodes:
            if node in values:
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = compute_node(self.fake, node, args, kwargs)
            if node.op == "get_attr":
                values[node] = values[node].detach()
        found: Tensor = values[block.exit]
        return found

    @torch.no_grad()
    def _error(
        self,
        block: Block,
        given: Sequence[Mapping[fx.Node, Any]],
        wanted: Sequence[Tensor],
        judges: Sequence[int],
        instead: Mapping[fx.Node, Tensor],
    ) -> float:
        """Return Σ ||y - t||² / Σ ||t||² of a block's output."""
        error = norm = 0.0
        for k in judges:
            y = self._run(block, {**given[k], **instead})
            error += float((y.double() - wanted[k].double()).square().sum())
            norm += float(wanted[k].double().square().sum())
        return error / norm if norm else 0.0

    # -------------------------------------------------------------------------------------------- what is learned
    def _moves(self, block: Block) -> dict[fx.Node, _Move]:
        """Return the moves of each weight that the block alone reads, evenly spaced and held by a parameter."""
        found = {}
        own = set(block.nodes)
        inside = {*own, *self._outside(block)}
        for node, quantizer in self.weights.items():
            (source,) = node.all_input_nodes
            if (
                node not in inside
                or source.op != "get_attr"
                or any(user not in set(block.nodes) for user in node.users)
            ):
                continue
            stored = quantizer.to_integers(fetch(self.fake, str(source.target)).detach())
            if isinstance(stored, Affine) and quantizer.exponent == 1.0:
                found[node] = _Move(stored)
        return found

    def _biases(self, block: Block) -> dict[fx.Node, Tensor]:
        """Return a copy of each bias that one op of the block alone reads."""
        found: dict[fx.Node, Tensor] = {}
        for node in block.nodes:
            bias = _bias_of(node)
            if bias is not None and not read_by_others(self.readers, bias, node):
                found[bias] = fetch(self.fake, str(bias.target)).detach().clone().requires_grad_(True)
        return found

    def _steps(self, block: Block) -> list[nn.Parameter]:
        """Return the steps of activations whose quantizers stand in the block alone."""
        own = set(block.nodes)
        places: dict[Quantizer, list[fx.Node]] = {}
        for node, quantizer in self.quantizers.items():
            places.setdefault(quantizer, []).append(node)
        return [
            step
            for quantizer, nodes in places.items()
            if own.issuperset(nodes) and not any(n in self.weights for n in nodes)
            for step in quantizer.steps()
        ]

    @torch.no_grad()
    def _keep(self, moves: Mapping[fx.Node, _Move], biases: Mapping[fx.Node, Tensor], rough: Lockstep) -> None:
        """Write what was learned into the fake-quant graph, and into values of constants that were read before."""
        for node, move in moves.items():
            (source,) = node.all_input_nodes
            weight = nn.Parameter(move.hard())
            if read_by_others(self.readers, source, node):
                name = f"graphcomp_{node.name}_weight"
                own = before(node).tensor(self.fake, name, weight)
                node.replace_input_with(source, own)
                rough.put(own, weight)
            else:
                put(self.fake, str(source.target), weight)
                if rough.has(source):
                    rough.put(source, weight)
            if rough.has(node):
                rough.put(node, self.weights[node](weight))
        for bias, learned in biases.items():
            parameter = nn.Parameter(learned.detach())
            put(self.fake, str(bias.target), parameter)
            if rough.has(bias):
                rough.put(bias, parameter)


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().abs().mean())


def _bias_of(node: fx.Node) -> fx.Node | None:
    """Return the attribute that an op adds per output channel; None without one."""
    if node.op != "call_function":
        return None
    operands = compute_of(node)
    bias = bind(node).get(operands.bias) if operands is not None and operands.bias else None
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


class _Move:
    """Where the codes of one weight go: by at most one level up or down.

    Attributes:
        free: what is learned, in the shape of the weight; 0: the codes stay.
    """

    def __init__(self, stored: Affine) -> None:
        self.scale, zero = (
            spread(t, stored.values.dim(), stored.dim, stored.groups) for t in (stored.scale, stored.zero_point)
        )
        self.codes = stored.values.to(self.scale.dtype) - zero
        self.low, self.high = stored.quant_min - zero, stored.quant_max - zero
        self.free = torch.zeros_like(self.codes).requires_grad_(True)
        self.settled = torch.zeros_like(self.codes, dtype=torch.bool)

    def _moved(self) -> Tensor:
        moved = (STRETCH * torch.tanh(self.free)).clamp(-1, 1)
        return torch.where(self.settled, moved.detach().round(), moved)

    @torch.no_grad()
    def settle(self, share: float) -> None:
        """Settle a share of the moves on whole levels, those nearest to one first; the others make up for the rest."""
        moved = (STRETCH * torch.tanh(self.free)).clamp(-1, 1)
        away = torch.where(self.settled, -1.0, (moved - moved.round()).abs())
        count = math.ceil(share * away.numel())
        if count:
            order = away.flatten().argsort(stable=True)[:count]
            self.settled.view(-1)[order] = True

    def soft(self) -> Tensor:
        """Return the weight with moves as they are learned."""
        return torch.clamp(self.codes + self._moved(), self.low, self.high) * self.scale

    @torch.no_grad()
    def hard(self) -> Tensor:
        """Return the weight with whole moves."""
        return torch.clamp(self.codes + self._moved().round(), self.low, self.high) * self.scale

    def away(self, exponent: float) -> Tensor:
        """Return how far moves are from whole levels: 0 at whole ones, 1 in the middle between two."""
        return (1 - (2 * self._moved().abs() - 1).abs().pow(exponent)).sum()
