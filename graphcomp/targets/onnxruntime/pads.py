"""Padding with zeros in front of a convolution becomes the convolution's own, which costs nothing.

torch pads a convolution by as much on both sides; models that need more on one side (TensorFlow's "same") pad before.
ONNX convolutions take any padding, and a padded 0 is the zero point whether padded before or after it is quantized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def fold_pads(model: ir.Model) -> None:
    """Fold every Pad that one convolution alone reads, through a pair of quantize and dequantize nodes or not."""
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Conv" and node.domain == "":
            _fold(node)


def _fold(conv: ir.Node) -> None:
    import onnx_ir as ir

    between = _quantized(conv.inputs[0])
    pad = _maker(between[0].inputs[0] if between else conv.inputs[0], "Pad")
    amounts = _zeros_around(pad) if pad is not None else None
    automatic = conv.attributes["auto_pad"].as_string() if "auto_pad" in conv.attributes else "NOTSET"
    if pad is None or amounts is None or automatic != "NOTSET":
        return
    own = conv.attributes["pads"].as_ints() if "pads" in conv.attributes else [0] * len(amounts)
    conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, amounts, strict=True)])
    source = pad.inputs[0]
    if not between:
        conv.replace_input_with(0, source)
    elif _same_steps(source, between[0]):
        conv.replace_input_with(0, source)  # it was on this scale before it was padded
    else:
        between[0].replace_input_with(0, source)
        for node in between:
            node.outputs[0].shape = source.shape if source is not None else None


def _quantized(value: ir.Value | None) -> list[ir.Node]:
    """The QuantizeLinear and DequantizeLinear that `value` has come through, for one reader alone."""
    restore = _maker(value, "DequantizeLinear")
    store = _maker(restore.inputs[0], "QuantizeLinear") if restore is not None else None
    return [store, restore] if store is not None and restore is not None else []


def _maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of that kind that makes `value` for one reader alone."""
    node = value.producer() if value is not None else None
    if node is None or value is None or node.op_type != kind or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return node


def _zeros_around(pad: ir.Node) -> list[int] | None:
    """How many zeros it puts before and after each dim but batch and channel; None where it does anything else."""
    mode = pad.attributes["mode"].as_string() if "mode" in pad.attributes else "constant"
    extra = [value for value in pad.inputs[2:] if value is not None]
    amounts = pad.inputs[1].const_value if len(pad.inputs) > 1 and pad.inputs[1] is not None else None
    if mode != "constant" or amounts is None or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return None
    if extra and (extra[0].const_value is None or extra[0].const_value.numpy().any()):
        return None
    found = [int(n) for n in amounts.numpy()]
    rank = len(found) // 2
    if min(found) < 0 or any(found[:2]) or any(found[rank : rank + 2]):
        return None
    return found[2:rank] + found[rank + 2 :]


def _same_steps(value: ir.Value | None, store: ir.Node) -> bool:
    """Whether `value` was dequantized with the scale and zero point that `store` quantizes with."""
    restore = value.producer() if value is not None else None
    if restore is None or restore.op_type != "DequantizeLinear":
        return False
    pairs = list(zip(restore.inputs[1:], store.inputs[1:], strict=False))
    return len(restore.inputs) == len(store.inputs) and all(a is b or _equal(a, b) for a, b in pairs)


def _equal(a: ir.Value | None, b: ir.Value | None) -> bool:
    if a is None or b is None or a.const_value is None or b.const_value is None:
        return False
    return bool((a.const_value.numpy() == b.const_value.numpy()).all()) and a.dtype == b.dtype
