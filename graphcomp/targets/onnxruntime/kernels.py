"""The kernel proof: which layers of an ONNX file onnxruntime runs on integers, and why the others do not."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphcomp.targets.onnxruntime.export import need

if TYPE_CHECKING:
    import onnx_ir as ir

INTEGER_LAYERS = frozenset(
    {
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
        "ConvInteger",
        "MatMulNBits",
        "QAttention",
    }
)
"""Kernels of convolutions and matrix products that read integers."""

INTEGER_OTHERS = frozenset(
    {
        "QLinearAdd",
        "QLinearMul",
        "QLinearConcat",
        "QLinearAveragePool",
        "QLinearGlobalAveragePool",
        "QLinearReduceMean",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearSoftmax",
        "QLinearWhere",
    }
)
FLOAT_LAYERS = frozenset(
    {
        "Conv",
        "FusedConv",
        "ConvTranspose",
        "Gemm",
        "FusedGemm",
        "MatMul",
        "FusedMatMul",
        "Attention",
        "MultiHeadAttention",
        "Einsum",
        "LSTM",
        "GRU",
        "RNN",
    }
)
"""Kernels of layers that read floats."""

NEVER_INTEGER = ("Einsum", "LSTM", "GRU", "RNN")
"""Layers that graphcomp writes in float alone."""

LOOKUPS = ("Gather", "GatherND", "GatherElements")
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
LONGEST = 10
"""Steps from a layer back to the codes of its weight, where these are shifted, dequantized and turned around."""

SMALLEST_BLOCK = 16
"""Inputs that share a step, for onnxruntime's kernel of weights of few bits."""

DECORATED = re.compile(r"^(?:fused )?(.*?)(?:/MatMulAddFusion)?(?:_token_\d+)*(?:/MatMulAddFusion)?$")


@dataclass(frozen=True)
class KernelProof:
    """What onnxruntime makes of a file.

    Attributes:
        integer: integer kernels by name, additions and concatenations among them.
        float_: float kernels of convolutions and matrix products by name.
        stayed_float: (layer, reason) for each quantized layer that multiplies floats. A layer is called like its
            weight; a product of two activations like its node.
        unquantized: (node, reason) for each layer that is float in the file itself: a convolution, a matrix product, a
            recurrent layer, an einsum; or (table, reason) for each lookup in a float parameter.
        share: integer layers, of all layers; 1.0 where there is none.
        layers: quantized layer -> the kernel that the layer runs in.
    """

    integer: Mapping[str, int]
    float_: Mapping[str, int]
    stayed_float: tuple[tuple[str, str], ...]
    unquantized: tuple[tuple[str, str], ...]
    share: float
    layers: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "integer": dict(self.integer),
            "float": dict(self.float_),
            "stayed_float": [list(pair) for pair in self.stayed_float],
            "unquantized": [list(pair) for pair in self.unquantized],
            "share": self.share,
            "layers": dict(self.layers),
        }


def prove(path: str | Path, parameters: Collection[str] = ()) -> KernelProof:
    """Load an ONNX file in onnxruntime as users do, and read the graph it would run.

    Args:
        path: the file.
        parameters: names of the float parameters among the file's constants, to tell tables that are looked up.

    Raises:
        ExportError: the `onnx` extra is not installed; onnxruntime cannot load the file.
    """
    need("reading what onnxruntime runs", ("onnx_ir", "onnxruntime"))
    import onnx_ir as ir

    from graphcomp.targets.runtime import open_session

    written = ir.load(path)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "optimized.onnx"
        open_session(path, optimized=place)
        optimized = ir.load(place)
        kernels = [(node.op_type, str(node.name)) for node in optimized.graph.all_nodes()]
    integer = Counter(kind for kind, _ in kernels if kind in INTEGER_LAYERS | INTEGER_OTHERS)
    floating = Counter(kind for kind, _ in kernels if kind in FLOAT_LAYERS)
    running = {_plain(name): kind for kind, name in kernels}
    layers: dict[str, str] = {}
    stayed, unquantized = [], []
    for node in written.graph.all_nodes():
        layer = quantized_layer(node)
        if layer is not None and (kernel := running.get(str(node.name))) is not None:
            layers[layer] = kernel
        if layer is not None and running.get(str(node.name), "") not in INTEGER_LAYERS:
            stayed.append((layer, _reason(node)))
        if layer is None and _is_layer(node):
            unquantized.append((str(node.name), _why_float(node)))
        if node.op_type in NEVER_INTEGER and node.domain == "":
            unquantized.append((str(node.name), f"{node.op_type} has no integer form"))
    tables = [table for node in written.graph.all_nodes() if (table := _table(node, parameters))]
    unquantized += [(name, "its table is float") for name in dict.fromkeys(tables)]
    whole = sum(count for kind, count in integer.items() if kind in INTEGER_LAYERS)
    total = whole + sum(floating.values()) + len(tables)
    share = whole / total if total else 1.0
    return KernelProof(dict(integer), dict(floating), tuple(stayed), tuple(unquantized), share, layers)


