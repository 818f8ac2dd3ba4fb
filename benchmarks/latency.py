"""Budgets on latency: predicted against measured, and what is left of the quality.

    python -m benchmarks.latency                                             # three models, up to 2.5 times as fast
    python -m benchmarks.latency --models resnet20 --speedups 2 --bits 8     # of the float original
    python -m benchmarks.latency --models resnet20 --speedups 1.1 --bits 8 --baseline quantized
    python -m benchmarks.latency --models resnet20 --runtime eager --tables tables   # keeps the tables, and reads them

One sample unless --batch says otherwise, one thread. Times are of this machine, the processor's time of the least of
many runs; the result and the original take turns. Weights and data come from the shared folder beside the checkout;
calibration data are never test data.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import common, oneshot
from benchmarks.common import section, table, timed
from graphcomp.api import family, time_layers
from graphcomp.cost.latency_table import LatencyTable
from graphcomp.report.report import Report

MODELS = ("resnet20", "mobilenet", "minilm")
TOKENS = 64
"""Of the one sentence that a language model is timed on."""


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    speedups = [float(each) for each in options.speedups.split(",")]
    rows: list[list[str]] = []
    for name in options.models.split(","):
        rows += _rows(name, speedups, options)
        columns = ["model", "asked", "before, ms", "predicted", "measured", "off", "times as fast", "quality"]
        section(f"latency in {options.runtime}", table(columns, rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--speedups", default="1.5,2,2.5", metavar="A,B", help="default: %(default)s")
    parser.add_argument("--runtime", default="onnxruntime", choices=("onnxruntime", "eager"))
    parser.add_argument("--bits", type=int, help="quantize, too")
    parser.add_argument("--batch", type=int, default=1, help="samples (default: %(default)s)")
    parser.add_argument("--baseline", default="original", choices=("original", "quantized"), help="of the speedups")
    parser.add_argument("--saliency", default="activation", help="default: %(default)s")
    parser.add_argument("--ranking", default="global", choices=("global", "local", "sensitivity"))
    parser.add_argument("--times-alone", action="store_true", help="neither repair nor evaluate")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="keep tables of times there, and read them")
    return parser.parse_args()


def _rows(name: str, speedups: list[float], options: argparse.Namespace) -> list[list[str]]:
    """Return one row for each speedup."""
    task = oneshot.TASKS[name]()
    n = options.batch
    example = tuple(t[:n, :TOKENS] if t.dim() == 2 else t[:n] for t in task.example)
    size = "" if n == 1 else f"-{n}"
    kept = options.tables and options.tables / f"{name}-{options.runtime}-{options.bits or 32}{size}.json"
    known = LatencyTable.load(kept) if kept and kept.exists() else LatencyTable(options.runtime)
    with timed() as clock:
        known = time_layers(task.model, example, table=known, bits=options.bits)
    print(f"\n{task.name}: {known}, {clock.seconds:.0f} s", flush=True)
    if kept:
        known.save(kept)
    asked: dict[str, Any] = {"table": known, "bits": options.bits, "ranking": options.ranking}
    if not options.times_alone:
        asked |= {"saliency": options.saliency, "data": task.calibration, "loss": task.loss}
        asked["calibration"] = [batch[: len(example)] for batch in task.calibration]
    with timed() as clock:
        found = family(task.model, example, speedups=speedups, baseline=options.baseline, **asked)
    print(f"{task.name}: {len(found)} models in {clock.seconds:.0f} s", flush=True)
    dense = "" if options.times_alone else _quality(task, task.model)
    rows = []
    for speedup, small in zip(speedups, found, strict=True):
        report = small.report
        assert isinstance(report, Report) and report.latency_ms is not None
        before, after = report.latency_ms.before, report.latency_ms.after
        said = next(note for note in report.notes if note.startswith("latency in "))
        expected = float(said.split(" ms predicted")[0].split()[-1])
        print("\n".join(report.notes[report.notes.index(said) :]), flush=True)
        quality = "" if options.times_alone else f"{dense} -> {_quality(task, small.eval())}"
        rows.append([
            task.name, f"{speedup:g}", f"{before:.3f}", f"{expected:.3f}", f"{after:.3f}",
            f"{expected / after - 1:+.1%}", f"{before / after:.2f}", quality,
        ])  # fmt: skip
        print("\t".join(rows[-1]), flush=True)
    return rows


def _quality(task: oneshot.Task, model: nn.Module) -> str:
    return ", ".join(f"{score.value:.1f}" for score in task.evaluate(model))


if __name__ == "__main__":
    main()
