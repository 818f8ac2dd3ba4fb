"""Rewrite layers of an integer file to floats: the float file that an integer file is timed against, and what a guard
leaves in float.

A layer on floats has the weights of the integer file, as codes that onnxruntime widens once, when the file is loaded.
Where a value from 0 up was quantized, a ReLU stays: lowering leaves out a ReLU whose work the quantization does. Other
clips that it left out are known by the scale and the zero point of the value; where they are not known, as in a model
that was loaded, the ends of the range stand for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from graphcomp.errors import ExportError
from graphcomp.targets.onnxruntime.export import silent
from graphcomp.targets.onnxruntime.kernels import LAYERS, integers_behind, quantized_layer
from graphcomp.targets.onnxruntime.unfused import MOVES, by_arithmetic, dequantized

if TYPE_CHECKING:
    import onnx_ir as ir

DEPTHWISE, POINTWISE, SPATIAL, TURNED, PRODUCT, WEIGHTS = (
    "depthwise and grouped convolutions", "convolutions of kernel 1", "convolutions", "transposed convolutions",
    "linear layers and products", "layers with integer weights alone",
)  # fmt: skip
"""Kinds of layers, whose integer kernels pay or not together."""

Clips: TypeAlias = Mapping[tuple[float, int], tuple[float | None, float | None]]
"""Scale and zero point of a quantized value -> ends of the clip that stood in front of the value."""

SAME = (*MOVES, "Relu", "Clip")
"""Ops between a layer and the quantization of the layer's result."""


def integer_layers(path: Path) -> dict[str, str]:
    """Node of each layer of an ONNX file that reads integers, of weights at least -> the kind of the layer."""
    import onnx_ir as ir

    return {str(node.name): _kind(node) for node in ir.load(path).graph.all_nodes() if _on_integers(node)}


@dataclass(frozen=True)
class Layer:
    """A layer of an ONNX file that reads integers.

    Attributes:
        name: of the module that holds the weight, as far as the file says; else of the node.
        kind: see `integer_layers`.
        like: what layers have in common that take equally long: op, shape of the weight, attributes.
        elements: of the weight; 0 without one.
    """

    name: str
    kind: str
    like: str
    elements: int = 0


def described_layers(path: Path) -> dict[str, Layer]:
    """Node of each layer of an ONNX file that reads integers -> the layer."""
    import onnx_ir as ir

    return {str(node.name): _described(node) for node in ir.load(path).graph.all_nodes() if _on_integers(node)}


def _described(node: ir.Node) -> Layer:
    shapes = [
        [size if isinstance(size, int) else "?" for size in (value.shape if value is not None and value.shape else [])]
        for value in node.inputs[:2]
    ]
    holder = next((name for value in node.inputs[1::-1] if (name := _held_in(value))), str(node.name))
    attributes = sorted(str(attribute) for attribute in node.attributes.values())
    sizes = [size for size in shapes[1] if isinstance(size, int)]
    like = f"{node.op_type} {shapes[0] if node.op_type != 'Conv' else ''} {shapes[1]} {attributes}"
    return Layer(holder, _kind(node), like, math.prod(sizes) if len(sizes) == len(shapes[1]) else 0)


def _held_in(value: ir.Value | None) -> str:
    """Return the name of the module whose weight a value holds, behind dequantization and moves; "" for none."""
    while value is not None and (maker := value.producer()) is not None:
        value = maker.inputs[0] if maker.op_type in (*MOVES, *UNPACKS) else None
    found = CODES.fullmatch(str(value.name)) if value is not None and value.const_value is not None else None
    return "" if found is None else found[1].removesuffix(".weight")


UNPACKS = ("DequantizeLinear", "Cast", "Mul", "Sub")
"""Ops between codes of a weight, as stored, and the weight."""

CODES = re.compile(r"(.*?)_codes(_[a-z]+[0-9]+)?(_t)?")
"""The name of codes: of the weight, how they are stored, and whether they are transposed."""


def write_floats(source: Path, target: Path, layers: Collection[str] | None = None, clips: Clips | None = None) -> None:
    """Write the ONNX file `source` to `target` with layers on floats.

    Args:
        layers: names of nodes, of `integer_layers`. None: all, and no value is quantized.
        clips: scale and zero point of a value -> the ends of a clip, no ReLU, that stood in front of the value. None:
            not known.

    Raises:
        ExportError: a layer is not written as graphcomp writes one.
    """
    import onnx_ir as ir

    model = ir.load(source)
    with silent():
        _rewrite(model, layers, clips)
    external = f"{target.name}.data" if source.with_name(f"{source.name}.data").exists() else None
    ir.save(model, target, external_data=external)


