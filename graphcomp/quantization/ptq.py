"""Post-training quantization: fold, equalise, place, calibrate, round, correct, lower.

Everything but the calibration is one walk over the float graph and the fake-quant graph side by side, layer after
layer, so that each is set on the operands it will get.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from graphcomp.errors import CalibrationError
from graphcomp.graph import bind, clone, fetch, set_argument, value
from graphcomp.quantization.calibrate import RangeObserver, calibrate_weight, make_observer
from graphcomp.quantization.equalize import equalize
from graphcomp.quantization.fold import FoldBatchNorm
from graphcomp.quantization.insert import InsertQuantizers, quantizer_nodes
from graphcomp.quantization.lower import Lowered, constants_with_quantizers, lower
from graphcomp.quantization.placement import COMPUTE, CONVOLUTIONS, place
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.second_order import round_second_order, second_moments
from graphcomp.quantization.spec import QuantConfig
from graphcomp.quantization.walk import Lockstep

logger = logging.getLogger("graphcomp.quantization")
aten = torch.ops.aten

Rounding = Literal["nearest", "second_order"]

BIAS_LIMIT = 2.0**30
"""A bias on the scale of its layer's products stays below this, half of what an int32 accumulator holds."""

FEWEST_SAMPLES = 16
"""Of each channel, to tell a mean error from chance."""


@dataclass(frozen=True)
class PostTraining:
    """What a model goes through after training.

    Attributes:
        config: which tensors are quantized, and how.
        ignore: module names or "re:" patterns that stay float.
        equalize: scale channels between layers so that all use their range (Nagel et al. 2019); None: where weights
            have one step per tensor, which is where it matters.
        correct_bias: add the mean error of each output channel to the bias (Nagel et al. 2019, section 4.2).
        rounding: "nearest", or "second_order": each weight's error is made up for by those after it (GPTQ).
        walk_batches: ranges are read off all calibration batches; rounding and correction see at most so many.
    """

    config: QuantConfig = field(default_factory=QuantConfig)
    ignore: tuple[str, ...] = ()
    equalize: bool | None = None
    correct_bias: bool = True
    rounding: Rounding = "nearest"
    walk_batches: int = 8


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


def quantize(module: fx.GraphModule, batches: Sequence[Sequence[Any]], options: PostTraining) -> Quantized:
    """Quantize a captured graph.

    Args:
        module: in eval mode; not changed.
        batches: flat inputs, in the order of the placeholders; at least one.
        options: how.

    Raises:
        CalibrationError: no batch, one the model does not run on, or values that are not finite.
    """
    notes: list[str] = []
    folded = FoldBatchNorm()(module)
    weights = options.config.weights
    if options.equalize or (options.equalize is None and weights is not None and weights.granularity == "tensor"):
        folded, found = equalize(folded)
        notes += found
    own_bias = _with_biases(folded) if options.correct_bias else folded
    placement = place(own_bias, options.config, options.ignore)
    fake = InsertQuantizers(placement)(own_bias)
    calibrate_activations(fake, batches)
    calibrate_weights(fake)
    errors = _Setting(own_bias, fake, options).walk(batches[: options.walk_batches])
    fit_biases(fake)
    left = {node.name: reason for node, reason in placement.left_float.items()}
    return Quantized(folded, fake, lower(fake), errors, left, tuple(notes))


# ------------------------------------------------------------------------------------------------ tensors of its own
def _with_biases(module: fx.GraphModule) -> fx.GraphModule:
    """A bias of zeros for each convolution that has none: there is then where to correct."""
    found, _ = clone(module)
    for node in found.graph.nodes:
        if node.target not in CONVOLUTIONS or bind(node)["bias"] is not None:
            continue
        weight = value(bind(node)["weight"])
        channels = value(node).shape[1]
        path = str(bind(node)["weight"].target).rpartition(".")[0] if bind(node)["weight"].op == "get_attr" else ""
        name = _free(found, f"{path}.bias".lstrip("."), node.name)
        owner = found.get_submodule(name.rpartition(".")[0])
        owner._parameters.pop(name.rpartition(".")[2], None)
        device = next(p.device for p in found.parameters())
        owner.register_parameter(
            name.rpartition(".")[2], nn.Parameter(torch.zeros(channels, dtype=weight.dtype, device=device))
        )
        with found.graph.inserting_before(node):
            bias = found.graph.get_attr(name)
        bias.meta["val"] = weight.new_empty(channels)
        set_argument(node, "bias", bias)
    found.recompile()
    return found


