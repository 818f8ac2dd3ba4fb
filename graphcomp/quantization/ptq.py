"""Post-training quantization: fold, equalise, place, calibrate, round, correct, lower.

Everything but the calibration is one walk over the float graph and the fake-quant graph side by side, layer after
layer, so that each is set on the operands it will get.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx, nn

from graphcomp.arguments import as_names, check_flag, check_instance, check_whole, check_word
from graphcomp.errors import CalibrationError
from graphcomp.ir.graph import attributes, bind, clone, set_argument, value
from graphcomp.ir.passes import GraphPass, Pass, Pipeline, Remember, ValuePass, applied
from graphcomp.ir.program import P, Program
from graphcomp.ir.rewrite import before
from graphcomp.ir.run_nodes import Constants, run_batch
from graphcomp.ops.answers import is_convolution
from graphcomp.pruning.repair import within_memory
from graphcomp.quantization.attention import WriteOutAttention
from graphcomp.quantization.biases import FitBiases
from graphcomp.quantization.calibrate import OutputObserver, calibrate_weight, make_observer
from graphcomp.quantization.einsum import WriteOutEinsum
from graphcomp.quantization.equalize import equalize
from graphcomp.quantization.even import EvenActivations, asks_for_even
from graphcomp.quantization.even_norms import EvenNorms, asks_for_even_norms
from graphcomp.quantization.floats import float_layers
from graphcomp.quantization.fold import FoldBatchNorm
from graphcomp.quantization.insert import InsertQuantizers, quantizer_nodes
from graphcomp.quantization.lower import FAKE, Lower, Lowered, LoweredLayer, constants_with_quantizers, layers_of
from graphcomp.quantization.placed import CheckPlaced
from graphcomp.quantization.placement import channels_of, layer_name, place
from graphcomp.quantization.ranges import choose_ranges
from graphcomp.quantization.reconstruct import reconstruct
from graphcomp.quantization.reconstruction import Reconstructed, Reconstruction
from graphcomp.quantization.setting import Setting
from graphcomp.quantization.spec import QuantConfig

aten = torch.ops.aten

Rounding = Literal["nearest", "second_order", "reconstruct"] | Reconstruction
"""How weights are rounded; "reconstruct" is `Reconstruction()`."""
WORDS = ("nearest", "second_order", "reconstruct")
"""The names among these."""

FLOATS = "floats"
"""The stage before quantizers are placed, with which the layers are compared."""


@dataclass(frozen=True)
class PostTraining:
    """What a model goes through after training.

    Attributes:
        config: which tensors are quantized, and how.
        ignore: module names or "re:" patterns that stay float.
        equalize: scale channels between layers so that all use their range (Nagel et al. 2019); None: where weights
            have one step per tensor, which is where it matters.
        even_activations: scale the channels of what layers read to one range, where one layer makes the value and one
            reads it (`graphcomp.quantization.even`), and where a norm makes it (`graphcomp.quantization.even_norms`);
            None: between layers where activations have fewer than 8 bits, behind norms wherever activations have
            ranges that are read off data.
        correct_bias: add the mean error of each output channel to the bias (Nagel et al. 2019, section 4.2).
        rounding: "nearest", or "second_order": each weight's error is made up for by those after it (GPTQ), or
            "reconstruct", or a `Reconstruction`: from there on rounding is learned block by block.
        walk_batches: ranges are read off all calibration batches; rounding and correction see at most so many.
    """

    config: QuantConfig = field(default_factory=QuantConfig)
    ignore: tuple[str, ...] = ()
    equalize: bool | None = None
    even_activations: bool | None = None
    correct_bias: bool = True
    rounding: Rounding = "nearest"
    walk_batches: int = 8

    @property
    def second_order(self) -> bool:
        """Whether weights are rounded on the second moments of what layers read."""
        return self.rounding != "nearest"

    @property
    def reconstruction(self) -> Reconstruction | None:
        """How rounding is learned block by block; None: not at all."""
        return Reconstruction() if self.rounding == "reconstruct" else _learned(self.rounding)

    def __post_init__(self) -> None:
        check_instance("config", self.config, QuantConfig, "config=graphcomp.QuantConfig(…)")
        object.__setattr__(self, "ignore", as_names("ignore", self.ignore, 'ignore=("head",)'))
        check_rounding("rounding", self.rounding)
        check_flag("correct_bias", self.correct_bias)
        if self.equalize is not None:
            check_flag("equalize", self.equalize, "equalize=True, False, or None to choose by the weights")
        if self.even_activations is not None:
            check_flag("even_activations", self.even_activations, "even_activations=True, False, or None by the bits")
        check_whole("walk_batches", self.walk_batches, fix="walk_batches=8")


def _learned(rounding: Rounding) -> Reconstruction | None:
    return rounding if isinstance(rounding, Reconstruction) else None


def check_rounding(name: str, value: object) -> None:
    """Raise PlanError where `value` is no way to round weights."""
    if not isinstance(value, Reconstruction):
        check_word(name, value, WORDS)


@dataclass(frozen=True)
class Quantized:
    """A quantized model in its three forms, and how far each layer is from the float one.

    Attributes:
        folded: float, batch norms folded.
        fake: with fake-quant nodes.
        lowered: integers.
        errors: layer -> relative error of its output, ||fake - float|| / ||float||, on the calibration data.
        left_float: layer -> why it is not quantized.
        notes: what a reader of the report should know.
    """

    folded: fx.GraphModule
    fake: fx.GraphModule
    lowered: Lowered
    errors: Mapping[str, float]
    left_float: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        return f"Quantized({self.lowered!r}, {len(self.left_float)} layers in floats)"


def quantize(program: Program, batches: Sequence[Sequence[Any]], options: PostTraining) -> Quantized:
    """Quantize a captured graph.

    Args:
        program: in eval mode; not changed.
        batches: flat inputs, in the order of the placeholders; at least one.
        options: how.

    Raises:
        CalibrationError: no batch, one the model does not run on, or values that are not finite.
        VerificationError: with all quantizers off, the graph does not compute what the float graph does.
    """
    last = Pipeline("post-training quantization", quantizing(options, batches))(program)
    return quantized_of(last, program)


def quantizing(
    options: PostTraining,
    batches: Sequence[Sequence[Any]],
    *,
    repair: bool = False,
    shown: bool = False,
    add_biases: bool = True,
) -> tuple[Pass, ...]:
    """Return the passes from a float graph in eval mode to integers; see `quantize`.

    `repair` moves the weights of each layer to those that best restore its output from quantized inputs; `shown` shows
    a progress line while rounding is learned; `add_biases` gives convolutions without a bias one, where to correct.
    """
    weights = options.config.weights
    per_tensor = weights is not None and weights.granularity == "tensor"
    return (
        CheckTensors(),  # before batch norms hand theirs on to weights
        *written_out(options.config),
        *([Equalize()] if options.equalize or (options.equalize is None and per_tensor) else []),
        *([AddBiases()] if add_biases and (options.correct_bias or repair) else []),
        *evening(options, batches),
        Remember(FLOATS),
        PlaceQuantizers(options.config, options.ignore),
        CalibrateWeights(),
        CalibrateActivations(batches),
        CheckPlaced(FLOATS, batches),
        SetLayers(options, batches, repair, shown),
        FitBiases(),
        NameFloatLayers(),
        Remember(FAKE),
        Lower(),
    )


def evening(options: PostTraining, batches: Sequence[Sequence[Any]]) -> tuple[Pass, ...]:
    """Return the passes that even out channels of activations."""
    asked, config = options.even_activations, options.config
    between = asks_for_even(config) if asked is None else asked
    behind = asks_for_even_norms(config) if asked is None else asked
    return (
        *([EvenActivations(config, options.ignore, batches)] if between else []),
        *([EvenNorms(config, options.ignore, batches)] if behind else []),
    )


def written_out(config: QuantConfig) -> tuple[GraphPass, ...]:
    """Return the passes to the float graph that quantizers are placed in."""
    return (FoldBatchNorm(), WriteOutEinsum(), *([WriteOutAttention()] if config.attention else []))


def quantized_of(last: Program, first: Program) -> Quantized:
    """Return what the passes of `quantizing` made of `first`."""
    floats, fake = (last.stages[stage].module for stage in (FLOATS, FAKE))
    assert isinstance(last.lowered, Lowered)
    return Quantized(floats, fake, last.lowered, last.errors, last.left_float, last.notes_since(first))


@dataclass(frozen=True)
class Equalize:
    """Even out the ranges of weights along the channels between layers, see `equalize`."""

    name: ClassVar[str] = "equalize"

    def __call__(self, program: P, /) -> P:
        """Return the equalized program, with a note for each kind of op that was in the way."""
        return program.rewritten(*equalize(program.module))


@dataclass(frozen=True)
class PlaceQuantizers:
    """Put quantizers, not calibrated, on all that `config` names."""

    config: QuantConfig
    ignore: tuple[str, ...] = ()
    name: ClassVar[str] = "place quantizers"

    def __call__(self, program: P, /) -> P:
        """Return the program with quantizers; `left_float` has the nodes that got none, with the reason."""
        placement = place(program.module, self.config, self.ignore)
        placed = program.rewritten(InsertQuantizers(placement.sites).rewrite(program.module), placement.notes)
        left_float = {node.name: why for node, why in placement.left_float.items()}
        return replace(placed, sites=placement.sites, left_float=left_float)


@dataclass(frozen=True)
class SetLayers:
    """Round weights and correct biases, layer after layer, and measure the error that is left.

    Attributes:
        batches: of which the first `walk_batches` are read; all where rounding is learned after that.
        repair, shown: see `quantizing`.
    """

    options: PostTraining
    batches: Sequence[Sequence[Any]]
    repair: bool = False
    shown: bool = False
    name: ClassVar[str] = "set layers"

    def __call__(self, program: P, /) -> P:
        """Return the program with the errors of its layers, and what was repaired."""
        floats = program.stages[FLOATS].module
        setting = Setting(floats, program.module, self.options, repair=self.repair)
        walked = within_memory(floats, self.batches[: self.options.walk_batches])
        errors = setting.walk(walked)
        repairs = {name: (layer.before, layer.after) for name, layer in setting.repairs.items()}
        found = learn_rounding(setting, self.batches, self.options, shown=self.shown)
        if found.blocks:
            errors = dict(layer_errors(floats, program.module, walked))
        notes = (*program.notes, *setting.notes(), *found.notes())
        return replace(program, errors=errors, repairs=repairs, reconstructions=found.blocks, notes=notes)


@dataclass(frozen=True)
class NameFloatLayers:
    """Name the layers that compute in float, each with the reason."""

    name: ClassVar[str] = "name float layers"

    def __call__(self, program: P, /) -> P:
        """Return the program with layers in place of nodes in `left_float`."""
        return replace(program, left_float=float_layers(program.module, program.left_float))


# ------------------------------------------------------------------------------------------------ plans
def planned_group_sizes(program: Program, options: PostTraining) -> dict[str, int]:
    """Weight that `quantize` will quantize as the graph reads it -> inputs that share a step; it takes no data."""
    floats = applied(program, *written_out(options.config))
    sites = [site for site in place(floats.module, options.config, options.ignore).sites if site.is_weight]
    sizes = {value: site.spec.group_size for site in sites for value in site.at}
    read = floats.graph.find_nodes(op="get_attr")
    return {str(node.target): sizes[node.name] for node in read if node.name in sizes}


def planned_layers(program: Program, options: PostTraining) -> tuple[LoweredLayer, ...]:
    """The bits that `quantize` will give each layer; it takes no data."""
    placing = PlaceQuantizers(options.config, options.ignore)
    return layers_of(applied(program, *written_out(options.config), placing).module)


def planning(options: PostTraining) -> tuple[Pass, ...]:
    """Return the passes to the integer graph that `quantize` will make, as far as the shapes of its tensors go, its
    codes not packed; they take no data."""
    return (
        *written_out(options.config),
        *([AddBiases()] if options.correct_bias else []),
        PlaceQuantizers(options.config, options.ignore),
        UnitRanges(),
        CalibrateWeights(),
        FitBiases(),
        Lower(pack=False),
    )


@dataclass(frozen=True)
class UnitRanges(ValuePass):
    """Let each quantizer of an activation range from -1 to 1, where there are no data to read a range off."""

    name: ClassVar[str] = "set unit ranges"

    def fill(self, fake: fx.GraphModule, /) -> None:
        """Set the ranges."""
        constant, one = constants_with_quantizers(fake), torch.ones(())
        for node, quantizer in quantizer_nodes(fake):
            if node not in constant:
                quantizer.set_range(-one, one)


# ------------------------------------------------------------------------------------------------ tensors of its own
@dataclass(frozen=True)
class AddBiases(GraphPass):
    """Give each convolution that has no bias one of zeros: there is then where to correct.

    Where the number of filters is dynamic (those of every sample side by side) no bias fits.

    Attributes:
        without: convolutions that need no bias.
    """

    without: Collection[fx.Node] = ()
    name: ClassVar[str] = "add biases"

    def rewrite(self, module: fx.GraphModule, /) -> fx.GraphModule:
        """Return a new module that shares the tensors of `module`."""
        found, new_node = clone(module)
        others = {new_node[node] for node in self.without}
        for node in list(found.graph.nodes):
            if node in others or not is_convolution(node) or bind(node)["bias"] is not None:
                continue
            weight = bind(node)["weight"]
            filters = value(node).shape[channels_of(node)]
            if not isinstance(filters, int):
                continue
            path = str(weight.target).rpartition(".")[0] if weight.op == "get_attr" else node.name
            device = next(p.device for p in found.parameters())
            zeros = torch.zeros(filters, dtype=value(weight).dtype, device=device)
            fresh = before(node).tensor(found, f"{path}.bias".lstrip("."), nn.Parameter(zeros))
            set_argument(node, "bias", fresh)
        found.recompile()
        return found


# ------------------------------------------------------------------------------------------------ calibration
@dataclass(frozen=True)
class CalibrateActivations(ValuePass):
    """Set the range of every quantizer of an activation from what the quantizer reads when nothing is quantized."""

    batches: Sequence[Sequence[Any]]
    name: ClassVar[str] = "calibrate activations"

    def fill(self, fake: fx.GraphModule, /) -> None:
        """Set the ranges; see `calibrate_activations`."""
        calibrate_activations(fake, self.batches)


@dataclass(frozen=True)
class CalibrateWeights(ValuePass):
    """Set the range of every quantizer of a weight from the weight."""

    name: ClassVar[str] = "calibrate weights"

    def fill(self, fake: fx.GraphModule, /) -> None:
        """Set the ranges; see `calibrate_weights`."""
        calibrate_weights(fake)


@dataclass(frozen=True)
class CheckTensors:
    """Refuse a NaN in a tensor that the graph reads, and an infinity in a parameter."""

    name: ClassVar[str] = "check tensors"

    def __call__(self, program: P, /) -> P:
        """Return the program as it is.

        Raises:
            CalibrationError: a tensor is not finite; the message names the tensor.
        """
        _check_tensors(program.module)
        return program


def calibrate_activations(fake: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> None:
    """Set the range of every quantizer of an activation from what it reads when nothing is quantized.

    Raises:
        CalibrationError: no batch, or one that the model does not run on, or values that are not finite.
    """
    constant = constants_with_quantizers(fake)
    found = {node: q for node, q in quantizer_nodes(fake) if node not in constant and not q.spec.dynamic}
    if not found:
        return
    observers = {q: make_observer(q.spec, q.dim, str(node.target)) for node, q in found.items()}
    if not batches:
        raise CalibrationError(
            "there is no batch to calibrate on", why="ranges are read off data", fix="calibration=[batch, …]"
        )

    def observe(node: fx.Node, read: Any) -> None:
        if node in found:
            observers[found[node]].observe(read)

    everything = [q for _, q in quantizer_nodes(fake)]
    for quantizer in everything:
        quantizer.enabled = False
    try:
        for k, batch in enumerate(batches):
            run_batch(fake, batch, k, observe)
    finally:
        for quantizer in everything:
            quantizer.enabled = True
    for quantizer, observer in observers.items():
        quantizer.set_range(*observer.range())
    choices = {q: seen.candidates() for q, seen in observers.items() if isinstance(seen, OutputObserver)}
    if choices:
        choose_ranges(fake, choices, batches)


def calibrate_weights(fake: fx.GraphModule) -> None:
    """Set the range of every quantizer of a weight from the weight.

    Raises:
        CalibrationError: a parameter or buffer is NaN, or a weight infinite; the message names it.
    """
    _check_tensors(fake)
    constant = constants_with_quantizers(fake)
    values = Constants(fake)
    for node, quantizer in quantizer_nodes(fake):
        if node in constant:
            (source,) = node.all_input_nodes
            calibrate_weight(quantizer, values.of(source), layer_name(source, constant) or source.name)


def _check_tensors(module: fx.GraphModule) -> None:
    """Raise CalibrationError where a tensor that the graph reads holds a NaN, or a parameter an infinity."""
    for node, tensor in attributes(module):
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        wrong = ~tensor.isfinite() if isinstance(tensor, nn.Parameter) else tensor.isnan()
        if bool(wrong.any()):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise CalibrationError(
                f"{kind} '{node.target}' is not finite",
                why=f"{int(wrong.sum())} of its {tensor.numel()} elements are NaN or infinite",
                fix="load a sound checkpoint",
            )


# ------------------------------------------------------------------------------------------------ setting
def learn_rounding(
    setting: Setting, batches: Sequence[Sequence[Any]], options: PostTraining, *, shown: bool = False
) -> Reconstructed:
    """Learn the rounding of layers that were set, where `options` ask for that; see `reconstruct`."""
    asked = options.reconstruction
    return Reconstructed() if asked is None or not batches else reconstruct(setting, batches, asked, shown=shown)


def layer_errors(folded: fx.GraphModule, fake: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> Mapping[str, float]:
    """How far each layer of a fake-quant graph is from its float twin.

    Args:
        folded: the nodes of `fake` but for the quantizers, in the same order.
        batches: flat inputs, in the order of the placeholders.

    Returns:
        layer -> relative error of its output, ||fake - float|| / ||float||.
    """
    return Setting(folded, fake, PostTraining(correct_bias=False)).walk(batches)
