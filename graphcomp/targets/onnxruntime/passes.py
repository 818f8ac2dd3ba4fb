"""Rewrites of an exported ONNX graph, on onnx-ir, to what onnxruntime turns into integer kernels.

`prepare` runs before onnxscript's optimizer, `finish` after it, `narrow` after that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphcomp.errors import ExportError
from graphcomp.quantization import ops
from graphcomp.targets.onnxruntime.norms import divide_by_roots, write_sums
from graphcomp.targets.onnxruntime.ops import DOMAIN, GROUPED, LOOK_UP, UNPACK, WIDE
from graphcomp.targets.onnxruntime.pads import fold_pads
from graphcomp.targets.onnxruntime.unfused import (
    by_arithmetic,
    dequantized,
    keep_sums_apart,
    readers,
    write_out_unfusable,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx_ir as ir

COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
IR_VERSION_OF_TWO_BITS = 13

SHIFT = "graphcomp.shift"
"""Key in the metadata of packed codes: by how many places they are shifted where they are widened."""


def prepare(model: ir.Model) -> None:
    """Constants where weights are. Of our own ops those stay that the optimizer would compute beforehand.

    Raises:
        ExportError: codes or groups of a weight are computed rather than stored.
    """
    import onnx_ir.passes.common as common

    for node in _nodes(model, UNPACK, DOMAIN):
        _unpack(model.graph, node)
    for node in _nodes(model, GROUPED, DOMAIN):
        _as_matmul(node)
        _blocks(model.graph, node)
    for node in _nodes(model, LOOK_UP, DOMAIN):
        _as_matmul(node)
    for node in _nodes(model, "DequantizeLinear"):
        _set_zero_points(model.graph, node)
    for node in _nodes(model, "Transpose"):
        _transpose_weight(model.graph, node)
    common.RemoveUnusedNodesPass()(model)


def finish(model: ir.Model) -> None:
    """Four-bit weights of integer layers, shared constants, and no traces of the machine that wrote the file."""
    import onnx_ir.passes.common as common

    for node in _nodes(model, GROUPED, DOMAIN):
        _gathered(node)
    for node in _nodes(model, WIDE, DOMAIN):
        _double(node)
    for node in _nodes(model, LOOK_UP, DOMAIN):
        _in_table(node)
    for node in _nodes(model, UNPACK, DOMAIN):
        _halve(node)
    model.opset_imports.pop(DOMAIN, None)
    for node in _nodes(model, "DequantizeLinear"):
        _widen_for_integer_kernels(model.graph, node)
    for node in _nodes(model, "MatMulInteger"):
        _widen_for_products(model.graph, node)
    write_out_unfusable(model)
    _share_weights(model.graph)
    fold_pads(model)
    write_sums(model)
    divide_by_roots(model)
    common.CommonSubexpressionEliminationPass()(model)
    _own_zero_points(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)


def name_lengths(
    model: ir.Model, named: Sequence[Mapping[int, str]], outputs: Sequence[Mapping[int, str]] = ()
) -> None:
    """Give dynamic lengths the names that were asked for, by input and dim, wherever the lengths occur.

    Args:
        outputs: names by output and dim, for lengths that are computed of others.
    """
    import onnx_ir as ir

    new: dict[str, str] = {}
    for value, names in zip(model.graph.inputs, named, strict=False):
        for dim, name in names.items():
            if value.shape is not None and isinstance(value.shape[dim], ir.SymbolicDim):
                new[str(value.shape[dim].value)] = name  # type: ignore[union-attr]
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values if new else ():
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, new) for size in value.shape])
    for value, names in zip(model.graph.outputs, outputs, strict=False):
        if value.shape is not None:
            value.shape = ir.Shape([names.get(dim, size) for dim, size in enumerate(value.shape)])


def _renamed(size: Any, new: Mapping[str, str]) -> Any:
    name = getattr(size, "value", None)
    return new.get(name, size) if isinstance(name, str) else size


def narrow(model: ir.Model, opset: int) -> None:
    """INT4 and UINT4 constants whose codes fit two bits become INT2 and UINT2, and the model of that opset.

    Later versions of the ops in between differ in the types they take alone.
    """
    import onnx_ir as ir

    to = {ir.DataType.INT4: ir.DataType.INT2, ir.DataType.UINT4: ir.DataType.UINT2}
    for codes in [v for v in model.graph.initializers.values() if v.dtype in to]:
        readers = [node for node, place in codes.uses() if place == 0]
        zeros = [n.inputs[2] for n in readers if n.op_type == "DequantizeLinear" and len(n.inputs) > 2]
        held = [codes, *(zero for zero in zeros if zero is not None)]
        if not readers or not all(_fits(value) for value in held):
            continue
        for value in held:
            assert isinstance(value.dtype, ir.DataType)
            kind = to[value.dtype]
            name = _free_name(model.graph, str(value.name).replace("_int4", "_int2"))
            value.replace_all_uses_with(_add_tensor(model.graph, _packed(_constant(value, "codes"), kind, name)))
            model.graph.initializers.pop(str(value.name))
        model.opset_imports[""] = opset
        model.ir_version = max(model.ir_version, IR_VERSION_OF_TWO_BITS)


def _fits(value: ir.Value) -> bool:
    """Whether codes, or zero points, fit two bits."""
    numbers = _constant(value, "zero points").astype("int8")
    low, high = (0, 3) if value.dtype is not None and not value.dtype.is_signed() else (-2, 1)
    return bool((numbers >= low).all() and (numbers <= high).all())


# ------------------------------------------------------------------------------------------------ four bits
def _unpack(graph: ir.Graph, node: ir.Node) -> None:
    """The packed bytes as an INT4 or UINT4 constant, whose codes may have fewer bits; see `_narrow`.

    A table that is looked up stays bytes, as Gather takes no INT4.
    """
    import onnx_ir as ir
    import torch

    packed, codes = node.inputs[0], node.outputs[0]
    assert packed is not None
    shape, signed = list(node.attributes["shape"].as_ints()), bool(node.attributes["signed"].as_int())
    data = torch.tensor(_constant(packed, "packed codes"))
    whole = ops.unpack(data, shape, node.attributes["bits"].as_int(), signed)
    looked_up = any(user.op_type == "Gather" and place == 0 for user, place in codes.uses())
    if looked_up and len(shape) == 2 and shape[1] % 2 == 0:
        rows = _add(graph, f"{packed.name}_rows", ops.pack(whole, 4).reshape(shape[0], shape[1] // 2).numpy())
        for user, place in list(codes.uses()):
            if user.op_type == "Gather" and place == 0:
                _look_up_packed(user, rows, shape[1], signed)
        if codes.uses():  # the same table as a weight, too: see _halve
            node.replace_input_with(0, rows)
            return
    elif looked_up:
        codes.replace_all_uses_with(_add(graph, f"{packed.name}_codes", whole.numpy()))
    else:
        kind = ir.DataType.INT4 if signed else ir.DataType.UINT4
        name = _free_name(graph, f"{packed.name}_int4")
        stored = _add_tensor(graph, _packed(whole.numpy(), kind, name))
        stored.meta[SHIFT] = node.attributes["shift"].as_int()
        codes.replace_all_uses_with(stored)
    graph.remove(node, safe=True)


def _look_up_packed(gather: ir.Node, rows: ir.Value, width: int, signed: bool) -> None:
    """Gather rows of bytes, then unpack only these."""
    ids, found = gather.inputs[1], gather.outputs[0]
    assert ids is not None and found.shape is not None
    tape = _tape()
    row = tape.op("Gather", [rows, ids], {"axis": 0})
    # every dim but the last is the batch's: 0 copies it
    shape = [0] * (len(found.shape) - 1) + [width]
    _insert(gather, tape, _halves(tape, row, shape, signed, found.dtype))


def _halve(node: ir.Node) -> None:
    """Unpack bytes of two codes by arithmetic: once, when the runtime loads the file."""
    packed, codes = node.inputs[0], node.outputs[0]
    assert packed is not None
    shape, signed = list(node.attributes["shape"].as_ints()), bool(node.attributes["signed"].as_int())
    tape = _tape()
    _insert(node, tape, _halves(tape, packed, shape, signed, codes.dtype))


def _halves(tape: Any, packed: ir.Value, shape: Sequence[int], signed: bool, kind: Any) -> Any:
    """The codes of bytes: the lower half first, then the upper one."""
    import numpy as np
    import onnx_ir as ir

    def constant(values: Any, dtype: Any) -> Any:
        return tape.op("Constant", [], {"value": ir.tensor(np.array(values, dtype))})

    low = tape.op("BitwiseAnd", [packed, constant(15, np.uint8)])
    high = tape.op("BitShift", [packed, constant(4, np.uint8)], {"direction": "RIGHT"})
    last = constant([-1], np.int64)
    pair = [tape.op("Unsqueeze", [half, last]) for half in (low, high)]
    codes = tape.op("Reshape", [tape.op("Concat", pair, {"axis": -1}), constant(shape, np.int64)])
    if signed:  # 0 … 15 to -8 … 7
        wide = tape.op("Cast", [tape.op("BitwiseXor", [codes, constant(8, np.uint8)])], {"to": ir.DataType.INT32})
        codes = tape.op("Sub", [wide, constant(8, np.int32)])
    return tape.op("Cast", [codes], {"to": kind})


def _widen_for_integer_kernels(graph: ir.Graph, node: ir.Node) -> None:
    """Put a Cast to INT8 between four-bit codes and the dequantization of a layer whose input is quantized, and the
    shift of the codes.

    onnxruntime has no integer kernel that reads INT4 and int8 activations; it folds what is computed of constants when
    it loads the file. Its product takes no INT8, so that it is of INT32.
    """
    import numpy as np
    import onnx_ir as ir

    codes = node.inputs[0]
    four = {ir.DataType.INT4: ir.DataType.INT8, ir.DataType.UINT4: ir.DataType.UINT8}
    if codes is None or codes.dtype not in four or _block_size(node) > 0:
        return
    shift = codes.meta.get(SHIFT, 0)
    if not shift and not any(
        user.op_type in COMPUTE and dequantized(user.inputs[0]) for user, _ in node.outputs[0].uses()
    ):
        return
    wide = four[codes.dtype]
    tape = _tape()
    widened = codes
    if shift:
        factor = tape.op("Constant", [], {"value": ir.tensor(np.array(2**shift, np.int32))})
        widened = tape.op("Mul", [tape.op("Cast", [codes], {"to": ir.DataType.INT32}), factor])
    widened = tape.op("Cast", [widened], {"to": wide})
    widened.dtype, widened.shape = wide, codes.shape
    graph.insert_before(node, tape.nodes)
    node.replace_input_with(0, widened)
    scales = node.inputs[1]
    assert scales is not None and scales.shape is not None
    old = node.inputs[2] if len(node.inputs) > 2 else None
    zeros = np.zeros(scales.shape.numpy(), wide.numpy()) if old is None else _constant(old, "zero points")
    node.resize_inputs(3)
    node.replace_input_with(2, _add(graph, f"{codes.name}_zero_points", zeros.astype(wide.numpy())))


def _block_size(node: ir.Node) -> int:
    return node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0


# ------------------------------------------------------------------------------------------------ groups
def _as_matmul(node: ir.Node) -> None:
    """Let a Gemm that reads this weight be MatMul and Add.

    onnxruntime has a kernel for MatMul with a weight in blocks (MatMulNBits), and none for Gemm; and it would quantize
    the float weight, from groups or a table, of a Gemm between quantized values a second time, on its own. On three
    dims, as it makes a Gemm of what has two.
    """
    import numpy as np
    import onnx_ir as ir

    for gemm, place in list(node.outputs[0].uses()):
        if gemm.op_type != "Gemm" or place != 1 or gemm.attributes["transB"].as_int() != 1:
            continue
        tape = _tape()
        turned = tape.op("Transpose", [gemm.inputs[1]], {"perm": [1, 0]})
        first = tape.op("Constant", [], {"value": ir.tensor(np.array([0], np.int64))})
        result = tape.op("MatMul", [tape.op("Unsqueeze", [gemm.inputs[0], first]), turned])
        if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
            result = tape.op("Add", [result, gemm.inputs[2]])
        _insert(gemm, tape, tape.op("Squeeze", [result, first]))


def _blocks(graph: ir.Graph, node: ir.Node) -> None:
    """Runs of equal length become blocks of one DequantizeLinear, where activations are float; other groups wait for
    `_gathered`."""
    import numpy as np
    import onnx_ir as ir

    values, scales, zeros, groups = node.inputs
    assert values is not None and scales is not None and zeros is not None and groups is not None
    index = _constant(groups, "the groups of a weight")
    count = int(index.max()) + 1
    length = len(index) // count
    users = [(user, place) for user, place in readers(node.outputs[0]) if user.op_type in COMPUTE and place < 2]
    if any(dequantized(user.inputs[1 - place]) for user, place in users) or scales.dtype == ir.DataType.DOUBLE:
        return
    if values.shape is None or len(values.shape) != 2 or not np.array_equal(index, np.arange(len(index)) // length):
        return
    points = _constant(zeros, "zero points")
    inputs = [values, scales]
    four = values.dtype in (ir.DataType.INT4, ir.DataType.UINT4)
    if points.any() or not four:  # see _set_zero_points
        name = _free_name(graph, f"{zeros.name}_blocks")
        kind = values.dtype
        assert isinstance(kind, ir.DataType)
        held = _packed(points, kind, name) if four else ir.Tensor(points.astype(kind.numpy()), kind, name=name)
        inputs.append(_add_tensor(graph, held))
    tape = _tape()
    _insert(node, tape, tape.op("DequantizeLinear", inputs, {"axis": 1, "block_size": length}))


def _gathered(node: ir.Node) -> None:
    """One scale and zero point per index, gathered by its group: computed once, when the runtime loads the file."""
    values, scales, zeros, groups = node.inputs
    assert values is not None and scales is not None and zeros is not None and groups is not None
    rank = len(values.shape) if values.shape is not None else 2
    to = {"to": scales.dtype}
    tape = _tape()
    zero, scale = (
        _between(tape, tape.op("Gather", [table, groups], {"axis": 1}), rank)
        for table in (tape.op("Cast", [zeros], to), scales)
    )
    result = tape.op("Mul", [tape.op("Sub", [tape.op("Cast", [values], to), zero]), scale])
    _insert(node, tape, result)
    keep_sums_apart(result)


def _double(node: ir.Node) -> None:
    """A weight of a model in float64: onnxruntime's DequantizeLinear gives float32 at most."""
    values, scales, zeros = node.inputs
    assert values is not None and scales is not None
    by_arithmetic(node, values, scales, zeros, node.attributes["axis"].as_int())


