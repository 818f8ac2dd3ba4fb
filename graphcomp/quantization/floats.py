"""The layers of a fake-quant graph that stay float: ops that multiply or look up a weight that is not quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.graph import bind, fetch, value
from graphcomp.ops.answers import compute_of, is_fused, lookup_of
from graphcomp.ops.facts import Float
from graphcomp.ops.registry import facts_of
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import constants_with_quantizers
from graphcomp.quantization.placement import op_label
from graphcomp.torch_compat import HigherOrderOperator, OpOverload, schema_of

aten = torch.ops.aten

NO_INTEGER_FORM = "{} has no integer form"
UNDER_AUTOCAST = "computed under torch.autocast"


def float_layers(fake: fx.GraphModule, reasons: Mapping[str, str], default: str = "no spec") -> dict[str, str]:
    """Return each layer that computes in float, with the reason.

    Args:
        fake: with quantizers.
        reasons: node -> why the op of that name was not quantized.
        default: the reason for other ops that have an integer form.
    """
    quantized, constant = dict(quantizer_nodes(fake)), constants_with_quantizers(fake)
    found: dict[str, str] = {}
    for node in fake.graph.nodes:
        if node.op != "call_function" or (node in constant and node.name not in reasons):
            continue
        compute, lookup = compute_of(node), lookup_of(node)
        if compute is not None:
            weight = bind(node)[compute.weight]
            if node.name in reasons or (weight in constant and weight not in quantized):
                found[op_label(node, constant)] = reasons.get(node.name, default)
        elif is_fused(node):
            if node.name in reasons:
                found[op_label(node, constant)] = reasons[node.name]
        elif lookup is not None:
            if bind(node)[lookup.weight] not in quantized and _parameters(fake, node, constant):
                found[op_label(node, constant)] = reasons.get(node.name, default)
        elif _multiplies(node) and (weights := _parameters(fake, node, constant)):
            found |= {name.rpartition(".")[0] or name: _why(node) for name in weights}
        elif _unanswered(node):
            found[op_label(node, constant)] = _why(node)
    return found


def nothing_quantized(fake: fx.GraphModule) -> str:
    """Return why a graph that was to be quantized holds no quantizer."""
    reasons = [f"'{layer}' stays float: {reason}" for layer, reason in float_layers(fake, {}).items()]
    return f"nothing is quantized: {'; '.join(reasons) or 'no op multiplies or looks up a weight'}"


def _unanswered(node: fx.Node) -> bool:
    """Return whether nothing says how the op behaves on integers."""
    return isinstance(node.target, OpOverload) and facts_of(node.target).integer is None


def _multiplies(node: fx.Node) -> bool:
    """Return whether the op may multiply or look up weights, rather than move, scale or shift."""
    if isinstance(node.target, HigherOrderOperator):
        return True
    if not isinstance(node.target, OpOverload):
        return False
    facts = facts_of(node.target)
    reads_rows = isinstance(facts.integer, Float) and facts.integer.rows != ""
    return facts.integer is None or facts.sums == "products" or reads_rows


def _parameters(fake: fx.GraphModule, node: fx.Node, constant: set[fx.Node]) -> list[str]:
    """Return the names of the float matrices among the parameters that constant operands of `node` are made of."""
    return [name for operand in node.all_input_nodes if operand in constant for name in _matrices(fake, operand)]


def _matrices(fake: fx.GraphModule, operand: fx.Node) -> Iterator[str]:
    if operand.op == "get_attr":
        tensor = fetch(fake, str(operand.target))
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dim() >= 2:
            yield str(operand.target)
    elif operand.op == "call_function" and isinstance(value(operand), Tensor):
        for source in operand.all_input_nodes:
            yield from _matrices(fake, source)


def _why(node: fx.Node) -> str:
    if node.target is torch.ops.higher_order.wrap_with_autocast:
        return UNDER_AUTOCAST
    name = schema_of(node.target).name if isinstance(node.target, OpOverload) else str(node.target)
    integer = facts_of(node.target).integer
    why = f": {integer.why}" if isinstance(integer, Float) else ""
    return NO_INTEGER_FORM.format(name.rpartition("::")[2]) + why
