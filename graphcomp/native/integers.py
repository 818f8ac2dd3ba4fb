"""The user's own class with weights of integers: a `QuantizedTensor` in the place of each quantized parameter.

The fake-quant graph says what is quantized, and how. A class can hold what stands at its parameters, and how the other
operand of a product with one of them is quantized. Quantized values elsewhere (sums, products of two activations) stand
in a graph alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from graphcomp.ir.graph import assign, bind, fetch, names_by_tensor, value
from graphcomp.ir.module import tensor_names
from graphcomp.ops.answers import compute_of, lookup_of, move_of
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.lower import constants_with_quantizers
from graphcomp.quantization.operand import Operand
from graphcomp.quantization.quantized_tensor import QuantizedTensor
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.stored import Affine

aten = torch.ops.aten

MATRICES = (aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default)
"""Ops with rows and a weight that `QuantizedTensor` computes from codes, where Python calls them by name."""


class CannotHold(Exception):
    """Why a class cannot hold a quantized graph: the text of the exception."""


@dataclass
class _Weight:
    """A parameter as it will stand in the class."""

    stored: Affine
    dtype: torch.dtype
    operand: Operand | None = None


def put_integers(module: nn.Module, fake: fx.GraphModule) -> None:
    """Give a model of the user's class the tensors of a fake-quant graph, and integers for those that are quantized.

    Args:
        module: of the cut, in floats, of which `fake` is the graph; changed.
        fake: in eval mode, calibrated.

    Raises:
        CannotHold: something is quantized that no parameter of the class stands for; `module` is not changed.
    """
    weights = _weights(fake)
    held = tensor_names(module)
    names = names_by_tensor(held.items())
    for name in weights:
        if name not in held:
            raise CannotHold(f"the class holds no tensor '{name}' that integers could stand for")
        if not isinstance(held[name], nn.Parameter):
            raise CannotHold(f"'{name}' is no parameter")
        others = [other for other in names[id(held[name])] if other != name and other in weights]
        if any(not _same(weights[name], weights[other]) for other in others):
            raise CannotHold(f"'{name}' and '{others[0]}' are one parameter, and are quantized in two ways")
    if added := sorted(name for name, _ in fake.named_parameters() if name.endswith(".bias") and name not in held):
        raise CannotHold(f"'{added[0]}' was added to correct what rounding moves, and the class has no such parameter")
    floats = {str(node.target) for node in fake.graph.find_nodes(op="get_attr")} - set(weights)
    for name in sorted(floats & set(held)):
        given = fetch(fake, name)
        if given.shape != held[name].shape:
            raise CannotHold(f"'{name}' has the shape {tuple(given.shape)} in the graph")
    for name in floats & set(held):
        old = held[name]
        new = fetch(fake, name).detach().to(old.dtype, copy=True)  # the memory may be that of the sliced graph, too
        new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        for other in names[id(old)]:
            assign(module, other, new)
    for name, weight in weights.items():
        tensor = QuantizedTensor(weight.stored, weight.dtype, weight.operand)
        parameter = nn.Parameter(tensor, requires_grad=False)
        for other in names[id(held[name])]:
            assign(module, other, parameter)


def _weights(fake: fx.GraphModule) -> dict[str, _Weight]:
    """Return parameter -> its integers, and how what is multiplied by them is quantized."""
    constant, found = constants_with_quantizers(fake), dict(quantizer_nodes(fake))
    weights: dict[str, _Weight] = {}
    at: dict[fx.Node, str] = {}
    for node, quantizer in found.items():
        if node not in constant:
            continue
        (source,) = node.all_input_nodes
        name = str(source.target)
        if source.op != "get_attr":
            raise CannotHold(f"a weight that is computed ('{source.name}') is quantized")
        readers = [other for other in fake.graph.find_nodes(op="get_attr", target=name) for other in other.users]
        if readers != [node]:
            others = ", ".join(other.name for other in readers if other is not node)
            raise CannotHold(f"'{name}' is quantized in one place, and read by '{others}' in another")
        stored = quantizer.to_integers(fetch(fake, name)).computable()
        if not isinstance(stored, Affine):
            raise CannotHold(f"'{name}' is stored as codes and a table of values")
        weights[name], at[node] = _Weight(stored, value(source).dtype), name
    for node, quantizer in found.items():
        if node not in constant:
            _note_operand(node, quantizer, at, weights, found)
    for node, name in at.items():
        _check_readers(node, name, weights[name], found)
    return weights


def _note_operand(
    node: fx.Node,
    quantizer: Quantizer,
    at: dict[fx.Node, str],
    weights: dict[str, _Weight],
    found: dict[fx.Node, Quantizer],
) -> None:
    """Write down how an activation is quantized, at the weights that multiply it."""
    operand = _operand(quantizer)
    for user in node.users:
        moved = move_of(user) is not None and all(found.get(behind) is quantizer for behind in user.users)
        if moved and not quantizer.spec.dynamic:
            continue  # on the same levels behind the move, where it is quantized again
        weight = _multiplied_by(user, node)
        if weight is None or weight not in at or user.target not in MATRICES:
            raise CannotHold(f"a value that '{user.name}' reads is quantized, which is no product with a weight")
        held = weights[at[weight]]
        if held.operand not in (None, operand):
            raise CannotHold(f"what '{at[weight]}' multiplies is quantized in two ways")
        held.operand = operand


def _check_readers(node: fx.Node, name: str, weight: _Weight, found: dict[fx.Node, Quantizer]) -> None:
    """Raise CannotHold where one product with the weight reads quantized values, and another reads floats."""
    for user in node.users:
        if weight.operand is None or lookup_of(user):
            continue
        operands, arguments = compute_of(user), bind(user)
        data = arguments[operands.data[0]] if operands is not None else None
        if not isinstance(data, fx.Node) or data not in found or _operand(found[data]) != weight.operand:
            raise CannotHold(f"'{name}' multiplies quantized values in one place, and floats in another")


def _multiplied_by(user: fx.Node, data: fx.Node) -> fx.Node | None:
    """Return the weight of a product that reads `data`; None where `user` is no such product."""
    operands = compute_of(user)
    if operands is None:
        return None
    arguments = bind(user)
    weight = arguments[operands.weight]
    return weight if arguments[operands.data[0]] is data and isinstance(weight, fx.Node) else None


def _operand(quantizer: Quantizer) -> Operand:
    if quantizer.spec.dynamic:
        return Operand(quantizer.spec.granularity == "token")
    levels = quantizer.to_integers(torch.zeros(()))
    if not isinstance(levels, Affine) or quantizer.exponent != 1.0:
        raise CannotHold("an activation has levels that are not evenly spaced")
    levels = levels.moved(-levels.quant_min)
    if levels.quant_max > torch.iinfo(torch.uint8).max:
        raise CannotHold(f"an activation has {levels.quant_max.bit_length()} bits")
    return Operand(False, (float(levels.scale), int(levels.zero_point), 0, levels.quant_max))


def _same(one: _Weight, other: _Weight) -> bool:
    tensors = ("values", "scale", "zero_point")
    return one.operand == other.operand and all(
        torch.equal(getattr(one.stored, name), getattr(other.stored, name)) for name in tensors
    )


def quantized_tensors(module: nn.Module) -> dict[str, QuantizedTensor]:
    """Return name -> weight of integers that a model holds, tied ones once."""
    return {name: t for name, t in module.named_parameters() if isinstance(t, QuantizedTensor)}


def put_floats(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put the floats that integers stand for in the place of each weight of integers.

    Args:
        module: changed.
        dtype: of the floats; None: as each weight shows.
    """
    names = names_by_tensor(tensor_names(module).items())
    for tensor in quantized_tensors(module).values():
        floats = nn.Parameter(tensor.dequantize().to(dtype or tensor.dtype), requires_grad=False)
        for name in names[id(tensor)]:
            assign(module, name, floats)


def products_of(weight: fx.Node) -> list[tuple[fx.Node, str]]:
    """Return the products that read a weight, each with the argument of the other operand."""
    found = []
    for user in weight.users:
        operands = compute_of(user)
        if user.target in MATRICES and operands is not None and bind(user)[operands.weight] is weight:
            found.append((user, operands.data[0]))
    return found