def _in_table(node: ir.Node) -> None:
    """Codes that are looked up in a table of values, or in one table per index of a dim: once, when the runtime loads
    the file.

    All tables are one, end to end, and each index adds the place where its table begins.
    """
    import numpy as np
    import onnx_ir as ir

    values, table = node.inputs
    axis = node.attributes["axis"].as_int()
    assert values is not None and table is not None and table.shape is not None

    def constant(numbers: Any) -> Any:
        return tape.op("Constant", [], {"value": ir.tensor(numbers)})

    tape = _tape()
    places: Any = tape.op("Cast", [values], {"to": ir.DataType.INT32})
    if axis >= 0:
        assert values.shape is not None
        channels, levels = table.shape.numpy()
        first = np.arange(channels, dtype=np.int32) * levels
        shape = [-1 if dim == axis else 1 for dim in range(len(values.shape))]
        places = tape.op("Add", [places, constant(first.reshape(shape))])
        table = tape.op("Reshape", [table, constant(np.array([-1], np.int64))])
    result = tape.op("Gather", [table, places], {"axis": 0})
    _insert(node, tape, result)
    keep_sums_apart(result)
    for user, place in list(readers(result)):
        if user.op_type in ("Conv", "ConvTranspose") and place == 1 and dequantized(user.inputs[0]):
            bias_apart(user)


