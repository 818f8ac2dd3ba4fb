"""Even channels of activations: each channel spans the range that the one step of the value is for.

A value of few bits with one step per tensor leaves a channel of small numbers few levels. Where a value is made by a
layer and read by one layer alone, the first may multiply channel k by s_k and the second divide by s_k: with one step
per output channel of the weights nothing is lost in the first layer, nor in a depthwise second one. In another second
layer the factors change the ranges of the weights in a row, and s_k is a power of the ratio of ranges, whose exponent
has the least error of the second layer's result, value and weight rounded.

A clip at a fixed number c between the two (ReLU6) does not scale along. There no factor takes a channel's largest value
in calibration above c: the function is the same on calibration data, and beyond these a channel is clipped at the
largest value seen, as the range of a quantizer would.

Sources: Nagel et al. 2019 (arXiv 1906.04721), section 4.1, for the pairs of layers, there by the ranges of weights;
Xiao et al. 2023 (SmoothQuant, arXiv 2211.10438), equation 4, for the exponent, there one for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphcomp.ir.graph import attributes, bind, clone, fetch, module_path, value
from graphcomp.ir.program import P
from graphcomp.ir.run_nodes import run_batch
from graphcomp.ops.answers import clip_of, compute_of, operands_of
from graphcomp.quantization.calibrate import MseObserver
from graphcomp.quantization.equalize import Layer
from graphcomp.quantization.in_force import Placed, Rounding
from graphcomp.quantization.placement import channels_of, constants, layer_name
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.spec import QuantConfig, matches

FEW_BITS = 8
"""Bits of activations below which channels are evened out by default."""

MOST = 64.0
"""The largest factor of a channel: with fewer than 8 bits a channel so small has no more to gain."""

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""What the exponent of the ratio of ranges is chosen from."""

SAMPLES = 8
"""Samples of the first batch that an exponent is chosen on."""

ELEMENTS = 1 << 18
"""Elements of a value, evenly spaced, that a range is tried on."""


@dataclass(frozen=True)
class EvenActivations:
    """Even out the channels of values between two layers; see `even_activations`."""

    config: QuantConfig
    ignore: tuple[str, ...]
    batches: Sequence[Sequence[Any]]
    name: ClassVar[str] = "even out channels of activations"

    def __call__(self, program: P, /) -> P:
        """Return the program, with a note where a value is clipped at a fixed number: the function may differ there."""
        found, count, clipped = even_activations(program.module, self.config, self.ignore, self.batches)
        if not count:
            return program
        return program.rewritten(found, clipped_notes(clipped))


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer, the value that the layer makes, behind a clip or not, and the one layer that reads the value."""

    made_by: fx.Node
    at: fx.Node
    read_by: fx.Node

    @property
    def apart(self) -> bool:
        """Whether each output of the second layer reads one channel alone: all factors are free."""
        return bool(bind(self.read_by).get("groups", 1) == _channels(self.at, self.read_by))

    @property
    def clipped(self) -> bool:
        """Whether the value is clipped at a fixed number."""
        return _bound(self.at) is not None


def clipped_notes(count: int) -> list[str]:
    """Say that so many values are clipped at a fixed number, if any are: the function may differ there."""
    values = f"{count} value{'s'[: count > 1]}"
    note = (
        f"channels of {values} between two layers were scaled to one range in front of a clip at a fixed number: "
        "values above the largest in calibration clip"
    )
    return [note] if count else []


def asks_for_even(config: QuantConfig) -> bool:
    """Whether channels are evened out by default: activations of few bits, with ranges read off data."""
    spec = config.activations
    return spec is not None and not spec.dynamic and spec.bits < FEW_BITS


@torch.no_grad()
def even_activations(
    module: fx.GraphModule, config: QuantConfig, ignore: Sequence[str], batches: Sequence[Sequence[Any]]
) -> tuple[fx.GraphModule, int, int]:
    """Scale the channels of values between two layers to one range.

    Args:
        module: a captured graph without quantizers, batch norms folded. Not changed.
        config, ignore: what will be quantized, and how.
        batches: flat inputs, in the order of the placeholders.

    Returns:
        A new module that computes the same on `batches`, how many values were scaled, and how many of these behind a
        clip at a fixed number.

    Raises:
        CalibrationError: a batch that the model does not run on.
    """
    equal, _ = clone(module)
    chosen = factors_between(equal, config, ignore, batches)
    layers: dict[fx.Node, Layer] = {}
    for pair, s in chosen.items():
        for end, scale in ((pair.made_by, Layer.divide_outputs), (pair.read_by, Layer.multiply_inputs)):
            scale(layers.setdefault(end, Layer(equal, end)), 1 / s)
    for layer in layers.values():
        layer.write(equal)
    return equal, len(chosen), sum(pair.clipped for pair in chosen)


@torch.no_grad()
def factors_between(
    module: fx.GraphModule, config: QuantConfig, ignore: Sequence[str], batches: Sequence[Sequence[Any]]
) -> dict[Pair, Tensor]:
    """Return values between two layers, and by what their channels are to be multiplied, (c,) float64, not all 1.

    The arguments are those of `even_activations`.

    Raises:
        CalibrationError: a batch that the model does not run on.
    """
    pairs = {pair.at: pair for pair in _pairs(module, config, ignore)}
    if not pairs or not batches:
        return {}
    largest: dict[fx.Node, Tensor] = {}

    def measure(node: fx.Node, found: Any) -> None:
        if node in pairs and found.numel():  # data that are empty or not finite are refused when ranges are read off
            channels = _rows(found, pairs[node]).abs().amax(1).double()
            largest[node] = torch.maximum(channels, largest.get(node, channels))

    for k, batch in enumerate(batches):
        run_batch(module, batch, k, measure)
    factors: dict[Pair, Tensor] = {}
    placed = Placed(module, config, ignore)

    def choose(node: fx.Node, found: Any) -> None:
        if node in largest and bool(largest[node].isfinite().all()):
            factors[pairs[node]] = _factors(module, pairs[node], found[:SAMPLES], largest[node], placed)

    run_batch(module, batches[0], 0, choose)
    return {pair: s for pair, s in factors.items() if bool((s != 1).any())}


def _pairs(module: fx.GraphModule, config: QuantConfig, ignore: Sequence[str]) -> Iterator[Pair]:
    """Yield the pairs of layers whose value has few bits and whose weights have one step per output channel."""
    constant = constants(module.graph)
    readers: dict[int, int] = {}
    for node, tensor in attributes(module):
        readers[id(tensor)] = readers.get(id(tensor), 0) + len(node.users)

    def own(node: fx.Node) -> bool:
        """Whether nothing else reads the layer's weight and bias, which have one factor per output channel."""
        operands, arguments = operands_of(node), bind(node)
        read = [arguments[name] for name in (operands.weight, operands.bias) if name and arguments[name] is not None]
        single = all(n.op == "get_attr" and readers[id(fetch(module, str(n.target)))] == 1 for n in read)
        return bool(operands.bias) and operands.out == 0 and single and arguments[operands.weight] in constant

    for node in module.graph.nodes:
        operands = compute_of(node)
        if operands is None or not own(node):
            continue
        weights, activations = config.specs(_path(node, constant))
        if weights is None or activations is None or activations.dynamic or activations.bits >= FEW_BITS:
            continue
        if weights.granularity != "channel" or any(matches(name, _path(node, constant)) for name in ignore):
            continue
        at = bind(node)[operands.data[0]]
        before = at.all_input_nodes[0] if clip_of(at) else at
        if compute_of(before) is None or len(at.users) != 1 or len(before.users) != 1 or not own(before):
            continue
        if before is not at and _low(at) != 0:
            continue
        of_maker = config.specs(_path(before, constant))[0]
        if of_maker is not None and of_maker.granularity != "channel":
            continue
        same = value(at).dim() == value(node).dim() and channels_of(before) == channels_of(node)
        if same and _channels(at, node) == value(before).shape[channels_of(before)]:
            yield Pair(before, at, node)


