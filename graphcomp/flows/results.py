"""From a program to what is handed back: what goes with what, counted and put together."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.beside import TRAINING
from graphcomp.capture.capture import Captured
from graphcomp.capture.resized import OPEN, open_lengths
from graphcomp.cost import Bits, Bops, CostModel, Counts, SizeModel, latency
from graphcomp.cost.conventions import BITS_FIELD
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import CalibrationError, PlanError, VerificationError
from graphcomp.ir.graph import bind, value
from graphcomp.ir.module import tensor_leaves
from graphcomp.ir.passes import applied
from graphcomp.ir.program import Program
from graphcomp.native.model import NativeResult
from graphcomp.pruning.repair import LayerRepair
from graphcomp.pruning.slice import by_factor, kept_of_model, kept_of_tensors
from graphcomp.quantization import ops
from graphcomp.quantization.integer_bytes import StoredBytes
from graphcomp.quantization.lower import Lowered, LoweredLayer
from graphcomp.quantization.ptq import (
    PostTraining,
    Rounding,
    check_rounding,
    planned_group_sizes,
    planned_layers,
    planning,
)
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.spec import (
    ACTIVATIONS,
    DYNAMIC,
    DYNAMIC_BITS,
    PER_TOKEN,
    WEIGHTS,
    Observer,
    QuantConfig,
    QuantSpec,
    check_bits,
)
from graphcomp.quantization.stored import Affine, Stored
from graphcomp.report.report import Change, LayerReport, Report, group_dict, layers
from graphcomp.result import CompressedModel
from graphcomp.system.threads import one_at_a_time
from graphcomp.torch_compat import OpOverload
from graphcomp.training.same_gradients import other_gradients

logger = logging.getLogger("graphcomp")


# ------------------------------------------------------------------------------------------------ cutting
@dataclass(frozen=True)
class Cut:
    """A plan carried out.

    Attributes:
        plan: of the model before.
        kept: the units that stay; groups left out stay whole.
        groups: whose units were up for pruning.
        program: sliced; of a recorded model, whose graph cannot be run, what was captured.
        notes: what was asked and not done, or done otherwise; how laws were checked.
        repaired: layer -> what the repair did to it; empty where nothing was repaired.
    """

    plan: Analysis
    kept: Kept
    groups: Sequence[ChannelGroup]
    program: Program
    notes: tuple[str, ...] = ()
    repaired: Mapping[str, LayerRepair] = field(default_factory=dict)

    def after(self, repair: Cut) -> Cut:
        """Return this cut, of the plan that a repair made, with what the repair said."""
        return replace(self, notes=tuple(dict.fromkeys((*repair.notes, *self.notes))), repaired=repair.repaired)

    @property
    def graph(self) -> fx.GraphModule | None:
        """The sliced graph; None for a recorded model."""
        return None if self.plan.captured.producer == "record" else self.program.module

    def noted(self, *notes: str) -> Cut:
        """Return the cut with more notes, in front of the others."""
        return replace(self, notes=(*notes, *self.notes))

    def proved(self, verified: Mapping[str, float], unchecked: Mapping[str, str]) -> Cut:
        """Return the cut with more laws checked, and more that could not be."""
        verified, unchecked = {**self.program.verified, **verified}, {**self.program.unchecked, **unchecked}
        return replace(self, program=replace(self.program, verified=verified, unchecked=unchecked))


@one_at_a_time
def as_model(cut: Cut, found: NativeResult, *, measure_latency: bool) -> CompressedModel:
    """The cut model in floats: of the user's own class where that could be verified, else the graph."""
    plan = cut.plan
    module, form = choose_module(found, cut.graph, plan)
    verified: dict[str, float] = {}
    unchecked: dict[str, str] = {}
    if found.module is not None and not math.isnan(found.error):
        verified[_law_of_native(plan, found)] = found.error
    elif found.module is not None:
        unchecked[_law_of_native(plan, found)] = found.silent
    others = {_law_of_other(name): error for name, error in found.others.items()}
    verified |= {law: error for law, error in others.items() if not math.isnan(error)}
    unchecked |= {_law_of_other(name): why for name, why in found.unchecked.items()}
    unchecked |= plan.beside.unchecked
    report = _report(cut.proved(verified, unchecked), native_notes(plan, found))
    module.train(plan.model.training)
    return _model(
        cut,
        module,
        with_latency(report, plan, module) if measure_latency else report,
        form=form,
        reason="" if form == "native" else found.reason,
        edits=found.edits if form == "native" else (),
    )