def _rewrite(model: ir.Model, layers: Collection[str] | None, clips: Clips | None) -> None:
    import onnx_ir.passes.common as common

    chosen = [
        node for node in model.graph.all_nodes() if _on_integers(node) and (layers is None or str(node.name) in layers)
    ]
    held = {node for node in model.graph.all_nodes() if _on_integers(node)} - set(chosen)
    for node in chosen:
        if node.op_type == "MatMulInteger":
            _product_of_floats(node)
        else:
            _widen_constants(node)
    for node in [n for n in model.graph.all_nodes() if n.op_type == "QuantizeLinear" and n.domain == ""]:
        if layers is None or not _serves_integers(node, held):
            _clip(node, clips)
    common.RemoveUnusedNodesPass()(model)
    for node in [n for n in model.graph.all_nodes() if n.op_type == "DequantizeLinear" and _constant(n)]:
        if layers is None:
            _by_arithmetic(node)  # of biases that are added behind a product
    common.RemoveUnusedNodesPass()(model)
    for node in chosen:
        if layers is not None and node.graph is not None:
            _keep_apart(node)


def _on_integers(node: ir.Node) -> bool:
    """Whether a layer multiplies integers, or floats by a weight that is dequantized at each run."""
    if node.op_type == "MatMulInteger":
        return node.domain == ""
    if quantized_layer(node) is None:
        return False
    widened = any(integers_behind(value) and not dequantized(value) for value in node.inputs[:2])
    return not widened and any(dequantized(value) for value in node.inputs[:2])


def _kind(node: ir.Node) -> str:
    if node.op_type == "ConvTranspose":
        return TURNED
    if node.op_type != "MatMulInteger" and not all(dequantized(value) for value in node.inputs[:2]):
        return WEIGHTS
    if node.op_type != "Conv":
        return PRODUCT
    weight = node.inputs[1]
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    if groups > 1:
        return DEPTHWISE
    shape = list(weight.shape) if weight is not None and weight.shape is not None else []
    return POINTWISE if shape and all(size == 1 for size in shape[2:]) else SPATIAL


# ------------------------------------------------------------------------------------------------ one layer
def _widen_constants(node: ir.Node) -> None:
    """Let the codes of weight and bias be widened by arithmetic, which onnxruntime does when it loads the file."""
    import onnx_ir as ir

    for place, value in enumerate(node.inputs):
        maker = value.producer() if value is not None else None
        moved = []
        while maker is not None and maker.op_type in MOVES:
            moved.append(maker)
            maker = maker.inputs[0].producer() if maker.inputs[0] is not None else None
        if maker is None or maker.op_type != "DequantizeLinear" or not _constant(maker):
            continue
        own = _copied(maker)  # other layers may read the same codes
        last: Any = own.outputs[0]
        for move in reversed(moved):
            copy = ir.Node(
                "", move.op_type, [last, *move.inputs[1:]], attributes=list(move.attributes.values()), num_outputs=1
            )
            _like(copy.outputs[0], move.outputs[0])
            assert node.graph is not None
            node.graph.insert_before(node, copy)
            last = copy.outputs[0]
        node.replace_input_with(place, last)
        _by_arithmetic(own)


def _like(value: Any, other: ir.Value) -> None:
    """Give a value the dtype and the shape of another."""
    value.dtype, value.shape = other.dtype, other.shape


def _copied(node: ir.Node) -> ir.Node:
    """A copy of a dequantization, in front of its first reader."""
    import onnx_ir as ir

    old = node.outputs[0]
    copy = ir.Node("", node.op_type, list(node.inputs), attributes=list(node.attributes.values()), num_outputs=1)
    _like(copy.outputs[0], old)
    assert node.graph is not None
    node.graph.insert_after(node, copy)
    return copy


def _by_arithmetic(node: ir.Node) -> None:
    """Write (Cast(codes) - zero) * scale in place of a dequantization, or floats where the codes are in blocks."""
    codes, scale = node.inputs[:2]
    assert codes is not None and scale is not None
    if "block_size" in node.attributes and node.attributes["block_size"].as_int():
        _of_blocks(node)
        return
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    by_arithmetic(node, codes, scale, node.inputs[2] if len(node.inputs) > 2 else None, axis)


