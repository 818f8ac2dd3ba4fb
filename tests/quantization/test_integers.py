"""Integer arithmetic gives what the lowered graph says in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.capture.capture import capture
from graphcomp.errors import VerificationError
from graphcomp.ir.run_nodes import Lockstep
from graphcomp.numerics.compare import relative_error
from graphcomp.quantization import ops
from graphcomp.quantization.calibrate import calibrate, calibrate_weight
from graphcomp.quantization.fold import FoldBatchNorm
from graphcomp.quantization.insert import InsertQuantizers, quantizer_nodes
from graphcomp.quantization.integers import IntegerInterpreter, check_integers
from graphcomp.quantization.lower import lower
from graphcomp.quantization.placement import place
from graphcomp.quantization.spec import ACTIVATIONS, WEIGHTS, QuantConfig, QuantSpec, with_bits
from graphcomp.testing import Block, randomize, tiny_models

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def lowered(model: nn.Module, inputs: Sequence[Tensor], config: QuantConfig | None = None) -> fx.GraphModule:
    """`model` as an integer graph, ranges read off `inputs`."""
    folded = FoldBatchNorm()(capture(model.eval(), tuple(inputs)).module)
    fake = InsertQuantizers(place(folded, config or QuantConfig()).sites)(folded)
    quantizers = dict(quantizer_nodes(fake))
    steps = Lockstep(fake, [inputs])
    for node in fake.graph.nodes:
        if node in quantizers:
            (((x,), _),) = steps.arguments(node)
            quantizer = quantizers[node]
            calibrate(quantizer, [x]) if quantizer.dim is None else calibrate_weight(quantizer, x)
        steps.step(node)
        steps.drop(node)
    return lower(fake).module


def bits(n: int, **options: Any) -> QuantConfig:
    return QuantConfig(with_bits(WEIGHTS, n), with_bits(ACTIVATIONS, n), first_and_last_bits=n, **options)


def targets(module: fx.GraphModule, names: Sequence[str]) -> set[str]:
    """The ops of the nodes named, as 'conv2d'."""
    return {str(node.target).split(".")[1] for node in module.graph.nodes if node.name in names}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize("name", ["residual_cnn", "vision_transformer", "encoder", "decoder"])
def test_whole_models(name: str, n: int) -> None:
    model, inputs = tiny_models()[name]
    module = lowered(model, inputs, bits(n))
    found = check_integers(module, inputs)
    assert found.steps <= 1
    assert found.output < 1e-4
    products = {"conv2d", "linear", "matmul"}
    assert not products & targets(module, tuple(found.in_floats))
    assert products & targets(module, found.in_integers)


@pytest.mark.parametrize("n", [4, 8])
def test_a_cnn_from_end_to_end(n: int) -> None:
    """Without a teacher, too: what a step at one layer becomes at the last stays small."""
    model, inputs = tiny_models()["residual_cnn"]
    module = lowered(model, inputs, bits(n, share_add=True))
    interpreter = IntegerInterpreter(module)
    result = interpreter.run(*inputs)
    assert relative_error(module(*inputs), result) < 2e-2
    assert {"conv2d", "quantize_per_tensor", "linear"} <= targets(module, interpreter.in_integers)
    for integers in interpreter.in_integers:
        assert integers not in interpreter.in_floats


def net(run: Callable[[Any, Tensor], Any], **parts: nn.Module) -> nn.Module:
    return randomize(Block("net", run, **parts))


def conv(c: int, out: int, k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, out, k, padding=k // 2, **options)


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "relu6": (lambda: net(lambda m, x: m.b(F.relu6(3 * m.a(x))), a=conv(3, 8), b=conv(8, 5)), {"conv2d"}),
    "relu, pool": (lambda: net(lambda m, x: m.b(F.max_pool2d(F.relu(m.a(x)), 3, 2, 1)), a=conv(3, 8), b=conv(8, 5)),
                   {"conv2d", "max_pool2d"}),
    "residual": (lambda: net(lambda m, x: m.c(F.relu(m.a(x) + m.b(x))), a=conv(3, 8), b=conv(3, 8), c=conv(8, 5)),
                 {"conv2d", "add"}),
    "concat": (lambda: net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x) * 5], 1)), a=conv(3, 8), b=conv(3, 4),
                           c=conv(12, 5)), {"conv2d"}),
    "moves": (lambda: net(lambda m, x: m.b(F.pad(m.a(x).roll(1, 2), (1, 0)).flatten(2).transpose(1, 2)),
                          a=conv(3, 8), b=nn.Linear(8, 5)), {"conv2d", "roll", "transpose", "linear"}),
    "split": (lambda: net(lambda m, x: m.b(torch.cat(m.a(x).split([3, 5], 1)[::-1], 1)), a=conv(3, 8), b=conv(8, 5)),
              {"conv2d", "split_with_sizes"}),
    "depthwise": (lambda: net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 8), b=conv(8, 16, 3, groups=8)), {"conv2d"}),
    "transposed": (lambda: net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 8),
                               b=nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)), {"conv2d", "conv_transpose2d"}),
    "by hand": (lambda: net(lambda m, x: torch.addmm(m.a.bias, x.mean((2, 3)), m.a.weight.t()), a=nn.Linear(3, 5)),
                {"addmm"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str, n: int, shared: bool) -> None:
    make, wanted = STRUCTURES[name]
    module = lowered(make(), (IMAGE,), bits(n, share_concat=shared, share_add=shared))
    found = check_integers(module, (IMAGE,))
    assert wanted <= targets(module, found.in_integers)
    assert found.output < 1e-5


def test_concat_of_integers_with_scales_of_their_own() -> None:
    """Each operand keeps its multiplier; a common scale needs none."""
    make, _ = STRUCTURES["concat"]
    for shared in (False, True):
        module = lowered(make(), (IMAGE,), bits(8, share_concat=shared))
        assert "cat" in targets(module, check_integers(module, (IMAGE,)).in_integers)


def test_a_product_by_hand() -> None:
    """x = (3 - 1) / 2, w = 5 / 4, b = 7 / 8: 2 * 5 + 7 = 17 of 1/8, which is 8.5 on a step of 1/4."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    dequantized = [
        graph.call_function(ops.dequantize_per_tensor, (operand, scale, zero, -128, 127, dtype))
        for operand, scale, zero, dtype in (
            (x, 0.5, 1, torch.int8),
            (graph.get_attr("w"), 0.25, 0, torch.int8),
            (graph.get_attr("b"), 0.125, 0, torch.int32),
        )
    ]
    product = graph.call_function(torch.ops.aten.linear.default, tuple(dequantized))
    graph.output(graph.call_function(ops.quantize_per_tensor, (product, 0.25, 3, -128, 127, torch.int8)))
    root = nn.Module()
    root.register_buffer("w", torch.tensor([[5]], dtype=torch.int8))
    root.register_buffer("b", torch.tensor([7], dtype=torch.int32))
    interpreter = IntegerInterpreter(fx.GraphModule(root, graph))
    codes = interpreter.run(torch.tensor([[3], [5], [127]], dtype=torch.int8))
    assert codes.flatten().tolist() == [8 + 3, 14 + 3, 127]  # 17/2 and 27/2 to even; saturated
    assert interpreter.in_integers == ["linear_default", "quantize_per_tensor_default"]


