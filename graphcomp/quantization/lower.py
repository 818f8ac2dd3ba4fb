"""The lowering pass: fake-quant nodes become integers with quantize and dequantize nodes.

weight      as it is stored (see stored.py): codes -> dequantize, or codes and a table -> look up; four bits and fewer:
            packed end to end; six and fewer beside a bias: shifted to seven, so that the bias may be finer (see
            biases.py)
embedding   the integer table is looked up, then its rows' scales; the table is never made float
activation  quantize -> dequantize, unsigned: kernels ask for one integer type in and out, and for 0 as the lowest code
            behind a clip at 0; with a range at run time: quantize, and a product of integers in place of the layer
bias        int32 buffer on the scale of the products, so that an integer kernel adds it as it is
clip        gone where the quantizer behind it saturates at the same codes
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import fx

from graphcomp.errors import PlanError
from graphcomp.ir.graph import bind, clone, module_path, set_argument, tensor_values, value
from graphcomp.ir.program import P
from graphcomp.ir.rewrite import Maker, become, before, redirect, replace_node
from graphcomp.ir.run_nodes import Constants
from graphcomp.ops.answers import clip_of, compute_of, lookup_of, move_of, operands_of
from graphcomp.quantization import dynamic, ops
from graphcomp.quantization.biases import biased_layers
from graphcomp.quantization.fold import drop_unread
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.placement import (
    constants,
    layer_name,
    padded_with,
)
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.mixed import MixedQuantizer
from graphcomp.quantization.stored import Affine, Stored, Writer, container

aten = torch.ops.aten

INT32_MAX = 2**31 - 1

CLIPS = "graphcomp_clips"
"""In the meta of a lowered module: scale and zero point of an activation -> the ends of the clip that is gone in front
of the quantization, where the clip was no ReLU. A layer that is left in float needs the clip."""

FAKE = "fake-quant"
"""The stage before the graph is lowered, with which the integers are compared."""


@dataclass(frozen=True)
class LoweredLayer:
    """One compute op or embedding: the bits of its weight and of what it reads (32: float).

    Of a product of two activations the second stands for the weight. Where channels have bits of their own, a fraction
    is the mean over channels.
    """

    name: str  # of its weight, or of the op
    node: str  # of the graph, as in the float graph
    weight_bits: int | Fraction = 32
    activation_bits: int = 32


@dataclass(frozen=True)
class Lowered:
    """An integer graph, and where its values stand in the fake-quant graph it came from.

    Attributes:
        module: the lowered graph.
        activations: name of a fake-quant node of an activation -> name of the dequantize node in its place; of one with
            a range at run time, of the quantize node.
        weights: name of a fake-quant node of a weight -> its integers.
        layers: what each layer is stored and fed with.
    """

    module: fx.GraphModule
    activations: Mapping[str, str]
    weights: Mapping[str, Stored]
    layers: tuple[LoweredLayer, ...] = field(default=())

    def __repr__(self) -> str:
        return f"Lowered({len(self.weights)} weights and {len(self.activations)} activations in integers)"


@dataclass(frozen=True)
class Lower:
    """Put integers in place of fake-quant nodes.

    Attributes:
        pack: codes of four bits and fewer end to end; False: each in a byte, and layers with ranges at run time read
            floats, so that ops and names of tensors are those of the float graph.
    """

    pack: bool = True
    name: ClassVar[str] = "lower"

    def __call__(self, program: P, /) -> P:
        """Return the integer program of a fake-quant one in eval mode; `lowered` has the integers.

        Raises:
            PlanError: activations that are quantized are in another dtype than float32.
        """
        found = lower(program.module, pack=self.pack)
        return replace(program.rewritten(found.module), lowered=found, sites=())


def lower(fake: fx.GraphModule, *, pack: bool = True) -> Lowered:
    """The integer graph of a fake-quant graph alone; see `Lower`."""
    with torch.no_grad():
        return _Lowering(fake, pack).run()


class _Lowering:
    def __init__(self, fake: fx.GraphModule, pack: bool) -> None:
        self.pack = pack
        self.module, new_node = clone(fake)
        self.graph = self.module.graph
        self.fake_name = {new: old.name for old, new in new_node.items()}
        self.constants = constants_with_quantizers(self.module)
        self.layers = layers_of(self.module)
        self.values = Constants(self.module)
        self.integers: dict[fx.Node, Stored] = {}  # floats of a weight -> what stands there
        self.activations: dict[str, str] = {}
        self.weights: dict[str, Stored] = {}
        self.scales: dict[fx.Node, Affine] = {}  # dequantized activation -> scale and zero point
        self.clips: dict[tuple[float, int], tuple[float | None, float | None]] = {}
        self.shifts = {layer.weight: layer.shift for layer in biased_layers(self.module)}

    def run(self) -> Lowered:
        found = list(quantizer_nodes(self.module))
        for node, quantizer in found:
            if node in self.constants:
                self._weight(node, quantizer)
        for node, quantizer in found:
            if quantizer.spec.dynamic:
                self._at_run_time(node, quantizer)
        found = [(node, quantizer) for node, quantizer in found if not quantizer.spec.dynamic]
        activations = [(node, quantizer) for node, quantizer in found if node not in self.constants]
        positive = _clipped_at_zero(self.graph, dict(found))
        signed = {quantizer for node, quantizer in activations if node not in positive}
        for node, quantizer in activations:
            self._activation(node, quantizer, quantizer in signed)
        for node in list(self.graph.nodes):
            if compute_of(node):
                self._bias(node)
        self.graph.eliminate_dead_code()
        drop_unread(self.module)
        self.module.recompile()
        self.module.meta[CLIPS] = self.clips
        return Lowered(self.module, self.activations, self.weights, self.layers)

    # ------------------------------------------------------------------------------------------ weights
    def _weight(self, node: fx.Node, quantizer: Quantizer) -> None:
        (source,) = node.args
        assert isinstance(source, fx.Node)
        stored = quantizer.to_integers(self.values.of(source)).computable()
        self.weights[self.fake_name[node]] = stored
        lookups = [user for user in node.users if lookup_of(user)]
        written = stored.write(self._writer(node), self._stem(source), self.shifts.get(node, 0))
        if len(lookups) < len(node.users):
            floats = written.floats()
            self.integers[floats] = written.stored
            redirect([user for user in node.users if user not in lookups], node, floats)
        for user in lookups:
            written.look_up(user)
        self.graph.erase_node(node)

    # ------------------------------------------------------------------------------------------ activations
    def _activation(self, node: fx.Node, quantizer: Quantizer, signed: bool) -> None:
        (source,) = node.args
        assert isinstance(source, fx.Node)
        _check_dtype(node)
        levels = quantizer.to_integers(torch.zeros((), dtype=value(node).dtype))
        assert isinstance(levels, Affine), "activations have evenly spaced levels"
        integers = _unsigned(levels, signed)
        numbers = (float(integers.scale), int(integers.zero_point))
        arguments = (*numbers, integers.quant_min, integers.quant_max, integers.values.dtype)
        if clip_of(source) and all(user is node for user in source.users) and _saturates(source, integers):
            if _bounds(source) != (0, None):
                self.clips[numbers] = _bounds(source)
            source = source.all_input_nodes[0]
        make = before(node)
        codes = make(ops.quantize_per_tensor, self._transformed(source, quantizer, make), *arguments)
        result = make(ops.dequantize_per_tensor, codes, *arguments)
        self.activations[self.fake_name[node]] = result.name
        self.scales[result] = integers
        replace_node(node, result)

    def _at_run_time(self, node: fx.Node, quantizer: Quantizer) -> None:
        """Write codes, and a product of codes in the place of each layer that reads the value."""
        (source,) = node.args
        assert isinstance(source, fx.Node)
        if not self.pack:
            replace_node(node, source)
            return
        _check_dtype(node)
        make, per_token = before(node), quantizer.spec.granularity == "token"
        codes = make(dynamic.quantize_dynamic, source, per_token)
        parts = [make(operator.getitem, codes, k) for k in range(3)]
        self.activations[self.fake_name[node]] = codes.name
        for user in list(node.users):
            self._product(user, parts, per_token)
        self.graph.erase_node(node)

    def _product(self, node: fx.Node, parts: list[fx.Node], per_token: bool) -> None:
        """rows @ matrix + bias, the rows quantized at run time -> a product of integers of the same name."""
        operands, arguments = operands_of(node), bind(node)
        floats, make = arguments[operands.weight], before(node)
        assert isinstance(floats, fx.Node) and floats.target in (ops.dequantize_per_channel, ops.dequantize_per_tensor)
        codes, scale = (
            bind(floats)["input"],
            bind(floats)["scales" if self.integers[floats].dim is not None else "scale"],
        )
        if isinstance(scale, float):
            name = f"{self._stem(codes).removesuffix('_codes')}_scale"
            scale = make.tensor(self.module, name, torch.tensor(scale, dtype=torch.float32))
        bias = arguments[operands.bias] if operands.bias else None
        become(node, dynamic.matmul_dynamic, *parts, codes, scale, bias, operands.out == 0, per_token)

    def _transformed(self, source: fx.Node, quantizer: Quantizer, make: Maker) -> fx.Node:
        """What is rounded: the value itself, but for quantizers with an exponent."""
        exponent = quantizer.exponent
        if exponent == 1.0:
            return source
        sign = make(aten.sign.default, source)
        return make(aten.mul.Tensor, sign, make(aten.pow.Tensor_Scalar, make(aten.abs.default, source), exponent))

    # ------------------------------------------------------------------------------------------ biases
    def _bias(self, node: fx.Node) -> None:
        operands, arguments = operands_of(node), bind(node)
        bias = arguments.get(operands.bias) if operands.bias else None
        weight, data = self.integers.get(arguments[operands.weight]), self.scales.get(arguments[operands.data[0]])
        step = None if weight is None else weight.step
        if bias is None or step is None or data is None or bias not in self.constants:
            return
        if node.target is aten.addmm.default and (arguments["beta"] != 1 or arguments["alpha"] != 1):
            return
        floats = self.values.of(bias)
        scale = (step * data.scale).to(step.dtype)
        if scale.dim() and operands.transposed:  # its weight holds one group's outputs, and every group has them
            scale = scale.repeat(arguments["groups"])
        scale = scale.expand(floats.shape[-1:]).contiguous()
        codes = torch.round(floats / scale)
        if floats.dim() != 1 or not bool((codes.abs() <= INT32_MAX).all()):
            return
        stem, to = self._stem(bias), self._writer(node)
        buffers = (
            to.buffer(f"{stem}_codes", codes.to(torch.int32)),
            to.buffer(f"{stem}_scale", scale),
            to.buffer(f"{stem}_zero_point", torch.zeros_like(codes, dtype=torch.int32)),
        )
        bounds = (0, -INT32_MAX - 1, INT32_MAX, torch.int32)
        set_argument(node, operands.bias, to.make(ops.dequantize_per_channel, *buffers, *bounds))

    # ------------------------------------------------------------------------------------------ nodes and tensors
    def _writer(self, node: fx.Node) -> Writer:
        return Writer(self.module, before(node), self.pack)

    def _stem(self, source: fx.Node) -> str:
        """The name of the parameter that a constant is made of; the node's where it is made of several."""
        read = [n for n in _ancestors(source) if n.op == "get_attr"]
        return str(read[0].target) if len(read) == 1 else source.name