def _of_blocks(node: ir.Node) -> None:
    """Write the floats of a dequantization in blocks, as a constant."""
    import numpy as np
    import onnx_ir as ir

    held = [None if value is None else ir.convenience.get_const_tensor(value) for value in node.inputs]
    if held[0] is None or held[1] is None:
        raise ExportError("codes in blocks must be constants", at=str(node.name), fix="please report the model")
    axis, size = node.attributes["axis"].as_int(), node.attributes["block_size"].as_int()
    scale = np.repeat(held[1].numpy(), size, axis)
    codes = held[0].numpy().astype(scale.dtype)
    if len(held) > 2 and held[2] is not None:
        codes = codes - np.repeat(held[2].numpy().astype(scale.dtype), size, axis)
    assert isinstance(node.graph, ir.Graph) and node.inputs[0] is not None
    name = f"{node.inputs[0].name}_floats"
    while name in node.graph.initializers:
        name += "_"
    value = ir.Value(name=name, const_value=ir.Tensor(codes * scale, name=name))
    _like(value, node.outputs[0])
    node.graph.register_initializer(value)
    node.outputs[0].replace_all_uses_with(value)


def _constant(node: ir.Node) -> bool:
    """Whether a dequantization reads codes that are stored, widened or not."""
    value = node.inputs[0]
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type not in ("Cast", "Mul", *MOVES):
            return False
        value = maker.inputs[0]
    return value is not None and value.is_initializer()


def _product_of_floats(node: ir.Node) -> None:
    """Cast(MatMulInteger(codes of x, codes of w)) * scales -> MatMul(x, (Cast(codes of w)) * scale of w)."""
    import onnx_ir as ir
    from onnx_ir.tape import Tape

    codes, weight = node.inputs[:2]
    product, own = _scales(_reader(node.outputs[0]))
    data, last = _quantized(codes), product.outputs[0]
    tape: Any = Tape()
    wide = tape.op("Mul", [tape.op("Cast", [weight], {"to": ir.DataType.FLOAT}), own])
    result = tape.op("MatMul", [data, wide])
    result.dtype, result.shape, result.name = last.dtype, last.shape, last.name
    last.name = f"{last.name}_replaced"
    maker = result.producer()
    assert maker is not None and node.graph is not None
    maker.name = node.name
    node.name = f"{node.name}_replaced"
    node.graph.insert_before(node, tape.nodes)
    last.replace_all_uses_with(result, replace_graph_outputs=True)


def _reader(value: ir.Value) -> ir.Node:
    """Return the one node that reads a value."""
    users = [user for user, _ in value.uses()]
    if len(users) != 1:
        raise ExportError("sums of products must have one reader", at=str(value.name), fix="please report the model")
    return users[0]


def _scales(cast: ir.Node) -> tuple[ir.Node, ir.Value]:
    """Return the node whose result is scaled by both scales, and the scale of the weight."""
    first = _reader(cast.outputs[0])
    other = _beside(first, cast.outputs[0])
    maker = other.producer()
    if maker is not None and maker.op_type == "Mul":  # sums * (scale of the data * scale of the weight)
        weight = maker.inputs[1]
        assert weight is not None
        return first, weight
    second = _reader(first.outputs[0])
    return second, _beside(second, first.outputs[0])


def _beside(node: ir.Node, value: ir.Value) -> ir.Value:
    """Return the operand that a product multiplies with `value`."""
    found = [own for own in node.inputs if own is not value and own is not None]
    if node.op_type != "Mul" or len(found) != 1:
        raise ExportError("sums of products must be scaled", at=str(node.name), fix="please report the model")
    return found[0]


def _quantized(codes: ir.Value | None) -> ir.Value:
    """Return the floats that codes were made of at run time: by one op, or row by row by arithmetic."""
    maker = codes.producer() if codes is not None else None
    while maker is not None and maker.op_type in ("Cast", "Add", "Round"):
        codes = maker.inputs[0]
        maker = codes.producer() if codes is not None else None
    data = maker.inputs[0] if maker is not None and maker.op_type in ("DynamicQuantizeLinear", "Div") else None
    if data is None:
        raise ExportError("codes must be made at run time", at=str(codes and codes.name), fix="please report the model")
    return data