def _plain(name: str) -> str:
    """The name a node had before onnxruntime fused it."""
    match = DECORATED.match(name)
    return match[1] if match else name


# ------------------------------------------------------------------------------------------------ layers
def quantized_layer(node: ir.Node) -> str | None:
    """What a convolution or matrix product is called that is quantized: as its integer weight, or as its node where it
    multiplies two quantized activations. None for another node, or where nothing is quantized."""
    if not _is_layer(node):
        return None
    weight = integers_behind(node.inputs[1]) or integers_behind(node.inputs[0])
    if weight is not None:
        return weight
    sources = [_through_moves(value) for value in node.inputs[:2]]
    both = all(source is not None and source.op_type == "DequantizeLinear" for source in sources)
    return str(node.name) if both else None


def _is_layer(node: ir.Node) -> bool:
    return node.op_type in LAYERS and node.domain == "" and len(node.inputs) >= 2


def _table(node: ir.Node, parameters: Collection[str]) -> str:
    """The one of `parameters` that the node looks up at indices that depend on the inputs; "" for none."""
    if node.op_type not in LOOKUPS or node.domain != "":
        return ""
    table, rows = node.inputs[:2]
    if table is None or rows is None or rows.is_initializer() or table.name not in parameters:
        return ""
    return str(table.name)


def _why_float(node: ir.Node) -> str:
    weight = node.inputs[1]
    while weight is not None and (producer := weight.producer()) is not None and producer.op_type in MOVES:
        weight = producer.inputs[0]
    if weight is not None and weight.is_initializer():
        return "its weight is float"
    return "a product of two activations, not both quantized; for attention see QuantConfig(attention=True)"


def integers_behind(value: ir.Value | None) -> str | None:
    """The integer constant behind a dequantization, blocked or written out for unequal groups, or behind a table."""
    for _ in range(LONGEST):
        producer = value.producer() if value is not None else None
        if producer is None:
            break
        if producer.op_type == "Gather":
            value = _places(producer)
            continue
        if producer.op_type not in ("DequantizeLinear", "Cast", "Mul", "Sub", *MOVES):
            return None
        value = producer.inputs[0]
    if value is None or not value.is_initializer() or value.dtype is None or not value.dtype.is_integer():
        return None
    return str(value.name)


def _places(gather: ir.Node) -> ir.Value | None:
    """The codes that are looked up in a table of values: widened, and with one table per channel moved."""
    value = gather.inputs[1]
    for kind in ("Add", "Cast"):
        if (producer := value.producer() if value is not None else None) is not None and producer.op_type == kind:
            value = producer.inputs[0]
    narrow = value is not None and value.dtype is not None and value.dtype.is_integer() and value.dtype.bitwidth <= 8
    return value if narrow else None


