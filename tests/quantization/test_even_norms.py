"""Channels behind norms, evened out by factors and shifts that norm and layers take back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.ir.graph import bind
from graphcomp.quantization import even_norms as passes
from graphcomp.quantization.even_norms import Even, EvenedNorms, EvenNorms, even_norms
from graphcomp.quantization.fold import FoldBatchNorm
from graphcomp.quantization.insert import InsertQuantizers
from graphcomp.quantization.norms import Norm, find_norms
from graphcomp.quantization.placement import place
from graphcomp.quantization.ptq import quantizing
from graphcomp.quantization.quantizers.base import Quantizer
from graphcomp.quantization.spec import ACTIVATIONS, DYNAMIC, WEIGHTS, QuantConfig, QuantSpec, with_bits
from graphcomp.testing.random_models import random_model

C = 8
ROWS = torch.randn(4, 6, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.randn(4, C, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EIGHT = QuantConfig(WEIGHTS, ACTIVATIONS)


class Net(nn.Module):
    """Parts by name, and what to do with them. Weights and biases of norms span two orders of magnitude."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data + torch.logspace(-1.5, 1, C, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(C, C, bias=bias)


def layer_norm() -> nn.LayerNorm:
    return nn.LayerNorm(C)


def group_norm() -> nn.GroupNorm:
    return nn.GroupNorm(2, C)


