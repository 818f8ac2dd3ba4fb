"""Costs read off the axes are those of the network that is cut: counted by hand, and by torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graphcomp as gc
from graphcomp.capture.capture import capture
from graphcomp.cost import CostModel, counts_of, macs, param_bytes, params
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.groups import Kept
from graphcomp.ops.registry import forget
from graphcomp.pruning.slice import SliceGroups


class Mlp(nn.Module):
    """4 -> 6 -> 3, one normalisation and a parameter that is never read."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.down = nn.Linear(6, 3, bias=False)
        self.unread = nn.Parameter(torch.zeros(11))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


class Residual(nn.Module):
    """Strided, grouped, depthwise, dilated and transposed convolutions around a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2)
        self.back = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.point(self.depthwise(x))
        return self.head(torch.relu(self.back(torch.relu(self.grouped(x)))).mean((2, 3)))


class Encoder(nn.Module):
    """Embedding, attention (fused or written out), feed-forward."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.embed = nn.Embedding(20, 16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, s, _ = x.shape
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).view(b, s, 3, 4, 4).unbind(2))
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-1, -2)) * 0.5).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(b, s, -1))
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def analysed(model: nn.Module, *inputs: Tensor) -> Analysis:
    return analyze_captured(capture(model.eval(), inputs))


def halved(analysis: Analysis) -> Kept:
    """Every group at a different share, at least one unit."""
    shares = (0.3, 0.5, 0.7)
    return {
        g: torch.randperm(g.size)[: max(1, int(shares[k % 3] * g.size))].sort().values
        for k, g in enumerate(analysis.groups)
    }


def counted(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates by torch's counter, which knows the parts of attention but not the fused kernel."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


# ------------------------------------------------------------------------------------------------ by hand
def test_params_macs_and_bytes_by_hand() -> None:
    analysis = analysed(Mlp(), torch.randn(5, 4))
    (group,) = analysis.groups
    kept = {group: torch.tensor([0, 2])}
    assert params(analysis) == 4 * 6 + 6 + 2 * 6 + 6 * 3 + 11
    assert params(analysis, kept) == 4 * 2 + 2 + 2 * 2 + 2 * 3 + 11
    assert macs(analysis) == 5 * (4 * 6 + 6 * 3)
    assert macs(analysis, kept) == 5 * (4 * 2 + 2 * 3)
    assert param_bytes(analysis, kept) == 4 * params(analysis, kept) + 4 * 2 * 2 + 8  # running statistics and a count


def test_a_batch_of_one_counts_one_sample() -> None:
    assert macs(analysed(Mlp(), torch.randn(1, 4))) == 4 * 6 + 6 * 3


def test_a_tied_parameter_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.embed(ids)))

    analysis = analysed(Tied(), torch.randint(0, 10, (2, 3)))
    (group,) = analysis.groups
    assert params(analysis) == 60
    assert params(analysis, {group: torch.arange(4)}) == 40
    assert param_bytes(analysis) == 240
    assert macs(analysis) == 2 * 3 * 6 * 10


def test_bytes_follow_the_dtype() -> None:
    analysis = analysed(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double(), torch.randn(2, 4).double())
    assert param_bytes(analysis) == 8 * params(analysis)


def test_einsum_and_bilinear() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 7))
            self.pair = nn.Bilinear(7, 7, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.einsum("bsi,io->bso", x, self.weight)
            return self.pair(y, torch.einsum("bso,bso->bso", y, y))

    analysis = analysed(Products(), torch.randn(2, 5, 4))
    assert macs(analysis) == 2 * 5 * 4 * 7 + 2 * 5 * 3 * 7 * 7


@pytest.mark.parametrize("equation", ["...id,...jd->...ij", "abij, abkj"])
def test_einsum_with_open_dims_or_no_result(equation: str) -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, x)

    assert macs(analysed(Products(), torch.randn(2, 3, 5, 4))) == 2 * 3 * 5 * 5 * 4


@pytest.mark.slow
@pytest.mark.ci
def test_recurrent_layers_meet_every_matrix_at_every_step() -> None:
    class Lstm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    costs = CostModel(analysed(Lstm(), torch.randn(2, 7, 3)))
    first, second = 2 * (20 * 3 + 20 * 5), 2 * (20 * 10 + 20 * 5)
    assert costs.macs_by_kind({})["recurrent"] == 2 * 7 * (first + second)


# ------------------------------------------------------------------------------------------------ by torch's counter
MODELS = {
    "convolutions": (Residual, lambda: torch.randn(2, 3, 16, 16)),
    "attention": (lambda: Encoder(fused=True), lambda: torch.randint(0, 20, (2, 5))),
    "written-out attention": (lambda: Encoder(fused=False), lambda: torch.randint(0, 20, (2, 5))),
}


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_those_of_the_sliced_network(name: str) -> None:
    build, inputs = MODELS[name]
    model, x = build().eval(), inputs()
    analysis = analysed(model, x)
    kept = halved(analysis)
    small = SliceGroups(analysis.coupling, kept)(analysis.captured.module)
    assert len(analysis.groups) >= 3
    assert macs(analysis) == counted(model, x)
    assert macs(analysis, kept) == counted(small, x) < counted(model, x)
    assert params(analysis, kept) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_attention_stands_apart(fused: bool) -> None:
    costs = CostModel(analysed(Encoder(fused), torch.randint(0, 20, (2, 5))))
    kinds = costs.macs_by_kind({})
    assert kinds["attention"] == 2 * 4 * 5 * 5 * (4 + 4)
    assert kinds["linear"] == 2 * 5 * (16 * 48 + 16 * 16 + 2 * 16 * 24) + 2 * 16 * 3
    assert sum(kinds.values()) == costs.macs({})