def _free(module: nn.Module, name: str, otherwise: str) -> str:
    owner: Any = module
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return name if owner is None and name != "bias" else f"{otherwise}_bias"


# ------------------------------------------------------------------------------------------------ calibration
def calibrate_activations(fake: fx.GraphModule, batches: Sequence[Sequence[Any]]) -> None:
    """Set the range of every quantizer of an activation from what it reads when nothing is quantized.

    Raises:
        CalibrationError: no batch, or one that the model does not run on, or values that are not finite.
    """
    constant = constants_with_quantizers(fake)
    found = {node: q for node, q in quantizer_nodes(fake) if node not in constant}
    observers = {q: make_observer(q.spec, q.dim, str(node.target)) for node, q in found.items()}
    if not batches:
        raise CalibrationError(
            "there is no batch to calibrate on", why="ranges are read off data", fix="calibration=[batch, …]"
        )
    everything = [q for _, q in quantizer_nodes(fake)]
    for quantizer in everything:
        quantizer.enabled = False
    try:
        watcher = _Watcher(fake, {node: observers[q] for node, q in found.items()})
        for k, batch in enumerate(batches):
            _run(watcher, batch, k)
    finally:
        for quantizer in everything:
            quantizer.enabled = True
    for quantizer, observer in observers.items():
        quantizer.set_range(*observer.range())


def _run(watcher: fx.Interpreter, batch: Sequence[Any], k: int) -> None:
    try:
        with torch.no_grad():
            watcher.run(*batch, enable_io_processing=False)
    except CalibrationError:
        raise
    except Exception as error:  # whatever the ops raise on inputs of another shape
        raise CalibrationError(
            f"the model does not run on batch {k} of the calibration data",
            why=str(error).splitlines()[0][:300] if str(error) else type(error).__name__,
            fix="give batches in the form of the example inputs",
        ) from error


class _Watcher(fx.Interpreter):
    """Runs a graph and shows observers what quantizers read."""

    def __init__(self, module: fx.GraphModule, observers: Mapping[fx.Node, RangeObserver]) -> None:
        super().__init__(module)
        self.observers = observers

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.observers:
            self.observers[n].observe(result)
        return result


def calibrate_weights(fake: fx.GraphModule) -> None:
    """Set the range of every quantizer of a weight from the weight."""
    constant = constants_with_quantizers(fake)
    values = Constants(fake)
    for node, quantizer in quantizer_nodes(fake):
        if node in constant:
            calibrate_weight(quantizer, values.of(node.all_input_nodes[0]), str(node.target))


def fit_biases(fake: fx.GraphModule) -> None:
    """Give each bias a value that an integer kernel adds as it is: a multiple of the layer's step of products.

    Steps of weights are widened so much that the multiple fits into an int32, which matters for channels whose weights
    are next to nothing beside their bias.
    """
    found = dict(quantizer_nodes(fake))
    values = Constants(fake)
    for node in list(fake.graph.nodes):
        operands = COMPUTE.get(node.target)
        if operands is None or not operands.bias or not isinstance(bind(node)[operands.bias], fx.Node):
            continue
        arguments = bind(node)
        weight, data = found.get(arguments[operands.weight]), found.get(arguments[operands.data[0]])
        scale = getattr(weight, "scale", None)
        if (
            data is None
            or data.dim is not None
            or not isinstance(scale, Tensor)
            or weight is None
            or weight.spec.granularity == "group"
        ):
            continue
        step = data.to_integers(torch.zeros((), dtype=scale.dtype)).scale
        needed = values.of(arguments[operands.bias]).detach().abs() / (step * BIAS_LIMIT)
        if weight.dim is None:
            needed = needed.amax()
        elif needed.numel() != scale.numel():  # the groups of a transposed convolution share the weight's channels
            needed = needed.view(-1, scale.numel()).amax(0)
        with torch.no_grad():
            scale.copy_(torch.maximum(scale, needed.to(scale)))
            floats = values.of(arguments[operands.bias])
            if weight.spec.symmetric and scale.numel() in (1, floats.numel()):
                product = scale * step
                _replace_bias(fake, node, operands.bias, torch.round(floats / product) * product)
    fake.recompile()