def test_float_where_the_graph_says_so() -> None:
    model, inputs = tiny_models()["encoder"]
    module = lowered(model, inputs)
    interpreter = IntegerInterpreter(module)
    interpreter.run(*inputs)
    assert not {"layer_norm", "gelu", "softmax"} & targets(module, interpreter.in_integers)
    grouped = QuantConfig(QuantSpec(4, granularity="group", group_size=2), ACTIVATIONS)
    module = lowered(nn.Sequential(nn.Linear(6, 4)), (torch.randn(3, 6),), grouped)
    found = check_integers(module, (torch.randn(3, 6),))
    assert found.in_floats == {"linear": "its weight is float"}


def test_sums_that_leave_32_bits_are_an_error() -> None:
    x = torch.ones(2, 64)
    module = lowered(nn.Sequential(nn.Linear(64, 2, bias=False)), (x,), bits(16))
    with pytest.raises(VerificationError, match="32 bits"):
        check_integers(module, (x,))


def test_an_integer_graph_that_computes_something_else_is_found() -> None:
    make, _ = STRUCTURES["relu, pool"]
    module = lowered(make(), (IMAGE,))
    interpreter = IntegerInterpreter(module)
    honest = interpreter.run(IMAGE)
    (codes,) = (b for name, b in module.named_buffers() if name == "b.weight_codes")
    codes[0] = -codes[0]
    assert relative_error(honest, IntegerInterpreter(module).run(IMAGE)) > 0.1
