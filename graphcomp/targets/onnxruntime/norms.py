"""Residual sums in front of a layer norm become Sum.

onnxruntime makes one kernel of Add and LayerNormalization (SkipLayerNormalization), which on CPUs takes three times as
long as the two it replaces (onnxruntime 1.32, docs/measured.md). It knows the pattern by Add; Sum of two is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def write_sums(model: ir.Model) -> None:
    """Turn each Add of two computed tensors that a LayerNormalization reads, and nothing quantizes, into a Sum."""
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Add" or node.domain != "" or any(_stored(value) for value in node.inputs):
            continue
        readers = {user.op_type for user, _ in node.outputs[0].uses()}
        if "LayerNormalization" in readers and "QuantizeLinear" not in readers:
            node.op_type = "Sum"


def _stored(value: ir.Value | None) -> bool:
    """Whether it is a constant, dequantized or not: a bias."""
    maker = value.producer() if value is not None else None
    if maker is not None and maker.op_type == "DequantizeLinear":
        value = maker.inputs[0]
    return value is None or value.is_initializer()