def _model(cut: Cut, module: nn.Module, report: Report, **about: Any) -> CompressedModel:
    model = cut.plan.model
    # constants that the forward makes are cut, too, and have no names in the model
    held = {name for name, _ in parameters_and_buffers(model)}
    kept = (kept_of_model if about["form"] == "native" else kept_of_tensors)(cut.plan.coupling, cut.kept)
    if isinstance(module, fx.GraphModule):
        module.meta[OPEN] = open_lengths(cut.plan.captured)
    small = CompressedModel(
        module,
        kept={name: dims for name, dims in kept.items() if name in held},
        report=report,
        original_shapes=shapes(model),
        example_args=cut.plan.captured.inputs.args,
        example_kwargs=cut.plan.captured.inputs.kwargs,
        **about,
    )
    small.path = cut.plan.captured.path
    return small


def parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name in the state_dict -> shape, of tensors: modules may put other state beside them."""
    held = model.state_dict(keep_vars=True)
    return {name: tuple(t.shape) for name, t in held.items() if isinstance(t, Tensor)}


# ------------------------------------------------------------------------------------------------ quantizing
SHOWN = 12
"""Layers that a note names before it counts the rest."""

Activations = Literal["static", "dynamic", "dynamic_per_token"]
"""When ranges of activations are known: read off data beforehand; at run time, one per tensor; one per token."""

AT_RUN_TIME: Mapping[str, QuantSpec] = {"dynamic": DYNAMIC, "dynamic_per_token": PER_TOKEN}
"""How activations are quantized whose ranges are known at run time."""

REDUCED_BITS = 7
"""Of weights whose products with 8-bit activations, added in pairs, fit into 16 bits: 2 · 63 · 255 < 2^15."""


FULL_RANGE_BITS = 8
"""Bits from which on the levels of activations reach the largest value, unless asked otherwise; with fewer, the range
has the least squared error."""


def post_training(
    bits: int | tuple[int, int] | None,
    activation_bits: int | tuple[int, int] | Literal["same"] | None,
    group_size: int,
    rounding: Rounding,
    ignore: str | Sequence[str],
    reduce_range: bool = False,
    observer: Observer = "minmax",
    activations: Activations = "static",
    calibrated: bool = True,
) -> PostTraining | None:
    """The options that `compress` was given one by one; None where nothing is to be quantized.

    `observer` is how ranges of weights and activations are read off data; of activations of few bits see
    `FULL_RANGE_BITS`. Biases beside ranges at run time stay as they are where no calibration data are given
    (`calibrated`).

    Raises:
        PlanError: bits outside 2 to 16, or options of a quantization that was not asked for.
    """
    if not isinstance(bits, int) or isinstance(bits, bool):
        others = activation_bits not in ("same", None) or group_size or rounding != "nearest" or reduce_range
        if bits is None and (others or activations != "static"):
            raise PlanError(
                "activation_bits, activations, group_size, rounding and reduce_range need bits, got bits=None",
                fix="bits=8",
            )
        if bits is not None:
            check_bits(bits)
        return None
    check_bits(bits)
    check_rounding("rounding", rounding)
    at_run_time = AT_RUN_TIME.get(activations)
    if at_run_time is not None:
        _check_at_run_time(bits, activation_bits, activations)
    asked = None if activation_bits is None or activation_bits == "same" else activation_bits
    acts = check_bits(asked, "activation_bits") if asked is not None else bits if activation_bits == "same" else None
    clip: Observer = "mse" if observer == "minmax" and acts is not None and acts < FULL_RANGE_BITS else observer
    of_activations = None if acts is None else replace(ACTIVATIONS, bits=acts, observer=clip)
    least = 8
    if reduce_range:
        bits, least = min(bits, REDUCED_BITS), REDUCED_BITS
    weights = QuantSpec(bits, granularity="group", group_size=group_size) if group_size else replace(WEIGHTS, bits=bits)
    config = QuantConfig(
        weights=replace(weights, observer=observer),
        activations=at_run_time or of_activations,
        embeddings=QuantSpec(max(bits, 8), granularity="channel"),
        first_and_last_bits=least,
    )
    corrects = calibrated or at_run_time is None
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    return PostTraining(config, ignored, rounding=rounding, correct_bias=corrects)


def _check_at_run_time(bits: int, activation_bits: Any, activations: str) -> None:
    """Raise PlanError where no kernel multiplies what is asked for.

    Raises:
        PlanError: weights of more than 8 bits, or activations of other than 8.
    """
    if activation_bits not in ("same", DYNAMIC_BITS) or isinstance(activation_bits, bool):
        raise PlanError(
            f"activations={activations!r} with activation_bits={activation_bits!r}",
            why="what is quantized at run time has 8 bits, as integer kernels have that width alone",
            fix="no activation_bits" if activation_bits is not None else 'no activations="dynamic", for weights alone',
        )
    if bits > DYNAMIC_BITS:
        raise PlanError(
            f"activations={activations!r} with bits={bits!r}",
            why="no integer kernel multiplies what is quantized at run time by weights of more than 8 bits",
            fix="bits=8",
        )


@one_at_a_time
def planned_bits(plan: Analysis, options: PostTraining) -> dict[str | fx.Node, Bits]:
    """The bits that the ops of the analysed graph will have.

    Raises:
        PlanError: the model could only be recorded.
    """
    return bits_by_node(CostModel(plan), planned_by_name(plan, options))


def planned_by_name(plan: Analysis, options: PostTraining) -> dict[str, Bits]:
    """The bits that each op, and each lookup in a table, will have, by its name in the analysed graph.

    Raises:
        PlanError: the model could only be recorded.
    """
    captured = plan.captured
    check_floats(captured)
    check_second_call(captured)
    if captured.producer != "export":
        raise PlanError(
            f"{type(plan.model).__name__} cannot be quantized: it could only be recorded",
            why=f"torch.export refused: {captured.reason}",
            fix='scope="path.to.submodule" compresses a part that can be exported',
        )
    return bits_by_name(planned_layers(captured, options))


def bits_by_name(layers: Sequence[LoweredLayer]) -> dict[str, Bits]:
    """The bits of each layer, by the name of its op; cutting and quantizing keep these names."""
    return {layer.node: Bits(layer.weight_bits, layer.activation_bits) for layer in layers}


def bits_by_node(costs: CostModel, by_name: Mapping[str, Bits]) -> dict[str | fx.Node, Bits]:
    """The bits of each op that multiplies, by its node."""
    return {op.node: by_name[op.node.name] for op in costs.operations if op.node.name in by_name}


def check_second_call(captured: Captured) -> None:
    """Raise PlanError where a graph cannot stand for the model, whose first call changes what the next one reads."""
    if captured.second_call:
        raise PlanError(
            f"a graph of {type(captured.original).__name__} holds for its first call alone",
            why=f"the forward changes attributes of the model: {captured.second_call}",
            fix="call the model once in eval mode before, if its first call alone is another; or keep state in buffers",
        )


def group_sizes(plan: Analysis, options: PostTraining) -> dict[str, int]:
    """Return the weights whose inputs will be quantized in groups, with the size of a group."""
    specs = (options.config.weights, *(weights for weights, _ in options.config.overrides.values()))
    if all(spec is None or spec.granularity != "group" for spec in specs):
        return {}
    return planned_group_sizes(plan.captured, options)


def check_floats(captured: Captured) -> None:
    """Raise PlanError where the model is quantized already, by `compress` or for training."""
    model = captured.original
    prepared = any(isinstance(module, Quantizer) for module in model.modules())
    if prepared or any(_is_of_integers(node.target) for node in captured.module.graph.nodes):
        raise PlanError(
            f"{type(model).__name__} is quantized already",
            why="it holds quantizers" if prepared else "its weights are integers",
            fix="graphcomp.finalize(ready) makes the small model" if prepared else "quantize the float model",
        )


def _is_of_integers(target: Any) -> bool:
    return target in ops.OF_INTEGERS or (isinstance(target, OpOverload) and target.namespace.startswith("quantized"))


def check_batches(example_inputs: Any, calibration: Iterable[Any]) -> None:
    """Raise CalibrationError where what was given is no series of batches."""
    example = next(iter(tensor_leaves(example_inputs)), None)
    one = isinstance(calibration, Tensor) and example is not None and calibration.dim() <= example.dim()
    if one or isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}, not a series of batches",
            why="each of its rows would be taken for a batch" if one else "",
            fix="calibration=[batch, …], each batch in the form of the example inputs",
        )


def planned_bytes(plan: Analysis, options: PostTraining, bits: Mapping[str | fx.Node, Bits]) -> Callable[[Counts], int]:
    """Bytes of what quantizing will store, by the number of units that stay.

    Args:
        bits: what `planned_bits` gave.
    """
    stored = stored_bytes(plan, options)
    by_op = {node.name: own for node, own in bits.items() if isinstance(node, fx.Node)}
    return lambda counts: stored(counts, by_op)


def stored_bytes(plan: Analysis, options: PostTraining) -> StoredBytes:
    """Bytes of what quantizing will store, by the number of units that stay, and the bits of each op."""
    config, group_size = options.config, 0
    if config.weights is not None and config.weights.granularity == "group":
        # which inputs make a group is settled when the others are gone: the graph is planned with a step per row
        group_size = config.weights.group_size
        rows = replace(config.weights, granularity="channel", group_size=0)
        options = replace(options, config=replace(config, weights=rows))
    lowered = applied(plan.captured, *planning(options))
    assert lowered.lowered is not None
    return StoredBytes(plan, lowered.module, lowered.lowered.layers, group_size)


def calibrating(
    captured: Captured, options: PostTraining, batches: Sequence[Sequence[Any]] | None
) -> tuple[Sequence[Sequence[Any]], tuple[str, ...]]:
    """Return the batches to calibrate on: without any, the example inputs, with a note that says so."""
    if batches is not None:
        return batches, ()
    example = [captured.inputs.flat()]
    if options.config.reads_ranges:
        return example, ("calibrated on the example inputs alone, as no calibration= was given",)
    if options.second_order:
        return example, ("rounded to second order on the example inputs alone, as no calibration= was given",)
    return example, ()


@one_at_a_time
def as_integers(
    cut: Cut, integers: Program, notes: Sequence[str], *, measure_latency: bool, held: NativeResult | None = None
) -> CompressedModel:
    """The cut model with integer weights.

    Args:
        integers: lowered.
        notes: what was asked and not done in quantizing.
        held: the user's class with weights of integers, or why it cannot hold them; None: a graph is asked for.
    """
    assert integers.lowered is not None
    cut = cut.proved(integers.verified, integers.unchecked)
    left = _left_float(integers.left_float)
    module: nn.Module = integers.module
    form, reason = "graph", "integer weights and quantize nodes stand in a graph"
    if held is not None and held.module is not None:
        module, form, reason = held.module, "native", ""
        same = {} if math.isnan(held.error) else {"native == integer graph": held.error}
        cut = cut.proved(same, {"native == integer graph": held.silent} if not same else {})
    elif held is not None:
        reason = held.reason
        notes = (*notes, f"a graph, not the model's own class: {reason}")
    replaced = _replaced_notes(cut.plan.captured) if form == "graph" else []
    report = _quantized_report(cut, (*notes, *replaced, *left), integers)
    module.train(cut.plan.model.training and form == "native")
    return _model(
        cut,
        module,
        with_latency(report, cut.plan, module) if measure_latency else report,
        form=form,
        reason=reason,
        edits=held.edits if held is not None and form == "native" else (),
    )


def _left_float(left: Mapping[str, str]) -> list[str]:
    """Return one note per reason for which layers stay float."""
    by_reason: dict[str, list[str]] = {}
    for layer, reason in left.items():
        by_reason.setdefault(reason, []).append(f"'{layer}'")
    return [
        f"{listed(layers)} {'stays' if len(layers) == 1 else 'stay'} float: {reason}"
        for reason, layers in by_reason.items()
    ]


def listed(names: Sequence[str]) -> str:
    """Return the names, those beyond SHOWN as their number."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _quantized_report(cut: Cut, notes: Sequence[str], integers: Program) -> Report:
    """The float report with what the integers change in it."""
    lowered = integers.lowered
    assert lowered is not None
    by_node = {layer.node: layer for layer in lowered.layers}
    # a weight that is computed of a parameter has a name of its own once it is stored
    operations = CostModel(cut.plan).operations
    by_name = {op.layer: by_node[op.node.name] for op in operations if op.node.name in by_node}
    by_name |= {layer.name: layer for layer in lowered.layers}
    report = _report(cut, notes, lowered.layers)
    stored = sum(t.numel() * t.element_size() for t in _stored(lowered.module))
    return replace(
        report,
        bytes=Change(report.bytes.before, stored),
        layers=tuple(_with_bits(layer, by_name) for layer in report.layers),
        sizes=_sizes(lowered),
        quantization_errors=integers.errors,
        quantization_repairs={name: Change(*pair) for name, pair in integers.repairs.items()},
        reconstructions={name: Change(*pair) for name, pair in integers.reconstructions.items()},
    )


