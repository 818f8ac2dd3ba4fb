"""A report as one HTML file: whole, safe, of what the report says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphcomp
from graphcomp.report.html import page, short
from graphcomp.report.lanes import lines_of
from graphcomp.report.report import Report

BROWSER = Path(__file__).parent / "browser"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.inner(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    x = torch.randn(4, 1, 6, 6)
    found = graphcomp.compress(Residual().eval(), x, sparsity=0.5, bits=8, calibration=[x]).report
    assert isinstance(found, Report)
    return found


class Elements(HTMLParser):
    """Counts tags, and keeps addresses that the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href")]


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r"<script type='application/json' id='data'>(.*?)</script>", text, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_loads_nothing_and_has_each_layer_and_group(report: Report) -> None:
    text = page(report)
    found = Elements(text)
    assert found.addresses == ["data:,"]
    assert "http" not in text.replace("http-equiv", "")
    data = embedded(text)
    assert [row["name"] for row in data["rows"]] == [layer.name for layer in report.layers]
    units = {group["name"]: (group["units"]["kept"], group["units"]["total"]) for group in report.groups}
    assert {group["name"]: (group["kept"], group["total"]) for group in data["groups"]} == units
    assert text.count('class="group"') == len(report.groups) == 2
    stream, inner = data["groups"]
    assert stream["rows"] == ["stem.0", "inner.0", "inner.2", "head"] and "inner.0.weight[1]" in stream["reads"]
    assert inner["makes"] == ["inner.0.weight[0]", "inner.0.bias[0]"] and inner["reads"] == ["inner.2.weight[1]"]
    assert inner["ignore"] == 'gc.compress(model, inputs, ignore=["inner.0"])'
    assert "reaches output" in data["rows"][3]["frozen"][0] and "self.head(" in data["rows"][3]["frozen"][0]


