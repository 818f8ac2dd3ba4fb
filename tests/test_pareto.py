"""The plot of accuracy against bit operations: what it draws, and that finished runs are not repeated."""

import argparse
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pareto = pytest.importorskip("benchmarks.pareto")


def row(method: str, budget: float, seed: int, **found: object) -> dict[str, object]:
    asked = {"steps": 252, "sparsity": 0.5, "bits": [2, 8], "budget": budget, "seed": seed}
    return {"task": "cnn", "method": method, **asked, **found}


def measured(accuracy: float, bops: float) -> dict[str, object]:
    more = {"macs": 50.0, "weight_bits": 3.0, "activation_bits": 4.0, "units": "168 of 336", "seconds": 10.0}
    return {"accuracy": accuracy, "bops": bops, **more}


ROWS = [
    {"task": "cnn", "method": "float", "accuracy": 99.0, "title": "digits CNN"},
    row("joint", 0.01, 0, **measured(97.0, 0.9)),
    row("joint", 0.01, 1, **measured(99.0, 0.9)),
    row("joint", 0.004, 0, **measured(95.0, 0.4)),
    row("sequential", 0.01, 0, **measured(96.0, 0.98)),
    row("sequential", 0.004, 0, refused="BudgetError: out of reach"),
]


def test_the_plot_has_a_curve_for_each_method_that_met_a_budget(tmp_path: Path):
    paths = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        pareto.draw(ROWS, path)
    text = paths[0].read_text(encoding="utf-8")
    assert "jointly (GETA)" in text and "pruned, then quantized" in text and "quantized only" not in text
    assert text == paths[1].read_text(encoding="utf-8")


def test_the_table_has_means_and_spreads_of_what_met_the_budget():
    lines = pareto._table(ROWS).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["1", "1", "0.4"]
    assert "98.00 ± 1.41" in lines[0] and "96.00" in lines[1] and "95.00" in lines[2]


def test_runs_that_the_file_holds_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def run(_task: object, method: str, options: object) -> dict[str, object]:
        asked.append((method, options.bops, options.seed))
        return measured(90.0, 1.0)

    monkeypatch.setattr(pareto, "_run", run)
    options = argparse.Namespace(
        json=tmp_path / "runs.jsonl", methods="joint", bops="0.01,0.004", seeds=2, bits=(2, 8), sparsity=0.5
    )
    first = list(pareto._measured(None, "cnn", 252, options))
    assert asked == [("joint", 0.01, 0), ("joint", 0.004, 0), ("joint", 0.01, 1), ("joint", 0.004, 1)]
    assert list(pareto._measured(None, "cnn", 252, options)) == first
    assert len(asked) == 4
