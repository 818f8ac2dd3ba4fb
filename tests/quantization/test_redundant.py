"""Quantizers of moved values: left out in training, put back for integer kernels."""

import torch
from torch import nn

from graphcomp.capture.capture import capture
from graphcomp.quantization.insert import InsertQuantizers, quantizer_nodes
from graphcomp.quantization.lower import constants_with_quantizers
from graphcomp.quantization.placement import place
from graphcomp.quantization.ptq import calibrate_activations, calibrate_weights
from graphcomp.quantization.redundant import RepeatQuantizers, quantizer_before, without_repeats
from graphcomp.quantization.spec import QuantConfig, QuantSpec


class Moves(nn.Module):
    """A value that is pooled, reshaped and transposed on its way from one layer to the next."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(16 * 8, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = nn.functional.max_pool2d(x, 2).flatten(2).transpose(1, 2)
        return self.out(self.inner(x).flatten(1))


def quantized(drop):
    torch.manual_seed(0)
    captured = capture(Moves().eval(), torch.randn(2, 3, 8, 8))
    spec = QuantSpec(4, kind="geta")
    sites = place(captured.module, QuantConfig(weights=spec, activations=spec)).sites
    graph = InsertQuantizers(without_repeats(sites, captured.graph) if drop else sites)(captured.module)
    calibrate_activations(graph, [captured.inputs.flat()])
    calibrate_weights(graph)
    return graph


def activations(graph):
    constant = constants_with_quantizers(graph)
    return [node for node, _ in quantizer_nodes(graph) if node not in constant]


def test_a_moved_value_is_quantized_once_and_the_result_is_the_same():
    every, few = quantized(False), quantized(True)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3  # beyond the range, too
    assert torch.equal(every(x), few(x))
    assert len(activations(every)) > len(activations(few)) == len({node.target for node in activations(few)})
    linear = few.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
    at = dict.fromkeys(activations(few))
    assert linear.args[0] not in at
    assert quantizer_before(linear.args[0], at) in at


def test_what_was_left_out_is_put_back():
    every, few = quantized(False), quantized(True)
    back = RepeatQuantizers()(few)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3
    assert torch.equal(back(x), few(x))
    assert [n.target for n in activations(back)] == [n.target for n in activations(every)]
    assert len(activations(few)) < len(activations(back))  # and `few` is as it was


def test_gradients_of_a_range_are_counted_once():
    """Where the largest level lies above the range, a second quantizer would take its elements for saturated."""
    few = quantized(True)
    for node in activations(few):
        quantizer = few.get_submodule(node.target)
        with torch.no_grad():
            quantizer.q_m.mul_(0.99)  # 6.93 steps: the largest level, 7, lies above
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3
    few(x).sum().backward()
    once = {name: p.grad.clone() for name, p in few.named_parameters() if p.grad is not None and name.endswith("q_m")}
    few.zero_grad()
    RepeatQuantizers()(few)(x).sum().backward()
    again = {name: p.grad for name, p in few.named_parameters() if p.grad is not None and name.endswith("q_m")}
    assert any(not torch.allclose(once[name], again[name]) for name in once)
