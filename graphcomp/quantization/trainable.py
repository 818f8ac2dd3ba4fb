"""Post-training quantization as a start for training: batch norms stay, and quantizers have learnable steps (LSQ).

In eval mode the graph computes what `ptq.quantize` gives: the step of a weight in front of a batch norm is that of the
folded weight divided by one factor per channel, and the correction of a bias is a shift of the norm's running mean.
Weights with one step per tensor are scaled by the norm's factor in front of the quantizer (`FoldForTraining`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import CalibrationError
from graphcomp.ir.graph import all_tensors, assign, bind, clone, fetch, set_argument
from graphcomp.ir.module import keeps_statistics, trains
from graphcomp.ir.passes import GraphPass, Pass, Remember, ValuePass
from graphcomp.ir.program import P
from graphcomp.ir.run_nodes import Constants, Lockstep
from graphcomp.ops.answers import lookup_of, operands_of
from graphcomp.pruning.repair import within_memory
from graphcomp.quantization.attention import WriteOutAttention
from graphcomp.quantization.einsum import WriteOutEinsum
from graphcomp.quantization.even_training import EvenToTrain
from graphcomp.quantization.fold import FoldForTraining, Pair, chains, folded_nodes
from graphcomp.quantization.insert import InsertQuantizers
from graphcomp.quantization.placed import CheckPlaced
from graphcomp.quantization.placement import place
from graphcomp.quantization.ptq import (
    FLOATS,
    AddBiases,
    CalibrateActivations,
    CalibrateWeights,
    PostTraining,
    calibrate_activations,
    evening,
    learn_rounding,
)
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.redundant import without_repeats
from graphcomp.quantization.setting import Setting, significant_mean
from graphcomp.quantization.sites import Site
from graphcomp.quantization.solve import RoundedLayer
from graphcomp.quantization.spec import QuantConfig
from graphcomp.quantization.stored import Affine, spread
from graphcomp.quantization.tensors import read_by_others

CELL = 0.49
"""Share of a step by which a parameter differs from its level at most."""

NOT_EVENED = "channels of activations were not scaled to one range, as batch norms have seen no batch yet"

NOT_EQUALIZED = "channels were not equalised between layers, as batch norms stay in the graph that is trained"


def on_weights_as_they_are(
    config: QuantConfig, ignore: Sequence[str], batches: Sequence[Sequence[Any]]
) -> tuple[Pass, ...]:
    """Return the passes from a float graph to one with calibrated quantizers, whose weights are not changed.

    Tables are quantized when training is over.

    Args:
        ignore: module names or "re:" patterns that stay float.
        batches: flat inputs, in the order of the placeholders; at least one.
    """
    return (
        WriteOutEinsum(),
        Remember(FLOATS),
        PlaceToTrain(replace(config, embeddings=None), tuple(ignore)),
        CalibrateWeights(),
        CalibrateInTraining(batches),
        CheckPlaced(FLOATS, batches),
    )


def quantizing_to_train(
    module: fx.GraphModule, options: PostTraining, batches: Sequence[Sequence[Any]], *, repair: bool = False
) -> tuple[Pass, ...]:
    """Return the passes from a float graph to quantizers, calibrated, rounded and corrected as after training.

    Where batch norms have seen no batch yet, the ranges are those of batch statistics, and nothing is corrected.

    Args:
        module: the graph that the passes begin with, in eval mode.
        options: how. Channels are not equalised between layers; channels of activations are evened out.
        batches: flat inputs, in the order of the placeholders; at least one.
        repair: move weights towards the float output of their layers before they are rounded.
    """
    per_tensor = options.config.weights is not None and options.config.weights.granularity == "tensor"
    unequal = options.equalize or (options.equalize is None and per_tensor)
    fresh = _has_fresh_norms(module)
    biases = (options.correct_bias or repair) and not fresh
    even = () if fresh else evening(options, batches)
    return (
        WriteOutEinsum(),
        *([WriteOutAttention()] if options.config.attention else []),
        *([AddTrainableBiases()] if biases else []),
        *([EvenToTrain(even, (AddBiases(),) if biases else ())] if even else []),
        *([FoldForTraining()] if per_tensor else []),  # one step is for the weight as it will be folded
        Remember(FLOATS),
        PlaceToTrain(options.config, options.ignore, repeats=True),
        CalibrateWeights(),
        CalibrateInTraining(batches) if fresh else CalibrateActivations(batches),
        LeaveOutRepeats(),
        CheckPlaced(FLOATS, batches),
        *([] if fresh else [SetTrainableLayers(options, batches, repair)]),
        *([AddNote(NOT_EQUALIZED)] if unequal else []),
        *([AddNote(NOT_EVENED)] if fresh and options.even_activations else []),
    )


@dataclass(frozen=True)
class AddTrainableBiases(GraphPass):
    """Give each convolution a bias of zeros that has none, and no batch norm behind it."""

    name: ClassVar[str] = "add biases"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return a new module that shares the tensors of `module`."""
        return AddBiases([pair.compute for pair in chains(module.graph)]).rewrite(module)


