"""Biases as integer kernels add them: multiples of the step of their layer's products.

A multiple is fine enough beside codes of eight bits, and not beside those of three: the step of products grows with the
weight's, and a rounded bias costs more than a rounded weight. Kernels read weights from bytes, so codes of few bits are
stored shifted to seven of them, with a step that is as many times smaller. The weight keeps its values, and the bias
gets a unit as fine as beside seven bits. (Not eight: there kernels without VNNI saturate.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.graph import attribute_readers, bind
from graphcomp.ir.passes import ValuePass
from graphcomp.ir.run_nodes import Constants
from graphcomp.ops.answers import compute_of, lookup_of, operands_of
from graphcomp.quantization.insert import quantizer_nodes
from graphcomp.quantization.quantizers.uniform import StepQuantizer
from graphcomp.quantization.stored import KERNEL_BITS, SMALLEST_STEP, Affine
from graphcomp.quantization.tensors import replace_argument

BIAS_LIMIT = 2.0**30
"""A bias on the scale of its layer's products stays below this, half of what an int32 accumulator holds."""


@dataclass(frozen=True)
class BiasedLayer:
    """A layer with a bias whose products have one step per channel.

    Attributes:
        node: the op.
        bias, weight: what it reads; `weight` is a fake-quant node.
        quantizer: of the weight.
        step: () of the data.
    """

    node: fx.Node
    bias: fx.Node
    weight: fx.Node
    quantizer: StepQuantizer
    step: Tensor

    @property
    def shift(self) -> int:
        """By how many places the weight's codes are shifted.

        A table that is also looked up stays as it is, and so do codes with a zero point, whose biases stay float.
        """
        if not self.quantizer.spec.symmetric or any(lookup_of(user) for user in self.weight.users):
            return 0
        return max(0, KERNEL_BITS - self.quantizer.spec.bits)


def biased_layers(fake: fx.GraphModule) -> Iterator[BiasedLayer]:
    """Those of a fake-quant graph, in its order."""
    quantizers = dict(quantizer_nodes(fake))
    for node in fake.graph.nodes:
        operands = compute_of(node)
        bias = bind(node)[operands.bias] if operands and operands.bias else None
        if operands is None or not isinstance(bias, fx.Node):
            continue
        weight, data = bind(node)[operands.weight], quantizers.get(bind(node)[operands.data[0]])
        quantizer = quantizers.get(weight)
        if data is None or data.spec.dynamic or data.dim is not None or not isinstance(quantizer, StepQuantizer):
            continue
        if quantizer.multiples and quantizer.spec.granularity != "group":
            levels = data.to_integers(torch.zeros((), dtype=quantizer.scale.dtype))
            assert isinstance(levels, Affine), "activations have evenly spaced levels"
            yield BiasedLayer(node, bias, weight, quantizer, levels.scale)


@dataclass(frozen=True)
class FitBiases(ValuePass):
    """Give each bias a value that an integer kernel adds as it is: a multiple of the step of the layer's products.

    Steps of weights are widened so much that the multiple fits into an int32, which matters for channels whose weights
    are next to nothing beside their bias.
    """

    name: ClassVar[str] = "fit biases"

    def fill(self, fake: fx.GraphModule, /) -> None:
        """Set biases and steps."""
        values, readers = Constants(fake), attribute_readers(fake)
        found = list(biased_layers(fake))
        with torch.no_grad():
            for layer in found:  # all of them first: layers may share a quantizer
                weight, finer = layer.quantizer, 2**layer.shift
                needed = values.of(layer.bias).detach().abs() * finer / (layer.step * BIAS_LIMIT)
                if weight.dim is None:
                    needed = needed.amax()
                elif needed.numel() != weight.scale.numel():  # groups of a transposed convolution share the channels
                    needed = needed.view(-1, weight.scale.numel()).amax(0)
                needed = needed.to(weight.scale).clamp(min=SMALLEST_STEP * finer)
                weight.scale.copy_(torch.maximum(weight.scale, needed))
            for layer in found:
                floats, product = values.of(layer.bias), layer.quantizer.scale * layer.step / 2**layer.shift
                if layer.quantizer.spec.symmetric and product.numel() in (1, floats.numel()):
                    rounded = nn.Parameter((torch.round(floats / product) * product).to(floats.dtype))
                    argument, name = operands_of(layer.node).bias, f"graphcomp_{layer.node.name}_bias"
                    replace_argument(fake, layer.node, argument, rounded, name, readers)
        fake.recompile()