def _replace_bias(fake: fx.GraphModule, node: fx.Node, argument: str, tensor: Tensor) -> None:
    """A bias that `node` alone reads: in its own place where no other reads that, else under a new name."""
    old = bind(node)[argument]
    if old.op == "get_attr":
        found = fetch(fake, str(old.target))
        readers = [n for n in fake.graph.find_nodes(op="get_attr") if fetch(fake, str(n.target)) is found]
        is_parameter = isinstance(found, nn.Parameter)
        if is_parameter and [user for reader in readers for user in reader.users] == [node]:
            _set(fake, str(old.target), tensor)
            return
    name = f"graphcomp_{node.name}_bias"
    fake.register_parameter(name, nn.Parameter(tensor))
    with fake.graph.inserting_before(node):
        fresh = fake.graph.get_attr(name)
    fresh.meta = {key: found for key, found in old.meta.items() if key != "follows_mode"}
    set_argument(node, argument, fresh)


# ------------------------------------------------------------------------------------------------ setting
class _Setting:
    """Rounds weights and corrects biases, layer after layer, and measures what is left."""

    def __init__(self, folded: fx.GraphModule, fake: fx.GraphModule, options: PostTraining) -> None:
        self.folded, self.fake, self.options = folded, fake, options
        self.constant = constants_with_quantizers(fake)
        self.quantizers = dict(quantizer_nodes(fake))
        self.errors: dict[str, float] = {}

    def walk(self, batches: Sequence[Sequence[Any]]) -> dict[str, float]:
        """Relative error of each compute op's output, by the op's layer."""
        exact, rough = Lockstep(self.folded, batches), Lockstep(self.fake, batches)
        float_nodes = iter(self.folded.graph.nodes)
        for node in self.fake.graph.nodes:
            if node in self.quantizers:
                rough.step(node)
                rough.drop(node)
                continue
            twin = next(float_nodes)
            exact.step(twin)
            if self._quantized(node):
                if self.options.rounding == "second_order":
                    self._round(node, rough)
                rough.step(node)
                if self.options.correct_bias:
                    self._correct(node, exact.of(twin), rough.of(node))
                self.errors[self._name(node)] = _relative(exact.of(twin), rough.of(node))
            else:
                rough.step(node)
            exact.drop(twin)
            rough.drop(node)
        return self.errors

    def _quantized(self, node: fx.Node) -> bool:
        return node.target in COMPUTE and any(n in self.quantizers for n in node.all_input_nodes)

    def _name(self, node: fx.Node) -> str:
        operands = COMPUTE[node.target]
        weight = bind(node)[operands.weight] if operands.weight else None
        while weight is not None and weight.op != "get_attr":
            weight = next((n for n in weight.all_input_nodes if n in self.constant), None)
        name = str(weight.target).removesuffix(".weight") if weight is not None else node.name
        return name if name not in self.errors else f"{name} ({node.name})"

    def _correct(self, node: fx.Node, exact: list[Tensor], rough: list[Tensor]) -> None:
        """Add the mean error of each output channel to the bias; `rough` becomes what the corrected layer gives."""
        operands, arguments = COMPUTE[node.target], bind(node)
        bias = arguments.get(operands.bias) if operands.bias else None
        if not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return
        channels = 1 if node.target in CONVOLUTIONS else exact[0].dim() - 1
        mean = significant_mean(exact, rough, channels)
        name = self._own_parameter(bias, node)
        old = fetch(self.fake, name)
        _set(self.fake, name, (old.double() + mean).to(old.dtype))
        shape = [-1 if d == channels else 1 for d in range(exact[0].dim())]
        for r in rough:
            r += mean.view(shape).to(r.dtype)

    def _round(self, node: fx.Node, rough: Lockstep) -> None:
        """Give the layer's weight the values on its grid that its operands make least of."""
        operands, arguments = COMPUTE[node.target], bind(node)
        wrapped = arguments[operands.weight]
        quantizer = self.quantizers.get(wrapped)
        if (
            quantizer is None
            or wrapped not in self.constant
            or len(wrapped.users) > 1
            or quantizer.dim not in (None, 0)
        ):
            return
        (source,) = wrapped.all_input_nodes
        if source.op != "get_attr":
            return
        moments = second_moments(node, rough.of(arguments[operands.data[0]]))
        if moments is None:
            return
        name = self._own_parameter(source, wrapped)
        weight = fetch(self.fake, name)
        rounded = round_second_order(weight.detach().flatten(1), moments, quantizer)
        _set(self.fake, name, rounded.view_as(weight))
        for values in rough.values:
            values[wrapped] = quantizer(rounded.view_as(weight))

    def _own_parameter(self, attribute: fx.Node, reader: fx.Node) -> str:
        """The name of a parameter that `reader` alone reads: a new one where the tensor is tied."""
        name = str(attribute.target)
        tensor = fetch(self.fake, name)
        tied = [
            user
            for other in self.fake.graph.find_nodes(op="get_attr")
            if fetch(self.fake, str(other.target)) is tensor
            for user in other.users
            if user is not reader
        ]
        if not tied:
            return name
        own = f"graphcomp_{reader.name}_{name.rpartition('.')[2]}"
        if not hasattr(self.fake, own):
            self.fake.register_parameter(own, nn.Parameter(tensor.detach().clone()))
            with self.fake.graph.inserting_before(reader):
                fresh = self.fake.graph.get_attr(own)
            fresh.meta = dict(attribute.meta)
            reader.replace_input_with(attribute, fresh)
            self.fake.recompile()
        return own