def bias_apart(node: ir.Node) -> None:
    """Let the bias of a convolution, zeros without one, be added by Sum.

    onnxruntime quantizes the float weight of a convolution between quantized values on its own, with one step in all.
    """
    import numpy as np
    import onnx_ir as ir

    out, weight = node.outputs[0], node.inputs[1]
    assert out.shape is not None and weight is not None
    tape = _tape()
    bias: Any = node.inputs[2] if len(node.inputs) > 2 else None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    sums = tape.op(node.op_type, list(node.inputs[:2]), attributes)
    sums.dtype, sums.shape = out.dtype, out.shape
    if bias is None:
        kind = out.dtype
        assert isinstance(kind, ir.DataType)
        bias = tape.op("Constant", [], {"value": ir.tensor(np.zeros(1, kind.numpy()))})
    shape = np.array([-1] + [1] * (len(out.shape) - 2), np.int64)
    bias = tape.op("Reshape", [bias, tape.op("Constant", [], {"value": ir.tensor(shape)})])
    _insert(node, tape, tape.op("Sum", [sums, bias]))


def _between(tape: Any, value: ir.Value, rank: int) -> Any:
    """(c, i) as (c, 1, …, i), of `rank` dims."""
    import numpy as np
    import onnx_ir as ir

    if rank == 2:
        return value
    axes = tape.op("Constant", [], {"value": ir.tensor(np.arange(1, rank - 1, dtype=np.int64))})
    return tape.op("Unsqueeze", [value, axes])


