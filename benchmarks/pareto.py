"""Accuracy against bit operations of the digits models: jointly, one after the other, and quantized alone.

    python -m benchmarks.pareto --json pareto.jsonl --plot docs/pareto.svg

Every run starts from the same trained float model, takes the same number of steps and ends within the same budget of
bit operations; see `benchmarks.geta`. Runs that the JSON file holds are not repeated: a sweep that was cut short can be
gone on with. A method that cannot meet a budget is left out there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import graphcomp as gc
from benchmarks import common, geta
from benchmarks.common import append_json, read_json, section, table, timed

BUDGETS = (0.01, 0.006, 0.004)
METHODS = {"joint": "jointly (GETA)", "sequential": "pruned, then quantized", "quantize only": "quantized only"}
COLORS = {"joint": "#0b5fa5", "sequential": "#c8501e", "quantize only": "#6f6f6f"}
MARKERS = {"joint": "o", "sequential": "s", "quantize only": "^"}


def main() -> None:
    options = _parsed()
    torch.set_num_threads(options.threads)
    print(common.header(), flush=True)
    rows: list[dict[str, Any]] = []
    for name in options.tasks.split(","):
        task = geta.TASKS[name](options.float_steps)
        steps = options.epochs * (len(task.train[1]) // task.batch)
        baseline = {"task": name, "method": "float", "accuracy": task.accuracy(task.model), "title": task.name}
        own = [baseline, *_measured(task, name, steps, options)]
        title = f"{task.name}: {options.sparsity:.0%} of the units, {options.bits[0]} to {options.bits[1]} bits, "
        section(f"{title}{steps} steps, {options.seeds} seeds; float: {baseline['accuracy']:.2f} %", _table(own))
        rows += own
    if options.plot is not None:
        draw(rows, options.plot)


def _measured(task: geta.Task, name: str, steps: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What came of each run, of those in the file too."""
    known = {_key(row): row for row in read_json(options.json)}
    methods, budgets = options.methods.split(","), [float(share) for share in options.bops.split(",")]
    for seed, budget, method in itertools.product(range(options.seeds), budgets, methods):
        bits = list(options.bits)
        asked = {"steps": steps, "sparsity": options.sparsity, "bits": bits, "budget": budget, "seed": seed}
        row = {"task": name, "method": method, **asked}
        if _key(row) not in known:
            row |= _run(task, method, geta.Options(steps, options.sparsity, options.bits, budget, seed))
            append_json(options.json, row)
            known[_key(row)] = row
            print(row, flush=True)
        yield known[_key(row)]


def _run(task: geta.Task, method: str, asked: geta.Options) -> dict[str, Any]:
    """As `benchmarks.geta` has it, but for CPU seconds; or why the budget cannot be met."""
    with timed() as clock:
        try:
            found = geta._run(task, method, asked)
        except gc.BudgetError as error:
            return {"refused": common.brief(error)}
    return {**found, "seconds": clock.seconds}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("task", "method", "steps", "sparsity", "bits", "budget", "seed"))


def _points(rows: Sequence[dict[str, Any]], method: str) -> Iterator[tuple[float, list[dict[str, Any]]]]:
    """Budget by budget, the runs of a method that met it."""
    own = [row for row in rows if row["method"] == method and "bops" in row]
    for budget in sorted({row["budget"] for row in own}, reverse=True):
        yield budget, [row for row in own if row["budget"] == budget]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ["budget %", "method", "runs", "accuracy %", "BOPs %", "MACs %", "bits W / A", "units", "CPU s"]
    lines = [
        (-budget, position, [f"{100 * budget:g}", METHODS[method], len(found), *geta._summary(found)])
        for position, method in enumerate(METHODS)
        for budget, found in _points(rows, method)
    ]
    return table(columns, [line for *_, line in sorted(lines, key=lambda line: line[:2])])


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Means over the seeds and their standard deviations, one panel for each model."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "pareto"  # the same runs give the same file
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(4.6 * len(tasks), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, name in zip(panels, tasks, strict=True):
        own = [row for row in rows if row["task"] == name]
        baseline = next(row for row in own if row["method"] == "float")
        panel.axhline(baseline["accuracy"], color="black", linewidth=0.8, linestyle=":", label="float")
        for method, label in METHODS.items():
            points = [found for _, found in _points(own, method)]
            if points:
                accuracy = [[row["accuracy"] for row in found] for found in points]
                panel.errorbar(
                    [statistics.fmean(row["bops"] for row in found) for found in points],
                    [statistics.fmean(found) for found in accuracy],
                    [statistics.stdev(found) if len(found) > 1 else 0.0 for found in accuracy],
                    label=label,
                    color=COLORS[method],
                    marker=MARKERS[method],
                    markersize=5,
                    linewidth=1.2,
                    capsize=3,
                )
        shown = [100 * row["budget"] for row in own if "budget" in row]
        panel.set_xscale("log")
        panel.set_xticks(sorted(set(shown)), [f"{budget:g}" for budget in sorted(set(shown))])
        panel.minorticks_off()
        panel.set_xlabel("bit operations, % of the float model's")
        panel.set_title(baseline["title"])
        panel.grid(alpha=0.3, linewidth=0.5)
    panels[0].set_ylabel("accuracy %")
    panels[0].legend(loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="cnn,transformer", metavar="A,B", help="default: %(default)s")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--bops", default=",".join(map(str, BUDGETS)), metavar="F,…", help="default: %(default)s")
    parser.add_argument("--sparsity", type=float, default=0.5, metavar="S", help="default: %(default)s")
    parser.add_argument("--bits", type=geta._pair, default=(2, 8), metavar="LOW,HIGH", help="default: 2,8")
    parser.add_argument("--epochs", type=int, default=12, metavar="N", help="of each run; default: %(default)s")
    parser.add_argument("--float-steps", type=int, default=300, metavar="N", help="of the models before")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=Path("pareto.jsonl"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the means, as .svg or .png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