@dataclass(frozen=True)
class PlaceToTrain:
    """Put quantizers, not calibrated, into a graph that is trained with its batch norms.

    Attributes:
        config, ignore: where, and how.
        repeats: whether a value that was moved from a quantized one has the quantizer again.
    """

    config: QuantConfig
    ignore: tuple[str, ...]
    repeats: bool = False
    name: ClassVar[str] = "place quantizers"

    def __call__(self, program: P, /) -> P:
        """Return the program with quantizers."""
        floats = program.module
        placement = place(floats, trainable(floats.graph, self.config), self.ignore, folded_nodes(floats.graph))
        return _with_quantizers(program.rewritten(floats, placement.notes), placement.sites, self.repeats)


@dataclass(frozen=True)
class LeaveOutRepeats:
    """Leave out quantizers of values that were moved from quantized ones: needless in training."""

    name: ClassVar[str] = "leave out repeated quantizers"

    def __call__(self, program: P, /) -> P:
        """Return the program with the same quantizers, each with the state it has."""
        calibrated, floats = program.module, program.stages[FLOATS].module
        program = _with_quantizers(program.rewritten(floats), program.sites, repeats=False)
        for site in program.sites:
            state = calibrated.get_submodule(site.name).state_dict()
            program.module.get_submodule(site.name).load_state_dict(state)
        return program


def _with_quantizers(program: P, sites: Sequence[Site], repeats: bool) -> P:
    """Return the program of floats with the quantizers of `sites`."""
    placed = tuple(sites) if repeats else without_repeats(sites, program.graph)
    return replace(program.rewritten(InsertQuantizers(placed).rewrite(program.module)), sites=placed)


@dataclass(frozen=True)
class CalibrateInTraining(ValuePass):
    """Set the ranges of activations as training will see them; see `calibrate_in_training`."""

    batches: Sequence[Sequence[Any]]
    name: ClassVar[str] = "calibrate activations in training mode"

    def fill(self, module: fx.GraphModule, /) -> None:
        """Set the ranges."""
        calibrate_in_training(module, self.batches)


@dataclass(frozen=True)
class SetTrainableLayers:
    """Round weights and correct biases, layer after layer; see `_TrainableSetting` and `SetLayers`."""

    options: PostTraining
    batches: Sequence[Sequence[Any]]
    repair: bool = False
    name: ClassVar[str] = "set layers"

    def __call__(self, program: P, /) -> P:
        """Return the program, set; notes say what was repaired and learned."""
        floats = program.stages[FLOATS].module
        setting = _TrainableSetting(floats, program.module, self.options, repair=self.repair)
        setting.walk(within_memory(floats, self.batches[: self.options.walk_batches]))
        learned = learn_rounding(setting, self.batches, self.options)
        _keep_frozen(floats, program.module)
        return replace(program, notes=(*program.notes, *setting.start_notes(), *setting.notes(), *learned.notes()))


@dataclass(frozen=True)
class AddNote:
    """Say what was asked and not done."""

    note: str
    name: ClassVar[str] = "note what is not done"

    def __call__(self, program: P, /) -> P:
        """Return the program with one note more."""
        return replace(program, notes=(*program.notes, self.note))


def trainable(graph: fx.Graph, config: QuantConfig) -> QuantConfig:
    """Return what can be trained of `config`: tables with sparse gradients are quantized when training is over."""
    lookups = (node for node in graph.nodes if lookup_of(node))
    return replace(config, embeddings=None) if any(bind(node)["sparse"] for node in lookups) else config


