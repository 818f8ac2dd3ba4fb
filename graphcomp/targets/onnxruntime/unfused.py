"""Weights that onnxruntime has no integer kernel for are dequantized by arithmetic, which it does not fuse.

onnxruntime makes an integer product of every MatMul between two DequantizeLinear, and fails to run the product where a
stack of matrices has a step per channel, where the constant on the left has a step per row, and where the weight has a
step per block. Between float activations, the weight of a convolution would be dequantized at each run, and the kernel
could not lay the weight out beforehand. Written as Cast, Sub and Mul the weight becomes float when the file is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

MOVES = ("Reshape", "Transpose", "Flatten", "Unsqueeze", "Squeeze", "Expand")


def write_out_unfusable(model: ir.Model) -> None:
    """Write out every dequantization of a constant that no integer kernel can read."""
    for node in [n for n in model.graph.all_nodes() if n.op_type == "DequantizeLinear" and n.domain == ""]:
        users = list(readers(node.outputs[0]))
        products = _per_channel(node) and any(_cannot_fuse(user, place) for user, place in users)
        if products or any(_reads_floats(user, place) for user, place in users):
            _write_out(model.graph, node)


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield what reads a value, through ops that only move it, with the place among the reader's inputs."""
    for user, place in value.uses():
        if user.op_type in MOVES and place == 0:
            yield from readers(user.outputs[0])
        else:
            yield user, place


def keep_sums_apart(weight: ir.Value) -> None:
    """Let biases behind the products of a float weight be added by Sum.

    onnxruntime makes a Gemm of MatMul and Add, and quantizes the float weight of a Gemm between quantized values on its
    own, with one step in all.
    """
    for product, _ in readers(weight):
        if product.op_type == "MatMul":
            for add, _ in readers(product.outputs[0]):
                if add.op_type == "Add":
                    add.op_type = "Sum"


def dequantized(value: ir.Value | None) -> bool:
    """Whether a value comes from a dequantization, through ops that only move it."""
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in MOVES:
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _per_channel(node: ir.Node) -> bool:
    """Whether it has one step per index of a dim; blocks have a step each, and rank 2 and more."""
    scale = node.inputs[1]
    return scale is not None and scale.const_value is not None and len(scale.const_value.shape) == 1


def _reads_floats(user: ir.Node, place: int) -> bool:
    """Whether it is a convolution of float activations with the constant."""
    return user.op_type in ("Conv", "ConvTranspose") and place == 1 and not dequantized(user.inputs[0])


def _cannot_fuse(user: ir.Node, place: int) -> bool:
    """Whether it is a product of integers with a constant on the left, or with a stack of matrices."""
    if user.op_type != "MatMul" or place > 1 or not dequantized(user.inputs[1 - place]):
        return False
    weight = user.inputs[place]
    return place == 0 or weight is None or weight.shape is None or len(weight.shape) > 2


def _write_out(graph: ir.Graph, node: ir.Node) -> None:
    """DequantizeLinear(codes, scale, zero) as (Cast(codes) - zero) * scale."""
    codes, scale = node.inputs[:2]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    assert codes is not None and scale is not None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    keep_sums_apart(by_arithmetic(node, codes, scale, zero, axis))


def by_arithmetic(node: ir.Node, codes: ir.Value, scale: ir.Value, zero: ir.Value | None, axis: int) -> ir.Value:
    """Replace `node` by (Cast(codes) - zero) * scale, with one scale and zero point per index of `axis`; the result."""
    from onnx_ir.tape import Tape

    rank = len(codes.shape) if codes.shape is not None else 1
    to, axis = {"to": scale.dtype}, axis % rank
    tape = Tape()
    found: Any = tape.op("Cast", [codes], to)
    if zero is not None and zero.const_value is not None and zero.const_value.numpy().any():
        found = tape.op("Sub", [found, tape.op("Cast", [_along(tape, zero, axis, rank)], to)])
    found = tape.op("Mul", [found, _along(tape, scale, axis, rank)])
    old = node.outputs[0]
    found.dtype, found.shape = old.dtype or scale.dtype, old.shape or codes.shape
    found.name, old.name = old.name, f"{old.name}_replaced"
    assert node.graph is not None
    node.graph.insert_before(node, tape.nodes)
    old.replace_all_uses_with(found, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    result: ir.Value = found
    return result


def _along(tape: Any, value: ir.Value, axis: int, rank: int) -> Any:
    """(c,) as (1, …, c, …, 1)."""
    import numpy as np
    import onnx_ir as ir

    shape = np.array([-1 if dim == axis else 1 for dim in range(rank)], np.int64)
    return tape.op("Reshape", [value, tape.op("Constant", [], {"value": ir.tensor(shape)})])
