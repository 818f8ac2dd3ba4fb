"""Accuracy without training against multiply-accumulates and bytes: as cut, repaired, chosen by sensitivity, and peers.

    python -m benchmarks.curves --json curves.jsonl --plot docs/curves.svg
    python -m benchmarks.curves --models resnet20 --ways "cut;repaired;Torch-Pruning" --macs 0.7,0.5

Each point is one call of `graphcomp.compress` as a user writes it, or one pruning by Torch-Pruning with its defaults
(global l2 over groups) down to the same multiply-accumulates. No label is used, and nothing is trained. Models,
calibration data and tests are those of `benchmarks.oneshot`. Points that the JSON file holds are not measured again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphcomp as gc
from benchmarks import common, oneshot
from benchmarks.common import append_json, brief, percent, read_json, section, table, timed
from benchmarks.oneshot import Task

MACS = (0.9, 0.8, 0.7, 0.5)
MODELS = ("resnet20", "mobilenet", "minilm", "stories")
PEER, PEER_BN = "Torch-Pruning", "Torch-Pruning, BN re-estimated"
TRIES = 12
"""Halvings of the interval in which the peer's pruning ratio is looked for."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """How a model gets smaller.

    Attributes:
        make: of a task and a share of the multiply-accumulates: the model, and what is left of both costs.
        color, marker: of the curve.
    """

    make: Callable[[Task, float], tuple[nn.Module, Row]]
    color: str
    marker: str


def main() -> None:
    options = _options()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(common.header(), flush=True)
    rows: list[Row] = []
    for name in options.models.split(","):
        own = measured(name, options)
        section(f"{own[0]['title']}: {own[0]['metric']}, no label and no training", _table(own, options))
        rows += own
    if options.plot is not None:
        draw(rows, options.plot)


def measured(name: str, options: argparse.Namespace) -> list[Row]:
    """The float model, and each way at each share."""
    known = {_key(row): row for row in read_json(options.json)}
    task = oneshot.TASKS[name]()
    wanted = [("float", 1.0), *((way, macs) for way in options.ways.split(";") for macs in options.macs)]
    found = []
    for way, macs in wanted:
        row: Row = {"model": name, "title": task.name, "way": way, "asked": macs, **shown(task)}
        if _key(row) not in known:
            row |= _dense(task) if way == "float" else _point(task, way, macs)
            append_json(options.json, row)
            known[_key(row)] = row
            print({key: value for key, value in row.items() if key != "title"}, flush=True)
        found.append(known[_key(row)])
    return found


def shown(task: Task) -> Row:
    """The metric that is drawn, where a task has several the first."""
    return {"metric": METRICS.get(task.name, "top-1 %")}


METRICS = {"MiniLM": "SST-2 accuracy %", "stories260k Llama": "nats per token"}
"""Task -> its first metric, where that is not the share of right answers."""


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("model", "way", "asked"))


def _dense(task: Task) -> Row:
    score = task.evaluate(task.model)[0]
    return {"value": score.value, "error": score.error, "macs": 1.0, "bytes": 1.0, "seconds": 0.0}


def _point(task: Task, way: str, macs: float) -> Row:
    try:
        with timed() as clock:
            small, costs = WAYS[way].make(task, macs)
    except Exception as error:  # of a peer, or a budget out of reach
        return {"failure": brief(error)}
    score = task.evaluate(small)[0]
    return {"value": score.value, "error": score.error, **costs, "seconds": clock.seconds}


# ------------------------------------------------------------------------------------------------ ways
def ours(**options: Any) -> Callable[[Task, float], tuple[nn.Module, Row]]:
    """One call of `compress`; "calibrated" options get the task's calibration data."""

    def make(task: Task, macs: float) -> tuple[nn.Module, Row]:
        given = {key: task.calibration if value is CALIBRATION else value for key, value in options.items()}
        budget = gc.Budget(macs=macs)
        small = gc.compress(task.model, task.example, budget=budget, progress=False, **given).eval()
        assert isinstance(small.report, gc.Report)
        return small, {"macs": small.report.macs.ratio, "bytes": small.report.bytes.ratio}

    return make


CALIBRATION = object()
"""Stands for the calibration data of the task."""