# ------------------------------------------------------------------------------------------------ weights
def _set_zero_points(graph: ir.Graph, node: ir.Node) -> None:
    """Zero points as ONNX wants them: none for an int32 bias, of four bits for four-bit codes.

    Those of int8 weights stay even where all are 0: onnxruntime 1.32 fails on weights without any where it widens them
    to uint8 (see runtime.py).
    """
    import onnx_ir as ir

    codes = node.inputs[0]
    if len(node.inputs) < 3 or codes is None or node.inputs[2] is None:
        return
    producer = node.inputs[2].producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else node.inputs[2]
    held = None if source is None else ir.convenience.get_const_tensor(source)  # a constant, or of a Constant node
    if source is None or held is None:
        return
    zeros = held.numpy()
    if codes.dtype == ir.DataType.INT32 and not zeros.any():
        node.resize_inputs(2)
    elif codes.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        if zeros.any():
            name = _free_name(graph, f"{source.name}_int4")
            node.replace_input_with(2, _add_tensor(graph, _packed(zeros, codes.dtype, name)))
        else:
            node.resize_inputs(2)


def _transpose_weight(graph: ir.Graph, node: ir.Node) -> None:
    """Transpose(DequantizeLinear(constant)) as DequantizeLinear(transposed constant).

    A constant that has other users, too (a tied table), stays one: there a MatMul becomes a Gemm that transposes.
    """
    value = node.inputs[0]
    source = value.producer() if value is not None else None
    if value is not None and value.const_value is not None and _of_products(node) and len(value.uses()) == 1:
        turned = _turned(graph, value, list(node.attributes["perm"].as_ints()))
        node.outputs[0].replace_all_uses_with(turned)
        return
    if source is None or source.op_type != "DequantizeLinear":
        return
    codes, scales = source.inputs[:2]
    order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else None
    if codes is None or scales is None or order is None:
        return
    if codes.const_value is None or len(codes.uses()) > 1 or len(source.outputs[0].uses()) > 1:
        if order == [1, 0]:
            for user, place in list(node.outputs[0].uses()):
                _gemm(user, place, source.outputs[0])
        return
    fresh = _turned(graph, codes, order)
    inputs: list[ir.Value | None] = [fresh]
    attributes = {k: v.value for k, v in source.attributes.items()}
    for extra in source.inputs[1:]:
        swap = _block_size(source) > 0 and extra is not None
        inputs.append(_turned(graph, extra, order) if swap and extra is not None else extra)
    tape = _tape()
    attributes["axis"] = order.index(int(attributes.get("axis", 1)) % len(order)) if len(order) > 0 else 0
    result = tape.op("DequantizeLinear", inputs, attributes)
    _insert(node, tape, result, source.outputs[0].dtype, fresh.shape)


