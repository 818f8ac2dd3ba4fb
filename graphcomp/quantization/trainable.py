"""Post-training quantization as a start for training: batch norms stay, and quantizers have learnable steps (LSQ).

In eval mode the graph computes what `ptq.quantize` gives: the step of a weight in front of a batch norm is that of the
folded weight divided by one factor per channel, and the correction of a bias is a shift of the norm's running mean.
Weights with one step per tensor are scaled by the norm's factor in front of the quantizer (`FoldForTraining`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import CalibrationError
from graphcomp.ir.graph import all_tensors, assign, bind, clone, fetch, set_argument
from graphcomp.ir.module import keeps_statistics, trains
from graphcomp.ir.run_nodes import Constants, Lockstep
from graphcomp.ops.answers import lookup_of, operands_of
from graphcomp.quantization.attention import WriteOutAttention
from graphcomp.quantization.einsum import WriteOutEinsum
from graphcomp.quantization.fold import FoldForTraining, chains, folded_nodes
from graphcomp.quantization.insert import InsertQuantizers, quantizer_nodes
from graphcomp.quantization.placement import place
from graphcomp.quantization.ptq import (
    AddBiases,
    PostTraining,
    Setting,
    calibrate_activations,
    calibrate_weights,
    significant_mean,
)
from graphcomp.quantization.redundant import without_repeats
from graphcomp.quantization.spec import QuantConfig
from graphcomp.quantization.tensors import read_by_others

NOT_EQUALIZED = "channels were not equalised between layers, as batch norms stay in the graph that is trained"


def quantize_to_train(
    module: fx.GraphModule, batches: Sequence[Sequence[Any]], options: PostTraining
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Return a new graph with quantizers, calibrated, rounded and corrected as after training, and what was not done.

    Where batch norms have seen no batch yet, the ranges are those of batch statistics, and nothing is corrected.

    Args:
        module: in eval mode; not changed. The result shares its tensors, but for those that are rounded or corrected.
        batches: flat inputs, in the order of the placeholders; at least one.
        options: how. Channels are not equalised between layers.

    Raises:
        CalibrationError: no batch, one the model does not run on, or values that are not finite.
    """
    floats = WriteOutEinsum()(module)
    floats = WriteOutAttention()(floats) if options.config.attention else floats
    per_tensor = options.config.weights is not None and options.config.weights.granularity == "tensor"
    if per_tensor:
        floats = FoldForTraining()(floats)  # one step is for the weight as it will be folded
    fresh = _has_fresh_norms(floats)
    if options.correct_bias and not fresh:
        floats = AddBiases([pair.compute for pair in chains(floats.graph)])(floats)
    config = trainable(floats.graph, options.config)
    placement = place(floats, config, options.ignore, folded_nodes(floats.graph))
    whole = InsertQuantizers(placement)(floats)
    calibrate_weights(whole)
    (calibrate_in_training if fresh else calibrate_activations)(whole, batches)
    fake = InsertQuantizers(without_repeats(placement))(floats)
    for node, quantizer in quantizer_nodes(fake):
        quantizer.load_state_dict(whole.get_submodule(str(node.target)).state_dict())
    if not fresh:
        _TrainableSetting(floats, fake, options).walk(batches[: options.walk_batches])
        _keep_frozen(floats, fake)
    unequal = options.equalize or (options.equalize is None and per_tensor)
    return fake, (*placement.notes, *([NOT_EQUALIZED] if unequal else []))


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
    """Rounds and corrects in place: each tensor stays where the model has it; a tensor with several readers is left."""

    def __init__(self, floats: fx.GraphModule, fake: fx.GraphModule, options: PostTraining) -> None:
        super().__init__(floats, fake, options)
        self.pairs = {pair.compute: pair for pair in chains(fake.graph)}

    def _correct(self, node: fx.Node, exact: list[Any], rough: Lockstep) -> None:
        pair = self.pairs.get(node)
        if pair is None:
            operands = operands_of(node)
            bias = bind(node).get(operands.bias) if operands.bias else None
            if isinstance(bias, fx.Node) and not read_by_others(self.readers, bias, node):
                super()._correct(node, exact, rough)
            return
        shift = significant_mean(exact, rough.of(node), 1)
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

    def _add(self, norm: fx.Node, argument: str, more: Tensor, rough: Lockstep) -> None:
        """Add to a tensor of a norm, where the norm has one that nothing else reads."""
        source = bind(norm)[argument]
        if not isinstance(source, fx.Node) or source.op != "get_attr" or read_by_others(self.readers, source, norm):
            return
        old = fetch(self.fake, str(source.target))
        new = (old.detach().double() + more).to(old.dtype)
        new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        assign(self.fake, str(source.target), new)
        rough.put(source, new)

    def _round(self, node: fx.Node, rough: Lockstep) -> None:
        wrapped = bind(node)[operands_of(node).weight]
        sources = wrapped.all_input_nodes
        if len(sources) == 1 and not read_by_others(self.readers, sources[0], wrapped):
            super()._round(node, rough)
