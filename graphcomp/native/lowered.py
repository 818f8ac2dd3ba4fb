"""From a class with weights of integers back to an integer graph, which files for other runtimes are written from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from graphcomp.capture.capture import capture
from graphcomp.ir.graph import bind, clone, names_by_tensor, value
from graphcomp.ir.module import copied, tensor_names
from graphcomp.ir.passes import Pipeline, Remember
from graphcomp.ir.program import Program
from graphcomp.ir.rewrite import after, redirect
from graphcomp.native.integers import products_of, put_floats, quantized_tensors
from graphcomp.quantization.lower import FAKE, Lower
from graphcomp.quantization.operand import Operand
from graphcomp.quantization.quantized_tensor import QuantizedTensor
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.quantizers.make import make_quantizer, quantizer_of
from graphcomp.quantization.sites import PREFIX, names_in
from graphcomp.quantization.spec import DYNAMIC, PER_TOKEN
from graphcomp.quantization.stored import Affine


def in_floats(module: nn.Module) -> nn.Module:
    """Return a copy of a model with floats in the place of its weights of integers."""
    found = copied(module)
    put_floats(found)
    return found


def lowered_again(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], more: Sequence[Collection[int]] = ()
) -> Program:
    """Return the integer program of a class with weights of integers; `stages[FAKE]` is its fake-quant program.

    Args:
        module: holds each `QuantizedTensor` as a parameter; not changed.
        args, kwargs: example inputs, as for `compress`.
        more: see `capture`.

    Raises:
        CaptureError, InputError: see `capture`.
    """
    weights = quantized_tensors(module)
    captured = capture(in_floats(module), args, kwargs, more=more)
    names = names_by_tensor(tensor_names(module).items())
    by_name = {other: tensor for name, tensor in weights.items() for other in names[id(module.get_parameter(name))]}
    fake = with_quantizers(captured.module, by_name)
    return Pipeline("integers of a class", (Remember(FAKE), Lower()))(captured.rewritten(fake))


def with_quantizers(module: fx.GraphModule, weights: Mapping[str, QuantizedTensor]) -> fx.GraphModule:
    """Return a graph with the quantizers that weights of integers stand for.

    Args:
        module: reads the floats of the weights.
        weights: name of a tensor that the graph reads -> its integers.
    """
    fake, _ = clone(module)
    names = names_in(fake)
    operands: dict[tuple[fx.Node, Operand], fx.Node] = {}
    for node in list(fake.graph.find_nodes(op="get_attr")):
        tensor = weights.get(str(node.target))
        if tensor is None:
            continue
        readers = list(node.users)
        own = tensor.stored.on_spec()
        quantizer = quantizer_of(own, own.spec)
        wrapped = _behind(fake, node, names.of(node), quantizer, readers)
        if tensor.operand is None:
            continue
        for product, argument in products_of(wrapped):
            data = bind(product)[argument]
            if (data, tensor.operand) not in operands:
                shared = _quantizer_of(tensor.operand, value(data).dtype)
                operands[data, tensor.operand] = _behind(fake, data, names.of(data), shared, [])
            redirect([product], data, operands[data, tensor.operand])
    fake.recompile()
    return fake


def _behind(fake: fx.GraphModule, node: fx.Node, name: str, quantizer: Quantizer, readers: list[fx.Node]) -> fx.Node:
    """Put a quantizer behind a node, for `readers`."""
    target = f"{PREFIX}.{name}"
    fake.add_submodule(target, quantizer)
    wrapped = after(node).submodule(target, node, val=value(node))
    redirect(readers, node, wrapped)
    return wrapped


def _quantizer_of(operand: Operand, dtype: torch.dtype) -> Quantizer:
    if operand.levels is None:
        return make_quantizer(PER_TOKEN if operand.per_token else DYNAMIC)
    scale, zero, low, high = operand.levels
    levels = Affine(torch.zeros((), dtype=torch.int32), torch.tensor(scale, dtype=dtype), torch.tensor(zero), low, high)
    own = levels.on_spec()
    return quantizer_of(own, replace(own.spec, granularity="tensor"))
