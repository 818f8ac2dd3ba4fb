"""Even channels where training starts: as after training, in a graph that is trained with its batch norms.

Factors and shifts are chosen on the graph with batch norms folded, as for `quantize`, and written to the tensors that
are trained: a layer with a batch norm behind scales the norm's weight and bias in place of its own weight, and the
norm's running mean takes what a bias would.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.graph import assign, attribute_readers, bind, clone, fetch
from graphcomp.ir.module import trains
from graphcomp.ir.passes import Pass, applied
from graphcomp.ir.program import P
from graphcomp.ir.run_nodes import Constants
from graphcomp.ops.answers import compute_of, operands_of
from graphcomp.quantization.equalize import Layer
from graphcomp.quantization.even import EvenActivations, Pair, clipped_notes, factors_between
from graphcomp.quantization.even_norms import Even, EvenedNorms, EvenNorms, columns, factors_behind_norms, write
from graphcomp.quantization.fold import FoldBatchNorm, chains
from graphcomp.quantization.fold import Pair as Folded
from graphcomp.quantization.norms import Norm, find_norms
from graphcomp.quantization.tensors import read_by_others


@dataclass(frozen=True)
class EvenToTrain:
    """Even out channels of activations as the passes of `quantize` do, and keep batch norms.

    Attributes:
        passes: those of `quantize` that even out channels (`EvenActivations`, `EvenNorms`).
        first: what `quantize` does to the folded graph before.
    """

    passes: tuple[Pass, ...]
    first: tuple[Pass, ...] = ()
    name: ClassVar[str] = "even out channels to train"

    def __call__(self, program: P, /) -> P:
        """Return the program with even channels, with the notes of `quantize`, and one for each value that stays."""
        folded = applied(program, FoldBatchNorm(), *self.first)
        writer = _Writer(program.module)
        notes: list[str] = []
        for each in self.passes:
            module = folded.module
            if isinstance(each, EvenActivations):
                chosen = factors_between(module, each.config, each.ignore, each.batches)
                notes += clipped_notes(sum(writer.scale(pair, s) and pair.clipped for pair, s in chosen.items()))
            elif isinstance(each, EvenNorms):
                evens, left = factors_behind_norms(module, each.config, each.ignore, each.batches)
                own = {n.maker.at.name: n for n in find_norms(writer.module, each.config, each.ignore)[0]}
                done = {n: e for n, e in evens.items() if writer.fold(own.get(n.maker.at.name), n, e)}
                notes += EvenedNorms.of(module, done, left).notes()
            folded = applied(folded, each)
        if not writer.written:
            return replace(program, notes=(*program.notes, *notes, *writer.notes()))
        writer.module.graph.eliminate_dead_code()
        writer.module.recompile()
        return program.rewritten(writer.module, [*notes, *writer.notes()])


class _Writer:
    """Writes factors and shifts, chosen on the folded graph, to a graph with batch norms.

    Attributes:
        module: a copy of the graph.
        written: whether anything was.
        left: value -> why it stays uneven.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, _ = clone(module)
        self.nodes = {node.name: node for node in self.module.graph.nodes}
        self.readers = attribute_readers(self.module)
        self.norms = {pair.compute: pair for pair in chains(self.module.graph)}
        self.written = False
        self.left: dict[str, str] = {}

    def notes(self) -> list[str]:
        """Name the values that stay uneven, where those of `quantize` would not."""
        return [f"channels of {name} were not scaled to one range where training starts: {why}"
                for name, why in self.left.items()]  # fmt: skip

    @torch.no_grad()
    def scale(self, pair: Pair, s: Tensor) -> bool:
        """Multiply the channels of a value between two layers; False, with the reason in `left`, where not."""
        maker, reader = self.nodes.get(pair.made_by.name), self.nodes.get(pair.read_by.name)
        why = self._unfit(maker, reader)
        if why or maker is None or reader is None:
            self.left[pair.at.name] = why
            return False
        layer = Layer(self.module, reader)
        layer.multiply_inputs(1 / s)
        layer.write(self.module)
        behind = self.norms.get(maker)
        if behind is None:
            layer = Layer(self.module, maker)
            layer.divide_outputs(1 / s)
            layer.write(self.module)
        else:
            for name in ("weight", "bias"):
                self._put(bind(behind.norm)[name], lambda old: old.double() * s)
        self.written = True
        return True

    def _unfit(self, maker: fx.Node | None, reader: fx.Node | None) -> str:
        """Return why a value between two layers cannot be scaled; "" where it can be."""
        if maker is None or reader is None or compute_of(maker) is None or compute_of(reader) is None:
            return "the layers are others in the graph that is trained"
        behind = self.norms.get(maker)
        ends: list[tuple[fx.Node, tuple[str, ...]]] = [(reader, (operands_of(reader).weight,))]
        if behind is None:
            ends.append((maker, (operands_of(maker).weight, operands_of(maker).bias)))
        elif behind.between or any(bind(behind.norm)[name] is None for name in ("weight", "bias")):
            return "the batch norm between has no weight and bias to scale"
        else:
            ends.append((behind.norm, ("weight", "bias")))
        for node, names in ends:
            for name in names:
                if (operand := bind(node).get(name)) is not None and not self._own(node, operand):
                    return f"{operand.name} is computed, or read elsewhere, too"
        return ""

    @torch.no_grad()
    def fold(self, norm: Norm | None, chosen: Norm, even: Even) -> bool:
        """Fold factors and shifts into a norm and the layers behind; False, with the reason in `left`, where not."""
        why = "the layers are others in the graph that is trained"
        if norm is not None and [r.node.name for r in norm.readers] == [r.node.name for r in chosen.readers]:
            why = self._takes(norm) if bool(even.shift.any()) else ""
        if why or norm is None:
            self.left[chosen.maker.at.name] = why
            return False
        if bool(even.shift.any()):
            for reader in norm.readers:
                if not reader.bias:
                    moved = columns(reader, reader.held.weight.double(), even.shift)
                    out = operands_of(reader.node).out % moved.dim()
                    self._shift(self.norms[reader.node], moved.sum([d for d in range(moved.dim()) if d != out]))
        write(self.module, norm, even, self.readers)
        self.readers = attribute_readers(self.module)
        self.written = True
        return True

    def _takes(self, norm: Norm) -> str:
        """Return why norm and layers cannot take a shift; "" where they can."""
        if not norm.maker.shift:
            return "the norm has no bias"
        for reader in norm.readers:
            behind = self.norms.get(reader.node)
            if reader.bias:
                continue
            if behind is None or behind.between:
                return f"{reader.node.name} has no bias of its own"
            mean = bind(behind.norm)["running_mean" if trains(behind.norm) else "bias"]
            if mean is None or not self._own(behind.norm, mean):
                return f"the batch norm behind {reader.node.name} has no bias of its own"
        return ""

    def _shift(self, behind: Folded, constant: Tensor) -> None:
        """Let a batch norm take (c,) off what the layer in front returns."""
        arguments = bind(behind.norm)
        if trains(behind.norm):
            self._put(arguments["running_mean"], lambda old: old.double() + constant)
            return
        values = Constants(self.module)
        variance = values.of(arguments["running_var"]).double() + arguments["eps"]
        gain = 1.0 if arguments["weight"] is None else values.of(arguments["weight"]).double()
        self._put(arguments["bias"], lambda old: old.double() - constant * gain * variance.rsqrt())

    def _own(self, reader: fx.Node, operand: Any) -> bool:
        return (
            isinstance(operand, fx.Node)
            and operand.op == "get_attr"
            and not read_by_others(self.readers, operand, reader)
        )

    def _put(self, operand: fx.Node, change: Any) -> None:
        old = fetch(self.module, str(operand.target))
        new = change(old.detach()).to(old.dtype)
        assign(
            self.module,
            str(operand.target),
            nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new,
        )
