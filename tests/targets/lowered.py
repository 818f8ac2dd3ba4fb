"""A lowered graph of a small model, made by hand: what the lowering passes give, without these passes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.capture import capture
from graphcomp.ir.graph import bind, fetch, set_argument
from graphcomp.ir.module import CapturedModule
from graphcomp.ir.run_nodes import run_tapped
from graphcomp.quantization.ops import (
    dequantize_per_channel,
    dequantize_per_tensor,
    pack,
    quantize_per_tensor,
)

aten = torch.ops.aten
CONVS = (aten.conv1d.default, aten.conv2d.default)
LINEAR = aten.linear.default
RELU = aten.relu.default
SHARING = (
    aten.max_pool2d.default,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
)
ROUNDING = (aten.add.Tensor, aten.cat.default, aten.mean.dim, aten.adaptive_avg_pool2d.default)


@dataclass(frozen=True)
class Quantization:
    """Settings of `lower`; `groups` maps each input index of a linear weight to its group, all linears alike."""

    weight_bits: int = 8
    activation_bits: int | None = 8
    signed: bool = False
    pack: bool = True
    per_channel: bool = True
    float_bias: bool = False
    last_float: bool = True
    groups: Tensor | None = None


def lower(model: nn.Module, inputs: Any, how: Quantization | None = None) -> CapturedModule:
    """`model` captured and quantized on `inputs`: each conv and linear; activations where integer kernels need it."""
    how = how or Quantization()
    module = capture(model, inputs).module
    assert isinstance(module, CapturedModule)
    ranges: dict[str, tuple[float, float]] = {}

    def keep(node: fx.Node, found: Any) -> None:
        if isinstance(found, Tensor) and found.is_floating_point():
            ranges[node.name] = (min(0.0, float(found.min())), max(0.0, float(found.max())))

    run_tapped(module, inputs if isinstance(inputs, tuple) else (inputs,), see=keep)
    lowering = _Lowering(module, ranges, how)
    for node in list(module.graph.nodes):
        lowering.visit(node)
    lowering.finish()
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


class _Lowering:
    def __init__(self, module: CapturedModule, ranges: dict[str, tuple[float, float]], how: Quantization) -> None:
        self.module, self.graph, self.ranges, self.how = module, module.graph, ranges, how
        self.scales: dict[fx.Node, float] = {}  # dequantize node -> its scale
        self.parameters: dict[fx.Node, tuple[Any, ...]] = {}
        self.count = itertools.count()
        self.weights: dict[fx.Node, tuple[fx.Node, Tensor]] = {}
        self.biases: list[tuple[fx.Node, fx.Node, fx.Node, Tensor]] = []

    def finish(self) -> None:
        """Biases come last: their scale is that of the input, which a later concat may change."""
        for node, bias, data, scales in self.biases:
            set_argument(node, "bias", self.bias(bias, self.scales[data] * scales, node))

    def visit(self, node: fx.Node) -> None:
        if node.target in (*CONVS, LINEAR):
            self.layer(node)
        elif node.target in SHARING and node.args[0] in self.parameters:
            self.after(node, self.parameters[node.args[0]])
        elif node.target in ROUNDING and self.how.activation_bits is not None:
            if node.target is aten.cat.default:
                low = min(self.ranges[a.name][0] for a in node.args[0])
                high = max(self.ranges[a.name][1] for a in node.args[0])
                shared = self.quantizer(low, high)
                node.args = ([self.requantized(a, shared) for a in node.args[0]], *node.args[1:])
                self.after(node, shared)
                return
            inputs = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            if all(self.ranges.get(a.name) for a in inputs):
                node.args = tuple(self.quantized(a) if a in inputs else a for a in node.args)
                self.output(node)

    def layer(self, node: fx.Node) -> None:
        arguments = bind(node)
        data = None
        if self.how.activation_bits is not None:
            data = self.quantized(arguments["input"])
            set_argument(node, "input", data)
        weight, scales = self.weight(arguments["weight"], node)
        set_argument(node, "weight", weight)
        bias = arguments.get("bias")
        if bias is not None and data is not None and not self.how.float_bias and self.how.groups is None:
            self.biases.append((node, bias, data, scales))
        last = all(user.op == "output" for user in node.users)
        if self.how.activation_bits is not None and not (last and self.how.last_float and node.target is LINEAR):
            self.output(node)

    def output(self, node: fx.Node) -> None:
        users = list(node.users)
        if len(users) == 1 and users[0].target is RELU:
            node = users[0]
        self.after(node, self.quantizer(*self.ranges[node.name]))

    def quantizer(self, low: float, high: float) -> tuple[Any, ...]:
        bits, signed = self.how.activation_bits, self.how.signed
        scale = max((high - low) / (2**bits - 1), 1e-8)
        bottom = -(2 ** (bits - 1)) if signed else 0
        dtype = {(False, False): torch.uint8, (True, False): torch.int8}.get(
            (signed, bits > 8), torch.int16 if signed else torch.uint16
        )
        return scale, round(-low / scale) + bottom, bottom, bottom + 2**bits - 1, dtype

    def quantized(self, node: fx.Node) -> fx.Node:
        if node in self.scales:
            return node
        for user in node.users:
            if user.target is quantize_per_tensor:
                return next(iter(user.users))
        return self.after(node, self.quantizer(*self.ranges[node.name]))

    def requantized(self, node: fx.Node, parameters: tuple[Any, ...]) -> fx.Node:
        """The quantizer that makes this value gets the shared parameters, as the passes that share scales do."""
        if node in self.scales:
            for step in (node.args[0], node):
                step.args = (step.args[0], *parameters)
            self.note(node, parameters)
            return node
        return self.after(node, parameters)

    def after(self, node: fx.Node, parameters: tuple[Any, ...]) -> fx.Node:
        users = list(node.users)
        with self.graph.inserting_after(node):
            codes = self.graph.call_function(quantize_per_tensor, (node, *parameters))
        with self.graph.inserting_after(codes):
            back = self.graph.call_function(dequantize_per_tensor, (codes, *parameters))
        for user in users:
            user.replace_input_with(node, back)
        self.note(back, parameters)
        self.ranges[back.name] = self.ranges[node.name]
        return back

    def note(self, node: fx.Node, parameters: tuple[Any, ...]) -> None:
        self.scales[node] = parameters[0]
        self.parameters[node] = parameters

    def hold(self, name: str, tensor: Tensor) -> fx.Node:
        name = f"{name.replace('.', '_')}_{next(self.count)}"
        self.module.register_buffer(name, tensor)
        return self.graph.get_attr(name)

    def weight(self, source: fx.Node, node: fx.Node) -> tuple[fx.Node, Tensor]:
        if source in self.weights:
            return self.weights[source]
        value = fetch(self.module, source.target).detach()
        name, bits = str(source.target), self.how.weight_bits
        top = 2 ** (bits - 1) - 1
        with self.graph.inserting_before(node):
            if self.how.groups is not None and node.target is LINEAR:
                found = self.grouped(name, value, top)
            else:
                flat = value.reshape(value.shape[0], -1).abs().amax(1) if self.how.per_channel else value.abs().max()
                scales = flat.clamp(min=1e-6) / top
                shape = (-1, *[1] * (value.dim() - 1)) if self.how.per_channel else ()
                dtype = torch.int8 if bits <= 8 else torch.int16
                codes = self.codes(name, (value / scales.reshape(shape)).round().clamp(-top, top).to(dtype))
                if self.how.per_channel:
                    zeros = torch.zeros(value.shape[0], dtype=torch.int32)
                    held = self.hold(f"{name}_scales", scales), self.hold(f"{name}_zeros", zeros)
                    arguments: Any = (codes, *held, 0, -top, top, dtype)
                    found = self.graph.call_function(dequantize_per_channel, arguments), scales
                else:
                    arguments = (codes, float(scales), 0, -top, top, dtype)
                    found = self.graph.call_function(dequantize_per_tensor, arguments), scales
        self.weights[source] = found
        return found

    def codes(self, name: str, codes: Tensor) -> fx.Node:
        bits = self.how.weight_bits
        if bits > 4 or not self.how.pack:
            return self.hold(name, codes)
        packed = self.hold(f"{name}_packed", pack(codes, bits))
        return self.graph.call_function(torch.ops.graphcomp.unpack.default, (packed, list(codes.shape), bits, True))

    def grouped(self, name: str, value: Tensor, top: int) -> tuple[fx.Node, Tensor]:
        groups = self.how.groups
        count = int(groups.max()) + 1
        scales = torch.stack([value[:, groups == g].abs().amax(1) for g in range(count)], 1).clamp(min=1e-6) / top
        codes = self.codes(name, (value / scales[:, groups]).round().clamp(-top, top).to(torch.int8))
        held = (
            self.hold(f"{name}_scales", scales),
            self.hold(f"{name}_zeros", torch.zeros_like(scales, dtype=torch.int32)),
            self.hold(f"{name}_groups", groups),
        )
        return self.graph.call_function(torch.ops.graphcomp.dequantize_grouped.default, (codes, *held)), scales

    def bias(self, source: fx.Node, scales: Tensor, node: fx.Node) -> fx.Node:
        value = fetch(self.module, source.target).detach()
        name = str(source.target)
        scales = scales.expand(value.shape[0]).contiguous()
        codes = (value / scales).round().clamp(-(2**31), 2**31 - 1).to(torch.int32)
        with self.graph.inserting_before(node):
            zeros = torch.zeros(value.shape[0], dtype=torch.int32)
            held = self.hold(name, codes), self.hold(f"{name}_scales", scales), self.hold(f"{name}_zeros", zeros)
            return self.graph.call_function(dequantize_per_channel, (*held, 0, -(2**31), 2**31 - 1, torch.int32))
