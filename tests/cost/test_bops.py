"""Bit operations: the published anchors, by hand, and after a cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

import graphcomp
from graphcomp.capture.capture import capture
from graphcomp.cost import Bits, Bops, CostModel, counts_of
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.errors import PlanError
from graphcomp.pruning.slice import SliceGroups


def vgg7() -> nn.Module:
    """2 x 128, 2 x 256 and 2 x 512 channels, a pool after each pair, 1024 features."""
    layers: list[nn.Module] = []
    for before, width in ((3, 128), (128, 256), (256, 512)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers, *head)


class Block(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = width // before
        self.one = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.two(relu(self.one(x))) + self.shortcut(x))


def resnet20() -> nn.Module:
    """For 32 x 32 images, with convolutions as shortcuts."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Block(before, width) for before, width in pairwise(widths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.ReLU(), *blocks, *head)


class Attention(nn.Module):
    """Heads of equal size, the products written out or fused."""

    def __init__(self, width: int, heads: int, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        split = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        q, k, v = split
        y = scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(-2))


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, fused: bool = True) -> None:
        super().__init__()
        self.attention = Attention(width, heads, fused)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(relu(self.up(x)))


def bert(layers: int) -> nn.Module:
    """BERT-base with the two scores per token that question answering takes; the embeddings have no MACs."""
    return nn.Sequential(*(Encoder(768, 12, 3072) for _ in range(layers)), nn.Linear(768, 2))