def _check_dtype(node: fx.Node) -> None:
    """Raise PlanError where activations are in another dtype than float32."""
    dtype = value(node).dtype
    if dtype != torch.float32:
        raise PlanError(
            f"activations in {str(dtype).removeprefix('torch.')} cannot be stored as integers",
            at=str(node.target),
            why="integer kernels take and give float32",
            fix="model.float(), and inputs in float32; or activation_bits=None for weights alone",
        )


def layers_of(fake: fx.GraphModule) -> tuple[LoweredLayer, ...]:
    """The compute ops and embeddings of a fake-quant graph, calibrated or not, and their bits."""
    quantizers, constant = dict(quantizer_nodes(fake)), constants_with_quantizers(fake)
    found = []
    for node in fake.graph.nodes:
        operands = compute_of(node)
        reads = operands or lookup_of(node)
        if reads is None:
            continue
        arguments = bind(node)
        weight = arguments[reads.weight]
        data = [arguments[name] for name in operands.data if arguments[name] is not weight] if operands else []
        bits = [round(_bits(quantizers.get(d))) for d in data]
        name = layer_name(weight, constant) if weight in constant else ""
        name = name or f"{module_path(node)}.{node.name}".lstrip(".")
        found.append(LoweredLayer(name, node.name, _bits(quantizers.get(weight)), max(bits, default=32)))
    return tuple(found)