def test_what_the_panel_says_to_paste_does_what_it_says(report: Report) -> None:
    torch.manual_seed(0)
    model, inputs = Residual().eval(), torch.randn(4, 1, 6, 6)
    data = embedded(page(report))
    for group in data["groups"]:
        for line, kept in ((group["ignore"], group["total"]), (group["share"], group["total"] - group["total"] // 4)):
            small = eval(line, {"gc": graphcomp, "model": model, "inputs": inputs})
            units = {own["name"]: own["units"]["kept"] for own in small.report.groups}
            assert units[group["name"]] == kept
    names: dict[str, Any] = {"gc": graphcomp, "model": model, "inputs": inputs}
    code, call = data["rows"][1]["bits"].rsplit("\n", 1)
    exec(code, names)
    layers = {layer.name: layer.weight_bits for layer in eval(call, names).report.layers}
    assert layers["inner.0"] == 8


def test_layers_add_up(report: Report) -> None:
    assert sum(layer.macs.before for layer in report.layers if layer.macs) == report.macs.before
    assert sum(layer.macs.after for layer in report.layers if layer.macs) == report.macs.after
    stem, inner = report.layers[:2]
    assert stem.params is not None and stem.params.after == stem.units_kept * 9
    assert inner.params is not None and inner.params.after == stem.units_kept * inner.units_kept * 9
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.layers == report.layers and again.model == report.model == "Residual"
    assert page(again) == page(report)


def test_the_headline(report: Report) -> None:
    kernels = {"share": 1.0, "speed": {"line": "4 of 4 layers on integers, 2.00 x", "ms": 1, "float_ms": 2, "ratio": 2}}
    text = page(replace(report, kernels=kernels), {"accuracy": (92.6, 92.2)})
    head = re.search(r"<p class='headline'>(.*?)</p>", text)
    assert head is not None
    times = report.bytes.before / report.bytes.after
    assert f"<b>{times:.1f} ×</b> smaller" in head[1] and "fewer multiply-accumulates" in head[1]
    assert "<b>−0.4</b> accuracy" in head[1] and "4 of 4 layers on integers" in head[1]


def test_names_and_notes_cannot_break_the_page(report: Report) -> None:
    bad = "</script><img src=x onerror=alert(1)>"
    layers = (replace(report.layers[0], name=bad), *report.layers[1:])
    text = page(replace(report, notes=(bad,), layers=layers, model=bad, unchecked={bad: bad}), {bad: (1, 2)})
    assert "img" not in Elements(text).tags and "<img" not in text
    assert embedded(text)["rows"][0]["name"] == bad


def test_a_report_of_an_earlier_version_can_be_drawn(report: Report) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    del data["model"]
    for group in data["groups"]:
        del group["consumers"]
    for layer in data["layers"]:
        del layer["macs"], layer["params"]
    assert "Model, compressed" in page(Report.from_dict(data))


def test_written_whole_or_not_at_all(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "there" / "report.html"
    report.to_html(file)
    assert file.read_text(encoding="utf-8") == page(report)
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]
    with pytest.raises(graphcomp.ExportError, match="is a folder"):
        report.to_html(tmp_path)
    assert "srcdoc=" in report._repr_html_()


@pytest.mark.parametrize(
    "metrics", [{"accuracy": 3}, {"accuracy": (1, 2, 3)}, {1: (1, 2)}, [("a", (1, 2))], "accuracy"]
)
def test_metrics_must_be_pairs(report: Report, metrics: Any) -> None:
    with pytest.raises(graphcomp.PlanError, match="metrics"):
        page(report, metrics)


def test_curves_of_a_run(report: Report, tmp_path: Path) -> None:
    lines = [
        {"step": k, "stage": "joint" if k < 600 else "cool-down", "loss": 2 / k, "sparsity": k / 1000,
         "weight_bits": 8 - k / 200, "activation_bits": None, "lr": 0.1, "seconds": k}
        for k in range(1, 1001)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.to_html(tmp_path / "report.html", run=tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<polyline") == 3  # no bits of activations
    assert "cool-down</title>" in text and "step 1000</text>" in text
    points = re.findall(r'points="([^"]*)"', text)
    assert all(190 < len(own.split()) < 210 for own in points)
    with pytest.raises(graphcomp.CheckpointError, match="no metrics"):
        report.to_html(tmp_path / "report.html", run=tmp_path / "elsewhere")


@given(st.lists(st.tuples(st.sets(st.integers(0, 20)), st.sets(st.integers(0, 20))), max_size=12))
@settings(max_examples=100, deadline=None)
def test_lines_of_one_lane_never_meet(groups: list[tuple[set[int], set[int]]]) -> None:
    lines = lines_of([sorted(makes) for makes, _ in groups], [sorted(reads) for _, reads in groups])
    assert [line.group for line in lines] == [k for k, (makes, reads) in enumerate(groups) if makes | reads]
    for a in lines:
        for b in lines:
            if a.group < b.group and a.lane == b.lane:
                assert a.rows[-1] < b.rows[0] or b.rows[-1] < a.rows[0]
    most = max((sum(line.rows[0] <= row <= line.rows[-1] for line in lines) for row in range(21)), default=0)
    assert max((line.lane + 1 for line in lines), default=0) >= most


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (12, "12"), (1234, "1.23 k"), (25.6e6, "25.6 M"), (4.19e12, "4.19 T"), (0.5, "0.5")]
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.slow
@pytest.mark.ci
def test_clicked_through_in_a_browser(report: Report, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (BROWSER / "node_modules").is_dir():
        pytest.skip("needs Node, and `npm install` in tests/report/browser")
    file = tmp_path / "report.html"
    report.to_html(file, metrics={"accuracy": (92.6, 92.2)})
    done = subprocess.run(
        [node, str(BROWSER / "click.mjs"), str(file)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["problems"] == []
    assert len({view["background"] for view in seen["views"]}) == 2  # light and dark
    for view in seen["views"]:
        assert view["title"] == "Residual, compressed" and view["overflow"] <= 0
        assert len(view["groups"]) == 2 and "stem.0/" in view["groups"][0] and "read by" in view["groups"][0]
        assert len(view["rows"]) == len(report.layers) and "stays whole" in view["rows"][3]
        assert view["chosen"] == 1