def attention(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return x + (m.q(y) @ m.k(y).transpose(-1, -2)).softmax(-1) @ m.v(y)


def after_the_sum(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.end(m.down(m.up(y).relu()) + y)


def written_out(m: Any, x: Tensor) -> Tensor:
    y = m.norm * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return m.down(functional.silu(m.gate(y)) * m.up(y))


def one_more(m: Any, x: Tensor) -> Tensor:
    return m.up(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + m.norm))


def by_hand(m: Any, x: Tensor) -> Tensor:
    off = x - x.mean(-1, keepdim=True)
    return m.up(off / (off.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.norm + m.norm_bias)


def windows(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x).view(4, 2, 3, C).transpose(1, 2).reshape(-1, C)
    return m.up(y) + y.new_zeros(())


def experts(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x).reshape(-1, C)
    return torch.bmm(y.expand(3, -1, -1), m.weights).sum(0) * m.router(y).softmax(-1)[:, :1]


def turned(m: Any, x: Tensor) -> Tensor:
    return m.norm(x) @ m.weights[0].t()


def channels_last(m: Any, x: Tensor) -> Tensor:
    return m.conv(m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


# name -> network, input, whether there is a shift, whether the layers have a norm of their own
NETS: dict[str, tuple[Net, Tensor, bool, bool]] = {
    "attention": (Net(attention, norm=layer_norm(), q=linear(), k=linear(), v=linear()), ROWS, True, False),
    "behind a sum": (
        Net(after_the_sum, norm=layer_norm(), up=linear(), down=linear(), end=linear()), ROWS, True, True,
    ),
    "no bias": (Net(lambda m, x: m.up(m.norm(x)), norm=layer_norm(), up=linear(False)), ROWS, False, False),
    "rms": (Net(lambda m, x: m.up(m.norm(x)), norm=nn.RMSNorm(C), up=linear()), ROWS, False, False),
    "rms written out": (
        Net(written_out, norm=p(C), gate=linear(), up=linear(False), down=linear()), ROWS, False, False,
    ),
    "rms of one more": (Net(one_more, norm=p(C), up=linear()), ROWS, False, False),
    "by hand": (Net(by_hand, norm=p(C), norm_bias=p(C), up=linear()), ROWS, True, False),
    "windows": (Net(windows, norm=layer_norm(), up=linear()), ROWS, True, True),
    "experts": (Net(experts, norm=layer_norm(), weights=p(3, C, C), router=linear()), ROWS, False, False),
    "turned": (Net(turned, norm=layer_norm(), weights=p(1, 5, C)), ROWS, False, False),
    "groups": (
        Net(lambda m, x: m.conv(m.norm(x)), norm=group_norm(), conv=nn.Conv2d(C, 4, 1)), IMAGES, True, False,
    ),
    "padded": (
        Net(lambda m, x: m.conv(m.norm(x)), norm=group_norm(), conv=nn.Conv2d(C, 4, 3, padding=1)),
        IMAGES, False, False,
    ),
    "grouped": (
        Net(lambda m, x: m.conv(m.norm(x)), norm=group_norm(), conv=nn.Conv2d(C, 4, 3, groups=2)),
        IMAGES, True, False,
    ),
    "transposed": (
        Net(lambda m, x: m.conv(m.norm(x)), norm=group_norm(), conv=nn.ConvTranspose2d(C, 4, 2, groups=2)),
        IMAGES, False, False,
    ),
    "channels last": (Net(channels_last, norm=layer_norm(), conv=nn.Conv2d(C, 4, 2)), IMAGES, True, False),
    "batch norm alone": (
        Net(lambda m, x: m.conv(m.norm(x)), norm=nn.BatchNorm2d(C), conv=nn.Conv2d(C, 4, 2)).double(),
        IMAGES, True, False,
    ),
}  # fmt: skip


def evened(model: nn.Module, x: Tensor, config: QuantConfig = EIGHT) -> tuple[fx.GraphModule, EvenedNorms]:
    module = FoldBatchNorm().rewrite(capture(model.eval(), x).module)
    return module, even_norms(module, config, (), [(x,)])


def anything(norm: Norm, *_: Any) -> Even:
    """Factors and shifts by chance."""
    generator = torch.Generator().manual_seed(2)
    factor = torch.rand(norm.maker.channels, generator=generator, dtype=torch.float64) * 5 + 0.2
    shift = torch.randn(norm.maker.channels, generator=generator, dtype=torch.float64)
    return Even(factor, shift if norm.shifts else torch.zeros_like(shift))


@pytest.mark.parametrize("name", NETS)
def test_the_function_is_the_same_whatever_the_factors_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_choose", anything)
    model, x, shifts, own = NETS[name]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    module, found = evened(model, x)
    assert (len(found.evened), len(found.own), found.left) == (1, int(own), {})
    (even,) = found.evened.values()
    assert bool(even.shift.any()) == shifts
    tolerance: dict[str, float] = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found.module(x), module(x), **tolerance)
    torch.testing.assert_close(found.module(2 * x + 1), module(2 * x + 1), **tolerance)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.ci
def test_the_function_is_the_same_of_random_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_choose", anything)
    evened_norms = 0
    for seed in range(24):
        model, inputs = random_model(seed)
        model = model.double().eval()
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        module = FoldBatchNorm().rewrite(capture(model, inputs).module)
        found = even_norms(module, EIGHT, (), [inputs])
        torch.testing.assert_close(found.module(*inputs), module(*inputs), rtol=1e-8, atol=1e-8)
        assert all(found.left.values())
        evened_norms += len(found.evened)
    assert evened_norms >= 3


@pytest.mark.parametrize("name", ["attention", "rms written out", "by hand", "channels last"])
def test_channels_of_outliers_are_evened_and_the_error_of_integers_lessens(name: str) -> None:
    model, x, *_ = NETS[name]
    generator = torch.Generator().manual_seed(3)
    *calibration, other = (torch.randn(64, *x.shape[1:], generator=generator) for _ in range(5))
    model.float()
    wanted, errors = model(other).detach(), []
    for even in (False, None):
        quantization = gc.PostTraining(EIGHT, even_activations=even)
        small = gc.compress(
            model, calibration[0], sparsity=0, quantization=quantization, calibration=calibration, repair=None,
            progress=False,
        )  # fmt: skip
        errors.append(float((small(other) - wanted).norm()))
        said = [note for note in small.report.notes if "that norms make were scaled to one range" in note]
        assert len(said) == (even is None)
    model.double()
    assert errors[1] < 0.9 * errors[0]


def test_channels_that_would_clip_on_rows_that_were_not_seen_stay() -> None:
    """A few rows say little of the range of each channel: evened out, every channel clips on others."""
    model = Net(lambda m, x: m.up(m.norm(x)), norm=layer_norm(), up=linear())
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(1.0, 1.3, C))
        model.norm.bias.zero_()
    few = torch.randn(4, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = evened(model, few)[1]
    assert not found.evened and not found.left


def test_a_norm_that_is_even_stays() -> None:
    model = Net(lambda m, x: m.up(m.norm(x)), norm=layer_norm(), up=linear())
    nn.init.ones_(model.norm.weight)
    nn.init.zeros_(model.norm.bias)
    with torch.no_grad():
        model.up.weight.fill_(0.0)
    module, found = evened(model, ROWS)
    assert not found.evened and not found.left
    assert torch.equal(found.module(ROWS), module(ROWS))


FOUR = QuantConfig(with_bits(WEIGHTS, 4), with_bits(ACTIVATIONS, 4))

# name -> network, config, modules to ignore, whether the layers are given a norm of their own first
IN_FORCE: dict[str, tuple[str, QuantConfig, tuple[str, ...], bool]] = {
    "first layer": ("attention", FOUR, (), False),
    "first layer as the others": ("attention", replace(FOUR, first_and_last_bits=4), (), False),
    "stream": ("behind a sum", replace(FOUR, first_and_last_bits=4), (), False),
    "stream, a norm of their own": ("behind a sum", replace(FOUR, first_and_last_bits=4), (), True),
    "stream of as few bits": ("behind a sum", replace(FOUR, first_and_last_bits=4, residual_bits=4), (), False),
    "override": (
        "attention", replace(FOUR, overrides={"k": (with_bits(WEIGHTS, 6), with_bits(ACTIVATIONS, 5))}), (), False,
    ),
    "floats by name": ("attention", replace(FOUR, overrides={"v": (with_bits(WEIGHTS, 6), None)}), (), False),
    "ignored": ("attention", FOUR, ("k",), False),
    "moved": ("channels last", replace(FOUR, first_and_last_bits=4), (), False),
    "weight turned": ("turned", replace(FOUR, first_and_last_bits=4), (), False),
    "one step per tensor": (
        "groups", QuantConfig(replace(WEIGHTS, granularity="tensor"), with_bits(ACTIVATIONS, 6)), (), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_FORCE)
def test_a_trial_rounds_by_the_quantizers_that_are_inserted(name: str) -> None:
    net, config, ignore, own = IN_FORCE[name]
    model, x, *_ = NETS[net]
    module = FoldBatchNorm().rewrite(capture(model.eval(), x).module)
    norms, _ = find_norms(module, config, ignore)
    find = passes._of_own_norms if own else partial(passes._in_force, norms=norms)
    found = find(module, config=config, ignore=ignore)
    if own:  # what the pass writes where layers are given a norm of their own
        for norm in norms:
            passes._copied(norm)
    fake = InsertQuantizers(place(module, config, ignore).sites).rewrite(module)
    nodes = {node.name: node for node in fake.graph.nodes}
    readers = [reader for norm in norms for reader in norm.readers]
    assert found.keys() == {reader.node.name for reader in readers}
    for reader in readers:
        read, weight = (bind(nodes[reader.node.name])[key] for key in (reader.data, reader.weight[0]))
        rounding = found[reader.node.name]
        assert rounding.value == tuple(quantizer.spec for quantizer in in_front(fake, read))
        inserted = in_front(fake, weight)
        expected = [(replace(quantizer.spec, observer="minmax"), quantizer.dim) for quantizer in inserted]
        assert expected == ([] if rounding.weight is None else [(rounding.weight, rounding.dim)])


def in_front(module: fx.GraphModule, node: fx.Node) -> list[Quantizer]:
    """Return the quantizers in a row that end with `node`, the first that a value passes first."""
    found: list[Quantizer] = []
    while node.op == "call_module":
        quantizer = module.get_submodule(str(node.target))
        assert isinstance(quantizer, Quantizer)
        found.insert(0, quantizer)
        node = node.all_input_nodes[0]
    return found


class Gated(nn.Module):
    """Two layers behind a norm that multiplies every seventh channel by 20."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(24), nn.Linear(24, 17), nn.Linear(24, 17)
        self.end = nn.Linear(17, 5)
        self.norm.weight.data.mul_(torch.where(torch.arange(24) % 7 == 3, 20.0, 1.0))

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.end(torch.sigmoid(self.gate(y)) * self.up(y))


# config -> the largest share of the error without even channels that may be left
LEAST: list[tuple[QuantConfig, float]] = [
    (FOUR, 0.95), (EIGHT, 0.95), (QuantConfig(QuantSpec(4), with_bits(ACTIVATIONS, 4)), 1.03),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("config", "most"), LEAST, ids=["4", "8", "4, one step per weight"])
def test_layers_of_more_bits_than_asked_are_not_made_worse(config: QuantConfig, most: float, seed: int) -> None:
    """Of 4 bits, the first layer's weight has 8, and so has the value that both layers read."""
    torch.manual_seed(seed)
    model = Gated().eval()
    *calibration, other = (torch.randn(32, 6, 24) for _ in range(5))
    errors = []
    for even in (False, None):
        small = gc.compress(
            model, calibration[0], sparsity=0, quantization=gc.PostTraining(config, even_activations=even),
            calibration=calibration, progress=False,
        )  # fmt: skip
        errors.append(float((small(other) - model(other)).detach().norm()))
    assert errors[1] <= most * errors[0]


def tied() -> Net:
    return Net(lambda m, x: m.up(m.norm(x)) + functional.linear(x, m.up.weight), norm=layer_norm(), up=linear())


NOT: dict[str, tuple[Net, QuantConfig, str]] = {
    "weight read elsewhere": (tied(), EIGHT, "read elsewhere"),
    "weight computed": (
        Net(lambda m, x: functional.linear(m.norm(x), m.w * 2), norm=layer_norm(), w=p(C, C)), EIGHT, "is computed",
    ),
    "product of two activations": (
        Net(lambda m, x: m.norm(x) @ m.up(m.norm(x)).transpose(1, 2), norm=layer_norm(), up=linear()), EIGHT, "",
    ),
    "channels turned round": (
        Net(lambda m, x: m.up(m.norm(x).flip(-1)), norm=layer_norm(), up=linear()), EIGHT, "in their order",
    ),
    "a clip between": (Net(lambda m, x: m.up(m.norm(x).relu()), norm=layer_norm(), up=linear()), EIGHT, ""),
    "weights alone": (
        Net(lambda m, x: m.up(m.norm(x)), norm=layer_norm(), up=linear()), QuantConfig(WEIGHTS, None), "",
    ),
    "ranges at run time": (
        Net(lambda m, x: m.up(m.norm(x)), norm=layer_norm(), up=linear()), QuantConfig(WEIGHTS, DYNAMIC), "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT)
def test_what_cannot_take_factors_stays_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_choose", anything)
    model, config, why = NOT[name]
    module, found = evened(model, ROWS, config)
    torch.testing.assert_close(found.module(ROWS), module(ROWS), rtol=1e-10, atol=1e-10)
    if name == "product of two activations":  # the norm is called twice: one value is read by a layer alone
        assert len(found.evened) == 1 and all("computed from the inputs" in reason for reason in found.left.values())
        return
    assert not found.evened
    assert [reason for reason in found.left.values() if why not in reason] == []
    assert bool(found.left) == bool(why)
    assert all("stay as they are" in note for note in found.notes())


def test_a_norm_that_is_called_twice_gets_tensors_of_its_own_for_each_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_choose", anything)
    model = Net(lambda m, x: m.up(m.norm(x)) + m.down(m.norm(x * x)), norm=layer_norm(), up=linear(), down=linear())
    module, found = evened(model, ROWS)
    assert len(found.evened) == 2
    torch.testing.assert_close(found.module(ROWS), module(ROWS), rtol=1e-10, atol=1e-10)


def test_even_norms_are_asked_for_where_activations_have_ranges_read_off_data() -> None:
    def asked(**options: Any) -> bool:
        return any(isinstance(step, EvenNorms) for step in quantizing(gc.PostTraining(**options), []))

    assert asked() and asked(config=QuantConfig(with_bits(WEIGHTS, 4), with_bits(ACTIVATIONS, 4)))
    assert not asked(even_activations=False)
    assert not asked(config=QuantConfig(WEIGHTS, None)) and not asked(config=QuantConfig(WEIGHTS, DYNAMIC))