def significant_mean(exact: Sequence[Tensor], rough: Sequence[Tensor], channels: int) -> Tensor:
    """(c,) float64: the mean of exact - rough over all dims but `channels`, 0 within twice its standard error.

    What few samples say of the mean is mostly chance, and correcting for chance makes the model worse.
    """
    dims = [d for d in range(exact[0].dim()) if d != channels]
    count = sum(e.numel() for e in exact) // max(exact[0].shape[channels], 1)
    total = torch.zeros(exact[0].shape[channels], dtype=torch.float64, device=exact[0].device)
    squares = torch.zeros_like(total)
    if count < FEWEST_SAMPLES:
        return total
    for e, r in zip(exact, rough, strict=True):
        difference = e - r
        total += difference.sum(dims, dtype=torch.float64)
        squares += difference.square_().sum(dims, dtype=torch.float64)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    return torch.where(mean.abs() > 2 * (variance / count).sqrt(), mean, 0.0)


class Constants:
    """What the constant nodes of a graph compute, each once."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.values: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def of(self, node: fx.Node) -> Tensor:
        """The value of a node that depends on parameters, buffers and numbers only."""
        if node not in self.values:
            arguments, keywords = fx.map_arg((node.args, node.kwargs), self.of)
            if node.op == "get_attr":
                self.values[node] = fetch(self.module, str(node.target))
            elif node.op == "call_module":
                self.values[node] = self.module.get_submodule(str(node.target))(*arguments, **keywords)
            else:
                self.values[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
        found: Tensor = self.values[node]
        return found


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    """A new parameter in place of the old: other modules may share that one's memory."""
    owner_name, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    owner._parameters[last] = nn.Parameter(tensor, requires_grad=owner._parameters[last].requires_grad)  # type: ignore[union-attr]


def _relative(exact: list[Tensor], rough: list[Tensor]) -> float:
    error = sum(float((e - r).square_().sum(dtype=torch.float64)) for e, r in zip(exact, rough, strict=True))
    norm = sum(float(e.square().sum(dtype=torch.float64)) for e in exact)
    return float((error / norm) ** 0.5) if norm > 0 else 0.0


def all_quantizers(fake: fx.GraphModule) -> dict[str, Quantizer]:
    """Every quantizer of a fake-quant graph by its name in it."""
    return {str(node.target): quantizer for node, quantizer in quantizer_nodes(fake)}
