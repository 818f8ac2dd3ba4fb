"""A report says what was done, as text and as plain data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import graphcomp
from graphcomp.cost import Latency
from graphcomp.report.report import Change, LayerReport, Report

PROMISED = {
    "params",
    "macs",
    "bops",
    "bytes",
    "latency_ms",
    "sparsity",
    "units",
    "layers",
    "groups",
    "frozen",
    "unknown_ops",
    "verified",
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.down(torch.relu(self.up(nn.functional.scaled_dot_product_attention(q, k, v))))


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    plan = graphcomp.analyze(Attention().eval(), torch.randn(2, 5, 8))
    hidden = next(group for group in plan.groups if group.size == 12)
    small = graphcomp.slice_groups(plan, {hidden: range(6)}, measure_latency=True)
    assert isinstance(small.report, Report)
    return small.report


KERNELS = {
    "integer": {"MatMulInteger": 2},
    "float": {"Gemm": 1},
    "stayed_float": [["down", "its output is not quantized"]],
    "unquantized": [],
    "share": 2 / 3,
}


def quantized(report: Report) -> Report:
    return replace(
        report,
        layers=(LayerReport("qkv", 24, 24, 8, 8), LayerReport("up", 6, 12, 4, 8), LayerReport("down", 4, 4, 8, 8)),
        sizes={"C0": 1234.0, "C4": 2345.6},
        quantization_errors={"qkv": 0.001, "up": 0.03},
        kernels=KERNELS,
    )


def test_attention_has_a_line_of_its_own(report: Report) -> None:
    before, after = 2 * 5 * (8 * 24 + 8 * 12 + 12 * 4), 2 * 5 * (8 * 24 + 8 * 6 + 6 * 4)
    products = 2 * 2 * 5 * 5 * 8
    assert report.bops == Change(1024 * before, 1024 * after)
    assert report.bops_attention == Change(1024 * products, 1024 * products)
    assert report.macs == Change(before + products, after + products)


def test_plain_data(report: Report) -> None:
    data = report.to_dict()
    assert set(data) >= PROMISED
    assert data["bops_attention"] == {"before": 1024 * 800, "after": 1024 * 800}
    assert (data["sizes"], data["quantization_errors"], data["kernels"]) == ({}, {}, None)
    data = quantized(report).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["sizes"] == {"C0": 1234.0, "C4": 2345.6}
    assert data["quantization_errors"] == {"qkv": 0.001, "up": 0.03}
    assert data["kernels"] == KERNELS
    assert [(layer["weight_bits"], layer["activation_bits"]) for layer in data["layers"]] == [(8, 8), (4, 8), (8, 8)]


def test_text(report: Report) -> None:
    lines = {line[:15].strip(): " ".join(line[15:].split()) for line in str(report).splitlines()}
    assert lines["bops"] == "3,440,640 -> 2,703,360 (78.6%)"
    assert lines["attention bops"] == "819,200 -> 819,200 (100.0%)"
    assert lines["units"].startswith("6 of ")
    assert "->" in lines["latency, ms"]
    assert {"bits", "weights, bytes", "quantization", "kernels"}.isdisjoint(lines)


def test_text_of_a_quantized_model(report: Report) -> None:
    lines = [" ".join(line.split()) for line in str(quantized(report)).splitlines()]
    assert "bits 4 for weights, 8 for activations: 1 of 3 layers" in lines
    assert "bits 8 for weights, 8 for activations: 2 of 3 layers" in lines
    assert "weights, bytes C0 1,234, C4 2,346" in lines
    assert "quantization largest relative error 3.0e-02, of up" in lines
    assert "kernels 67% of convolutions and products on integers (2 MatMulInteger, 1 Gemm)" in lines
    assert "kernels down stays float: its output is not quantized" in lines


@pytest.mark.parametrize("bits", [None, 8])
def test_latency_is_of_the_model_and_of_the_result(monkeypatch: pytest.MonkeyPatch, bits: int | None) -> None:
    timed: list[nn.Module] = []

    def latency(module: nn.Module, *_: object) -> Latency:
        timed.append(module)
        return Latency(float(len(timed)), 0.0, 0.0, 1)

    monkeypatch.setattr("graphcomp.flows.results.latency", latency)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    small = graphcomp.compress(model, torch.randn(2, 8), bits=bits, measure_latency=True)
    assert len(timed) == 2 and timed[0] is model and timed[1] is small.module
    assert small.report.latency_ms == Change(1.0, 2.0)


def test_it_comes_back_from_plain_data(report: Report) -> None:
    for whole in (report, quantized(report), replace(report, verified={"masked == sliced": float("nan")})):
        stored = json.loads(json.dumps(whole.to_dict()).replace("NaN", "null"))
        found = Report.from_dict(stored)
        assert str(found) == str(whole)
        assert [str(axis) for axis in found.frozen] == [str(axis) for axis in whole.frozen] != []
        assert found.layers == whole.layers and found.bops.ratio == whole.bops.ratio
    assert found.verified["masked == sliced"] != found.verified["masked == sliced"]


class Tokens(nn.Module):
    """A layer of every kind, a class token, a table of positions and a bias of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag = nn.Embedding(9, 8), nn.EmbeddingBag(9, 8)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(5, 8))
        self.bias, self.scale = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.rand(5, 8))
        self.conv, self.recurrent, self.head = nn.Conv1d(8, 8, 1), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)
        self.columns = nn.Parameter(torch.randn(8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(ids), -1, -1), self.words(ids)], 1) + self.positions
        x = nn.functional.scaled_dot_product_attention(x, x, x, self.bias) * self.scale
        x = self.recurrent(self.conv(x.transpose(1, 2)).transpose(1, 2) @ self.columns)[0]
        return self.head(x[:, 0] + self.bag(ids))


def test_layers_multiply_or_look_up() -> None:
    torch.manual_seed(0)
    small = graphcomp.compress(Tokens().eval(), torch.randint(9, (2, 4)), sparsity=0, bits=8)
    bits = {layer.name: layer.weight_bits for layer in small.report.layers}
    eight = dict.fromkeys(("words", "conv", "head", "columns"), 8)
    assert bits == {**eight, **dict.fromkeys(("bag", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0"), 32)}


def test_sizes_count_all_that_is_stored() -> None:
    """Beside the codes: 32 bits for each bias and each float, 32 and 4 for each step and each tensor."""
    torch.manual_seed(0)
    small = graphcomp.compress(
        nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6)).eval(), torch.randn(2, 8), sparsity=0, bits=8
    )
    assert small.report.sizes["remainder"] == (32 * (6 + 6 + 6 + 6) + 4) / 8


def test_a_model_without_attention_has_no_such_line(report: Report) -> None:
    assert "attention" not in str(replace(report, bops_attention=Change(0, 0)))
