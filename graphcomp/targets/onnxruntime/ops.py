"""How each op of a lowered graph is written in ONNX (for `torch.onnx.export`, whose own table drops the code range).

What needs the values of constants is written as an op of the private domain `graphcomp`, and replaced by
`graphcomp.targets.onnxruntime.passes` once they are known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphcomp.quantization import dynamic, ops
from graphcomp.quantization.dynamic import MIDDLE, SMALLEST

DOMAIN = "graphcomp"
UNPACK, GROUPED, WIDE, LOOK_UP = "Unpack", "DequantizeGrouped", "DequantizeDouble", "LookUp"


def translation_table(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch op -> a function that writes it with the ONNX ops of `opset`."""
    import numpy as np
    import onnx
    import onnxscript
    from onnx_ir import DataType
    from onnx_ir import tensor as tensor_of
    from onnxscript.values import Op, Opset

    op = getattr(onnxscript, f"opset{opset}")
    private = Opset(DOMAIN, 1)
    schema = onnx.defs.OpSchema
    parameter, attribute = schema.FormalParameter, schema.Attribute
    kinds = [
        ("T", ["tensor(int8)", "tensor(uint8)"], ""),
        ("F", ["tensor(float)", "tensor(float16)", "tensor(double)"], ""),
    ]
    integers = schema.AttrType.INT, schema.AttrType.INTS
    unpack_schema = schema(
        UNPACK,
        DOMAIN,
        1,
        inputs=[parameter("packed", "tensor(uint8)")],
        outputs=[parameter("codes", "T")],
        type_constraints=kinds[:1],
        attributes=[
            attribute("shape", integers[1]),
            attribute("bits", integers[0]),
            attribute("signed", integers[0]),
            attribute("shift", integers[0]),
        ],
    )
    grouped_schema = schema(
        GROUPED,
        DOMAIN,
        1,
        inputs=[
            parameter("values", "T"),
            parameter("scales", "F"),
            parameter("zero_points", "tensor(int32)"),
            parameter("groups", "tensor(int64)"),
        ],
        outputs=[parameter("weight", "F")],
        type_constraints=kinds,
    )
    wide_schema = schema(
        WIDE,
        DOMAIN,
        1,
        inputs=[
            parameter("values", "T"),
            parameter("scales", "tensor(double)"),
            parameter("zero_points", "tensor(int32)"),
        ],
        outputs=[parameter("weight", "tensor(double)")],
        type_constraints=kinds[:1],
        attributes=[attribute("axis", integers[0])],
    )
    look_up_schema = schema(
        LOOK_UP,
        DOMAIN,
        1,
        inputs=[parameter("values", "T"), parameter("table", "F")],
        outputs=[parameter("weight", "F")],
        type_constraints=kinds,
        attributes=[attribute("axis", integers[0])],
    )
    look_up_op = Op(private, LOOK_UP, look_up_schema)
    unpack_op, grouped_op = Op(private, UNPACK, unpack_schema), Op(private, GROUPED, grouped_schema)
    wide_op = Op(private, WIDE, wide_schema)

    def constant(number: float, dtype: int) -> Any:
        kind = DataType(dtype)
        return op.Constant(value=tensor_of(np.array(number, dtype=kind.numpy()), dtype=kind))

    def floating(x: Any) -> int:
        return int(DataType.FLOAT16 if x.dtype == DataType.FLOAT16 else DataType.FLOAT)

    def quantize_per_tensor(x, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int):  # type: ignore[no-untyped-def]
        kind = DataType(dtype)
        bounds = np.iinfo(kind.numpy())
        narrow = (quant_min, quant_max) != (bounds.min, bounds.max)
        if narrow and kind.bitwidth > 8:  # onnxruntime clips no 16-bit integers
            low, high = ((bound - zero_point) * scale for bound in (quant_min, quant_max))
            x = op.Clip(x, constant(low, floating(x)), constant(high, floating(x)))
        codes = op.QuantizeLinear(x, constant(scale, floating(x)), constant(zero_point, dtype))
        if narrow and kind.bitwidth == 8:  # after it, so that onnxruntime still sees Conv -> QuantizeLinear
            codes = op.Clip(codes, constant(quant_min, dtype), constant(quant_max, dtype))
        return codes

    def dequantize_per_tensor(  # type: ignore[no-untyped-def]
        x, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int, out_dtype: int = -1
    ):
        to = DataType.FLOAT if out_dtype in (-1, None) else out_dtype
        return op.DequantizeLinear(x, constant(scale, to), constant(zero_point, dtype))

    def dequantize_per_channel(  # type: ignore[no-untyped-def]
        x, scales, zero_points, axis: int, quant_min: int, quant_max: int, dtype: int, out_dtype: int = -1
    ):
        to = DataType.FLOAT if out_dtype in (-1, None) else out_dtype
        if scales.dtype == DataType.DOUBLE:  # for which DequantizeLinear has no kernel
            return op.Cast(wide_op(x, scales, zero_points, axis=axis), to=to)
        scales = op.Cast(scales, to=to)
        if zero_points is None:
            return op.DequantizeLinear(x, scales, axis=axis)
        return op.DequantizeLinear(x, scales, op.Cast(zero_points, to=dtype), axis=axis)

    def unpack(packed, shape, bits: int, signed: bool, shift: int = 0):  # type: ignore[no-untyped-def]
        return unpack_op(packed, shape=list(shape), bits=bits, signed=int(signed), shift=shift)

    def dequantize_grouped(values, scales, zero_points, groups):  # type: ignore[no-untyped-def]
        return grouped_op(values, scales, zero_points, groups)

    def look_up(values, table, axis: int = -1):  # type: ignore[no-untyped-def]
        return look_up_op(values, table, axis=-1 if axis is None else axis)  # -1: one table for all

    def quantize_dynamic(x, per_token: bool):  # type: ignore[no-untyped-def]
        if not per_token:
            return op.DynamicQuantizeLinear(x)
        steps, middle = constant(MIDDLE - 1, DataType.FLOAT), constant(MIDDLE, DataType.FLOAT)
        last = op.Constant(value_ints=[-1])
        scale = op.Div(op.ReduceMax(op.Abs(x), last, keepdims=1), steps)
        empty = op.Equal(scale, constant(0, DataType.FLOAT))
        scale = op.Where(empty, constant(1, DataType.FLOAT), op.Max(scale, constant(SMALLEST, DataType.FLOAT)))
        codes = op.Cast(op.Add(op.Round(op.Div(x, scale)), middle), to=DataType.UINT8)
        return codes, scale, constant(MIDDLE, DataType.UINT8)

    def matmul_dynamic(codes, scale, zero_point, weight, weight_scale, bias, turned: bool, per_token: bool):  # type: ignore[no-untyped-def]
        matrix = op.Transpose(weight, perm=[1, 0]) if turned else weight
        sums = op.Cast(op.MatMulInteger(codes, matrix, zero_point), to=DataType.FLOAT)
        # one range per tensor in the form that onnxruntime makes one kernel of
        first = [op.Mul(sums, scale), weight_scale] if per_token else [sums, op.Mul(scale, weight_scale)]
        return op.Mul(*first) if bias is None else op.Add(op.Mul(*first), bias)

    return {
        dynamic.quantize_dynamic: quantize_dynamic,
        dynamic.matmul_dynamic: matmul_dynamic,
        ops.quantize_per_tensor: quantize_per_tensor,
        ops.dequantize_per_tensor: dequantize_per_tensor,
        ops.dequantize_per_channel: dequantize_per_channel,
        torch.ops.graphcomp.unpack.default: unpack,
        torch.ops.graphcomp.dequantize_grouped.default: dequantize_grouped,
        ops.LOOK_UP: look_up,
    }
