"""Cross-layer equalization: the same function, ranges that one step can serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.capture.capture import capture
from graphcomp.numerics.compare import relative_error
from graphcomp.quantization.calibrate import calibrate_weight
from graphcomp.quantization.equalize import equalize
from graphcomp.quantization.fold import FoldBatchNorm
from graphcomp.quantization.quantizers.make import make_quantizer
from graphcomp.quantization.spec import QuantSpec
from graphcomp.testing import Block, ResidualCNN, randomize, tiny_models

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Mobile(nn.Module):
    """Two inverted residuals without the residual: conv, depthwise, conv."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
        for _ in range(2):
            layers += [nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), act(),
                       nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), act(),
                       nn.Conv2d(16, 8, 1)]  # fmt: skip
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.features(x)).mean((2, 3)))
        return logits


def badly_scaled(model: nn.Module) -> nn.Module:
    """The scales of the norms spread over four orders of magnitude."""
    randomize(model)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                spread = 10 ** (torch.rand(norm.num_features) * 4 - 2)
                norm.weight *= spread
                norm.bias *= spread
    return model


def folded(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return FoldBatchNorm()(capture(model.eval(), inputs or (IMAGE,)).module)


@torch.no_grad()
def quantized(module: fx.GraphModule, bits: int = 8) -> fx.GraphModule:
    """A copy of `module` with the weights at one step per tensor."""
    from graphcomp.ir.graph import assign, attributes, clone

    rough, _ = clone(module)
    for node, weight in list(attributes(rough)):
        if weight.dim() > 1:
            quantizer = make_quantizer(QuantSpec(bits))
            calibrate_weight(quantizer, weight)
            assign(rough, str(node.target), nn.Parameter(quantizer(weight)))
    return rough


def weights(module: fx.GraphModule) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in module.named_parameters() if tensor.dim() > 1}


def test_badly_scaled_depthwise_channels_come_to_use_the_same_levels() -> None:
    plain = folded(badly_scaled(Mobile()))
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    equal, notes = equalize(plain)
    reference = plain(IMAGE)
    assert relative_error(reference, equal(IMAGE)) < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    errors = [relative_error(reference, quantized(m)(IMAGE)) for m in (plain, equal)]
    assert errors[1] < errors[0] / 5
    assert [note for note in notes if "clipped" in note] == []
    # the two sides of a depthwise convolution have scales of their own: all three ranges of a channel meet
    first, depthwise, second = (weights(equal)[f"features.{k}.weight"] for k in (1, 4, 7))
    ranges = [first.abs().amax((1, 2, 3)), depthwise.abs().amax((1, 2, 3)), second.abs().amax((0, 2, 3))]
    torch.testing.assert_close(ranges[0], ranges[1], rtol=2e-2, atol=0)
    torch.testing.assert_close(ranges[1], ranges[2], rtol=2e-2, atol=0)


