"""Bits of each layer without training, beside equal bits at the same bytes or bit operations.

    python -m benchmarks.mixed                                  # ResNet-20: about ten minutes on a quiet core
    python -m benchmarks.mixed --models mobilenet --bits 4

Models, calibration data and tests are those of `benchmarks.oneshot`; no label is used, and nothing is trained. Equal
bits leave the first and the last layer 8 bits; what that costs is the budget of the choice.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch

import graphcomp as gc
from benchmarks import common, oneshot
from benchmarks.common import percent, section, table, timed
from benchmarks.oneshot import Task

RANGE = (2, 8)


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(common.header(), flush=True)
    for name in options.models.split(","):
        task = oneshot.TASKS[name]()
        dense = ", ".join(str(score) for score in task.evaluate(task.model))
        rows = []
        for bits in map(int, options.bits.split(",")):
            rows += compared(task, f"W{bits}", "bytes", bits=bits, activation_bits=None)
            rows += compared(task, f"W{bits}A{bits}", "bops", bits=bits)
        columns = ["equal bits", "limit", "equal", "chosen", "limit met to", "layers by bits", "s, equal", "s, chosen"]
        section(f"{task.name}, {task.evaluate(task.model)[0].metric}, float {dense}", table(columns, rows))


def compared(task: Task, label: str, limit: str, **options: Any) -> list[list[str]]:
    """One row: the quality with equal bits, and with chosen ones at the same cost."""
    given = {"sparsity": 0.0, "rounding": "second_order", "calibration": task.calibration, "progress": False}
    with timed() as clock:
        equal = gc.compress(task.model, task.example, **given, **options).eval()
    cost = getattr(equal.report, limit)
    budget = gc.Budget(**{limit: cost.after})
    with timed() as longer:
        chosen = gc.compress(task.model, task.example, **given, **{**options, "bits": RANGE}, budget=budget).eval()
    assert isinstance(chosen.report, gc.Report)
    found = [layer.weight_bits for layer in chosen.report.layers]
    row = [
        label,
        f"{limit} {percent(cost.ratio)}",
        *(", ".join(str(score) for score in task.evaluate(small)) for small in (equal, chosen)),
        percent(getattr(chosen.report, limit).after / cost.after),
        ", ".join(f"{found.count(bits)} x {bits:.0f}" for bits in sorted(set(found))),
        *(f"{c.seconds:.0f}" for c in (clock, longer)),
    ]
    print(row, flush=True)
    return [row]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet20", metavar="A,B", help="default: %(default)s")
    parser.add_argument("--bits", default="4,3", metavar="A,B", help="equal bits to compare with; default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