# ------------------------------------------------------------------------------------------------ values
def _serves_integers(node: ir.Node, held: Collection[ir.Node]) -> bool:
    """Whether a value must stay quantized for a layer on integers, or another integer kernel, before or behind it."""
    return any(user in held for user in _readers(node.outputs[0])) or _maker(node.inputs[0]) in held


def _readers(codes: ir.Value) -> Iterator[ir.Node]:
    """Yield what reads codes, looked at through the dequantization and ops that move or clip elements."""
    for user, _ in codes.uses():
        if user.op_type in ("DequantizeLinear", *SAME):
            yield from _readers(user.outputs[0])
        else:
            yield user


def _maker(value: ir.Value | None) -> ir.Node | None:
    """Return the op that computes a value, looked at through ops that move or clip elements."""
    maker = value.producer() if value is not None else None
    while maker is not None and maker.op_type in SAME:
        maker = maker.inputs[0].producer() if maker.inputs[0] is not None else None
    return maker


def _clip(node: ir.Node, clips: Clips | None) -> None:
    """x -> quantize -> dequantize becomes x behind the clip that quantization did the work of."""
    import numpy as np
    import onnx_ir as ir
    from onnx_ir.tape import Tape

    data, scale, zero = node.inputs[:3]
    assert data is not None and scale is not None and zero is not None and zero.dtype is not None
    held = [ir.convenience.get_const_tensor(value) for value in (scale, zero)]
    assert held[0] is not None and held[1] is not None
    step, middle = np.float32(held[0].numpy()), int(held[1].numpy())
    low, high = _ends(node, zero.dtype)
    known = None if clips is None else {(np.float32(s), z): ends for (s, z), ends in clips.items()}
    tape: Any = Tape()
    result: Any = data
    if known is None or (step, middle) in known:
        ends = ((low - middle) * step, (high - middle) * step) if known is None else known[step, middle]
        constants = [None if e is None else tape.op("Constant", [], {"value": ir.tensor(np.float32(e))}) for e in ends]
        result = tape.op("Clip", [data, *constants])
    elif middle == low and not _from_zero(data):
        result = tape.op("Relu", [data])
    if result is not data:
        result.dtype, result.shape = data.dtype or ir.DataType.FLOAT, data.shape
        assert node.graph is not None
        node.graph.insert_before(node, tape.nodes)
    for last in _dequantizations(node.outputs[0]):
        last.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)


def _from_zero(value: ir.Value) -> bool:
    """Whether a value is from 0 up by an op that says so."""
    maker = value.producer()
    while maker is not None and maker.op_type in (*MOVES, "MaxPool"):
        maker = maker.inputs[0].producer() if maker.inputs[0] is not None else None
    return maker is not None and maker.op_type in ("Relu", "Softmax", "Sigmoid")


def _ends(node: ir.Node, kind: Any) -> tuple[int, int]:
    """Return the lowest and the highest code, after a Clip of the codes where there is one."""
    import onnx_ir as ir

    low, high = int(kind.min), int(kind.max)
    for user, _ in node.outputs[0].uses():
        if user.op_type == "Clip":
            held = [None if v is None else ir.convenience.get_const_tensor(v) for v in user.inputs[1:3]]
            low = low if held[0] is None else int(held[0].numpy())
            high = high if held[1] is None else int(held[1].numpy())
    return low, high


def _dequantizations(codes: ir.Value) -> list[ir.Node]:
    found = []
    for user, _ in codes.uses():
        if user.op_type == "DequantizeLinear":
            found.append(user)
        elif user.op_type == "Clip":
            found += _dequantizations(user.outputs[0])
    return found


def _keep_apart(node: ir.Node) -> None:
    """Let the bias of a float layer between quantized values be added by Sum: onnxruntime quantizes the float weight of
    such a layer on its own, with one step in all."""
    from graphcomp.targets.onnxruntime.passes import bias_apart

    if node.op_type not in LAYERS or not dequantized(node.inputs[0]):
        return
    if node.op_type in ("Conv", "ConvTranspose") and any(
        user.op_type == "QuantizeLinear" for user in _all_readers(node)
    ):
        bias_apart(node)


def _all_readers(node: ir.Node) -> Iterator[ir.Node]:
    for user, _ in node.outputs[0].uses():
        yield user
        if user.op_type in SAME:
            yield from _all_readers(user)