def calibrate_in_training(graph: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> None:
    """Set the ranges of activations as training will see them: with batch norms on the statistics of the batch, which
    those of an untrained model have little to do with. In eval mode where a batch is too small for that.

    Raises:
        CalibrationError: no batch, one the model does not run on, or values that are not finite.
    """
    training, new_node = clone(graph)  # its quantizers have the same parameters
    for node in new_node.values():
        if node.target is torch.ops.aten.batch_norm.default and trains(node):
            set_argument(node, "training", True)
            set_argument(node, "momentum", 0.0)  # the running statistics stay as they are
    training.recompile()
    try:
        calibrate_activations(training, batches)
    except CalibrationError:
        calibrate_activations(graph, batches)


def _has_fresh_norms(module: fx.GraphModule) -> bool:
    """Return whether a batch norm that follows the mode has the statistics it was made with: mean 0, variance 1."""
    for node in module.graph.nodes:
        if keeps_statistics(node) and trains(node):
            mean, var = (fetch(module, str(bind(node)[name].target)) for name in ("running_mean", "running_var"))
            if not bool(mean.any()) and bool((var == 1).all()):
                return True
    return False


def _keep_frozen(floats: fx.GraphModule, fake: fx.GraphModule) -> None:
    """Let parameters that take the place of frozen ones be frozen."""
    frozen = {name for name, tensor in all_tensors(floats) if not tensor.requires_grad}
    for name, parameter in fake.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


class _TrainableSetting(Setting):
    """Rounds and corrects in place: each tensor stays where the model has it; a tensor with several readers is left.

    Parameters hold weights as they were before rounding, as far as these are rounded to the same levels: training goes
    on from there.
    """

    def __init__(
        self, floats: fx.GraphModule, fake: fx.GraphModule, options: PostTraining, *, repair: bool = False
    ) -> None:
        super().__init__(floats, fake, options, repair=repair)
        self.pairs = {pair.compute: pair for pair in chains(fake.graph)}

    def _correct(self, node: fx.Node, exact: list[Any], rough: Lockstep) -> None:
        pair = self.pairs.get(node)
        if pair is None:
            operands = operands_of(node)
            bias = bind(node).get(operands.bias) if operands.bias else None
            if isinstance(bias, fx.Node) and not read_by_others(self.readers, bias, node):
                super()._correct(node, exact, rough)
            return
        self._shift_norm(pair, significant_mean(exact, rough.of(node), 1), rough)

    def start_notes(self) -> list[str]:
        """Say what the repair did to the layers that training begins with."""
        solved = [layer for layer in self.repairs.values() if not math.isinf(layer.ridge)]
        if not solved:
            return []
        before, after = (median(getattr(layer, end) for layer in solved) for end in ("before", "after"))
        return [
            f"training began with {len(solved)} layers repaired by least squares: median relative error "
            f"{before:.3f} -> {after:.3f}"
        ]

    def _shift(self, node: fx.Node, shift: Tensor, rough: Lockstep) -> None:
        pair = self.pairs.get(node)
        if pair is None:
            super()._shift(node, shift, rough)
        else:
            self._shift_norm(pair, shift, rough)

    def _shift_norm(self, pair: Pair, shift: Tensor, rough: Lockstep) -> None:
        """Let a norm take what would be added to the bias of the layer in front."""
        values = Constants(self.fake)
        for between in pair.between:  # as `FoldForTraining` scales back what the norm reads
            if between.target is torch.ops.aten.div.Tensor:
                shift = shift / values.of(between.args[1]).flatten()  # type: ignore[arg-type]
        if trains(pair.norm):
            self._add(pair.norm, "running_mean", -shift, rough)
            return
        arguments = bind(pair.norm)  # statistics that stay are the user's: what follows them takes the shift
        variance = values.of(arguments["running_var"]).double() + arguments["eps"]
        gain = 1.0 if arguments["weight"] is None else values.of(arguments["weight"]).double()
        self._add(pair.norm, "bias", shift * gain * variance.rsqrt(), rough)

    def _has_intercept(self, node: fx.Node) -> bool:
        if node in self.pairs:  # a norm behind takes what a bias would
            norm = self.pairs[node].norm
            return self._own(norm, bind(norm)["running_mean" if trains(norm) else "bias"])
        operands = operands_of(node)
        return super()._has_intercept(node) and self._own(node, bind(node).get(operands.bias))

    def _own(self, reader: fx.Node, source: Any) -> bool:
        """Return whether an op has a tensor that nothing else reads."""
        return (
            isinstance(source, fx.Node) and source.op == "get_attr" and not read_by_others(self.readers, source, reader)
        )

    def _kept(self, quantizer: Quantizer, found: RoundedLayer) -> Tensor:
        """Return the weight before rounding, where it is rounded to the level that was chosen; else near that level."""
        stored = quantizer.to_integers(found.weight)
        if not isinstance(stored, Affine) or quantizer.exponent != 1.0:
            return found.weight
        half = CELL * spread(stored.scale, found.weight.dim(), stored.dim, stored.groups)
        near = found.weight + (found.floats - found.weight).clamp(-half, half)
        return torch.where(quantizer(near) == found.weight, near, found.weight)

    def _add(self, norm: fx.Node, argument: str, more: Tensor, rough: Lockstep) -> None:
        """Add to a tensor of a norm, where the norm has one that nothing else reads."""
        source = bind(norm)[argument]
        if not self._own(norm, source):
            return
        old = fetch(self.fake, str(source.target))
        new = (old.detach().double() + more).to(old.dtype)
        new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        assign(self.fake, str(source.target), new)
        rough.put(source, new)

    def _round(self, node: fx.Node, name: str, wanted: list[Tensor], rough: Lockstep) -> bool:
        wrapped = bind(node)[operands_of(node).weight]
        sources = wrapped.all_input_nodes
        alone = len(sources) == 1 and not read_by_others(self.readers, sources[0], wrapped)
        return alone and super()._round(node, name, wanted, rough)