def _with_bits(layer: LayerReport, found: Mapping[str, Any]) -> LayerReport:
    if layer.name not in found:
        return layer
    own = found[layer.name]
    mean = round(float(own.weight_bits), 3) if isinstance(own.weight_bits, Fraction) else own.weight_bits
    return replace(layer, weight_bits=mean, activation_bits=own.activation_bits)


def _stored(module: nn.Module) -> list[Tensor]:
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def _sizes(lowered: Lowered) -> dict[str, float]:
    """The conventions' sizes of the quantized weights; floats and biases, of 32 bits each, are in the remainder.

    Where channels have bits of their own, the codes of each width count apart, and each channel says its bits.
    """
    nodes = lowered.module.graph.find_nodes(op="call_function", target=ops.dequantize_per_channel)
    biases = sum(value(node).numel() for node in nodes if bind(node)["dtype"] is torch.int32)
    floats = sum(p.numel() for p in lowered.module.parameters())
    found = SizeModel({}, floats + biases).sizes()
    for name, stored in lowered.weights.items():  # one at a time: what is counted of a tensor is not kept
        for convention, size in _model_of(name, stored).sizes().items():
            found[convention] += size
    return {convention: float(size) for convention, size in found.items()}


def _model_of(name: str, stored: Stored) -> SizeModel:
    if not isinstance(stored, Affine) or stored.widths is None:
        return SizeModel({name: stored.counted()})
    parts = {f"{name}, {width} bits": codes for width, codes in stored.counted_by_width().items()}
    fields = BITS_FIELD * (stored.widths.numel() - len(parts))  # each part counts a field itself
    return SizeModel(parts, 0, fields)


