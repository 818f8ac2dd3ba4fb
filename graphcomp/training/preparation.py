"""From an analysed model to the module that is trained: quantizers and masks are put into the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.pruning.mask import computed_with
from graphcomp.quantization.einsum import WriteOutEinsum
from graphcomp.quantization.floats import nothing_quantized
from graphcomp.quantization.fold import folded_nodes
from graphcomp.quantization.insert import InsertQuantizers
from graphcomp.quantization.placement import place
from graphcomp.quantization.ptq import PostTraining, calibrate_weights
from graphcomp.quantization.redundant import without_repeats
from graphcomp.quantization.spec import QuantConfig, QuantSpec
from graphcomp.quantization.trainable import calibrate_in_training, quantize_to_train
from graphcomp.system.threads import one_at_a_time
from graphcomp.training.masked import with_masks
from graphcomp.training.prepared import Prepared
from graphcomp.training.ranges import LayerBits, _bounds, _fixed_sites, _Ranges, _start_at_the_most
from graphcomp.training.session import Session, Site


def training_config(bits: int, activation_bits: int | None, learn_exponent: bool) -> QuantConfig:
    """Return the configuration of GETA's quantizers on weights and activations, with the bits that training starts at.

    Embedding tables are looked up in floats, and quantized when training is over.

    Args:
        bits: of weights.
        activation_bits: of activations; None: activations stay float.
        learn_exponent: whether quantizers of weights learn an exponent.
    """
    return QuantConfig(
        weights=QuantSpec(bits, kind="geta", learn_exponent=learn_exponent),
        activations=None if activation_bits is None else QuantSpec(activation_bits, kind="geta"),
        first_and_last_bits=bits,
    )


@one_at_a_time
def prepare_graph(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    *,
    bits: tuple[int, int] | None,
    activation_bits: tuple[int, int] | None,
    config: QuantConfig | None,
    layer_bits: Mapping[str, LayerBits],
    ignore: Sequence[str],
    batches: Sequence[Sequence[Any]],
    no_groups: str = "",
    notes: Sequence[str] = (),
    start: PostTraining | None = None,
) -> Prepared:
    """Insert quantizers and masks into a captured graph.

    Args:
        plan: of a model whose tensors the result will share, and train.
        groups: of `plan`, whose units may go.
        bits: the range of bits of weights that is learned; None: no quantizers, or those of `config` at its bits.
        activation_bits: the range of bits of activations; None: activations stay float.
        config: where quantizers go, at the most bits of each range.
        layer_bits: module name or "re:" pattern -> ranges of its own; the last that matches counts.
        ignore: modules that stay float.
        batches: flat inputs that the ranges of activations are read off.
        no_groups: why nothing can be pruned, where `groups` is empty.
        notes: what a reader of the report should know of the groups.
        start: post-training quantization that LSQ starts from, in place of bits, config and layer_bits; None: GETA's
            quantizers.
    """
    quantized = plan
    sites: tuple[Site, ...] = ()
    wishes: tuple[str, ...] = ()
    if start is not None:
        start = replace(start, ignore=(*start.ignore, *ignore))
        graph, wishes = quantize_to_train(plan.captured.module, batches, start)
        sites, config, ignore = _fixed_sites(graph), start.config, start.ignore
        bits = _bounds(sites)
        quantized = analyze_captured(plan.captured.rewritten(graph))
    elif config is not None:
        floats = WriteOutEinsum()(plan.captured.module)
        placement = place(floats, replace(config, embeddings=None), ignore, folded_nodes(floats.graph))
        graph = InsertQuantizers(without_repeats(placement))(floats)
        calibrate_weights(graph)
        calibrate_in_training(graph, batches)
        if bits is None:
            sites, wishes, bits = _fixed_sites(graph), (), _bounds(_fixed_sites(graph))
        else:
            sites, wishes = _Ranges(graph, bits, activation_bits or bits, layer_bits).sites()
            _start_at_the_most(graph, sites)
        wishes = (*placement.notes, *wishes)
        quantized = analyze_captured(plan.captured.rewritten(graph))
    if quantized is not plan and not sites:
        wishes = (*wishes, nothing_quantized(quantized.captured.module))
    by_name = {group.name: group for group in quantized.groups}
    chosen = tuple(by_name[group.name] for group in groups)
    session = Session(
        plan,
        quantized,
        chosen,
        sites,
        bits,
        config,
        computed_with(plan.coupling),
        no_groups,
        (*notes, *wishes),
        tuple(ignore),
    )
    ready = with_masks(session)
    ready.train(plan.model.training)
    return ready
