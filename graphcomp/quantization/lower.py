"""The lowering pass: fake-quant nodes become integers with quantize and dequantize nodes.

weight      integer buffer -> dequantize          four bits and fewer: packed end to end; six and fewer beside a bias:
            shifted to seven, so that the bias may be finer (see biases.py)
embedding   the integer table is looked up, then its rows' scales; the table is never made float
activation  quantize -> dequantize, unsigned: kernels ask for one integer type in and out, and for 0 as the lowest code
            behind a clip at 0
bias        int32 buffer on the scale of the products, so that an integer kernel adds it as it is
clip        gone where the quantizer behind it saturates at the same codes
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphcomp.errors import PlanError
from graphcomp.ir.graph import bind, clone, module_path, set_argument, tensor_values, value
from graphcomp.ir.run_nodes import Constants
from graphcomp.ops.answers import clip_of, compute_of, lookup_of, move_of, operands_of
from graphcomp.quantization import ops
from graphcomp.quantization.biases import KERNEL_BITS, biased_layers
from graphcomp.quantization.fold import drop_unread
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.placement import (
    constants,
    layer_name,
    padded_with,
)
from graphcomp.quantization.quantizers.base import Codebook, Integers, Quantizer, Stored, container, spread
from graphcomp.quantization.tensors import add_tensor
from graphcomp.torch_compat import schema_of

aten = torch.ops.aten

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class LoweredLayer:
    """One compute op or embedding: the bits of its weight and of what it reads (32: float).

    Of a product of two activations the second stands for the weight.
    """

    name: str  # of its weight, or of the op
    node: str  # of the graph, as in the float graph
    weight_bits: int = 32
    activation_bits: int = 32


@dataclass(frozen=True)
class Lowered:
    """An integer graph, and where its values stand in the fake-quant graph it came from.

    Attributes:
        module: the lowered graph.
        activations: name of a fake-quant node of an activation -> name of the dequantize node in its place.
        weights: name of a fake-quant node of a weight -> its integers.
        layers: what each layer is stored and fed with.
    """

    module: fx.GraphModule
    activations: Mapping[str, str]
    weights: Mapping[str, Stored]
    layers: tuple[LoweredLayer, ...] = field(default=())


def lower(fake: fx.GraphModule, *, pack: bool = True) -> Lowered:
    """The integer graph of a fake-quant graph in eval mode; `fake` is not changed.

    Args:
        pack: codes of four bits and fewer end to end; False: each in a byte.

    Raises:
        PlanError: activations that are quantized are in another dtype than float32.
    """
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
        self.integers: dict[fx.Node, Integers] = {}  # dequantized value -> its integers
        self.activations: dict[str, str] = {}
        self.weights: dict[str, Stored] = {}
        self.scales: dict[fx.Node, Integers] = {}  # dequantized activation -> scale and zero point
        self.shifts = {layer.weight: layer.shift for layer in biased_layers(self.module)}

    def run(self) -> Lowered:
        found = list(quantizer_nodes(self.module))
        for node, quantizer in found:
            if node in self.constants:
                self._weight(node, quantizer)
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
        self.graph.lint()
        self.module.recompile()
        return Lowered(self.module, self.activations, self.weights, self.layers)

    # ------------------------------------------------------------------------------------------ weights
    def _weight(self, node: fx.Node, quantizer: Quantizer) -> None:
        (source,) = node.args
        assert isinstance(source, fx.Node)
        stored = quantizer.stored(self.values.of(source))
        if isinstance(stored, Codebook):
            self._codebook(node, source, stored)
            return
        integers = _signed(stored)
        self.weights[self.fake_name[node]] = integers
        stem = self._stem(source)
        lookups = [user for user in node.users if lookup_of(user)]
        with self.graph.inserting_before(node):
            codes, integers = self._codes(stem, integers, self.shifts.get(node, 0), node)
            scale = self._buffer(f"{stem}_scale", integers.scale, node)
            zero = self._buffer(f"{stem}_zero_point", integers.zero_point.to(torch.int32), node)
            if len(lookups) < len(node.users):
                dequantized = self._dequantize(stem, codes, scale, zero, integers, node)
                dequantized = self._cast(dequantized, value(node).dtype, node)
                self.integers[dequantized] = integers
                for user in [u for u in node.users if u not in lookups]:
                    user.replace_input_with(node, dequantized)
        for user in lookups:
            self._lookup(user, codes, scale, zero, integers)
        self.graph.erase_node(node)

    def _codebook(self, node: fx.Node, source: fx.Node, codebook: Codebook) -> None:
        """Codes of -1, 0 and 1, packed, times the levels on either side: max(code, 0) above + min(code, 0) below."""
        self.weights[self.fake_name[node]] = codebook
        stem, like, dim = self._stem(source), node, codebook.dim or 0
        ones = torch.ones(codebook.values.shape[dim], dtype=torch.float32, device=codebook.values.device)
        low, high = codebook.quant_min, codebook.quant_max
        whole = Integers(codebook.values, ones, torch.zeros_like(ones, dtype=torch.int32), low, high, dim)
        levels = {"above": codebook.above, "below": codebook.below}
        with self.graph.inserting_before(node):
            codes, whole = self._codes(stem, whole, 0, like)
            scale, zero = (
                self._buffer(f"{stem}_{n}", t, like) for n, t in (("scale", ones), ("zero_point", whole.zero_point))
            )
            floats = self._cast(self._dequantize(stem, codes, scale, zero, whole, like), codebook.above.dtype, like)
            sides = []
            for (name, level), clamp in zip(
                levels.items(), (aten.clamp_min.default, aten.clamp_max.default), strict=True
            ):
                along = spread(level, codebook.values.dim(), codebook.dim).contiguous()
                side = self._call(clamp, (floats, 0), like)
                sides.append(self._call(aten.mul.Tensor, (side, self._buffer(f"{stem}_{name}", along, like)), like))
            weight = self._cast(self._call(aten.add.Tensor, tuple(sides), like), value(node).dtype, like)
        node.replace_all_uses_with(weight)
        self.graph.erase_node(node)

    def _codes(self, stem: str, integers: Integers, shift: int, like: fx.Node) -> tuple[fx.Node, Integers]:
        """The node that yields the codes, unpacked and shifted, and what they are."""
        shifted = _shifted(integers, shift)
        low, high = integers.quant_min, integers.quant_max
        signed = low < 0
        bits = max(max(high, -1 - low).bit_length() + signed, min(ops.PACKED_BITS))
        if bits > max(ops.PACKED_BITS) or not self.pack:
            return self._buffer(f"{stem}_codes", shifted.values, like), shifted
        packed = self._buffer(f"{stem}_codes", ops.pack(integers.values, bits), like)
        arguments = (packed, list(integers.values.shape), bits, signed, *([shift] if shift else []))
        return self._call(torch.ops.graphcomp.unpack.default, arguments, like), shifted

    def _dequantize(
        self, stem: str, codes: fx.Node, scale: fx.Node, zero: fx.Node, integers: Integers, like: fx.Node
    ) -> fx.Node:
        bounds = (integers.quant_min, integers.quant_max, integers.values.dtype)
        if integers.groups is not None:
            groups = self._buffer(f"{stem}_groups", integers.groups, like)
            return self._call(torch.ops.graphcomp.dequantize_grouped.default, (codes, scale, zero, groups), like)
        if integers.dim is not None:
            return self._call(ops.dequantize_per_channel, (codes, scale, zero, integers.dim, *bounds), like)
        numbers = (float(integers.scale), int(integers.zero_point))
        return self._call(ops.dequantize_per_tensor, (codes, *numbers, *bounds), like)

    def _lookup(self, user: fx.Node, codes: fx.Node, scale: fx.Node, zero: fx.Node, integers: Integers) -> None:
        """embedding(dequantized table, ids) -> (embedding(codes, ids) - zero point) * scale of the row."""
        assert integers.groups is None, "an embedding has one scale per row or one in all"
        arguments = bind(user)
        rest = tuple(arguments[a.name] for a in schema_of(user.target).arguments[1:])
        with self.graph.inserting_before(user):
            row = self._call(user.target, (codes, *rest), user)
            row = self._call(aten.to.dtype, (row, integers.scale.dtype), user)
            if bool((integers.zero_point != 0).any()):
                row = self._call(aten.sub.Tensor, (row, self._row(zero, integers, rest, user)), user)
            row = self._call(aten.mul.Tensor, (row, self._row(scale, integers, rest, user)), user)
            row = self._cast(row, value(user).dtype, user)
        user.replace_all_uses_with(row)
        self.graph.erase_node(user)

    def _row(self, parameter: fx.Node, integers: Integers, rest: tuple[Any, ...], user: fx.Node) -> fx.Node:
        if integers.dim is None:
            return parameter
        column = self._call(aten.view.default, (parameter, [-1, 1]), parameter)
        return self._call(user.target, (column, *rest), user)

    # ------------------------------------------------------------------------------------------ activations
    def _activation(self, node: fx.Node, quantizer: Quantizer, signed: bool) -> None:
        (source,) = node.args
        assert isinstance(source, fx.Node)
        dtype = value(node).dtype
        if dtype != torch.float32:
            raise PlanError(
                f"activations in {str(dtype).removeprefix('torch.')} cannot be stored as integers",
                at=str(node.target),
                why="integer kernels take and give float32",
                fix="model.float(), and inputs in float32; or activation_bits=None for weights alone",
            )
        integers = _unsigned(quantizer.to_integers(torch.zeros((), dtype=dtype)), signed)
        numbers = (float(integers.scale), int(integers.zero_point))
        arguments = (*numbers, integers.quant_min, integers.quant_max, integers.values.dtype)
        if clip_of(source) and all(user is node for user in source.users) and _saturates(source, integers):
            source = source.all_input_nodes[0]
        with self.graph.inserting_before(node):
            source = self._transformed(source, quantizer, node)
            codes = self._call(ops.quantize_per_tensor, (source, *arguments), node)
            result = self._call(ops.dequantize_per_tensor, (codes, *arguments), node)
        node.replace_all_uses_with(result)
        self.activations[self.fake_name[node]] = result.name
        self.scales[result] = integers
        self.graph.erase_node(node)

    def _transformed(self, source: fx.Node, quantizer: Quantizer, like: fx.Node) -> fx.Node:
        """What is rounded: the value itself, but for quantizers with an exponent."""
        exponent = quantizer.exponent
        if exponent == 1.0:
            return source
        sign = self._call(aten.sign.default, (source,), like)
        power = self._call(aten.pow.Tensor_Scalar, (self._call(aten.abs.default, (source,), like), exponent), like)
        return self._call(aten.mul.Tensor, (sign, power), like)

    # ------------------------------------------------------------------------------------------ biases
    def _bias(self, node: fx.Node) -> None:
        operands, arguments = operands_of(node), bind(node)
        bias = arguments.get(operands.bias) if operands.bias else None
        weight, data = self.integers.get(arguments[operands.weight]), self.scales.get(arguments[operands.data[0]])
        if bias is None or weight is None or data is None or bias not in self.constants:
            return
        if weight.groups is not None or bool((weight.zero_point != 0).any()):
            return  # the products have no one scale per channel
        if node.target is aten.addmm.default and (arguments["beta"] != 1 or arguments["alpha"] != 1):
            return
        floats = self.values.of(bias)
        scale = (weight.scale * data.scale).to(weight.scale.dtype)
        if scale.dim() and operands.transposed:  # its weight holds one group's outputs, and every group has them
            scale = scale.repeat(arguments["groups"])
        scale = scale.expand(floats.shape[-1:]).contiguous()
        codes = torch.round(floats / scale)
        if floats.dim() != 1 or not bool((codes.abs() <= INT32_MAX).all()):
            return
        stem = self._stem(bias)
        with self.graph.inserting_before(node):
            buffers = (
                self._buffer(f"{stem}_codes", codes.to(torch.int32), bias),
                self._buffer(f"{stem}_scale", scale, bias),
                self._buffer(f"{stem}_zero_point", torch.zeros_like(codes, dtype=torch.int32), bias),
            )
            bounds = (0, -INT32_MAX - 1, INT32_MAX, torch.int32)
            set_argument(node, operands.bias, self._call(ops.dequantize_per_channel, (*buffers, *bounds), bias))

    # ------------------------------------------------------------------------------------------ nodes and tensors
    def _call(self, target: Any, arguments: tuple[Any, ...], like: fx.Node) -> fx.Node:
        node = self.graph.call_function(target, arguments)
        node.meta = {key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta}
        shown = [a.meta.get("val") if isinstance(a, fx.Node) else a for a in arguments]
        node.meta["val"] = target(*shown)
        return node

    def _cast(self, node: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        """`node` in the dtype of the model: what integers stand for is float32."""
        return node if value(node).dtype == dtype else self._call(aten.to.dtype, (node, dtype), like)

    def _buffer(self, name: str, tensor: Tensor, like: fx.Node) -> fx.Node:
        """A tensor laid out as it is when it is read from a file: sums of another order round otherwise."""
        return add_tensor(self.module, name, tensor.detach().clone(memory_format=torch.contiguous_format), like)

    def _stem(self, source: fx.Node) -> str:
        """The name of the parameter that a constant is made of; the node's where it is made of several."""
        read = [n for n in _ancestors(source) if n.op == "get_attr"]
        return str(read[0].target) if len(read) == 1 else source.name


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
        bits = [_bits(quantizers.get(d)) for d in data]
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