# ------------------------------------------------------------------------------------------------ by op and by layer
def test_macs_of_each_layer_before_and_after_a_cut() -> None:
    analysis = analysed(Mlp(), torch.randn(5, 4))
    (group,) = analysis.groups
    costs = CostModel(analysis)
    assert costs.macs_by_layer() == {"up": 5 * 24, "down": 5 * 18}
    assert costs.macs_by_layer({group.factor: 2}) == {"up": 5 * 8, "down": 5 * 6}
    assert costs.macs_by_op({group.factor: 2}) == {o.node: 5 * {"up": 8, "down": 6}[o.layer] for o in costs.operations}
    assert costs.layers == {"up", "up.bias", "norm", "norm.bias", "down", "unread"}


@pytest.mark.parametrize("name", MODELS)
def test_ops_and_layers_sum_up_to_the_whole(name: str) -> None:
    build, inputs = MODELS[name]
    analysis = analysed(build(), inputs())
    costs, counts = CostModel(analysis), counts_of(halved(analysis))
    by_op, by_layer = costs.macs_by_op(counts), costs.macs_by_layer(counts)
    assert sum(by_op.values()) == sum(by_layer.values()) == costs.macs(counts)
    assert [costs.operations[k].node for k in range(len(by_op))] == list(by_op)
    weights = {n.removesuffix(".weight") for n, p in analysis.model.named_parameters() if p.dim() > 1} - {"embed"}
    assert weights == {o.layer for o in costs.operations if o.kind != "attention"}


def test_names_of_layers() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
            self.rnn = nn.LSTM(8, 6, batch_first=True)
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight
            self.matrix = nn.Parameter(torch.randn(10, 3))

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.rnn(self.normed(self.embed(ids)))[0]) @ self.matrix

    costs = CostModel(analysed(Layers(), torch.randint(0, 10, (2, 3))))
    normed, rnn, head, matrix = costs.macs_by_layer()
    assert normed == "normed.parametrizations.weight.original1"
    assert rnn.startswith("rnn/")
    assert (head, matrix) == ("embed", "matrix")  # a tied weight has one name
    assert [o.kind for o in costs.operations] == ["linear", "recurrent", "linear", "linear"]


def test_the_meta_device_will_do() -> None:
    with torch.device("meta"):
        analysis = analysed(Residual(), torch.randn(2, 3, 16, 16))
    real = analysed(Residual(), torch.randn(2, 3, 16, 16))
    assert macs(analysis) == macs(real)
    assert params(analysis) == params(real)


def test_counts_of() -> None:
    analysis = analysed(Mlp(), torch.randn(5, 4))
    (group,) = analysis.groups
    assert counts_of({group: torch.tensor([1, 3, 4])}) == {group.factor: 3}


@torch.library.custom_op("graphcomp_tests::gate", mutates_args=())
def gate(x: Tensor, w: Tensor) -> Tensor:
    """An op that no formula can know."""
    return x * w


@gate.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_ops_of_the_users_own_are_named() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return self.b(torch.ops.graphcomp_tests.gate(y, y.sigmoid()))

    def found() -> list[str]:
        return [op.op for op in CostModel(gc.analyze(Gated(), torch.randn(2, 4))).uncounted]

    assert found() == ["graphcomp_tests.gate.default"]
    try:
        gc.rule("graphcomp_tests::gate", "n c, n c -> n c")
        assert found() == ["graphcomp_tests.gate.default"]
        forget("graphcomp_tests::gate")
        gc.op("graphcomp_tests::gate", "n c, n c -> n c", macs=())
        assert found() == []
    finally:
        forget("graphcomp_tests::gate")


def test_norms_and_similarities_are_no_products() -> None:
    class Similar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cosine_similarity(self.norm(self.a(x)), self.b(x), -1)

    assert CostModel(gc.analyze(Similar(), torch.randn(2, 4))).uncounted == ()


class Striding(nn.Module):
    """A number read off a buffer beside a length of the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.register_buffer("stride", torch.tensor([8.0]))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 4, 2 h, 2 w)."""
        y: Tensor = self.b(nn.functional.interpolate(self.a(x).relu(), scale_factor=2.0))
        return y * torch.full((y.shape[-1],), self.stride[0])


def test_nothing_after_the_analysis_specialises_its_symbols() -> None:
    x = torch.randn(2, 3, 8, 8)
    plan = gc.analyze(Striding(), x)
    batch = plan.captured.module.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    environment = batch.node.shape_env
    before = macs(plan), len(environment.guards), dict(environment.replacements)
    small = gc.slice_groups(plan, {plan.groups[0]: torch.arange(4)})
    assert (macs(plan), len(environment.guards), environment.replacements) == before
    assert small.report.macs.before == 2 * 64 * (3 * 8 * 9 + 4 * 8 * 4)


def test_a_recorded_recurrent_layer_counts_as_an_exported_one() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.f = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.r(x)[0]
            return self.f(y * 2 if float(y.sum()) > 1e9 else y)

    plan = gc.analyze(Branching(), torch.randn(2, 5, 8))
    assert plan.captured.producer == "record"
    assert macs(plan) == 2 * 5 * (4 * 16 * (8 + 16) + 16 * 4)
