"""A report says what was done, as text and as plain data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import graphcomp
from graphcomp.report import Change, LayerReport, Report

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


def quantized(report: Report) -> Report:
    return replace(
        report,
        layers=(LayerReport("qkv", 24, 24, 8, 8), LayerReport("up", 6, 12, 4, 8), LayerReport("down", 4, 4, 8, 8)),
        sizes={"C0": 1234.0, "C4": 2345.6},
        quantization_errors={"qkv": 0.001, "up": 0.03},
        kernels={"MatMulInteger": 2},
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
    assert data["kernels"] == {"MatMulInteger": 2}
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
    assert "kernels MatMulInteger: 2" in lines


def test_a_model_without_attention_has_no_such_line(report: Report) -> None:
    assert "attention" not in str(replace(report, bops_attention=Change(0, 0)))