# ------------------------------------------------------------------------------------------------ verification
def _law_of_native(plan: Analysis, found: NativeResult) -> str:
    """What the user's class was compared with, and in which precision."""
    law = "native == masked" if plan.captured.producer == "record" else "native == sliced"
    return f"{law}, in float64" if found.rounding else law


def _law_of_other(name: str) -> str:
    return f"native == masked, {name}" if name == TRAINING else f"native == masked, on {name}"


def choose_module(found: NativeResult, small: fx.GraphModule | None, plan: Analysis) -> tuple[nn.Module, Any]:
    if found.module is not None:
        return found.module, "native"
    if small is not None:
        check_second_call(plan.captured)
        logger.info("the result is a graph, not a %s: %s", type(plan.model).__name__, found.reason)
        return small, "graph"
    raise VerificationError(
        f"{type(plan.model).__name__} could only be recorded, and its own class could not be cut",
        why=f"{found.reason}; torch.export refused: {plan.captured.reason}",
        fix='scope="path.to.submodule" compresses a part that can be exported',
    )


# ------------------------------------------------------------------------------------------------ results
def native_notes(plan: Analysis, found: NativeResult) -> tuple[str, ...]:
    notes = []
    if found.module is None:
        notes = [f"a graph, not the model's own class: {found.reason}", *_replaced_notes(plan.captured)]
    other = other_gradients(plan.captured) if found.module is None and plan.captured.functions else ""
    notes += [f"the graph is for inference: {other}"] if other else []
    if plan.captured.producer == "record":
        notes.append(f"recorded, since torch.export refused: {plan.captured.reason}")
    if found.rounding:
        notes.append(f"verified in float64, since in the model's own precision rounding shows: {found.rounding}")
    return tuple(notes)