def _of_products(node: ir.Node) -> bool:
    """Whether products of integers alone read what a node returns."""
    users = [user.op_type for user, _ in node.outputs[0].uses()]
    return bool(users) and set(users) == {"MatMulInteger"}


def _widen_for_products(graph: ir.Graph, node: ir.Node) -> None:
    """Put a Cast to INT8 between four-bit codes and the product of integers that reads the codes."""
    import onnx_ir as ir

    codes = node.inputs[1]
    if codes is None or codes.dtype != ir.DataType.INT4:
        return
    tape = _tape()
    widened = tape.op("Cast", [codes], {"to": ir.DataType.INT8})
    widened.dtype, widened.shape = ir.DataType.INT8, codes.shape
    graph.insert_before(node, tape.nodes)
    node.replace_input_with(1, widened)


def _turned(graph: ir.Graph, value: ir.Value, order: Sequence[int]) -> ir.Value:
    """A constant with its dims in another order."""
    import numpy as np
    import onnx_ir as ir

    turned = np.ascontiguousarray(_constant(value, "scales").transpose(order))
    name, kind = _free_name(graph, f"{value.name}_t"), value.dtype
    assert isinstance(kind, ir.DataType)
    held = _add_tensor(graph, _packed(turned, kind, name) if kind.bitwidth == 4 else ir.Tensor(turned, kind, name=name))
    held.meta.update(value.meta)
    return held