def test_one_pair_by_hand() -> None:
    """s = sqrt(r1 r2) / r2, equation 11."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 2.0], [0.5, -1.0]]))  # type: ignore[union-attr, operator]
        model[0].bias.copy_(torch.tensor([8.0, 1.0]))  # type: ignore[union-attr, operator]
        model[2].weight.copy_(torch.tensor([[1.0, -9.0]]))  # type: ignore[union-attr, operator]
    equal, notes = equalize(folded(model, torch.randn(3, 2)))
    assert notes == ["not equalized: 1 value returned by the model"]
    torch.testing.assert_close(weights(equal)["0.weight"], torch.tensor([[2.0, 1.0], [1.5, -3.0]]))
    torch.testing.assert_close(weights(equal)["2.weight"], torch.tensor([[2.0, -3.0]]))
    torch.testing.assert_close(dict(equal.named_parameters())["0.bias"].detach(), torch.tensor([4.0, 3.0]))


@pytest.mark.parametrize("act", [nn.ReLU6, nn.Hardtanh])
def test_what_clips_at_a_number_is_left_alone(act: type[nn.Module]) -> None:
    plain = folded(badly_scaled(Mobile(act)))
    equal, notes = equalize(plain)
    assert any("4 values clipped at a fixed number" in note for note in notes)
    for name in ("features.4.weight", "features.11.weight"):
        assert torch.equal(weights(equal)[name], weights(plain)[name])


def net(run: Any, **parts: nn.Module | nn.Parameter) -> nn.Module:
    return Block("net", run, **parts)


def conv(c: int, out: int, k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, out, k, padding=k // 2, **options)


def twice(x: Tensor, run: Any) -> Any:
    return run(x)


NETS = {
    "residual": lambda: net(lambda m, x: m.c(F.relu(m.a(x) + m.b(x))), a=conv(3, 8), b=conv(3, 8, 3), c=conv(8, 5)),
    "two readers": lambda: net(lambda m, x: twice(m.a(x).relu(), lambda h: m.b(h) + m.c(h).relu()),
                               a=conv(3, 8), b=conv(8, 5), c=conv(8, 5)),
    "grouped": lambda: net(lambda m, x: m.b(F.leaky_relu(m.a(x))), a=conv(3, 8), b=conv(8, 12, 3, groups=4)),
    "flatten": lambda: net(lambda m, x: m.b(F.max_pool2d(F.relu(m.a(x)), 2).flatten(1)), a=conv(3, 8),
                           b=nn.Linear(128, 5)),
    "mean, view": lambda: net(lambda m, x: m.b(m.a(x).relu().mean((2, 3), keepdim=True).view(4, -1)), a=conv(3, 8),
                              b=nn.Linear(8, 5)),
    "pools": lambda: net(lambda m, x: m.b(F.adaptive_avg_pool2d(F.avg_pool2d(m.a(x), 2), 1)), a=conv(3, 8),
                         b=conv(8, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_structures(name: str) -> None:
    model = NETS[name]()
    with torch.no_grad():
        model.a.weight *= 10 ** (torch.rand(8, 1, 1, 1) * 4 - 2)
    plain = folded(model)
    equal, _ = equalize(plain)
    assert relative_error(plain(IMAGE), equal(IMAGE)) < 1e-5
    spreads = [weights(m)["a.weight"].abs().amax((1, 2, 3)).log().std() for m in (plain, equal)]
    assert spreads[1] < 0.8 * spreads[0]


BLOCKED = {
    "gelu": (lambda m, x: m.b(F.gelu(m.a(x))), "gelu"),
    "also returned": (lambda m, x: (m.b(F.relu(m.a(x))), m.a(x)), "returned"),
    "a gate": (lambda m, x: m.b(m.a(x) * torch.sigmoid(x.mean())), "mul"),
    "added to the input": (lambda m, x: m.b(F.relu(m.a(x) + x.mean(1, True).expand(-1, 8, -1, -1))), "add"),
    "mean over channels": (lambda m, x: m.b(twice(m.a(x), lambda h: h - h.mean(1, True))), "mean"),
    "channels moved": (lambda m, x: m.b(m.a(x).transpose(1, 2)), "transpose"),
    "sum of a constant": (lambda m, x: m.b(F.relu(m.a(x) + 1.0)), "add"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_does_not_scale_is_left_alone(name: str) -> None:
    run, op = BLOCKED[name]
    plain = folded(net(run, a=conv(3, 8), b=conv(8, 5)))
    equal, notes = equalize(plain)
    assert any(op in note for note in notes)
    assert all(torch.equal(tensor, weights(plain)[key]) for key, tensor in weights(equal).items())


def test_tied_weights_are_left_alone() -> None:
    a, b = conv(3, 8), conv(8, 8)
    plain = folded(net(lambda m, x: m.c(F.relu(m.b(F.relu(m.b(F.relu(m.a(x))))))), a=a, b=b, c=conv(8, 5)))
    equal, _ = equalize(plain)
    assert all(torch.equal(tensor, weights(plain)[key]) for key, tensor in weights(equal).items())


def test_dead_and_extreme_channels() -> None:
    model = net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 8), b=conv(8, 5))
    with torch.no_grad():
        model.a.weight[0] = 0  # type: ignore[union-attr, operator, index]
        model.b.weight[:, 1] = 0  # type: ignore[union-attr, operator, index]
        model.a.weight[2] *= 1e-20  # type: ignore[union-attr, operator, index]
    plain = folded(model)
    equal, _ = equalize(plain)
    assert relative_error(plain(IMAGE), equal(IMAGE)) < 1e-5
    ratio = dict(equal.named_parameters())["a.bias"] / dict(plain.named_parameters())["a.bias"]
    assert ratio[:2].tolist() == [1.0, 1.0]
    assert ratio[2].item() == pytest.approx(1e3)


@pytest.mark.slow
@pytest.mark.ci
def test_whole_models_keep_their_function() -> None:
    torch.manual_seed(0)
    plain = folded(badly_scaled(ResidualCNN()))
    equal, _ = equalize(plain)
    assert relative_error(plain(IMAGE), equal(IMAGE)) < 1e-4
    assert not torch.equal(weights(plain)["first.0.weight"], weights(equal)["first.0.weight"])
    for name in ("vision_transformer", "encoder", "decoder"):
        model, inputs = tiny_models()[name]
        whole = folded(model, *inputs)
        assert relative_error(whole(*inputs), equalize(whole)[0](*inputs)) < 1e-5
