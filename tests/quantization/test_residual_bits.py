"""Few bits for operands of products alone: what passes through sums, bottlenecks and pools has `residual_bits`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.errors import PlanError
from graphcomp.quantization.fold import FoldBatchNorm
from graphcomp.quantization.insert import InsertQuantizers, quantizer_nodes
from graphcomp.quantization.placement import place
from graphcomp.quantization.ptq import calibrate_activations, calibrate_weights
from graphcomp.quantization.redundant import RepeatQuantizers, without_repeats
from graphcomp.quantization.spec import ACTIVATIONS, WEIGHTS, QuantConfig, with_bits
from tests.marks import in_ci
from tests.quantization.models import random_norms

CONV, ADD = torch.ops.aten.conv2d.default, torch.ops.aten.add.Tensor
LAW = "integers == fake-quant, in steps"


class Inverted(nn.Module):
    """A residual block with a linear bottleneck, as in MobileNetV2."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.expand, self.depth = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.project, self.norm = nn.Conv2d(2 * c, c, 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.project(functional.relu6(self.depth(functional.relu6(self.expand(x))))))


class Net(nn.Module):
    """Two residual blocks between a bottleneck and a pool in front of the classifier."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.stem, self.narrow = nn.Conv2d(3, 2 * c, 3, stride=2), nn.Conv2d(2 * c, c, 1)
        self.first, self.second = Inverted(c), Inverted(c)
        self.head, self.fc = nn.Conv2d(c, 2 * c, 1), nn.Linear(2 * c, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.narrow(functional.relu6(self.stem(x)))))
        return self.fc(functional.relu6(self.head(x)).mean((2, 3)))


class Pooled(nn.Module):
    """A stream that a pooling moves on the way to a product and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.a(self.stem(x)), 2)
        return self.last(x + self.b(x))


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return random_norms(Net()).eval()


def config(bits: int = 4, **options: Any) -> QuantConfig:
    return QuantConfig(with_bits(WEIGHTS, bits), with_bits(ACTIVATIONS, bits), **options)


def fake(model: nn.Module, options: QuantConfig, *, repeats: bool = True) -> fx.GraphModule:
    folded = FoldBatchNorm()(capture(model, X).module)
    sites = place(folded, options).sites
    module = InsertQuantizers(sites if repeats else without_repeats(sites, folded.graph))(folded)
    calibrate_activations(module, [(X,)])
    calibrate_weights(module)
    return module


def read_bits(module: fx.GraphModule, target: Any) -> list[list[int]]:
    """Of each call of `target`: the bits of each quantizer between the first operand and the op behind, last first."""
    quantizers = dict(quantizer_nodes(module))
    found = []
    for node in module.graph.find_nodes(op="call_function", target=target):
        chain, operand = [], node.all_input_nodes[0]
        while operand in quantizers:
            chain.append(quantizers[operand].spec.bits)
            (operand,) = operand.all_input_nodes
        found.append(chain)
    return found


def compressed(model: nn.Module, options: QuantConfig, **more: Any) -> gc.CompressedModel:
    quantization = gc.PostTraining(options, **more)
    return gc.compress(model, X, sparsity=0, quantization=quantization, calibration=[X], progress=False)


# ------------------------------------------------------------------------------------------------ placement
def test_products_read_few_bits_and_sums_read_eight() -> None:
    module = fake(net(), config())
    # stem, narrow, then expand, depth and project twice, head; an expansion reads the stream through both quantizers
    block = [[4, 8], [4], [4]]
    assert read_bits(module, CONV) == [[8], [8], *block, *block, [4]]
    assert read_bits(module, ADD) == [[8], [8]]
    assert read_bits(module, torch.ops.aten.mean.dim) == [[8]]


def test_two_bits_for_the_residual_stream_ask_for_nothing() -> None:
    module = fake(net(), config(residual_bits=2))
    assert read_bits(module, CONV) == [[8], [8], *[[4]] * 7]
    assert read_bits(module, ADD) == [[4], [4]]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_stream_of_as_many_bits_has_one_quantizer(bits: int) -> None:
    module = fake(net(), config(bits))
    assert [len(chain) for chain in read_bits(module, CONV)] == [1] * 9
    assert read_bits(module, ADD) == [[bits], [bits]]


def test_a_stream_may_have_more_bits_than_eight() -> None:
    module = fake(net(), config(residual_bits=12))
    assert read_bits(module, ADD) == [[12], [12]]
    assert [chain for chain in read_bits(module, CONV) if len(chain) > 1] == [[4, 12]] * 2


def test_one_quantizer_of_few_bits_for_all_products_that_read_a_value() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mid, self.a, self.b = (nn.Conv2d(3, 3, 1) for _ in range(4))
            self.last = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mid(self.stem(x))
            return self.last(x + self.a(x) + self.b(x))

    module = fake(Fork().eval(), config())
    few = {node for node, quantizer in quantizer_nodes(module) if quantizer.spec.bits == 4 and quantizer.dim is None}
    (shared,) = few
    assert [user.target for user in shared.users] == [CONV, CONV]


def test_a_named_product_reads_its_own_bits_beside_the_stream() -> None:
    own = {"first.expand": (with_bits(WEIGHTS, 4), with_bits(ACTIVATIONS, 6))}
    module = fake(net(), config(overrides=own))
    assert read_bits(module, CONV)[2][0] == 6 and read_bits(module, ADD) == [[8], [8]]


def test_quantizers_behind_moves_are_left_out_and_put_back() -> None:
    torch.manual_seed(0)
    model = Pooled().eval()
    every, few = fake(model, config()), fake(model, config(), repeats=False)
    again = RepeatQuantizers()(few)
    assert read_bits(every, CONV)[2] == read_bits(again, CONV)[2] == [4, 8] and read_bits(few, CONV)[2] == [4]
    for module in (few, again):
        torch.testing.assert_close(module(X), every(X), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ what follows from it
@pytest.mark.parametrize("options", [{}, {"share_add": True}, {"residual_bits": 16}], ids=str)
@pytest.mark.parametrize("rounding", in_ci("nearest", "second_order"))
def test_integers_are_the_fake_quant_graph(options: dict[str, Any], rounding: Any) -> None:
    small = compressed(net(), config(**options), rounding=rounding)
    assert small.report.verified[LAW] <= 1
    layers = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in small.report.layers}
    assert layers["first.expand"] == layers["second.expand"] == layers["head"] == (4, 4)
    assert layers["stem"] == layers["fc"] == (8, 8)


@pytest.mark.slow
@pytest.mark.ci
def test_the_stream_costs_no_bit_operations_and_saves_error() -> None:
    few, more = (compressed(net(), config(residual_bits=bits)) for bits in (2, 8))
    assert few.report.bops.after == more.report.bops.after
    wanted = net()(X)
    errors = [float((small(X) - wanted).detach().norm()) for small in (few, more)]
    assert errors[1] < errors[0]


@pytest.mark.slow
@pytest.mark.ci
def test_the_file_computes_what_the_model_computes(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    small = compressed(net(), config())
    small.export(tmp_path / "small.onnx")
    (found,) = runtime.InferenceSession(tmp_path / "small.onnx").run(None, {"x": X.numpy()})
    np.testing.assert_allclose(found, small(X).detach().numpy(), rtol=1e-4, atol=1e-4)
    assert small.export_report.kernels.share == 1.0


@pytest.mark.parametrize("bits", [1, 17, None])
def test_residual_bits_are_checked(bits: Any) -> None:
    with pytest.raises(PlanError, match="residual_bits"):
        QuantConfig(residual_bits=bits)
