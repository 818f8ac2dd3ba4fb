"""Fits of times, the file of a table, and the line from layers to networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graphcomp.cost.fit_times import fit_times
from graphcomp.cost.latency_table import LatencyTable, LayerTimes, Sample, along, key_of, line, this_machine
from graphcomp.errors import CheckpointError, ExportError, PlanError

TABLE = LatencyTable("eager", 2, "here", {"a": LayerTimes("conv", (Sample((3, 4), 0.5), Sample((1, 2), 0.25)))})


def test_a_fit_finds_what_a_time_is_made_of() -> None:
    features = [(1.0, n * m, n, m) for n in range(1, 5) for m in (2, 7)]
    found = fit_times(features, [0.5 + 0.25 * f[1] + 2 * f[3] for f in features])
    assert found == pytest.approx((0.5, 0.25, 0, 2), abs=1e-9)


def test_a_fit_never_subtracts() -> None:
    features = [(1.0, float(n)) for n in range(1, 9)]
    for times in ([9.0 - n for n in range(1, 9)], [n**2 for n in range(1, 9)], [1.0] * 8):
        found = fit_times(features, times)
        assert all(c >= 0 for c in found) and sum(found) > 0
    assert fit_times([(1.0, 5.0)], [2.0]) == pytest.approx((2.0, 0.0))


def test_a_fit_weighs_errors_by_the_time() -> None:
    features = [(1.0,), (1.0,)]
    (found,) = fit_times(features, [1.0, 100.0])
    assert found == pytest.approx((1 + 1 / 100) / (1 + 1 / 100**2))


def test_networks_lie_on_a_line_that_rises() -> None:
    points = line([10, 2, 6], [14, 4, 9])
    assert points == ((2, 4), (6, 9), (10, 14))
    assert [along(points, s) for s in (2, 4, 6, 8, 10)] == pytest.approx([4, 6.5, 9, 11.5, 14])
    assert along(points, 1) == pytest.approx(2) and along(points, 20) == pytest.approx(28)
    assert line([10, 6], [14, 15]) == ((6, 14), (10, 14))  # narrower and slower: disturbed
    assert line([10, 10], [14, 13]) == ((10, 13),) and along(((10, 13),), 5) == pytest.approx(6.5)
    at = torch.linspace(0.5, 15, 50).tolist()
    found = [along(points, s) for s in at]
    assert found == sorted(found)


def test_a_table_is_saved_and_loaded(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "new" / "table.json")
    assert LatencyTable.load(tmp_path / "new" / "table.json") == TABLE
    assert repr(TABLE) == "LatencyTable('eager', threads=2, 1 layers, 2 times)"
    more = TABLE.with_times("there", {"b": LayerTimes("fc", (Sample((1,), 1.0),))})
    assert more.layers.keys() == {"a", "b"} and more.machine == "there" and TABLE.layers.keys() == {"a"}
    with pytest.raises(ExportError, match="folder"):
        TABLE.save(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "nan", json.dumps({"format": 2}), json.dumps({"format": 1, "runtime": "eager"})]
)
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="no table of latencies"):
        LatencyTable.load(path)


@pytest.mark.parametrize(("name", "value"), [("ms", -1.0), ("ms", None), ("widths", "x"), ("widths", 3)])
def test_damaged_samples_are_refused(name: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    TABLE.save(path)
    data = json.loads(path.read_text())
    data["layers"]["a"]["samples"][0][name] = value
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="no table of latencies"):
        LatencyTable.load(path)
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        LatencyTable.load(tmp_path / "none.json")


def test_wrong_ways_to_measure_are_refused() -> None:
    with pytest.raises(PlanError, match="runtime"):
        LatencyTable("tensorrt")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="threads"):
        LatencyTable(threads=0)


def test_a_machine_is_named_with_the_versions() -> None:
    assert "torch" in this_machine("eager") and "onnxruntime" in this_machine("onnxruntime")
    assert key_of("a", "b") != key_of("b", "a") and len(key_of("a")) == 32