def analysed(model: nn.Module, *shape: int, device: str = "cpu") -> Analysis:
    return analyze_captured(capture(model.to(device).eval(), torch.randn(*shape, device=device)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


# ------------------------------------------------------------------------------------------------ anchors
@pytest.mark.parametrize(
    ("build", "shape", "macs", "bops"),
    [
        (vgg7, (1, 3, 32, 32), 608.053e6, 622_646.5e6),
        (resnet20, (1, 3, 32, 32), 40.813e6, 41_792.7e6),
        (lambda: bert(1), (1, 156, 768), 1104.390e6, None),
        (lambda: bert(2), (1, 156, 768), 2208.54067e6, None),
    ],
)
def test_published_counts(build, shape: tuple[int, ...], macs: float, bops: float | None) -> None:
    """The counts that GETA's reference code gives."""
    with torch.device("meta"):
        costs = CostModel(analysed(build(), *shape, device="meta"))
    kinds = costs.macs_by_kind()
    digits = 5e2 if macs < 2e9 else 5
    assert sum(kinds.values()) - kinds["attention"] == pytest.approx(macs, abs=digits)
    if bops is not None:
        assert Bops(costs).layers() == pytest.approx(bops, abs=5e4)
        half = {layer: Bits(weight=16) for layer in costs.macs_by_layer()}
        assert Bops(costs, half).layers() * 2 == Bops(costs).layers()


# ------------------------------------------------------------------------------------------------ by hand
def test_bits_of_each_layer_count() -> None:
    costs = CostModel(analysed(mlp(), 5, 4))
    bops = Bops(costs, {"0": Bits(4, 8), "2": Bits(weight=2)})
    assert bops.by_layer() == {"0": 5 * 24 * 4 * 8, "2": 5 * 18 * 2 * 32}
    assert bops.layers() == 5 * (24 * 32 + 18 * 64)
    assert bops.attention() == 0
    assert Bops(costs).layers() == 1024 * costs.macs()


def test_learned_bits_are_rounded() -> None:
    costs = CostModel(analysed(mlp(), 5, 4))
    assert Bops(costs, {"0": Bits(3.6, 7.7)}).by_layer()["0"] == 5 * 24 * 4 * 8
    assert Bops(costs, {"0": Bits(3.4, 8.2)}).by_layer()["0"] == 5 * 24 * 3 * 8


def test_bits_of_an_op_come_before_those_of_its_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(relu(self.fc(x)))

    costs = CostModel(analysed(Twice(), 5, 4))
    first, second = costs.operations
    assert costs.macs_by_layer() == {"fc": 160}
    assert Bops(costs, {"fc": Bits(8, 8), second.node: Bits(8, 4)}).layers() == 80 * 64 + 80 * 32
    assert first.layer == second.layer == "fc"


@pytest.mark.parametrize("fused", [True, False])
def test_attention_stands_apart(fused: bool) -> None:
    costs = CostModel(analysed(Encoder(16, 4, 24, fused), 2, 5, 16))
    linear, products = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 24), 2 * 2 * 5 * 5 * 16
    bops = Bops(costs)
    assert bops.layers() == 1024 * linear
    assert bops.attention() == 1024 * products
    names = [o.layer for o in costs.operations if o.kind == "attention"]
    assert len(names) == len(set(names)) == (1 if fused else 2)
    assert all(name.startswith("attention/") for name in names)
    quantized = Bops(costs, {name: Bits(8, 4) for name in names})
    assert quantized.attention() == 32 * products
    assert quantized.layers() == bops.layers()


def test_bops_after_a_cut_are_those_of_the_cut_network() -> None:
    analysis = analysed(Encoder(16, 4, 24), 2, 5, 16)
    costs = CostModel(analysis)
    kept = {g: torch.arange(max(1, g.size // 2)) for g in analysis.groups if g.role in ("head", "hidden")}
    assert len(kept) == 2
    small = SliceGroups(analysis.coupling, kept)(analysis.captured.module)
    bits = {"up": Bits(4, 8), "attention.query": Bits(2, 2), "down": Bits(8, 8)}
    by_layer = Bops(costs, bits).by_layer(counts_of(kept))
    again = Bops(CostModel(analyze_captured(capture(small.eval(), torch.randn(2, 5, 16)))))
    after, before = again.by_layer(), Bops(costs).by_layer()
    assert by_layer["up"] * 32 == after["up"] == before["up"] // 2
    assert by_layer["attention.query"] * 256 == after["attention.query"]
    assert by_layer["down"] * 16 == after["down"]
    assert Bops(costs).layers(counts_of(kept)) == again.layers()
    assert Bops(costs).attention(counts_of(kept)) == again.attention() == Bops(costs).attention() // 2


class Mixed(nn.Module):
    """Convolutions of all kinds, a residual sum and linear layers on a sequence: (n, 3, 8, 8) -> (n, 64, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=4)
        self.depthwise, self.point = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 16, 1)
        self.wide = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.up, self.down = nn.Linear(16, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.stem(x))
        x = relu(x + self.wide(relu(self.point(relu(self.depthwise(relu(self.grouped(x))))))))
        return self.down(relu(self.up(x.flatten(2).transpose(1, 2))))


def counted(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Layer -> multiplications, counted on the shapes that go by: each output element of a layer is a sum of as many
    products as a row of its weight has elements; of a transposed convolution, each input element goes into as many."""
    found: dict[str, int] = {}

    def hook(name: str) -> Any:
        def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            transposed = isinstance(layer, nn.ConvTranspose2d)
            found[name] = (inputs[0] if transposed else output).numel() * layer.weight[0].numel()

        return count

    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if isinstance(m, layers)]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def test_a_cut_network_costs_what_hooks_count() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    small = graphcomp.compress(Mixed().eval(), x, sparsity=0.4)
    assert small.form == "native"
    by_layer = counted(small.module, x)
    report = graphcomp.compress(small, x, sparsity=0, bits=5, activation_bits=6).report
    assert small.report.macs.after == report.macs.before == sum(by_layer.values()) < small.report.macs.before
    assert small.report.bops.after == 1024 * sum(by_layer.values())
    bits = {row.name.removeprefix("module."): row.weight_bits * row.activation_bits for row in report.layers}
    assert bits.keys() == by_layer.keys() and {30, 64} <= set(bits.values())
    assert report.bops.after == sum(by_layer[name] * product for name, product in bits.items())


# ------------------------------------------------------------------------------------------------ bad arguments
def test_bits_for_no_layer() -> None:
    costs = CostModel(analysed(Encoder(16, 4, 24), 2, 5, 16))
    with pytest.raises(PlanError, match=r"(?s)attention\.quary.*fix: +one of attention\.query"):
        Bops(costs, {"attention.quary": Bits(8, 8)})


def test_a_layer_without_macs_may_have_bits() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(relu(self.table(ids)))

    costs = CostModel(analyze_captured(capture(Embedded().eval(), torch.randint(0, 10, (2, 3)))))
    assert Bops(costs, {"table": Bits(8), "head": Bits(8, 8)}).by_layer() == {"head": 64 * 2 * 3 * 18}


@pytest.mark.parametrize("bits", [0, 33, -1, float("nan"), True])
def test_bits_out_of_range(bits: float) -> None:
    with pytest.raises(PlanError, match=r"from 1 to 32"):
        Bits(8, bits)
    with pytest.raises(PlanError, match=r"from 1 to 32"):
        Bits(bits)