def _packed(values: npt.NDArray[Any], kind: Any, name: str) -> Any:
    """A constant of two or four bits from one value per element."""
    import numpy as np
    import onnx_ir as ir
    import torch

    data = ops.pack(torch.from_numpy(values.astype(np.int8)), kind.bitwidth)
    return ir.PackedTensor(data.numpy(), kind, shape=ir.Shape(values.shape), name=name)


def _gemm(matmul: ir.Node, place: int, weight: ir.Value) -> None:
    """MatMul(x, transposed weight) as a Gemm on rows: x (…, i), weight (o, i) -> (…, o)."""
    import numpy as np
    import onnx_ir as ir

    data, out = matmul.inputs[0], matmul.outputs[0]
    if matmul.op_type != "MatMul" or place != 1 or data is None or out.shape is None or weight.shape is None:
        return
    rank, (o, i) = len(out.shape), weight.shape
    if not isinstance(o, int) or not isinstance(i, int):
        return
    tape = _tape()

    def constant(values: Any) -> Any:
        return tape.op("Constant", [], {"value": ir.tensor(np.array(values, np.int64))})

    rows = tape.op("Reshape", [data, constant([-1, i])])
    result = tape.op("Gemm", [rows, weight], {"transB": 1})
    if rank != 2:
        leading = tape.op("Shape", [data], {"start": 0, "end": -1})
        shape = tape.op("Concat", [leading, constant([o])], {"axis": 0})
        result = tape.op("Reshape", [result, shape])
    _insert(matmul, tape, result)


# ------------------------------------------------------------------------------------------------ helpers
def _nodes(model: ir.Model, kind: str, domain: str = "") -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type == kind and node.domain == domain]


def _tape() -> Any:
    from onnx_ir.tape import Tape

    return Tape()


def _insert(node: ir.Node, tape: Any, result: Any, dtype: Any = None, shape: Any = None) -> None:
    """Put the tape's nodes in the place of `node`, whose only output becomes `result`."""
    old = node.outputs[0]
    result.dtype, result.shape, result.name = dtype or old.dtype, shape or old.shape, old.name
    old.name = f"{old.name}_replaced"
    last = result.producer()
    assert last is not None and node.graph is not None
    last.name = node.name
    node.graph.insert_before(node, tape.nodes)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def _share_weights(graph: ir.Graph) -> None:
    """Equal constants of two dims and more become one: tied weights that were quantized one by one."""
    import hashlib

    first: dict[tuple[Any, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or len(tensor.shape) < 2 or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest())
        kept = first.setdefault(key, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            graph.initializers.pop(str(value.name))


def _own_zero_points(model: ir.Model) -> None:
    """Each weight gets a zero-point vector of its own.

    Where it widens int8 weights, onnxruntime 1.32 names the new zero points after the old ones, and fails when two
    weights share one.
    """
    import onnx_ir as ir

    taken: set[ir.Value] = set()
    for node in _nodes(model, "DequantizeLinear"):
        zeros = node.inputs[2] if len(node.inputs) > 2 else None
        if zeros is None or zeros.const_value is None or not _stored(node):
            continue
        if zeros in taken:
            name = _free_name(model.graph, f"{node.name}_zero_points")
            copied = ir.Tensor(zeros.const_value.numpy(), zeros.const_value.dtype, name=name)
            node.replace_input_with(2, _add_tensor(model.graph, copied))
        taken.add(zeros)


def _stored(node: ir.Node) -> bool:
    """Whether a DequantizeLinear reads a constant, widened or not."""
    codes = node.inputs[0]
    while codes is not None and (producer := codes.producer()) is not None and producer.op_type in ("Cast", "Mul"):
        codes = producer.inputs[0]
    return codes is not None and codes.is_initializer()


def _constant(value: ir.Value, what: str) -> npt.NDArray[Any]:
    if value.const_value is None:
        raise ExportError(
            f"{what} are computed, not stored", at=str(value.name), fix="store them as buffers of the graph"
        )
    return value.const_value.numpy()


def _free_name(graph: ir.Graph, name: str) -> str:
    while name in graph.initializers:
        name += "_"
    return name


def _add(graph: ir.Graph, name: str, values: npt.NDArray[Any]) -> ir.Value:
    import onnx_ir as ir

    return _add_tensor(graph, ir.Tensor(values, name=_free_name(graph, name)))


def _add_tensor(graph: ir.Graph, tensor: Any) -> ir.Value:
    import onnx_ir as ir

    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