def _reason(node: ir.Node) -> str:
    """Why onnxruntime has no integer kernel for a quantized layer."""
    source, producer = _through_moves(node.inputs[0]), _through_moves(node.inputs[1])
    if producer is not None and producer.op_type == "Gather":
        return "weights from a table of values have no integer kernel"
    if integers_behind(node.inputs[1]) is None and integers_behind(node.inputs[0]) is not None:
        return "a constant on the left with a step per row has no integer kernel"
    if node.op_type == "ConvTranspose":
        return "onnxruntime has no integer kernel for ConvTranspose"
    if source is None or source.op_type != "DequantizeLinear":
        return _reason_weight_only(producer)
    if producer is None or producer.op_type != "DequantizeLinear":
        return _reason_written_out(node)
    if "block_size" in producer.attributes and producer.attributes["block_size"].as_int() > 0:
        return "group-wise weights with quantized activations have no integer kernel"
    codes = (source.inputs[0], producer.inputs[0], *_codes_of_output(node))
    bits = [v.dtype.bitwidth for v in codes if v is not None and v.dtype is not None]
    if max(bits, default=8) > 8:
        return f"integers of {max(bits)} bits have no kernel"
    return _reason_of_output(node)


def _reason_weight_only(producer: ir.Node | None) -> str:
    """Why the weight of a layer that reads floats has no kernel, by what dequantizes the weight."""
    if (
        producer is not None
        and producer.op_type == "Mul"
        and _maker_kind(producer.inputs[1]) in ("Gather", "Unsqueeze")
    ):
        return "groups of unequal sizes are made float when the file is loaded"
    size = producer.attributes["block_size"].as_int() if producer and "block_size" in producer.attributes else 0
    if size and (size < SMALLEST_BLOCK or size & (size - 1)):
        return f"groups of {size} have no kernel, which takes powers of two from {SMALLEST_BLOCK} on"
    return "the activation is not quantized (weight-only)"


def _maker_kind(value: ir.Value | None) -> str:
    maker = value.producer() if value is not None else None
    return "" if maker is None else maker.op_type


def _reason_written_out(node: ir.Node) -> str:
    """Why a weight is dequantized by arithmetic, and so float once the file is loaded (see `onnx_unfused`)."""
    weight = node.inputs[1]
    if weight is not None and weight.shape is not None and len(weight.shape) > 2:
        return "a stack of matrices with a step per channel has no integer kernel"
    return "group-wise weights with quantized activations have no integer kernel"


def _codes_of_output(node: ir.Node) -> Iterator[ir.Value]:
    """What the output is quantized to, clipped or not."""
    for user, _ in node.outputs[0].uses():
        if user.op_type == "QuantizeLinear":
            yield user.outputs[0]
        elif user.op_type in ("Relu", "Clip"):
            yield from _codes_of_output(user)


def _reason_of_output(node: ir.Node) -> str:
    follow = list(_followers(node))
    ends = [kind for kind, _ in follow]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    producer = bias.producer() if bias is not None else None
    if "QuantizeLinear" not in ends:
        if node.op_type != "Conv" and bias is not None and (producer is None or producer.op_type != "DequantizeLinear"):
            return "the bias is float, and the output is not quantized"
        return "the output is not quantized"
    if len(follow) > 1:
        return "the output is also used before it is quantized"
    if follow[0][1] is not None:
        return follow[0][1]
    if bias is not None and (producer is None or producer.op_type != "DequantizeLinear"):
        return "the bias is float"
    return "onnxruntime did not fuse it"


def _followers(node: ir.Node) -> Iterator[tuple[str, str | None]]:
    """What reads the output, looked at through a ReLU: (op, what is wrong with it)."""
    out = node.outputs[0]
    if out.is_graph_output():
        yield "output", None
    for user, _ in out.uses():
        if user.op_type == "Relu":
            for kind, _ in _followers(user):
                wrong = None
                if kind == "QuantizeLinear" and not _bottom(user):
                    wrong = "after ReLU the zero point is not the lowest code"
                yield kind, wrong
        else:
            yield user.op_type, None


def _bottom(relu: ir.Node) -> bool:
    """Whether what quantizes the ReLU's output has its zero point at the lowest code of its type."""
    for user, _ in relu.outputs[0].uses():
        zero = user.inputs[2] if user.op_type == "QuantizeLinear" and len(user.inputs) > 2 else None
        if zero is not None and zero.const_value is not None and zero.dtype is not None:
            return bool(zero.const_value.numpy() == zero.dtype.min)
    return True


def _through_moves(value: ir.Value | None) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in MOVES:
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    return producer
