"""Norms as onnxruntime runs them fastest.

Residual sums in front of a layer norm become Sum: onnxruntime makes one kernel of Add and LayerNormalization
(SkipLayerNormalization), which on CPUs takes three times as long as the two it replaces (onnxruntime 1.32,
docs/measured.md). It knows the pattern by Add; Sum of two is the same.

Root mean square norms multiply by the reciprocal of a root in torch's translation; onnxruntime has one kernel
(SimplifiedLayerNormalization) for the pattern that divides by the root.
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


def divide_by_roots(model: ir.Model) -> None:
    """Turn x * (1 / sqrt(mean(x ** 2) + eps)) into x / sqrt(mean(x ** 2) + eps)."""
    import onnx_ir as ir

    for inverse in [node for node in model.graph.all_nodes() if node.op_type == "Reciprocal" and node.domain == ""]:
        root = inverse.inputs[0]
        users = [user for user, _ in inverse.outputs[0].uses()]
        if root is None or len(users) != 1 or users[0].op_type != "Mul" or inverse.outputs[0].is_graph_output():
            continue
        product = users[0]
        data = next(value for value in product.inputs if value is not inverse.outputs[0])
        if data is None or _squared(root) is not data:
            continue
        divided = ir.Node("", "Div", [data, root], name=product.name)
        old, new = product.outputs[0], divided.outputs[0]
        new.type, new.shape, new.name = old.type, old.shape, old.name
        old.name = f"{old.name}_replaced"
        assert product.graph is not None and inverse.graph is not None
        product.graph.insert_before(product, divided)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        product.graph.remove(product, safe=True)
        inverse.graph.remove(inverse, safe=True)


def _squared(root: ir.Value) -> ir.Value | None:
    """Return x of sqrt(mean(x ** 2) + eps); None where the value is something else."""
    value: ir.Value | None = root
    for kind in ("Sqrt", "Add", "ReduceMean", "Pow"):
        maker = None if value is None else value.producer()
        if maker is None or maker.op_type != kind:
            return None
        value = maker.inputs[0]
    return value


def _stored(value: ir.Value | None) -> bool:
    """Whether it is a constant, dequantized or not: a bias."""
    maker = value.producer() if value is not None else None
    if maker is not None and maker.op_type == "DequantizeLinear":
        value = maker.inputs[0]
    return value is None or value.is_initializer()