def constants_with_quantizers(module: fx.GraphModule) -> set[fx.Node]:
    """As `constants`, quantizers of constants included."""
    found = constants(module.graph)
    for node, _ in quantizer_nodes(module):
        if found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _unsigned(integers: Affine, signed: bool) -> Affine:
    """The same levels as codes from 0 up; without those below 0 for values that are not `signed`."""
    if integers.quant_min >= 0:
        return integers
    if signed:
        return integers.moved(integers.quant_max + 1)
    values = integers.values.to(container(0, integers.quant_max))
    return replace(integers, values=values, quant_min=0)


def _clipped_at_zero(graph: fx.Graph, quantizers: Mapping[fx.Node, Quantizer]) -> set[fx.Node]:
    """What clips that let nothing below 0 through return, moved and joined."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        low = _bounds(node)[0]
        moves = node in quantizers or move_of(node) or node.target in (aten.cat.default, operator.getitem)
        operands = [n for n in node.all_input_nodes if tensor_values(n)]
        if (low is not None and low >= 0) or (
            moves and operands and found.issuperset(operands) and padded_with(node) >= 0
        ):
            found.add(node)
    return found


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    waiting, seen = [node], {node}
    while waiting:
        found = waiting.pop()
        yield found
        new = [n for n in found.all_input_nodes if n not in seen]
        seen.update(new)
        waiting += new


def _bits(quantizer: Quantizer | None) -> int | Fraction:
    if isinstance(quantizer, MixedQuantizer):
        mean = Fraction(int(quantizer.widths.sum()), quantizer.widths.numel())
        return int(mean) if mean.denominator == 1 else mean
    return 32 if quantizer is None else round(float(quantizer.bits.detach()))


def _saturates(clip: fx.Node, integers: Affine) -> bool:
    """Whether every value the clip would change has the code of the bound it is clipped to."""
    low, high = _bounds(clip)
    if low is None and high is None:
        return False

    def code(x: float) -> int:
        scale = float(integers.scale)
        return max(integers.quant_min, min(integers.quant_max, round(x / scale) + int(integers.zero_point)))

    return (low is None or code(low) == integers.quant_min) and (high is None or code(high) == integers.quant_max)


def _bounds(node: fx.Node) -> tuple[float | None, float | None]:
    """Return what a clip lets through, where that is known; (None, None) of another op."""
    clip = clip_of(node)
    return (None, None) if clip is None else clip.bounds(bind(node))
