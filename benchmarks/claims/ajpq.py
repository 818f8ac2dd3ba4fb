"""Bits per channel with 0 among them, beside pruning at one number of bits and bits alone, at equal bit operations."""

from __future__ import annotations

import argparse
import time
from typing import Any

import graphcomp as gc
from benchmarks.claims.cases import Case
from benchmarks.claims.rows import accuracy, loss_of
from benchmarks.common import append_json, section, table
from graphcomp.methods.ajpq.method import Ajpq

IMAGES, REPAIRED = 500, 64
"""Images of the search, and how many of these plans are repaired on; plans are scored on the others."""
SHARES = (0.02,)
"""Bit operations, of the model in floats."""
KINDS: dict[str, dict[str, Any]] = {
    "0, or 2 to 8 bits": {"bits": (2, 8)},
    "2 to 8 bits, no channel goes": {"bits": (2, 8), "sparsity": 0},
    "0 or 3 bits": {"bits": 3},
    "0 or 4 bits": {"bits": 4},
}
COLUMNS = ["bit operations", "bits of channels", "% of test", "MACs", "C0, kB", "units gone", "loss of the search", "s"]


def ajpq(case: Case, options: argparse.Namespace) -> None:
    """Compare searches of equally many plans, without training."""
    images, labels = case.data.images[:IMAGES], case.data.labels[:IMAGES]  # type: ignore[attr-defined]
    rows = []
    for share in SHARES:
        for name, asked in KINDS.items():
            for seed in range(options.seeds):
                start = time.perf_counter()
                small = gc.compress(
                    case.model(seed), images[:2], method=Ajpq(), budget=gc.Budget(bops=share), activation_bits=8,
                    calibration=[images[:REPAIRED]], data=[(images[REPAIRED:], labels[REPAIRED:])], loss=loss_of,
                    seed=seed, progress=False, **asked,
                )  # fmt: skip
                seconds, report = time.perf_counter() - start, small.report
                score = next(note.rsplit(" ", 1)[1] for note in report.notes if "best score" in note)
                found = {
                    "case": case.name, "share": share, "what": name, "seed": seed, "accuracy": accuracy(case, small),
                    "bops": report.bops.ratio, "macs": report.macs.ratio, "C0": report.sizes["C0"],
                    "gone": report.units_removed, "loss": -float(score), "seconds": seconds,
                }  # fmt: skip
                append_json(options.json, found)
                rows.append([
                    f"{found['bops']:.2%}", name, f"{found['accuracy']:.2f}", f"{found['macs']:.1%}",
                    f"{found['C0'] / 1000:.1f}", f"{found['gone']} of {report.units_total}", f"{found['loss']:.3f}",
                    f"{seconds:.0f}",
                ])  # fmt: skip
            if options.short and len(rows) >= 2:
                break
    in_floats = accuracy(case, case.model(0).eval())
    section(f"AJPQ, {case.name}, not trained; in floats {in_floats:.2f} %", table(COLUMNS, rows))
