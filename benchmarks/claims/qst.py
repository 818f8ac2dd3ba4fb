"""Thresholds and steps trained from scratch, beside magnitude pruning on the same cubic schedule and LSQ."""

from __future__ import annotations

import argparse
from typing import Any

import graphcomp as gc
from benchmarks.claims.cases import Case
from benchmarks.claims.rows import COLUMNS, row
from benchmarks.common import section, table
from graphcomp.methods.qst.method import Qst, QstRun


class Magnitude(Qst):
    """Magnitude pruning on QST's schedule, and LSQ: one threshold for all weights, which no gradient moves."""

    def begin(self, *args: Any) -> QstRun:
        """Begin a run."""
        run = super().begin(*args)
        for threshold in run.parameters():
            threshold.requires_grad_(False)
        return run


def qst(case: Case, options: argparse.Namespace) -> None:
    """Compare thresholds that are trained with magnitude pruning and LSQ, at equal C0 bytes."""
    rows = []
    bits = 3
    for share in (0.004, 0.01, 0.002):
        for name, method in (("QST", Qst()), ("magnitude and LSQ", Magnitude())):
            what = f"{name}, {bits} bits, C0 at {share:.1%}"
            rows.append(row(case, what, method, options, bits=bits, budget=gc.Budget(bytes=share)))
        if options.short:
            break
    rows.append(row(case, "QST, 4 bits, half of the units", Qst(per="unit"), options, bits=4, sparsity=0.5))
    rows.append(row(case, "QST, 8 bits, nothing pruned", Qst(), options, bits=8, sparsity=0.0))
    section(f"QST, {case.name}, from scratch", table(COLUMNS, rows))
