"""Reconstruction of blocks: rounding, biases and steps are learned so that each block gives what the float block gives.

Layer by layer, rounding sees products alone; a block is seen with its nonlinear ops. A block reads what the quantized
graph in front of the block gives, some elements at random replaced by the float ones, and its target is the float
block's output. At last the whole model is learned at once (`whole_trial.py`). A block is kept where its output,
and the model's, is no farther from the float one on samples that the learning has not seen; else the start is kept.

Sources: Nagel et al. 2020 (AdaRound, arXiv 2004.10568) for the relaxation, Li et al. 2021 (BRECQ, arXiv 2102.05426) for
blocks, Wei et al. 2022 (QDrop, arXiv 2203.05740) for elements that are float at random. Differences: the start is
second-order rounding; each block competes with it; the pull to levels is relative to the error of the block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import first_line
from graphcomp.ir.graph import fetch
from graphcomp.ir.inputs import sample_count
from graphcomp.ir.preserve import writes
from graphcomp.ir.run_nodes import Lockstep, output_errors, run_tapped
from graphcomp.numerics.compare import floating_tensors
from graphcomp.pruning.repair import LIVE, value_bytes
from graphcomp.quantization.block_trial import BlockTrial, Data
from graphcomp.quantization.pieces import divides, in_parts, pieces_of
from graphcomp.quantization.placement import layer_name
from graphcomp.quantization.reconstruction import Reconstructed, Reconstruction
from graphcomp.quantization.segments import Segment, segments_of
from graphcomp.quantization.setting import Setting
from graphcomp.quantization.tensors import put
from graphcomp.quantization.whole_trial import WholeTrial
from graphcomp.system.progress import progress

JUDGES = 4
"""One of so many pieces of the data judges; of fewer, the last one."""
WHOLE = "the model as a whole"
"""Name of the last block."""
KEPT_FOR_GRADIENTS = 4
"""Tensors of the size of a value that a backward pass keeps, about."""
SAMPLES_AT_ONCE = 8
"""Samples of one step of the model as a whole at most, where a batch can be divided."""

Undo = Callable[[], None]


def reconstruct(
    setting: Setting, batches: Sequence[Sequence[Any]], options: Reconstruction, *, shown: bool = False
) -> Reconstructed:
    """Learn the rounding of each block of a fake-quant graph; its weights, biases and steps are replaced.

    Args:
        setting: that has set the layers of the graph.
        batches: flat inputs, one at least.
        options: how long.
        shown: show a progress line on the terminal.
    """
    if options.steps == options.steps_of_whole == 0 or options.seconds == 0:
        return Reconstructed()
    pieces = pieces_of(setting.folded, batches)
    why = ""
    if writes(setting.fake):
        why = "an op writes into a tensor that it is given"
    elif torch.is_inference_mode_enabled():
        why = "torch.inference_mode() records no gradients"
    elif len(pieces) < 2:
        why = "there is one batch that cannot be divided, and nothing else to judge on"
    return Reconstructed(left={WHOLE: why}) if why else _Walk(setting, pieces, options).walk(shown)


class _Walk:
    """One walk over a float graph and its fake-quant graph, segment by segment."""

    def __init__(self, setting: Setting, pieces: Sequence[Sequence[Any]], options: Reconstruction) -> None:
        self.setting, self.fake, self.pieces, self.options = setting, setting.fake, pieces, options
        self.judges = [k for k in range(len(pieces)) if k % JUDGES == JUDGES - 1] or [len(pieces) - 1]
        self.learns = [k for k in range(len(pieces)) if k not in self.judges]
        self.exact, self.rough = Lockstep(setting.folded, pieces), Lockstep(setting.fake, pieces)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.found = Reconstructed()
        self.begun = time.monotonic()
        self.segments = segments_of(self.fake)
        blocks = sum(_bytes(segment) for segment in self.segments if segment.weights)
        self.waiting = blocks * (bool(options.steps) + bool(options.steps_of_whole))
        self.divides = divides(setting.folded, pieces[0])

    def walk(self, shown: bool) -> Reconstructed:
        """Learn segment after segment, and the whole; return what came of it."""
        self.outputs = start = self._outputs_error()
        with progress(1 + sum(bool(segment.weights) for segment in self.segments), shown) as bar:
            for segment in self.segments if self.options.steps else ():
                carried = self._step_floats(segment)
                settled: set[fx.Node] = set()
                if segment.weights:
                    name = self._name(segment)
                    bar.step(f"reconstructing {name}")
                    settled = self._segment(segment, name, carried)
                self._step_rough(segment, settled)
            if self.options.steps_of_whole:
                bar.step(f"reconstructing {WHOLE}")
                self._whole()
        self.fake.recompile()
        counts = [sample_count(piece) for piece in self.pieces]
        self.found.samples = (sum(counts[k] for k in self.learns), sum(counts[k] for k in self.judges))
        self.found.outputs = (start, self.outputs)
        return self.found

    # -------------------------------------------------------------------------------------------- both graphs
    @torch.no_grad()
    def _step_floats(self, segment: Segment) -> list[Tensor] | None:
        """Compute the float nodes of a segment; return the value that enters, None where there is no tensor."""
        entry = None if segment.entry is None else self._twin(segment.entry)
        carried = self.exact.of(entry) if entry is not None and self.exact.has(entry) else None
        for run in self.exact.runs:
            for node in segment.nodes:
                if node in self.setting.twins:
                    run.step(self.setting.twins[node])
                    if node is not segment.exit:
                        run.drop(self.setting.twins[node])
        for run in self.rough.runs:
            for node in segment.nodes:
                if node.op == "placeholder":
                    run.step(node)
        fits = carried is not None and segment.entry is not None and all(
            isinstance(x, Tensor) and x.is_floating_point() and x.shape == run.values[segment.entry].shape
            for x, run in zip(carried, self.rough.runs, strict=True)
        )  # fmt: skip
        return carried if fits else None

    @torch.no_grad()
    def _step_rough(self, segment: Segment, settled: set[fx.Node]) -> None:
        """Compute the quantized nodes of a segment but those whose values are there."""
        for run in self.rough.runs:
            for node in segment.nodes:
                if node.op != "placeholder" and node not in settled:
                    run.step(node)
                run.drop(node)

    def _twin(self, node: fx.Node) -> fx.Node:
        """Return the float node that computes what `node` stands for."""
        while node in self.setting.quantizers:
            (node,) = node.all_input_nodes
        return self.setting.twins[node]

    def _name(self, segment: Segment) -> str:
        name = layer_name(segment.weights[0], self.setting.constant) or segment.exit.name
        more = len(segment.weights) - 1
        name = f"{name} and {more} more" if more else name
        return f"{name} ({segment.exit.name})" if name in {*self.found.blocks, *self.found.left} else name

    def _outputs_error(self) -> float:
        """Return ||y - t|| / ||t|| of the model's outputs on the pieces that judge; 0 without outputs of floats."""
        (error,), norm = output_errors(self.setting.folded, [self.fake], [self.pieces[k] for k in self.judges])
        return math.sqrt(error / norm) if norm > 0 else 0.0

    # -------------------------------------------------------------------------------------------- blocks
    def _segment(self, segment: Segment, name: str, carried: list[Tensor] | None) -> set[fx.Node]:
        """Learn one segment; return the nodes whose values are those that were learned."""
        wanted = self.exact.of(self._twin(segment.exit))
        for run in self.exact.runs:
            run.drop(self._twin(segment.exit))
        if not all(isinstance(t, Tensor) and t.is_floating_point() for t in wanted):
            self.found.left[name] = "the output is no tensor of floats"
            return set()
        read = [*segment.outside, *(node for node in segment.nodes if node.op == "placeholder")]
        given = [{node: run.values[node] for node in read} for run in self.rough.runs]
        data = Data(given, carried, [[t] for t in wanted], self.learns, self.judges)
        trial = BlockTrial(self.setting, segment, segment.exit, data)
        return self._try(name, trial, _bytes(segment), self.options.steps)

    def _whole(self) -> None:
        """Learn all blocks together, towards the outputs of the model and what blocks hand on."""
        nodes = tuple(node for segment in self.segments for node in segment.nodes)
        weights = tuple(node for segment in self.segments for node in segment.weights)
        segment = Segment(nodes, weights)
        most = max(1, round(LIVE / (KEPT_FOR_GRADIENTS * _bytes(segment)) * max(sample_count(self._example()), 1)))
        pieces, learns, judges = list[Sequence[Any]](), list[int](), list[int]()
        for k, piece in enumerate(self.pieces):
            parts = in_parts(piece, min(most, SAMPLES_AT_ONCE)) if self.divides else [piece]
            (judges if k in self.judges else learns).extend(range(len(pieces), len(pieces) + len(parts)))
            pieces += parts
        if max(map(sample_count, pieces)) > most:
            self.found.left[WHOLE] = f"its gradients take more than {LIVE >> 30} GiB of memory"
            return
        inputs = [node for node in nodes if node.op == "placeholder"]
        given = [dict(zip(inputs, piece, strict=True)) for piece in pieces]
        wanted = [floating_tensors(run_tapped(self.setting.folded, piece)) for piece in pieces]
        if not wanted[0]:
            self.found.left[WHOLE] = "no output is of floats"
            return
        (output,) = self.fake.graph.find_nodes(op="output")
        data = Data(given, None, wanted, learns, judges)
        trial = WholeTrial(
            self.setting, segment, output.args[0], data, drops=False, exits=self._exits(), augment=self.options.augment
        )
        self._try(WHOLE, trial, self.waiting, self.options.steps_of_whole)

    def _exits(self) -> dict[fx.Node, fx.Node]:
        """Return where blocks end in a tensor of floats, each with the float node."""
        found = {segment.exit: self._twin(segment.exit) for segment in self.segments if segment.weights}
        return {node: twin for node, twin in found.items() if _is_float(node)}

    def _example(self) -> list[Any]:
        """Return the example inputs, as far as their sizes go."""
        return [node.meta["val"] for node in self.fake.graph.find_nodes(op="placeholder")]

    def _try(self, name: str, trial: BlockTrial, size: int, steps: int) -> set[fx.Node]:
        """Learn one block, and keep what helps; return the nodes whose values are those that were learned."""
        if not trial.softs:
            self.found.left[name] = "no weight has evenly spaced levels that one op alone reads"
            return set()
        seconds = None
        if self.options.seconds is not None:
            seconds = (self.options.seconds - (time.monotonic() - self.begun)) * size / self.waiting
            self.waiting -= size
        before = trial.error(self.judges, {})
        try:
            why = trial.descend(steps, seconds, self.generator)
        except (RuntimeError, NotImplementedError) as error:
            why = f"an op has no gradient: {first_line(error)[:120]}"
        learned = trial.learned()
        after = before if why else trial.error(self.judges, learned)
        if not after < before:
            trial.restore()
            self.found.left[name] = why or "nothing that was learned helps on samples that are held out"
            return set()
        undo = self._keep(trial, learned)
        outputs = self._outputs_error()
        if outputs > self.outputs:
            trial.restore()
            for each in undo:
                each()
            self.found.left[name] = "the outputs on samples that are held out would be farther from the float ones"
            return {*learned}
        self.outputs = outputs
        self.found.blocks[name] = math.sqrt(before), math.sqrt(after)
        return {*learned}

    @torch.no_grad()
    def _keep(self, trial: BlockTrial, learned: dict[fx.Node, Tensor]) -> list[Undo]:
        """Write what was learned into the graph, and into what later nodes read; return how to take it back."""
        undo: list[Undo] = []
        for node, tensor in learned.items():
            give = self._give_weight if node in trial.softs else self._give_bias
            undo.append(give(node, tensor))
        return undo

    def _give_weight(self, node: fx.Node, weight: Tensor) -> Undo:
        held = self.setting.held(node)
        assert not isinstance(held, str)
        old = held.weight

        def give(tensor: Tensor) -> None:
            self.setting.put(held, node, tensor)
            self.rough.put(node, self.setting.quantizers[node](tensor))

        give(weight)
        return lambda: give(old)

    def _give_bias(self, node: fx.Node, bias: Tensor) -> Undo:
        name, old = str(node.target), fetch(self.fake, str(node.target))

        def give(tensor: Tensor) -> None:
            put(self.fake, name, nn.Parameter(tensor.detach(), old.requires_grad))
            self.rough.put(node, fetch(self.fake, name))

        give(bias)
        return lambda: give(old)


def _is_float(node: fx.Node) -> bool:
    example = node.meta.get("val")
    return isinstance(example, Tensor) and example.is_floating_point()


def _bytes(segment: Segment) -> int:
    """Return the bytes of a segment's values for the example, which its time follows."""
    return max(1, sum(value_bytes(node) for node in segment.nodes if node.op != "get_attr"))
