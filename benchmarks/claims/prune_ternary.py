"""Pruned ternary weights: bytes against accuracy, and how near filters come to their ternary directions."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.claims.cases import Case
from benchmarks.claims.rows import COLUMNS, accuracy, chosen, row
from benchmarks.common import section, table
from graphcomp.methods.base import Method
from graphcomp.methods.prune_ternary import PruneTernary, PruneTernaryRun
from graphcomp.methods.ternary import Ternary

SHARES = (0.8, 0.7, 0.9)
"""Shares of the weights that are pruned."""

RUNS: list[PruneTernaryRun] = []
"""Runs of `Watched`, the last one at the end."""


class Watched(PruneTernary):
    """Keeps its runs in `RUNS`."""

    def begin(self, *args: Any) -> PruneTernaryRun:
        """Begin a run."""
        RUNS.append(super().begin(*args))
        return RUNS[-1]


def prune_ternary(case: Case, options: argparse.Namespace) -> None:
    """Compare shares of pruned weights with ternary weights that are not pruned, and with no pull."""
    shares = SHARES[:1] if options.short else SHARES
    methods: list[tuple[str, Method, dict[str, Any]]] = [
        *((f"{share:.0%} pruned", Watched(), {"sparsity": share}) for share in shares),
        (f"{SHARES[0]:.0%} pruned, no pull before the last stage", Watched(pull=0.0), {}),
        ("best directions, no share", Watched(masks="best"), {}),
        ("ternary, one scale, not pruned (LSQ)", Ternary(symmetric=True), {}),
    ]
    rows = []
    for what, method, asked in methods:
        if chosen(options, what):
            found = row(case, what, method, options, bits=2, **asked)
            rows.append([*found, *(_cosines() if isinstance(method, Watched) else ("", ""))])
    columns = [*COLUMNS, "cosine before the last stage", "at the end"]
    title = f"Pruned ternary weights, {case.name}; before {accuracy(case, case.model(0).eval()):.2f} %"
    section(title, table(columns, rows))


def _cosines() -> list[str]:
    """Return the mean and the least cosine of the last seed's filters, before and at the end of the last stage."""
    return [f"{mean:.4f}, {least:.4f} at least" for mean, least in RUNS.pop().cosine.values()]