def _replaced_notes(captured: Captured) -> list[str]:
    """Say which inputs the forward replaces in lists and dicts of the caller, which a graph does not do."""
    names = ", ".join(captured.path.replaced)
    return [f"the model puts other tensors in the place of its inputs {names}, and the graph does not"] if names else []


def _report(cut: Cut, notes: Sequence[str], quantized: Sequence[LoweredLayer] = ()) -> Report:
    """What was cut; the ops after have the bits of the `quantized` layers, the others are float."""
    plan, kept, groups = cut.plan, cut.kept, cut.groups
    counts = {factor: len(units) for factor, units in by_factor(kept).items()}
    costs = CostModel(plan)
    before, after = Bops(costs), Bops(costs, bits_by_node(costs, bits_by_name(quantized)))
    return Report(
        params=Change(costs.params(), costs.params(counts)),
        macs=Change(costs.macs(), costs.macs(counts)),
        bops=Change(before.layers(), after.layers(counts)),
        bops_attention=Change(before.attention(), after.attention(counts)),
        bytes=Change(costs.bytes(), costs.bytes(counts)),
        units_removed=sum(group.size - len(units) for group, units in kept.items()),
        units_total=sum(group.size for group in groups),
        layers=layers(plan, kept_of_tensors(plan.coupling, kept), costs, costs.macs_by_layer(counts)),
        groups=tuple(group_dict(group, kept) for group in plan.groups),
        frozen=plan.frozen,
        unknown_ops=tuple(u.op for u in plan.unknown_ops),
        repairs={name: Change(layer.before, layer.after) for name, layer in cut.repaired.items()},
        verified=cut.program.verified,
        unchecked=cut.program.unchecked,
        notes=(
            *plan.captured.notes,
            *_unknown_notes(plan),
            *_uncounted_notes(costs),
            *notes,
            *cut.notes,
            *plan.captured.path.notes(),
        ),
        model=type(plan.model).__name__,
    )


def _unknown_notes(plan: Analysis) -> list[str]:
    """One note per op that keeps every index it touches, for want of a rule that decides."""
    return [f"left whole around {op}" + (f"; {op.fix}" if op.fix else "") for op in plan.unknown_ops]


def _uncounted_notes(costs: CostModel) -> list[str]:
    """One note per op and reason that macs and bops leave out."""
    found = Counter(str(op) for op in costs.uncounted)
    return [f"not counted in macs and bops: {count} x {op}" for op, count in found.items()]


def with_latency(report: Report, plan: Analysis, module: nn.Module) -> Report:
    captured = plan.captured
    before = latency(plan.model, captured.inputs.args, captured.inputs.kwargs)
    after = latency(module, captured.inputs.args, captured.inputs.kwargs)
    return replace(report, latency_ms=Change(before.median_ms, after.median_ms))