def peer(task: Task, macs: float) -> tuple[nn.Module, Row]:
    """Torch-Pruning's global magnitude pruning, at the ratio that leaves so much; a ratio that fails is too much."""
    import torch_pruning as tp

    dense, _ = tp.utils.count_ops_and_params(task.model, task.example)
    low, high = 0.0, 1.0
    found: tuple[nn.Module, Row] | None = None
    failure: Exception | None = None
    for _ in range(TRIES):
        ratio = (low + high) / 2
        model = copy.deepcopy(task.model)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        pruner = tp.pruner.MagnitudePruner(
            model,
            task.example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=[last],
        )
        try:
            pruner.step()
            left = tp.utils.count_ops_and_params(model, task.example)[0] / dense
        except Exception as error:  # of the peer
            high, failure = ratio, failure or error
            continue
        if left <= macs:
            high = ratio
            found = model, {"macs": left, "bytes": _parameters(model) / _parameters(task.model), "ratio": ratio}
        else:
            low = ratio
    if found is None and failure is not None:
        raise failure
    if found is None:
        raise ValueError(f"no ratio leaves {percent(macs, 0)} of the multiply-accumulates")
    return found


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def peer_reestimated(task: Task, macs: float) -> tuple[nn.Module, Row]:
    """The same with batch norms re-estimated on the calibration data."""
    model, costs = peer(task, macs)
    return oneshot.reestimated(model, task.calibration) if task.has_batch_norm else model, costs


WAYS: dict[str, Way] = {
    "cut": Way(ours(), "#9a9a9a", "x"),
    "repaired": Way(ours(calibration=CALIBRATION), "#0b5fa5", "o"),
    "by sensitivity, repaired": Way(ours(calibration=CALIBRATION, ranking="sensitivity"), "#1c7c3a", "D"),
    "by sensitivity, repaired, 8 bits": Way(
        ours(calibration=CALIBRATION, ranking="sensitivity", bits=8), "#7a3b9a", "v"
    ),
    PEER: Way(peer, "#c8501e", "s"),
    PEER_BN: Way(peer_reestimated, "#e0a030", "^"),
}


# ------------------------------------------------------------------------------------------------ what is shown
def _table(rows: Sequence[Row], options: argparse.Namespace) -> str:
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        lines.append([way, *(_cell(row) for row in own), *[""] * (len(options.macs) - len(own))])
    return table(["", *(f"{percent(macs, 0)} of the MACs" for macs in options.macs)], lines)


def _cell(row: Row) -> str:
    if "failure" in row:
        return row["failure"][:60]
    digits = 3 if "nats" in row["metric"] else 1
    return f"{row['value']:.{digits}f} ± {row['error']:.{digits}f} ({row['seconds']:.0f} s)"


def draw(rows: Sequence[Row], path: Path) -> None:
    """One column for each model: quality against multiply-accumulates above, against bytes below."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same points give the same file
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.2 * len(models), 6.4), layout="constrained")
    panels = figure.subplots(2, len(models), squeeze=False)
    for column, name in enumerate(models):
        own = [row for row in rows if row["model"] == name and "value" in row]
        dense = next(row for row in own if row["way"] == "float")
        for line, (key, label) in enumerate((("macs", "multiply-accumulates"), ("bytes", "bytes of weights"))):
            panel = panels[line][column]
            panel.axhline(dense["value"], color="black", linewidth=0.8, linestyle=":", label="float, whole")
            for way, style in WAYS.items():
                points = [row for row in own if row["way"] == way]
                if points:
                    panel.errorbar(
                        [100 * row[key] for row in points],
                        [row["value"] for row in points],
                        [row["error"] for row in points],
                        label=way, color=style.color, marker=style.marker, markersize=5, linewidth=1.2, capsize=2,
                    )  # fmt: skip
            panel.set_xlabel(f"{label}, % of the float model's")
            panel.grid(alpha=0.3, linewidth=0.5)
            if "nats" in dense["metric"]:
                panel.invert_yaxis()
        panels[0][column].set_title(dense["title"])
        panels[0][column].set_ylabel(dense["metric"])
        panels[1][column].set_ylabel(dense["metric"])
    panels[0][0].legend(loc="lower right", frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def _shares(text: str) -> list[float]:
    return [float(share) for share in text.split(",")]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--ways", default=";".join(WAYS), metavar="A;B", help="default: %(default)s")
    parser.add_argument("--macs", type=_shares, default=MACS, metavar="F,…", help="default: 0.9,0.8,0.7,0.5")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=Path("curves.jsonl"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves, as .svg or .png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
