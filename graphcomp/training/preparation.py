"""From an analysed model to the module that is trained: quantizers, and a mask per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from graphcomp.coupling.analysis import Analysis, analyze_rewritten
from graphcomp.coupling.groups import ChannelGroup
from graphcomp.ir.passes import Pass, Pipeline
from graphcomp.ir.program import P, Program
from graphcomp.pruning.mask import computed_with
from graphcomp.quantization.floats import nothing_quantized
from graphcomp.quantization.ptq import PostTraining
from graphcomp.quantization.spec import MIN_BITS, QuantConfig, QuantSpec
from graphcomp.quantization.trainable import on_weights_as_they_are, quantizing_to_train
from graphcomp.system.threads import one_at_a_time
from graphcomp.training.masked import with_masks
from graphcomp.training.prepared import Prepared
from graphcomp.training.ranges import ChooseBits, LayerBits, bounds
from graphcomp.training.session import Session

Batches = Sequence[Sequence[Any]]
"""Flat inputs, in the order of the placeholders; at least one."""


# ------------------------------------------------------------------------------------------------ which quantizers
@dataclass(frozen=True)
class AsTheyAre:
    """Quantizers on the weights as they are, calibrated.

    Attributes:
        config: where quantizers go, at the most bits of each range.
        bits: the range of bits of weights that is learned; None: those of `config`.
        activation_bits: the range of bits of activations; None: activations stay float.
        layer_bits: module name or "re:" pattern -> ranges of its own; the last that matches counts.
    """

    config: QuantConfig
    bits: tuple[int, int] | None = None
    activation_bits: tuple[int, int] | None = None
    layer_bits: Mapping[str, LayerBits] = field(default_factory=dict)
    ignore: ClassVar[tuple[str, ...]] = ()

    def passes(self, program: Program, ignore: Sequence[str], batches: Batches) -> tuple[Pass, ...]:
        """Return the passes from floats to quantizers."""
        chosen = ChooseBits(self.bits, self.activation_bits, self.layer_bits)
        return (*on_weights_as_they_are(self.config, ignore, batches), chosen)


@dataclass(frozen=True)
class FromPostTraining:
    """Quantizers at fixed bits, that start from post-training quantization, `repair` see `quantizing_to_train`."""

    start: PostTraining
    repair: bool = False
    bits: ClassVar[None] = None

    @property
    def config(self) -> QuantConfig:
        """Where quantizers go."""
        return self.start.config

    @property
    def ignore(self) -> tuple[str, ...]:
        """Modules that stay float."""
        return self.start.ignore

    def passes(self, program: Program, ignore: Sequence[str], batches: Batches) -> tuple[Pass, ...]:
        """Return the passes from floats to quantizers."""
        options = replace(self.start, ignore=tuple(ignore))
        return (*quantizing_to_train(program.module, options, batches, repair=self.repair), ChooseBits())


Quantizing = AsTheyAre | FromPostTraining


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
        residual_bits=MIN_BITS,  # bits are learned, each within its range
    )


# ------------------------------------------------------------------------------------------------ preparing
@one_at_a_time
def prepare_graph(
    plan: Analysis,
    groups: Sequence[ChannelGroup],
    quantizing: Quantizing | None,
    *,
    ignore: Sequence[str],
    batches: Batches,
    no_groups: str = "",
    notes: Sequence[str] = (),
) -> Prepared:
    """Insert quantizers and masks into a captured graph.

    Args:
        plan: of a model whose tensors the result will share, and train.
        groups: of `plan`, whose units may go.
        quantizing: which quantizers stand on the weights; None: none do.
        ignore: modules that stay float.
        batches: flat inputs that the ranges of activations are read off.
        no_groups: why nothing can be pruned, where `groups` is empty.
        notes: what a reader of the report should know of the groups.

    Raises:
        PlanError, CalibrationError: what is asked cannot be done.
        VerificationError, PassError: a pass left a graph that is not valid, or failed; the error names the pass.
    """
    quantized = plan
    if quantizing is not None:
        ignore = (*quantizing.ignore, *ignore)
        passes = quantizing.passes(plan.captured, ignore, batches)
        # calibration runs the graph, and coupling compares each rule with the shapes that nodes say
        quantizers = Pipeline("quantizers to train", (*passes, NoteFloats(), ForgetStages()), values=False)
        quantized = analyze_rewritten(plan, quantizers(plan.captured))
    by_name = {group.name: group for group in quantized.groups}
    ready = with_masks(
        Session(
            plan,
            quantized,
            tuple(by_name[group.name] for group in groups),
            None if quantizing is None else quantizing.bits or bounds(quantized.captured.sites),
            None if quantizing is None else quantizing.config,
            computed_with(plan.coupling),
            no_groups,
            (*notes, *quantized.captured.notes_since(plan.captured)),
            tuple(ignore),
        )
    )
    ready.train(plan.model.training)
    return ready


@dataclass(frozen=True)
class NoteFloats:
    """Say so where no value is quantized, and why."""

    name: ClassVar[str] = "note what stays float"

    def __call__(self, program: P, /) -> P:
        """Return the program, with a note where it has no sites."""
        more = () if program.sites else (nothing_quantized(program.module),)
        return replace(program, notes=(*program.notes, *more))


@dataclass(frozen=True)
class ForgetStages:
    """Let earlier stages go: what is trained moves away from them."""

    name: ClassVar[str] = "forget earlier stages"

    def __call__(self, program: P, /) -> P:
        """Return the program without stages."""
        return replace(program, stages={})