def _path(node: fx.Node, constant: set[fx.Node]) -> str:
    return module_path(node) or layer_name(bind(node)[operands_of(node).weight], constant)


def _channels(at: fx.Node, reader: fx.Node) -> int:
    return int(value(at).shape[channels_of(reader)])


def _low(clip: fx.Node) -> float | None:
    found = clip_of(clip)
    assert found is not None
    return found.bounds(bind(clip))[0]


def _bound(at: fx.Node) -> float | None:
    """Return the fixed number that a value is clipped at; None without one."""
    clip = clip_of(at)
    return None if clip is None else clip.bounds(bind(at))[1]


def _rows(x: Tensor, pair: Pair) -> Tensor:
    """`x` as (c, n), one row per channel."""
    dim = channels_of(pair.read_by)
    return x.movedim(dim, 0).reshape(x.shape[dim], -1)


# ------------------------------------------------------------------------------------------------ factors
def _factors(module: fx.GraphModule, pair: Pair, x: Tensor, largest: Tensor, placed: Placed) -> Tensor:
    """Return the factors of a value's channels, (c,) float64."""
    bound = _bound(pair.at)
    reach = largest.max() if bound is None else torch.tensor(bound, dtype=largest.dtype, device=largest.device)
    ratio = torch.where(largest > 0, reach / largest.clamp(min=torch.finfo(torch.float32).tiny), 1.0).clamp(1, MOST)
    if pair.apart:
        return ratio
    error = _trial(module, pair, x, placed.rounding(pair.read_by, *operands_of(pair.read_by).data))
    return min(((error(ratio**e), ratio**e) for e in EXPONENTS), key=lambda found: found[0])[1]


def _trial(module: fx.GraphModule, pair: Pair, x: Tensor, rounding: Rounding) -> Callable[[Tensor], float]:
    """Return the squared error of the second layer's result, value and weight rounded, by the factors."""
    operands, arguments = operands_of(pair.read_by), bind(pair.read_by)
    weight = fetch(module, str(arguments[operands.weight].target)).detach()
    (data,) = operands.data
    fixed = {name: given for name, given in arguments.items() if name not in (data, operands.weight)}
    fixed = {**fixed, operands.bias: None}
    on_data = [-1 if d == channels_of(pair.read_by) else 1 for d in range(x.dim())]
    on_weight = [1, -1, *[1] * (weight.dim() - 2)]
    target: Any = pair.read_by.target

    def result(value_: Tensor, kernel: Tensor) -> Tensor:
        found: Tensor = target(**{**fixed, data: value_, operands.weight: kernel})
        return found

    wanted = result(x, weight)

    def error(s: Tensor) -> float:
        scaled, kernel = x * s.to(x.dtype).view(on_data), weight / s.to(weight.dtype).view(on_weight)
        rounded = scaled
        for spec in rounding.value:
            of_value = make_quantizer(spec).to(scaled)
            observer = MseObserver(spec)
            observer.observe(scaled.flatten()[:: max(1, scaled.numel() // ELEMENTS)])
            of_value.set_range(*observer.range())
            rounded = of_value(rounded)
        return float((result(rounded, rounding.of_weight(kernel)) - wanted).double().square().sum())

    return error