def _signed(integers: Integers) -> Integers:
    """The same floats from int16 where the codes are uint16, which torch cannot subtract a zero point from."""
    if integers.values.dtype is not torch.uint16:
        return integers
    offset = (integers.quant_max + 1) // 2
    return replace(
        integers,
        values=(integers.values.to(torch.int32) - offset).to(torch.int16),
        zero_point=integers.zero_point - offset,
        quant_min=integers.quant_min - offset,
        quant_max=integers.quant_max - offset,
    )


def _shifted(integers: Integers, shift: int) -> Integers:
    """The same floats from codes that are shifted by so many places."""
    if shift == 0:
        return integers
    low, high = integers.quant_min << shift, integers.quant_max << shift
    assert max(high, -1 - low).bit_length() < KERNEL_BITS and not bool(integers.zero_point.any())
    return replace(
        integers,
        values=(integers.values.to(torch.int32) << shift).to(torch.int8),
        scale=integers.scale / 2**shift,
        quant_min=low,
        quant_max=high,
    )


def _unsigned(integers: Integers, signed: bool) -> Integers:
    """The same levels as codes from 0 up; without those below 0 for values that are not `signed`."""
    low, high = integers.quant_min, integers.quant_max
    if low >= 0:
        return integers
    offset = high + 1 if signed else 0
    low, high = (low + offset if signed else 0), high + offset
    values = (integers.values.to(torch.int32) + offset).to(container(low, high))
    return replace(integers, values=values, zero_point=integers.zero_point + offset, quant_min=low, quant_max=high)


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


def _bits(quantizer: Quantizer | None) -> int:
    return 32 if quantizer is None else round(float(quantizer.bits.detach()))


def _saturates(clip: fx.Node, integers: Integers) -> bool:
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
